"""The paper's four claims, measured from one base recipe: python bench/claims.py RECIPE --budget-min 240

Every run forwards the same number of views with the same number of views per step (or, with --per-step images, of
images), so cells cost about the same time: more views or fewer images mean fewer or more epochs. The learning rate
is constant, as the paper's, so each point of a curve is what a run of that length reaches. Seconds are steps times
the fastest step of that kind, timed apart (claims_time.py): a busy machine delays a run but does not change its axis.
Cells run one seed after another, the most telling first; a cell already done is not run again and one that was
stopped continues, so the command may be stopped and repeated until done. Writes bench/results/claims.json and four
figures; the verdicts are computed in claims_verdicts.py.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from claims_time import seconds_per_step  # noqa: E402
from claims_verdicts import Cell, Found, Run, seconds_to, verdicts  # noqa: E402
from resume import another, earlier, here, refuse_another_grid, say_kept  # noqa: E402

import fastssl  # noqa: E402
from fastssl import build  # noqa: E402
from fastssl.bench.crossing import median_or_none  # noqa: E402
from fastssl.bench.record import record, row  # noqa: E402
from fastssl.errors import Interrupted, UserError  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402
from fastssl.training.guards import EXIT_CODE  # noqa: E402
from fastssl.training.precision import holds_another  # noqa: E402

PerStep = Literal["views", "images"]


@dataclass(frozen=True)
class Grid:
    """What is varied; `dim` is the projector of the multi-view cells, the largest of `dims` the reference's.

    `per_step` is what all cells share of the base's step: the number of views forwarded, or of images.
    `only` keeps the cells of these names.
    """

    dims: tuple[int, ...]
    views: tuple[int, ...]
    fractions: tuple[float, ...]
    dim: int
    per_step: PerStep = "views"
    only: tuple[str, ...] = ()

    @property
    def reference(self) -> Cell:
        return Cell(2, max(self.dims), "fixed", 1.0)


def cells(grid: Grid) -> list[Cell]:
    """Each cell once, the most telling first: the reference against small D with more views and less data."""
    ends = (min(grid.views, key=lambda v: abs(v - 4)), min(grid.views, key=lambda v: abs(v - 8)))
    telling = [grid.reference, *(Cell(v, grid.dim, "scaled", 1.0) for v in ends)]
    telling.append(Cell(ends[1], grid.dim, "scaled", 2 / ends[1]))
    by_dim = [Cell(2, d, weight, 1.0) for d in sorted(grid.dims) for weight in ("scaled", "fixed")]
    by_views = [Cell(v, grid.dim, "scaled", 1.0) for v in grid.views]
    paired = [Cell(v, grid.dim, "scaled", 2 / v) for v in grid.views if 2 / v in grid.fractions]
    by_fraction = [Cell(2, grid.dim, "scaled", f) for f in grid.fractions]
    wanted = telling + by_views + paired + by_fraction + by_dim
    # With the weight for the largest D held fixed, fixed and scaled are one cell there.
    same = Cell(2, max(grid.dims), "scaled", 1.0)
    every = dict.fromkeys(grid.reference if cell == same else cell for cell in wanted)
    return [cell for cell in every if not grid.only or cell.name in grid.only]


def recipe_of(base: Recipe, cell: Cell, seed: int, grid: Grid, schedule: str) -> Recipe:
    """The base with the cell's views, projector, weight and fraction, at the base's number of views in all."""
    weights: dict[str, Any] = dict.fromkeys(build.losses.weights(base, max(grid.dims)), "auto")
    if cell.weight == "fixed":
        two_views = load(base, ["augment.views=2", *(f"loss.{name}=auto" for name in weights)])
        weights = build.losses.weights(two_views, max(grid.dims))
    epochs = max(1, round(base.train.epochs * base.augment.views / (cell.views * cell.fraction)))
    every = max(1, epochs // 12)
    widths = [cell.dim] * len(base.model.projector)
    images = base.data.batch_size
    if grid.per_step == "views":
        images = max(2, round(images * base.augment.views / cell.views))
    return load(
        base,
        [
            f"name={cell.name}-s{seed}",
            f"seed={seed}",
            f"augment.views={cell.views}",
            f"data.fraction={cell.fraction * base.data.fraction}",
            f"data.batch_size={images}",
            f"model.projector={widths}",
            *(f"loss.{name}={value}" for name, value in weights.items()),
            f"train.epochs={epochs}",
            f"train.checkpoint_every_epochs={every}",
            f"evaluate.every_epochs={0 if base.evaluate.every_steps else every}",
            f"optim.schedule={schedule}",
        ],
    )


def kind_of(recipe: Recipe) -> str:
    """Recipes of one kind take the same time for a step."""
    return f"V{recipe.augment.views}-D{recipe.model.projector[-1]}-B{recipe.data.batch_size}"


def step_seconds(
    base: Recipe, grid: Grid, out: Path, *, schedule: str, again: bool = False, known: Mapping[Cell, float]
) -> dict[Cell, float]:
    """Each cell's seconds of a step; cells of one kind share one measurement."""
    of_cell = {cell: recipe_of(base, cell, 0, grid, schedule) for cell in cells(grid)}
    kinds = {kind_of(recipe): recipe for recipe in of_cell.values()}
    before = {kind_of(of_cell[cell]): one for cell, one in known.items() if cell in of_cell}
    seconds = seconds_per_step(kinds, out / "seconds_per_step.json", again=again, known=before)
    return {cell: seconds[kind_of(recipe)] for cell, recipe in of_cell.items()}


