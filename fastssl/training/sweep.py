"""A grid of recipes, each cell a run of its own: runs what is missing, resumes what was stopped, tabulates all.

Cells run one after another in this process. A cell that a person has to fix is recorded and the others continue.
"""

import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastssl.errors import UserError, option, raise_all
from fastssl.probes import table
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.runs import reading
from fastssl.runs.files import atomic_json
from fastssl.training import loop
from fastssl.training.precision import holds_another

Observer = Callable[[dict[str, Any]], None]
LONGEST_NAME = 100


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: what it changes, its folder, and its recipe or what is wrong with it."""

    changes: dict[str, Any]
    folder: Path
    recipe: Recipe | UserError


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """["optim.lr=0.1,0.2", "model.projector=[64,64],[256,256]"] to each key's values, which are YAML.

    Raises:
        UserError: when a text is not of that form or a key comes twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, listed = (part.strip() for part in text.partition("="))
        try:
            values = yaml.safe_load(f"[{listed}]")
        except (yaml.YAMLError, ValueError):
            values = None
        if not equals or not key or not values:
            raise UserError(
                f"{option('grid')} {text!r} is not of the form section.key=a,b,c.",
                "Write for example optim.lr=0.001,0.01.",
            )
        if key in grid:
            raise UserError(f"{option('grid')} names {key} twice.", f"Give all of its values in one {option('grid')}.")
        grid[key] = values
    return grid


def cells(
    recipe: str | Path | Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    *,
    seeds: int,
    out: Path,
    changes: Sequence[str] = (),
) -> list[Cell]:
    """Every combination of the grid's values, seeds innermost.

    Args:
        recipe: what the cells change.
        grid: keys such as "optim.lr" to values.
        seeds: runs of each combination; their seeds count up from the recipe's.
        out: holds a folder for each cell.
        changes: texts "section.key=value" for all cells.

    Raises:
        UserError: when no cell's recipe is sound, a value comes twice, or the grid and seeds both set the seed.
    """
    if seeds > 1 and "seed" in grid:
        raise UserError(f"The grid sets seed and {option('seeds')} asks for more.", "Use one of the two.")
    raise_all(error for key, values in grid.items() for error in given_twice(recipe, changes, key, values))
    first_seed = load(recipe, changes).seed
    axes = [[(key, value) for value in values] for key, values in grid.items()]
    if seeds > 1 or not grid:
        axes.append([("seed", first_seed + i) for i in range(seeds)])
    planned, taken = [], set[str]()
    for combination in itertools.product(*axes):
        changed = dict(combination)
        name = folder_name(changed, taken)
        taken.add(name)
        texts = [override(key, value) for key, value in combination]
        planned.append(Cell(changed, out / name, recipe_of(recipe, [*changes, *texts])))
    wrong = [cell.recipe for cell in planned if isinstance(cell.recipe, UserError)]
    if len(wrong) == len(planned):
        raise wrong[0]
    return planned


def given_twice(
    recipe: str | Path | Mapping[str, Any], changes: Sequence[str], key: str, values: Sequence[Any]
) -> Iterator[UserError]:
    """The values of a key that a recipe takes for an earlier one: 0.001 and 1e-3, which YAML reads as text."""
    recipes = [recipe_of(recipe, [*changes, override(key, value)]) for value in values]
    for i, (value, made) in enumerate(zip(values, recipes, strict=True)):
        before = next((j for j in range(i) if value == values[j]), None)
        if before is None and isinstance(made, Recipe):
            before = next((j for j in range(i) if made == recipes[j]), None)
        if before is not None:
            also = "" if str(values[before]) == str(value) else f", as {values[before]} and {value}"
            yield UserError(f"The grid gives {key} the value {values[before]} twice{also}.", "Give each value once.")


