"""Which weight is best at each D, next to the rule c / D: python bench/weights.py RECIPE [--seeds 2]

Trains the recipe at each D with weights that are factors of the rule's, chooses on held-out images, and reads the best
weight of each seed off a parabola through the best point and its neighbors in log weight. The slope of log best weight
against log D is the rule's exponent (-1), best weight times D its c. Runs are resumed and never repeated. Writes
bench/results/weights.json and docs/figures/weights.png.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from claims import as_command, at_least_one, run_of  # noqa: E402
from claims_figures import COLORS, bars, log_axis, named  # noqa: E402

import fastssl  # noqa: E402
from fastssl import build  # noqa: E402
from fastssl.bench.record import record, row  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402

# The weights that the search moves together; the others stay as the recipe has them.
SEARCHED = {
    "barlow_twins": ("redundancy_weight",),
    "vicreg": ("invariance_weight", "variance_weight"),
    "sigreg": ("sigreg_weight",),
}
Found = dict[tuple[int, float], list[float]]  # (D, weight) -> held-out accuracy of each seed in percent


def recipe_of(base: Recipe, dim: int, weight: float, seed: int) -> Recipe:
    return load(
        base,
        [
            f"name=D{dim}-w{weight:.3g}-s{seed}",
            f"seed={seed}",
            f"model.projector={[dim] * len(base.model.projector)}",
            *(f"loss.{name}={weight}" for name in SEARCHED[base.loss.name]),
        ],
    )


def rule(base: Recipe, dim: int) -> float:
    return build.losses.weights(load(base, ["loss={name: " + base.loss.name + "}"]), dim)[SEARCHED[base.loss.name][0]]


def measure(
    base: Recipe, dims: Sequence[int], factors: Sequence[float], *, seeds: int, out: Path, metric: str
) -> Found:
    """Trains what is missing; the accuracy of each run's last evaluation on held-out images."""
    found: Found = {}
    for seed in range(seeds):
        for dim in dims:
            for weight in (factor * rule(base, dim) for factor in factors):
                recipe = recipe_of(base, dim, weight, seed)
                if run_of(out / recipe.name, recipe, metric, 0.0) is None:
                    fastssl.train(recipe, run_dir=out / recipe.name, resume=True)
                done = run_of(out / recipe.name, recipe, metric, 0.0)
                assert done is not None
                found.setdefault((dim, weight), []).append(done.curve[-1][3])
                print(f"{recipe.name}: {done.curve[-1][3]:.2f} %", file=sys.stderr)
    return found


def peak(weights: Sequence[float], accuracies: Sequence[float]) -> float:
    """The weight at the top of the parabola through the best point and its neighbors in log weight.

    A best point at either end of the weights is returned as it is: the true one may lie beyond it.
    """
    at = int(np.argmax(accuracies))
    if at in (0, len(weights) - 1):
        return weights[at]
    x, y = np.log(weights[at - 1 : at + 2]), accuracies[at - 1 : at + 2]
    curvature, slope, _ = np.polyfit(x, y, 2)
    return float(math.exp(-slope / (2 * curvature)))


def best_of(found: Found) -> dict[int, list[float]]:
    """Of each D, the best weight of each seed."""
    best: dict[int, list[float]] = {}
    for dim in sorted({d for d, _ in found}):
        weights = sorted(w for d, w in found if d == dim)
        seeds = zip(*(found[dim, w] for w in weights), strict=True)
        best[dim] = [peak(weights, accuracies) for accuracies in seeds]
    return best


def slopes(best: dict[int, list[float]]) -> list[float]:
    """Of log best weight against log D, one for each seed."""
    x = np.log(list(best))
    return [float(np.polyfit(x, np.log(y), 1)[0]) for y in zip(*best.values(), strict=True)]


def rows_of(found: Found, best: dict[int, list[float]], base: Recipe, metric: str) -> list[dict[str, Any]]:
    rows = [
        row(f"D = {d}", {"dim": d, "weight": w, "of_rule": w / rule(base, d)}, f"val_{metric}", values)
        for (d, w), values in sorted(found.items())
    ]
    for dim, weights in best.items():
        rows.append(row(f"D = {dim}", {"dim": dim, "rule": rule(base, dim)}, "best_weight", weights))
        rows.append(row(f"D = {dim}", {"dim": dim, "rule": rule(base, dim)}, "c", [w * dim for w in weights]))
    return [*rows, row("all D", {"rule": -1}, "slope", slopes(best))] if len(best) > 1 else rows


def draw(path: Path, found: Found, base: Recipe, metric: str) -> None:
    """Accuracy against the weight, and against weight times D, where one c for all D shows as one curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained", sharey=True)
    for color, dim in zip(COLORS, sorted({d for d, _ in found}), strict=False):
        weights = sorted(w for d, w in found if d == dim)
        for axis, times in zip(axes, (1, dim), strict=True):
            groups = [found[dim, w] for w in weights]
            bars(axis, [w * times for w in weights], groups, color=color, label=f"D = {dim}")
            axis.axvline(rule(base, dim) * times, color=color if times == 1 else "0.5", ls=":", lw=1)
            axis.set_xscale("log")
    axes[0].set(xlabel="weight (dotted: the rule's)", ylabel=f"validation {named(metric)}")
    log_axis(axes[1])
    axes[1].set(xlabel="weight times D (dotted: the rule's c)")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--dims", type=at_least_one, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 16, 1 / 4, 1, 4, 16], help="of the rule's")
    parser.add_argument("--seeds", type=at_least_one, default=2)
    parser.add_argument("--metric", default="ridge_pct", help="of the evaluations")
    parser.add_argument("--out", type=Path, default=Path("runs/weights"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/weights.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/weights.png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    base = load(args.recipe, [*args.changes, "optim.schedule=constant"])
    found = measure(base, args.dims, sorted(args.factors), seeds=args.seeds, out=args.out, metric=args.metric)
    best = best_of(found)
    rows = rows_of(found, best, base, args.metric)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record("weights", rows, base.model_dump(mode="json")), indent=1) + "\n")
    draw(args.figure, found, base, args.metric)
    for dim, weights in best.items():
        middle = statistics.median(weights)
        print(f"D = {dim}: best weight {middle:.3g} (c = {middle * dim:.3g}), the rule's {rule(base, dim):.3g}")
    if len(best) > 1:
        print(f"slope of log weight against log D: {', '.join(f'{s:.2f}' for s in slopes(best))}")


if __name__ == "__main__":
    as_command(main)