def refuse_another(folder: Path, wanted: Recipe) -> None:
    """
    Raises:
        UserError: when the folder holds a run of another recipe.
    """
    if holds_another(folder, wanted):
        fix = "Choose another --out, or remove that folder."
        raise UserError(f"{folder} holds a run of another recipe than this command's.", fix)


def refuse_unmeasured(recipe: Recipe, *, on_test: bool) -> None:
    """
    Raises:
        UserError: when held-out images, k = 20 or, where it is wanted, a test set are missing.
    """
    fixes = {
        "data.val_count=1000, say": recipe.data.val_count == 0,
        "evaluate.knn_k=[20]": 20 not in recipe.evaluate.knn_k,
        "data.test_path": on_test and recipe.data.test_path is None,
    }
    missing = [fix for fix, is_missing in fixes.items() if is_missing]
    if missing:
        raise UserError(f"{recipe.name} does not measure what is compared here.", f"Set {' and '.join(missing)}.")


def run_of(folder: Path, wanted: Recipe, metric: str, step_s: float) -> Run | None:
    """What a finished run directory says, or None when it is not finished.

    Raises:
        UserError: when the folder holds a run of another recipe.
    """
    refuse_another(folder, wanted)
    summary = folder / "summary.json"
    if not summary.exists():
        return None
    done = json.loads(summary.read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if f"test_{metric}" not in done:
        known = ", ".join(key.removeprefix("test_") for key in done if key.startswith("test_") and key.endswith("_pct"))
        raise UserError(f"--metric {metric} is not measured on the test set.", f"Choose one of: {known or 'none'}.")
    per_image = done["views"] / done["images"]
    commit = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["commit"]
    curve = [
        (e["epoch"], e["images"] * per_image, e["step"] * step_s, e[metric])
        for e in lines
        if e["event"] == "evaluation"
    ]
    also = {key: float(value) for key, value in done.items() if key.startswith("test_") and key.endswith("_pct")}
    return Run(wanted.seed, also.pop(f"test_{metric}"), done["steps"] * step_s, curve, commit, also)


@dataclass(frozen=True)
class Earlier:
    """What an earlier record holds: finished runs, each cell's seconds of a step, whether those are of this machine."""

    runs: Found = field(default_factory=dict)
    step_s: Mapping[Cell, float] = field(default_factory=dict)
    here: bool = False


def resumed(path: Path, base: Recipe, args: argparse.Namespace, wanted: Sequence[Cell]) -> Earlier:
    """What the record there holds of the wanted cells and seeds.

    Raises:
        UserError: when the record is of another recipe or grid.
    """
    before = earlier(path, "claims", base)
    if before is None:
        return Earlier()
    refuse_another_grid(path, before, args, parse, lambda one: (max(one.dims), one.schedule, one.per_step, one.metric))
    seconds = {Cell(**one["work"]): one["median"] / 1e3 for one in before["rows"] if one["metric"] == "step_ms"}
    if not seconds:
        raise another(path, "form")  # of before steps were timed apart
    runs = {
        cell: [Run(**run) for run in before["curves"][cell.name] if run["seed"] < args.seeds]
        for cell in seconds
        if cell in wanted
    }
    say_kept(path, sum(map(len, runs.values())), sum(map(len, before["curves"].values())))
    return Earlier(runs, seconds, here(before))


def in_seconds_of(before: Earlier, step_s: Mapping[Cell, float]) -> dict[tuple[int, Cell], Run]:
    """The earlier runs by seed and cell, with their seconds by what a step takes now."""
    found = {}
    for cell in before.runs:
        factor = step_s[cell] / before.step_s[cell]
        for run in before.runs[cell]:
            curve = [(epoch, views, seconds * factor, pct) for epoch, views, seconds, pct in run.curve]
            found[run.seed, cell] = replace(run, train_s=run.train_s * factor, curve=curve)
    return found


def measure(
    base: Recipe,
    grid: Grid,
    seeds: int,
    out: Path,
    *,
    budget_s: float,
    metric: str,
    schedule: str,
    seconds: Mapping[Cell, float],
    before: Mapping[tuple[int, Cell], Run],
) -> dict[Cell, list[Run]]:
    """Runs what is missing until done or until the next run would not fit; all finished runs, old and new."""
    found: dict[Cell, list[Run]] = {}
    start, longest, skipped = time.monotonic(), 0.0, 0
    todo = [(seed, cell) for seed in range(seeds) for cell in cells(grid)]
    for at, (seed, cell) in enumerate(todo):
        folder, recipe = out / f"{cell.name}-s{seed}", recipe_of(base, cell, seed, grid, schedule)
        run = run_of(folder, recipe, metric, seconds[cell]) or before.get((seed, cell))
        if run is None and time.monotonic() - start + longest > budget_s:
            skipped += 1
        elif run is None:
            begun = time.monotonic()
            fastssl.train(recipe, run_dir=folder, resume=True)
            longest = max(longest, time.monotonic() - begun)
            run = run_of(folder, recipe, metric, seconds[cell])
            assert run is not None
            print(f"[{at + 1}/{len(todo)}] {folder.name}: {run.final:.2f} %, {run.train_s:.0f} s", file=sys.stderr)
        if run is not None:
            found.setdefault(cell, []).append(run)
    if skipped:
        print(f"The budget is spent with {skipped} of {len(todo)} runs left; repeat the command.", file=sys.stderr)
    return found


def report(
    base: Recipe,
    grid: Grid,
    found: dict[Cell, list[Run]],
    *,
    path: Path,
    figures: Path,
    metric: str,
    seconds: Mapping[Cell, float],
    reach: Sequence[float] = (),
) -> list[dict[str, str]]:
    """The JSON record with rows, curves and verdicts, and the four figures."""
    rows: list[dict[str, Any]] = []
    for cell, runs in found.items():
        rows.append(row(cell.name, asdict(cell), f"test_{metric}", [run.final for run in runs]))
        rows += [row(cell.name, asdict(cell), other, [run.also[other] for run in runs]) for other in runs[0].also]
        rows.append(row(cell.name, asdict(cell), "train_s", [run.train_s for run in runs]))
        rows.append(row(cell.name, asdict(cell), "step_ms", [1e3 * seconds[cell]]))
        for target in reach:
            times = [seconds_to(run, target) for run in runs]
            arrived = [s for s in times if s is not None]
            reached = row(cell.name, asdict(cell) | {"target_pct": target}, "reached_s", arrived)
            rows.append(reached | {"median": median_or_none(times), "seeds": len(runs)})
    said = verdicts(found, grid.reference, grid.dim)
    written = record("claims", rows, base.model_dump(mode="json"))
    written["curves"] = {cell.name: [asdict(run) for run in runs] for cell, runs in found.items()}
    written["verdicts"] = said
    written["time_axis"] = "steps times the fastest of several steps of that kind, timed apart from the runs"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: the record is written, the figures are not drawn.", file=sys.stderr)
    else:
        from claims_figures import draw

        draw(figures, found, grid.reference, grid.dim, metric)
    return said


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="the base: its epochs and views set how many views every run forwards")
    parser.add_argument("--budget-min", type=float, default=60.0)
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument("--dims", type=at_least_one, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.125])
    parser.add_argument("--dim", type=at_least_one, default=256, help="projector of the multi-view cells")
    parser.add_argument("--metric", default="ridge_pct", help="of evaluations and, with test_, of summaries")
    parser.add_argument("--schedule", default="constant", choices=["constant", "cosine"])
    parser.add_argument("--per-step", default="views", choices=["views", "images"], help="what steps have alike")
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="names as --plan prints them")
    parser.add_argument("--reach", type=float, nargs="+", default=[], metavar="PCT", help="record seconds to these")
    parser.add_argument("--time-again", action="store_true", help="time steps once more and keep the faster")
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/claims.json")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --json holds of this command")
    parser.add_argument("--plan", action="store_true", help="print the runs and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    base = load(args.recipe, args.changes)
    grid = Grid(tuple(args.dims), tuple(args.views), tuple(args.fractions), args.dim, args.per_step, tuple(args.only))
    if not cells(grid):
        raise UserError(f"No cell is named {' or '.join(args.only)}.", "See the names with --plan.")
    if args.plan:
        for cell in cells(grid):
            one = recipe_of(base, cell, 0, grid, args.schedule)
            print(f"{cell.name:28} {one.train.epochs:4} epochs of batch {one.data.batch_size}, x {args.seeds} seeds")
        return
    before = resumed(args.json, base, args, cells(grid)) if args.resume else Earlier()
    known = before.step_s if before.here else {}
    seconds = step_seconds(base, grid, args.out, schedule=args.schedule, again=args.time_again, known=known)
    found = measure(
        base,
        grid,
        args.seeds,
        args.out,
        budget_s=60 * args.budget_min,
        metric=args.metric,
        schedule=args.schedule,
        seconds=seconds,
        before=in_seconds_of(before, seconds),
    )
    if not found:
        return
    for said in report(
        base,
        grid,
        found,
        path=args.json,
        figures=args.figures,
        metric=args.metric,
        seconds=seconds,
        reach=args.reach,
    ):
        print(f"{said['claim']}\n  {said['outcome']}: {said['text']}")


def as_command(run: Callable[[], None]) -> None:
    """Runs it; a mistake ends in two lines and exit code 2, a signal with what to do next."""
    try:
        run()
    except UserError as error:
        print(f"Error: {error.what}\n{error.fix}", file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        print("Stopped; the run that was under way is saved. Repeat the command to continue.", file=sys.stderr)
        sys.exit(EXIT_CODE)


def at_least_one(text: str) -> int:
    """An argument's whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    as_command(main)