def override(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def recipe_of(recipe: str | Path | Mapping[str, Any], changes: Sequence[str]) -> Recipe | UserError:
    try:
        return load(recipe, changes)
    except UserError as error:
        return error


def folder_name(changes: Mapping[str, Any], taken: set[str]) -> str:
    """lr=0.01_seed=1: the same cell has the same name in every sweep."""
    short = [key.rsplit(".", 1)[-1] for key in changes]
    keys = short if len(set(short)) == len(short) else list(changes)
    parts = (f"{key}={value}" for key, value in zip(keys, changes.values(), strict=True))
    name = "_".join(re.sub(r"[^A-Za-z0-9_.=+-]+", "-", part).strip("-") for part in parts)
    if len(name) > LONGEST_NAME or name in taken:
        mark = hashlib.sha256(json.dumps(changes, sort_keys=True, default=str).encode()).hexdigest()[:8]
        name = f"{name[:LONGEST_NAME]}-{mark}"
    return name


def sweep(
    recipe: str | Path | Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 1,
    out: str | Path | None = None,
    changes: Sequence[str] = (),
    observe: Observer = lambda record: None,
    convert_progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Runs a grid of recipes; the same call again runs only what is not done.

    Args:
        recipe: a mapping, a YAML file or a shipped recipe's name.
        grid: keys such as "optim.lr" to the values to try.
        seeds: runs of each combination, their seeds counting up from the recipe's.
        out: holds a run folder for each cell, and sweep.json; `runs/<recipe's name>-sweep` when absent.
        changes: texts "section.key=value" for all cells.
        observe: called with each run's records, and {"event": "cell", ...} before each cell.
        convert_progress: as for `train`.

    Returns:
        What sweep.json holds: {"cells": [...], "settings": [...]}, one record per run, and one per combination over its
        seeds. A cell that failed has its "error".

    Raises:
        UserError: when there is nothing sound to run.
        Interrupted: after a signal, when the running cell's checkpoint is written.
    """
    name = load(recipe, changes).name
    folder = Path(out) if out is not None else Path("runs") / f"{name}-sweep"
    planned = cells(recipe, grid, seeds=seeds, out=folder, changes=changes)
    errors: dict[Path, UserError] = {}
    try:
        for number, cell in enumerate(planned, start=1):
            observe({"event": "cell", "number": number, "of": len(planned), "changes": cell.changes})
            try:
                run(cell, observe=observe, convert_progress=convert_progress)
            except UserError as error:
                errors[cell.folder] = error
    finally:
        result = tabulated(name, planned, errors)
        write(folder / "sweep.json", result)
    return result


def run(cell: Cell, *, observe: Observer, convert_progress: Callable[[str, int, int | None], None] | None) -> None:
    """Trains one cell, from its last checkpoint when it has one; a finished cell is left alone."""
    if isinstance(cell.recipe, UserError):
        raise cell.recipe
    if (cell.folder / "summary.json").exists() and not holds_another(cell.folder, cell.recipe):
        return
    try:
        loop.train(cell.recipe, run_dir=cell.folder, resume=True, observe=observe, convert_progress=convert_progress)
    except UserError as error:  # a sweep chooses the folders of its runs, below its own
        raise UserError(error.what, error.fix.replace(option("run_dir"), option("out"))) from error


def tabulated(name: str, planned: Sequence[Cell], errors: Mapping[Path, UserError]) -> dict[str, Any]:
    """The sweep so far, from the run folders."""
    rows = [row(cell, errors.get(cell.folder)) for cell in planned]
    return {"sweep": name, "cells": rows, "settings": settings(rows)}


def row(cell: Cell, error: UserError | None) -> dict[str, Any]:
    """One cell: the main figures of its run, its changes, and what ended it."""
    entry: dict[str, Any] = {"run_dir": str(cell.folder), "state": "not begun", "validation": {}, "test": {}}
    try:
        if reading.is_run(cell.folder):
            entry = reading.entry(reading.read(cell.folder))
    except UserError as damage:
        error = error or damage
    if error:
        entry["state"] = "failed"
    return entry | {"changes": cell.changes, "error": f"{error.what} {error.fix}" if error else None}


def settings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record a combination: what its finished seeds reached at their last evaluation, never on the test set.

    All combinations are judged by one metric: the accuracy on held-out images, or without labels the first figure of
    the table of probes.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in rows:
        key = json.dumps({k: v for k, v in cell["changes"].items() if k != "seed"}, default=str)
        groups.setdefault(key, []).append(cell)
    metric = judged_by(rows)
    return [
        {"changes": json.loads(key), "seeds": len(group), "metric": metric, **spread(group, metric)}
        for key, group in groups.items()
    ]


def judged_by(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The metric that every finished cell was measured by."""
    done = [cell["validation"] for cell in rows if cell["state"] == "done"]
    shared = {key: value for key, value in (done[0] if done else {}).items() if all(key in other for other in done)}
    return table.judged_by(shared)


def spread(group: Sequence[Mapping[str, Any]], metric: str | None) -> dict[str, Any]:
    """Mean and range over the finished seeds."""
    values = [cell["validation"][metric] for cell in group if cell["state"] == "done"] if metric else []
    if not values:
        return {"mean": None, "min": None, "max": None, "n": 0}
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values), "n": len(values)}


def write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_json(path, result, default=str)  # YAML has values, such as dates, that JSON has not
