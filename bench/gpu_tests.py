"""pytest as a stage of bench/gpu_suite.py, which keeps counts: python bench/gpu_tests.py OUT.json [pytest's options].

Versions differ on a rented machine, so warnings are not errors, tests that load the machine for minutes stay away, and
several processes share the rest where there are cores.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastssl.bench.record import record, row, save
from fastssl.training.guards import EXIT_CODE

HANG_S = 90  # no test that belongs here takes as long
MOST_WORKERS = 8  # each compiles kernels and holds a context of the GPU


class Counts:
    """A pytest plugin that writes how tests end, after each of them."""

    def __init__(self, out: Path) -> None:
        self.out, self.empty = out, record("gpu_tests", [])
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)
        self.save()

    def save(self) -> None:
        rows = [row("tests", {}, name, [count]) for name, count in self.outcomes.items()]
        save(self.out, self.empty | {"failures": self.failures, "rows": rows})


def main(out: Path, words: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest ends with its report
    os.environ["PYTEST_ADDOPTS"] = "-o filterwarnings=default"  # for the pytest that a test starts, too
    hang = [f"--timeout={HANG_S}"] if importlib.util.find_spec("pytest_timeout") else []
    workers = min(MOST_WORKERS, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 1
    shared = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    counts = Counts(out)
    code = int(pytest.main(["-m", "not slow", *hang, *shared, *words], plugins=[counts]))
    counts.save()
    return EXIT_CODE if code == pytest.ExitCode.INTERRUPTED else code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
