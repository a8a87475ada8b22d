"""The record on a CPU: a recipe's accuracy and seconds over seeds, and what each change of it gains at equal views.

python bench/record.py [RECIPE] --seeds 5                    the recipe itself, timed by the clock: run it alone
python bench/record.py [RECIPE] --levers bench/levers.yaml   each change against the recipe, shortened

Levers are compared on held-out images at equal views and equal seeds. Their views per second are ratios to the
recipe's, of steps timed in turn apart from the runs (claims_time.py), so the runs themselves may share the machine.
Finished runs are not repeated, stopped ones continue. Writes bench/results/record.json and keeps the parts in it that
other calls measured.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from claims import as_command, at_least_one, refuse_another, refuse_unmeasured  # noqa: E402
from claims_time import ratios  # noqa: E402
from resume import another, here, is_of, record_at, say_kept  # noqa: E402

import fastssl  # noqa: E402
from fastssl.bench.crossing import first_crossing, median_or_none  # noqa: E402
from fastssl.bench.record import record, row, save  # noqa: E402
from fastssl.bench.tta import evaluations_of  # noqa: E402
from fastssl.errors import UserError  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402

METRICS = ("knn20_pct", "ridge_pct")
SPEED = "views_per_s_ratio"
BASE = "the recipe"
Levers = dict[str, list[str]]  # a lever's name to the changes of the recipe, as SECTION.KEY=VALUE
Done = dict[str, Any]


class Table(BaseModel, extra="forbid"):
    """A file of levers."""

    short: list[str]
    levers: Levers


def levers_of(path: Path) -> tuple[list[str], Levers]:
    """The changes that shorten every run, and each lever's own.

    Raises:
        UserError: when the file cannot be read or is not such a table, or a lever has the base's name.
    """
    fix = f'Give "short", a list of changes, and "levers", such a list of each name but "{BASE}".'
    try:
        table = Table.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Choose another --levers.") from None
    except (ValueError, yaml.YAMLError):
        raise UserError(f"{path} is not a table of levers.", fix) from None
    if BASE in table.levers:
        raise UserError(f"{path} has a lever named {BASE}.", fix)
    return table.short, table.levers


def trained(recipe: Recipe, folder: Path) -> Done:
    """The run's summary with its evaluations, trained first where it is not finished.

    Raises:
        UserError: when the folder holds a run of another recipe.
    """
    refuse_another(folder, recipe)
    if not (folder / "summary.json").exists():
        fastssl.train(recipe, run_dir=folder, resume=True)
    done: Done = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    commit = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["commit"]
    return done | {"evaluations": evaluations_of(folder), "commit": commit}


@dataclass(frozen=True)
class Earlier:
    """What a part of an earlier record holds: runs by lever from the first seed on, views per second over the
    recipe's, commits."""

    runs: Mapping[str, Sequence[Done]] = field(default_factory=dict)
    speeds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    commits: Sequence[str] = ()


def resumed(path: Path, part: str, recipe: Recipe, *, seeds: int, short: Sequence[str], levers: Levers) -> Earlier:
    """What the record holds of that part and those seeds; nothing of levers whose changes are others now.

    Raises:
        UserError: when the part is of another recipe, machine or shortening.
    """
    made = record_at(path, "record")
    if made is None or part not in made["parts"]:
        return Earlier()
    about = made["parts"][part]
    same = {"recipe": is_of(about["recipe"], recipe), "machine": here(about)}
    same["shortening"] = about.get("short", []) == list(short)
    for what, is_same in same.items():
        if not is_same:
            raise another(path, what)
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in made["rows"]:
        if one["part"] == part:
            rows.setdefault(one["impl"], []).append(one)
    held = {name: done_of(some, about.get("curves")) for name, some in rows.items()}
    alike = [name for name, some in rows.items() if some[0]["work"].get("changes", []) == levers.get(name, [])]
    runs = {name: held[name][:seeds] for name in alike}
    speeds = {name: r["values"] for name in alike for r in rows[name] if r["metric"] == SPEED}
    say_kept(path, sum(map(len, runs.values())), sum(map(len, held.values())))
    return Earlier(runs, speeds, about["commits"])


