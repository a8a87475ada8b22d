"""One epoch of a recipe for each change of a table: accuracy on held-out images, views per second, a step's time.

python bench/epoch.py OUT.json [RECIPE] [-s SECTION.KEY=VALUE]... [--levers FILE] [--runs FOLDER] [--limit-min 10]

The table is one of bench/record.py's (bench/epoch_gpu.yaml). One run each: differences of a few points between two runs
are noise, since a rounding in the first steps changes all that follow. Finished runs in --runs are kept, and none is
begun when the longest so far would not fit.
"""

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from claims import as_command, refuse_unmeasured  # noqa: E402
from record import folder_of, levers_of, trained  # noqa: E402

from fastssl.bench.record import record, row, save  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.runs import reading  # noqa: E402

METRICS = ("knn20_pct", "ridge_pct")
MADE_BY = ("hardware", "versions", "commit")


def rows_of(name: str, folder: Path, done: dict[str, Any]) -> list[dict[str, Any]]:
    """A finished run's accuracies, its rate over the epoch and a step's time between each two lines of its metrics."""
    steps = [line for event, line in reading.read_metrics(folder / "metrics.jsonl") if event == "step"]
    ms = [1e3 * (b["train_s"] - a["train_s"]) / (b["step"] - a["step"]) for a, b in pairwise(steps)]
    work = {"views": done["views"], "precision": done["precision"]}
    metrics = {metric: [done["validation"][metric]] for metric in METRICS}
    metrics |= {"views_per_s": [done["views_per_s"]], "ms_per_step": [round(one, 3) for one in ms]}
    return [row(name, work, metric, values, commit=done["commit"]) for metric, values in metrics.items()]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipe", nargs="?", default="cifar10_lowdim")
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--levers", type=Path, default=ROOT / "bench" / "epoch_gpu.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/epoch"))
    parser.add_argument("--limit-min", type=float, default=10.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    begun, longest_s, rows, made = time.monotonic(), 0.0, list[dict[str, Any]](), dict[str, Any]()
    short, levers = levers_of(args.levers)
    base = load(args.recipe, [*args.changes, *short])
    refuse_unmeasured(base, on_test=False)
    recipes = {name: load(base, changes) for name, changes in levers.items()}
    for name, recipe in recipes.items():
        folder, start = args.runs / folder_of(name, recipe.seed), time.monotonic()
        if not (folder / "summary.json").exists() and start - begun + longest_s > 60 * args.limit_min:
            print(f"{name}: left out, {args.limit_min:g} minutes are over", file=sys.stderr)
            continue
        rows += rows_of(name, folder, trained(recipe, folder))
        longest_s = max(longest_s, time.monotonic() - start)
        environment = reading.read_mapping(folder / "environment.json")
        made = made or {key: environment[key] for key in MADE_BY}
        save(args.out, record("epoch", rows, base.model_dump(mode="json"), levers=levers) | made)


if __name__ == "__main__":
    as_command(main)
