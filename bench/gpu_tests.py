"""pytest as a stage of bench/gpu_suite.py, which keeps counts: python bench/gpu_tests.py OUT.json [pytest's words]."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastssl.bench.record import record as made_record
from fastssl.bench.record import row, save


class Counts:
    """A pytest plugin that counts how tests end."""

    def __init__(self) -> None:
        self.of = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)


def main(out: Path, words: list[str]) -> int:
    counts = Counts()
    code = int(pytest.main(words, plugins=[counts]))
    rows = [row("tests", {}, name, [count]) for name, count in counts.of.items()]
    save(out, made_record("gpu_tests", rows, failures=counts.failures))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