def done_of(rows: Sequence[dict[str, Any]], curves: Sequence[Any] | None) -> list[Done]:
    """The runs from which rows of one lever were made; without curves, with the last evaluation alone."""
    values = {one["metric"]: one["values"] for one in rows if "pct" not in one["work"]}
    if curves is None:
        pairs = zip(*(values[f"val_{metric}"] for metric in METRICS), strict=True)
        curves = [[dict(zip(METRICS, pair, strict=True))] for pair in pairs]
    shared = {"views": rows[0]["work"]["views"], "commit": None}
    of_run = {key: of_seed for key, of_seed in values.items() if len(of_seed) == len(curves)}
    return [
        shared | {key: of_seed[i] for key, of_seed in of_run.items()} | {"evaluations": curve}
        for i, curve in enumerate(curves)
    ]


def views_in_all(recipe: Recipe) -> float:
    return recipe.train.epochs * recipe.augment.views * recipe.data.fraction


def views_of_a_step(recipe: Recipe) -> int:
    return recipe.data.batch_size * recipe.augment.views


def lever_recipes(base: Recipe, short: Sequence[str], levers: Levers) -> dict[str, Recipe]:
    """Of each lever the shortened recipe with its changes, the recipe itself first.

    Raises:
        UserError: when one forwards more or fewer views than the others.
    """
    recipes = {name: load(base, [*short, *changes]) for name, changes in {BASE: [], **levers}.items()}
    views = views_in_all(recipes[BASE])
    unlike = [name for name, one in recipes.items() if abs(views_in_all(one) / views - 1) > 0.01]
    if unlike:
        fix = "Change train.epochs or data.fraction there, so that epochs x views x fraction is the same."
        raise UserError(f"Not as many views as the recipe has: {', '.join(unlike)}.", fix)
    return recipes


def lever_runs(
    recipes: Mapping[str, Recipe],
    seeds: int,
    *,
    only: Sequence[str],
    out: Path,
    deadline: float,
    before: Mapping[str, Sequence[Done]],
) -> dict[str, list[Done]]:
    """The runs of each lever, those of the first seed first.

    Args:
        recipes: by lever.
        seeds: of each lever.
        only: train these and the recipe, and of the others report what is done; empty for all.
        out: where the runs are.
        deadline: on the monotonic clock; no run begins after it.
        before: runs of an earlier record, which are not repeated.
    """
    runs: dict[str, list[Done]] = {name: [] for name in recipes}
    left = 0
    for seed in range(seeds):
        for name, recipe in recipes.items():
            folder = out / folder_of(name, seed)
            if seed < len(before.get(name, [])):
                runs[name].append(before[name][seed])
                continue
            if not (folder / "summary.json").exists():
                if only and name not in (BASE, *only):
                    continue
                if time.monotonic() > deadline:
                    left += 1
                    continue
            runs[name].append(trained(load(recipe, [f"seed={seed}"]), folder))
            last = runs[name][-1]["evaluations"][-1]
            found = f"kNN {last['knn20_pct']:.2f} %, ridge {last['ridge_pct']:.2f} %"
            print(f"{name}, seed {seed}: {found}", file=sys.stderr)
    if left:
        print(f"The budget is spent with {left} runs left; repeat the command.", file=sys.stderr)
    return {name: done for name, done in runs.items() if done}


def folder_of(lever: str, seed: int) -> str:
    return f"{re.sub(r'[^a-z0-9.]+', '-', lever.lower())}-s{seed}"


def speeds_of(recipes: Mapping[str, Recipe]) -> dict[str, list[float]]:
    """Views per second of each lever over those of the recipe, one ratio a round."""
    print(f"Timing a step of each of {', '.join(recipes)}", file=sys.stderr)
    views = {name: views_of_a_step(one) / views_of_a_step(recipes[BASE]) for name, one in recipes.items()}
    return {name: [views[name] / ratio for ratio in found] for name, found in ratios(recipes, BASE).items()}


def lever_rows(
    runs: Mapping[str, Sequence[Done]], speeds: Mapping[str, Sequence[float]], levers: Levers
) -> list[dict[str, Any]]:
    """Accuracy on held-out images, points above the recipe at equal seeds, and views per second over the recipe's."""
    rows = []
    for name, done in runs.items():
        work = {"lever": name, "changes": levers.get(name, []), "views": done[0]["views"]}
        for metric in METRICS:
            values, base = ([run["evaluations"][-1][metric] for run in some] for some in (done, runs[BASE]))
            rows.append(row(name, work, f"val_{metric}", values))
            gains = [a - b for a, b in zip(values, base, strict=False)]
            rows.append(row(name, work, f"gain_{metric}", gains, mean=round(statistics.mean(gains), 2)))
        if name in speeds:
            rows.append(row(name, work, SPEED, speeds[name]))
    return rows


