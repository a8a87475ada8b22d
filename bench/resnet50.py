"""The paper's pair on its backbone, ResNet-50: two views and many dimensions against more views and few, at equal time.

python bench/resnet50.py [RECIPE] [--run-min 25] [--seeds 2] [--budget-min 60]

Every cell trains for the number of whole epochs closest to --run-min minutes, counted in its fastest step, which
are timed separately (claims_time.py): other programs delay a run but do not change its time axis. The learning rate is
constant, so each point of a curve is what a run of that length reaches. Each run is a separate process, whose peak
memory is recorded. The most telling cells come first, one seed after another. Finished runs are not repeated and
stopped ones continue, so the command may be stopped and repeated until done. Writes bench/results/resnet50.json after
every run.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from claims import (  # noqa: E402
    Grid,
    as_command,
    at_least_one,
    kind_of,
    recipe_of,
    refuse_another,
    refuse_unmeasured,
)
from claims_time import seconds_per_step  # noqa: E402
from claims_verdicts import Cell  # noqa: E402
from resume import another, earlier, here, refuse_another_grid, say_kept  # noqa: E402

from fastssl import build  # noqa: E402
from fastssl.bench.crossing import Timed, speed_up  # noqa: E402
from fastssl.bench.record import record, row, save  # noqa: E402
from fastssl.bench.tta import evaluations_of  # noqa: E402
from fastssl.errors import Interrupted, UserError  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.presets import view_table  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402
from fastssl.runs.files import atomic_json  # noqa: E402
from fastssl.training.guards import EXIT_CODE  # noqa: E402

METRIC = "ridge_pct"
ROUNDS = 3
PARTS = ("backbone_s", "projector_s", "loss_s")  # of forward and backward
Done = dict[str, Any]


def cells_of(dims: Sequence[int], dim: int) -> list[Cell]:
    """The reference and the low-dimensional cells, then the other large projectors with either weight."""
    most = max(dims)
    others = [Cell(2, d, weight, 1.0) for d in sorted(dims) if d != most for weight in ("fixed", "scaled")]
    return [Cell(2, most, "fixed", 1.0), Cell(4, dim, "scaled", 1.0), Cell(8, dim, "scaled", 0.25), *others]


def recipes_of(base: Recipe, cells: Sequence[Cell], dim: int) -> dict[Cell, Recipe]:
    """Each cell's recipe, for one epoch; the fixed weight is the rule's for the largest projector, the first cell's."""
    grid = Grid((cells[0].dim, dim), (2, 4, 8), (1.0, 0.25), dim)
    return {cell: load(recipe_of(base, cell, 0, grid, "constant"), ["train.epochs=1"]) for cell in cells}


def steps_of_an_epoch(recipe: Recipe) -> int:
    labels = build.data.labels_of(recipe.data.path)
    return len(build.data.sets(recipe, labels, labels).train) // recipe.data.batch_size


