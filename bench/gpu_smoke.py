"""The first look at a machine: what works, then one short training. A machine on which this fails needs no benchmark.

python bench/gpu_smoke.py OUT.json RECIPE [-s SECTION.KEY=VALUE]...
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fastssl  # noqa: E402
from fastssl.bench.doctor import examine  # noqa: E402
from fastssl.bench.record import row, write  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402

METRICS = ("train_s", "compile_s", "images_per_s")


def main(out: Path, name: str, changes: list[str]) -> None:
    """Doctor's checks are printed and kept in the record, with the summary of the run."""
    checks = examine()["checks"]
    for check in checks:
        print(f"{'ok' if check['works'] else 'no':3} {check['kind']} {check['name']}: {check['detail']}")
    recipe = load(name, changes)
    with tempfile.TemporaryDirectory() as folder:
        summary = fastssl.train(recipe, run_dir=Path(folder) / "run")
    measured = {metric: summary[metric] for metric in METRICS if summary.get(metric) is not None}
    rows = [row("fastssl", {"steps": summary["steps"]}, metric, [value]) for metric, value in measured.items()]
    write(out, "gpu_smoke", rows, recipe.model_dump(mode="json"), checks=checks, summary=summary)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [word for word in sys.argv[3:] if word != "-s"])