def record_rows(recipe: Recipe, runs: Sequence[Done], target_pct: float) -> list[dict[str, Any]]:
    """Accuracy on test, seconds of training, and seconds to the target on held-out images."""
    work = {"recipe": recipe.name, "views": runs[0]["views"]}
    rows = [
        row(BASE, work, f"test_{metric}", [run[f"test_{metric}"] for run in runs])
        for metric in (*METRICS, "whitened_knn20_pct", "linear_pct")
        if f"test_{metric}" in runs[0]
    ]
    rows += [row(BASE, work, key, [run[key] for run in runs]) for key in ("train_s", "views_per_s")]
    found = [first_crossing(run["evaluations"], METRICS[0], target_pct, views=recipe.augment.views) for run in runs]
    seconds = [at.train_s if at else None for at in found]
    goal = work | {"target": METRICS[0], "pct": target_pct}
    made = row(BASE, goal, "train_s", [value for value in seconds if value is not None])
    return [*rows, made | {"median": median_or_none(seconds), "seeds": len(runs)}]


def write(path: Path, recipe: Recipe, part: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes the record with this part replaced; each part has its recipe, machine and command, and rows name it."""
    before = record_at(path, "record") or {"parts": {}, "rows": []}
    others = [one for one in before["rows"] if one["part"] != part]
    made = record("record", others + [one | {"part": part} for one in rows], recipe.model_dump(mode="json"))
    about = {key: made[key] for key in ("date", "hardware", "versions", "commit", "command", "recipe")}
    save(path, made | {"parts": before["parts"] | {part: about | more}})


def commits(runs: Sequence[Done], before: Earlier) -> dict[str, list[str]]:
    """The commits that made the runs, which may be older than the record."""
    return {"commits": sorted({run["commit"] for run in runs if run["commit"]} | set(before.commits))}


def text(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for one in rows:
        low, median, high = (f"{one[key]:.2f}" if one[key] is not None else "-" for key in ("min", "median", "max"))
        lines.append(f"{one['impl']:32} {one['metric']:20} {median:>9} ({low} to {high}, n = {one['n']})")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "cifar10_cpu.yaml"))
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--seeds", type=at_least_one, default=1)
    parser.add_argument("--target", type=float, default=60.0, help="kNN accuracy in percent on held-out images")
    parser.add_argument("--levers", type=Path, help="table of changes; measures them in place of the recipe")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="LEVER", help="train these, leave the others as they are"
    )
    parser.add_argument("--no-time", action="store_true", help="leave views per second out: the machine is not idle")
    parser.add_argument("--time-again", action="store_true", help="time the steps that the record holds once more")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --json holds of this recipe")
    parser.add_argument("--budget-min", type=float, default=60.0, help="begin no lever's run after as many minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/record"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/record.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    recipe = load(args.recipe, args.changes)
    refuse_unmeasured(recipe, on_test=args.levers is None)
    if args.levers is None:
        before = (
            resumed(args.json, "record", recipe, seeds=args.seeds, short=[], levers={}) if args.resume else Earlier()
        )
        runs = list(before.runs.get(BASE, []))
        missing = range(len(runs), args.seeds)
        runs += [trained(load(recipe, [f"seed={seed}"]), args.out / f"seed{seed}") for seed in missing]
        rows = record_rows(recipe, runs, args.target)
        about = commits(runs, before) | {"curves": [run["evaluations"] for run in runs]}
        write(args.json, recipe, "record", rows, **about)
    else:
        short, levers = levers_of(args.levers)
        unknown = sorted(set(args.only) - set(levers))
        if unknown:
            raise UserError(f"No lever is named {' or '.join(unknown)}.", f"Choose from: {', '.join(levers)}.")
        recipes = lever_recipes(recipe, short, levers)
        deadline = time.monotonic() + 60 * args.budget_min
        place = args.out / args.levers.stem
        before = (
            resumed(args.json, args.levers.stem, recipe, seeds=args.seeds, short=short, levers=levers)
            if args.resume
            else Earlier()
        )
        found = lever_runs(recipes, args.seeds, only=args.only, out=place, deadline=deadline, before=before.runs)
        speeds = {} if args.time_again else dict(before.speeds)
        untimed = [] if args.no_time else [name for name in found if name not in (BASE, *speeds)]
        if untimed:
            speeds |= speeds_of({name: recipes[name] for name in (BASE, *untimed)})
        rows = lever_rows(found, speeds, levers)
        every = [run for done in found.values() for run in done]
        write(args.json, recipe, args.levers.stem, rows, **commits(every, before), short=short)
    print(text(rows))


if __name__ == "__main__":
    as_command(main)