def timed_recipe(recipe: Recipe, seed: int, step_s: float, run_s: float, points: int) -> Recipe:
    """The cell with this seed, the number of epochs closest to `run_s`, and `points` evaluations on the way."""
    per_epoch = steps_of_an_epoch(recipe)
    epochs = max(1, round(run_s / (per_epoch * step_s)))
    every = max(1, epochs * per_epoch // points)
    return load(
        recipe,
        [
            f"name={recipe.name.rpartition('-s')[0]}-s{seed}",
            f"seed={seed}",
            f"train.epochs={epochs}",
            f"train.checkpoint_every_epochs={epochs}",
            "train.checkpoint_every_minutes=5",
            "evaluate.every_epochs=0",
            f"evaluate.every_steps={every}",
        ],
    )


def train_apart(recipe: Recipe, folder: Path) -> None:
    """Trains, or continues, in a separate process and saves its peak memory next to the run.

    Raises:
        Interrupted: when the process was asked to stop.
        UserError: when it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, peak = folder / "asked.yaml", folder / "peak.json"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "fastssl", "train", str(path), "--run-dir", str(folder), "--resume"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    with passed_on(process.pid):
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    before = json.loads(peak.read_text(encoding="utf-8"))["peak_bytes"] if peak.exists() else 0
    atomic_json(peak, {"peak_bytes": max(before, usage.ru_maxrss << 10)})
    if process.returncode == EXIT_CODE:
        raise Interrupted("a signal", folder)
    if process.returncode:
        raise UserError(f"The run in {folder} failed.", "Its own message stands above.")


@contextmanager
def passed_on(process: int) -> Iterator[None]:
    """Forwards signals that ask this process to stop to that one, which saves first."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda caught, _: os.kill(process, caught)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def finished(folder: Path, recipe: Recipe, step_s: float) -> Done | None:
    """A finished run's curve and results, with seconds as steps times the fastest step; None when it is not finished.

    Raises:
        UserError: when the folder holds a run of another recipe.
    """
    refuse_another(folder, recipe)
    if not (folder / "summary.json").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    views = len(view_table(recipe.augment))
    curve = [
        {"epoch": e["epoch"], "views": e["images"] * views, "train_s": e["step"] * step_s}
        | {key: e[key] for key in (METRIC, "knn20_pct")}
        for e in evaluations_of(folder)
    ]
    ends = {key: summary[key] for key in (f"test_{METRIC}", "test_knn20_pct", "views", "steps")}
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    peak = json.loads((folder / "peak.json").read_text(encoding="utf-8"))
    return {
        "seed": recipe.seed,
        **ends,
        "train_s": summary["steps"] * step_s,
        **peak,
        "clock_s": summary["train_s"],  # of the run itself, other programs included
        "commit": environment["commit"],
        "curve": curve,
    }


def shares(recipe: Recipe) -> dict[str, float]:
    """Seconds of forward and backward of the backbone, the projector and the loss alone, the fastest of several."""
    device = build.hardware.device(recipe)
    channels = build.data.manifest_of(recipe.data.path).channels
    network: Any = build.model.network(recipe, in_channels=channels, device=device).train()
    loss = build.losses.loss(recipe)
    views, batch, side = len(view_table(recipe.augment)), recipe.data.batch_size, recipe.augment.side_px
    x = torch.randn(views * batch, channels, side, side).to(memory_format=torch.channels_last)
    features = torch.randn(views * batch, network.backbone.features_dim).requires_grad_()
    z_VBD = torch.randn(views, batch, recipe.model.projector[-1]).requires_grad_()
    parts: list[Callable[[], Tensor]] = [
        lambda: network.backbone(x).square().mean(),
        lambda: network.projector(features).square().mean(),
        lambda: loss(z_VBD)["loss"],
    ]
    calls = dict(zip(PARTS, parts, strict=True))
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call().backward()  # type: ignore[no-untyped-call]
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


@dataclass(frozen=True)
class Earlier:
    """What an earlier record holds: finished runs by seed and cell, seconds of a step and of its parts by kind."""

    runs: Mapping[tuple[int, Cell], Done] = field(default_factory=dict)
    step_s: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, dict[str, float]] = field(default_factory=dict)


def resumed(path: Path, base: Recipe, recipes: Mapping[Cell, Recipe], args: argparse.Namespace) -> Earlier:
    """
    Raises:
        UserError: when the record there is of another recipe, grid or machine: on that one runs have another length.
    """
    before = earlier(path, "resnet50", base)
    if before is None:
        return Earlier()
    refuse_another_grid(path, before, args, parse, lambda one: (one.dims, one.dim, one.run_min, one.points))
    if not here(before):
        raise another(path, "machine")
    held = {(run["seed"], cell): run for cell in recipes for run in before["curves"].get(cell.name, [])}
    runs = {(seed, cell): run for (seed, cell), run in held.items() if seed < args.seeds}
    step_s = {kind_of(recipes[cell]): run["train_s"] / run["steps"] for (_, cell), run in runs.items()}
    values = {(one["impl"], one["metric"]): one["median"] for one in before["rows"]}
    parts = {
        kind_of(recipes[cell]): {part: values[cell.name, part] for part in PARTS} for cell in {cell for _, cell in runs}
    }
    say_kept(path, len(runs), len(held))
    return Earlier(runs, step_s, parts)


def at(curve: Sequence[Mapping[str, float]], seconds: float) -> float | None:
    """Accuracy of the last evaluation up to that second; None before the first."""
    return next((one[METRIC] for one in reversed(curve) if one["train_s"] <= seconds), None)


def reached(run: Done, target_pct: float) -> Timed:
    first = next((one["train_s"] for one in run["curve"] if one[METRIC] >= target_pct), None)
    return Timed(run["train_s"], False) if first is None else Timed(first, True)


