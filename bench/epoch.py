"""One epoch of a recipe for each change of a table: accuracy on held-out images, views per second, a step's time.

python bench/epoch.py OUT.json [RECIPE] [-s SECTION.KEY=VALUE]... [--table FILE] [--runs FOLDER] [--limit-min 10]

The table maps names to changes of the recipe (bench/epoch_gpu.yaml). One run each: differences of a few points between
two runs are noise, since a rounding in the first steps changes all that follow. Finished runs in --runs are kept, and
none is begun when the longest so far would not fit.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from claims import as_command  # noqa: E402

import fastssl  # noqa: E402
from fastssl.bench.record import record, row, save  # noqa: E402
from fastssl.errors import UserError  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.runs import reading  # noqa: E402
from fastssl.training.precision import holds_another  # noqa: E402

ONE_EPOCH = ["train.epochs=1", "evaluate.every_epochs=1", "evaluate.linear_epochs=0", "data.test_path=null"]
METRICS = ("knn20_pct", "ridge_pct")
MADE_BY = ("hardware", "versions", "commit")


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """A finished run's accuracies, its rate over the epoch and a step's time between each two lines of its metrics."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = [line for event, line in reading.read_metrics(folder / "metrics.jsonl") if event == "step"]
    ms = [1e3 * (b["train_s"] - a["train_s"]) / (b["step"] - a["step"]) for a, b in pairwise(steps)]
    work = {"views": summary["views"], "precision": summary["precision"]}
    metrics = {metric: [summary["validation"][metric]] for metric in METRICS}
    metrics |= {"views_per_s": [summary["views_per_s"]], "ms_per_step": [round(one, 3) for one in ms]}
    return [row(name, work, metric, values) for metric, values in metrics.items()]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipe", nargs="?", default="cifar10_lowdim")
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--table", type=Path, default=ROOT / "bench" / "epoch_gpu.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/epoch"))
    parser.add_argument("--limit-min", type=float, default=10.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    begun, longest_s, rows, made = time.monotonic(), 0.0, list[dict[str, Any]](), dict[str, Any]()
    table: dict[str, list[str]] = yaml.safe_load(args.table.read_text(encoding="utf-8"))
    for name, changes in table.items():
        folder, start = args.runs / name.replace("/", "-").replace(" ", "-"), time.monotonic()
        recipe = load(args.recipe, [*args.changes, *ONE_EPOCH, *changes])
        if holds_another(folder, recipe):
            raise UserError(f"{folder} holds a run of another recipe.", "Choose another --runs, or remove that folder.")
        if not (folder / "summary.json").exists():
            if start - begun + longest_s > 60 * args.limit_min:
                print(f"{name}: left out, {args.limit_min:g} minutes are over", file=sys.stderr)
                continue
            fastssl.train(recipe, run_dir=folder, resume=True)
            longest_s = max(longest_s, time.monotonic() - start)
        environment = reading.read_mapping(folder / "environment.json")
        rows += [one | {"commit": environment["commit"]} for one in rows_of(name, folder)]
        made = made or {key: environment[key] for key in MADE_BY}
        base = load(args.recipe, args.changes).model_dump(mode="json")
        save(args.out, record("epoch", rows, base, table=table) | made)


if __name__ == "__main__":
    as_command(main)