def report(
    recipes: Mapping[Cell, Recipe], runs: Mapping[Cell, Sequence[Done]], parts: Mapping[str, dict[str, float]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of every cell, and how much sooner it reaches the final accuracy of the first cell."""
    reference = next(iter(recipes))
    rows, speed_ups = [], []
    alike_s = min(run["curve"][-1]["train_s"] for done in runs.values() for run in done)
    for cell, done in runs.items():
        work = {"views": cell.views, "dim": cell.dim, "weight": cell.weight, "fraction": cell.fraction}
        keys = (f"test_{METRIC}", "test_knn20_pct", "views", "train_s", "peak_bytes")
        rows += [row(cell.name, work, key, [run[key] for run in done]) for key in keys]
        equal = [value for run in done if (value := at(run["curve"], alike_s)) is not None]
        rows.append(row(cell.name, work | {"after_s": round(alike_s)}, f"val_{METRIC}", equal))
        rows += [row(cell.name, work, key, [value]) for key, value in parts[kind_of(recipes[cell])].items()]
    target = statistics.median(run["curve"][-1][METRIC] for run in runs[reference])
    for cell in runs:
        timed = [[reached(run, target) for run in runs[one]] for one in (reference, cell)]
        said = {"recipe": cell.name, "against": reference.name, "metric": METRIC, "target_pct": target}
        speed_ups.append(said | speed_up(*timed))
    return rows, speed_ups


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "bench" / "resnet50.yaml"))
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--dims", type=at_least_one, nargs="+", default=[2048, 8192], help="of the two-view cells")
    parser.add_argument("--dim", type=at_least_one, default=256, help="of the cells with more views")
    parser.add_argument(
        "--run-min", type=float, default=25.0, help="training of each run, in minutes of its fastest step"
    )
    parser.add_argument("--points", type=at_least_one, default=8, help="evaluations of each run")
    parser.add_argument("--seeds", type=at_least_one, default=2)
    parser.add_argument("--budget-min", type=float, default=60.0, help="begin no run that would not fit")
    parser.add_argument("--out", type=Path, default=Path("runs/resnet50"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/resnet50.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --json holds of this command")
    parser.add_argument("--plan", action="store_true", help="time a step of each cell, print the runs and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    begun, base = time.monotonic(), load(args.recipe, args.changes)
    refuse_unmeasured(base, on_test=True)
    recipes = recipes_of(base, cells_of(args.dims, args.dim), args.dim)
    kinds = {kind_of(recipe): recipe for recipe in recipes.values()}
    before = resumed(args.json, base, recipes, args) if args.resume else Earlier()
    step_s = seconds_per_step(kinds, args.out / "seconds_per_step.json", known=before.step_s)
    wanted = {
        (seed, cell): timed_recipe(recipe, seed, step_s[kind_of(recipe)], 60 * args.run_min, args.points)
        for seed in range(args.seeds)
        for cell, recipe in recipes.items()
    }
    if args.plan:
        for (_, cell), recipe in wanted.items():
            step_ms = 1e3 * step_s[kind_of(recipes[cell])]
            print(f"{recipe.name:28} {recipe.train.epochs:4} epochs, a step {step_ms:,.0f} ms")
        return
    parts = known_shares(kinds, args.out / "shares.json", before.parts)
    runs: dict[Cell, list[Done]] = {}
    left, longest_s = 0, 60 * args.run_min
    for (seed, cell), recipe in wanted.items():
        folder, seconds, start = args.out / recipe.name, step_s[kind_of(recipes[cell])], time.monotonic()
        done = finished(folder, recipe, seconds) or before.runs.get((seed, cell))
        if done is None and start - begun + longest_s > 60 * args.budget_min:
            left += 1
            continue
        if done is None:
            train_apart(recipe, folder)
            done, longest_s = finished(folder, recipe, seconds), max(longest_s, time.monotonic() - start)
            assert done is not None
            print(f"{recipe.name}: ridge {done[f'test_{METRIC}']:.2f} % on test", file=sys.stderr)
        runs.setdefault(cell, []).append(done)
        if next(iter(recipes)) in runs:  # with which the others are compared
            write(args.json, base, recipes, runs, parts)
    if left:
        print(f"The budget is spent with {left} of {len(wanted)} runs left; repeat the command.", file=sys.stderr)


def known_shares(
    kinds: Mapping[str, Recipe], path: Path, before: Mapping[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """The seconds of each kind's parts, measured once; `before` is an earlier record's."""
    of_path: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = {**before, **of_path}
    parts = known | {name: shares(recipe) for name, recipe in kinds.items() if name not in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_json(path, parts)
    return parts


def write(
    path: Path,
    base: Recipe,
    recipes: Mapping[Cell, Recipe],
    runs: Mapping[Cell, Sequence[Done]],
    parts: Mapping[str, dict[str, float]],
) -> None:
    rows, speed_ups = report(recipes, runs, parts)
    save(
        path,
        record(
            "resnet50",
            rows,
            base.model_dump(mode="json"),
            clock="steps times the fastest of several steps of that kind, timed apart from the runs",
            speed_ups=speed_ups,
            curves={cell.name: list(done) for cell, done in runs.items()},
        ),
    )


if __name__ == "__main__":
    as_command(main)
