"""Run directories as data: read without torch, checked, and listed with their state.

A run is running while its lock is held, done when summary.json is there, failed when it left failure.json, and
interrupted otherwise (a signal or a kill; --resume continues it). Nothing read here is believed: a number is finite,
and a count or time of a sane size, or the file is said to be damaged.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.runs.directory import FAILURE, is_locked

State = Literal["running", "done", "interrupted", "failed", "damaged"]
Numbers = dict[str, float]
REQUIRED = {
    "step": ("step", "epoch", "loss", "images", "views", "train_s"),
    "evaluation": ("step", "epoch", "images", "train_s"),
}
LARGEST_COUNT = 1e15  # and time: beyond it a figure's axis overflows, and no run gets there
LARGEST = 3.5e38  # just above float32's largest: a loss that diverges gets there
DEPTH = 4


@dataclass(frozen=True)
class RunFiles:
    """What one run directory says.

    Attributes:
        folder: the directory.
        recipe: as resolved when the run began.
        state: see the top of this file; never "damaged" here.
        steps, evaluations: records of metrics.jsonl in order, their numbers only.
        summary: the numbers of summary.json, empty before the run's end.
        manifest: of the data, empty when data.json is absent.
        environment: hardware and versions, empty when environment.json is absent.
        failure: one sentence on what ended a failed run.
        own_loss: the loss was a function from Python, and not the recipe's; known of runs that are done.
    """

    folder: Path
    recipe: Recipe
    state: State
    steps: tuple[Numbers, ...]
    evaluations: tuple[Numbers, ...]
    summary: Numbers
    manifest: dict[str, Any]
    environment: dict[str, Any]
    failure: str | None
    own_loss: bool

    @property
    def views_per_s(self) -> float | None:
        last = self.steps[-1] if self.steps else {}
        return last["views"] / last["train_s"] if last.get("train_s") else None


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file()


def find(folder: Path) -> list[Path]:
    """Run directories at and below a folder (four levels), in the order of their names; links are followed.

    A run that several names lead to is listed once, by its own name where it is below the folder.

    Raises:
        UserError: when the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.", "Give a folder of runs; `fastssl train` writes into runs/.")
    folders, root, seen = [], folder.resolve(), set[Path]()
    for place, inside, _ in os.walk(folder, followlinks=True):
        here = Path(place)
        below, real = here.relative_to(folder), here.resolve()
        is_elsewhere = real != root / below  # a link leads here
        if real in seen or (is_elsewhere and real.is_relative_to(root)):
            inside.clear()
            continue
        seen.add(real)
        inside.sort()
        if is_run(here):
            folders.append(here)
        if is_run(here) or len(below.parts) >= DEPTH:
            inside.clear()
    return sorted(folders)


def read(folder: Path) -> RunFiles:
    """One run directory.

    Raises:
        UserError: when it is not a run, or a file in it is damaged.
    """
    if not is_run(folder):
        raise UserError(f"{folder} is not a run.", "Give the folder that `fastssl train` wrote (it holds recipe.yaml).")
    recipe = load(folder / "recipe.yaml")
    records = read_metrics(folder / "metrics.jsonl")
    summary, failure = read_mapping(folder / "summary.json"), read_mapping(folder / FAILURE)
    return RunFiles(
        folder=folder,
        recipe=recipe,
        state=state_of(folder),
        steps=tuple(numbers for event, numbers in records if event == "step"),
        evaluations=tuple(numbers for event, numbers in records if event == "evaluation"),
        summary=numbers_in(summary),
        manifest=read_mapping(folder / "data.json"),
        environment=read_mapping(folder / "environment.json"),
        failure=str(failure["what"]) if failure.get("what") else None,
        own_loss=summary.get("own_loss") is True,
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is absent."""
    try:
        mapping = json.loads(path.read_bytes())
        if not isinstance(mapping, dict):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path) from error
    return mapping


def read_metrics(path: Path) -> list[tuple[str, Numbers]]:
    """(event, numbers) of every step and evaluation; a last line without its end is one being written."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise damaged(path) from error
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            event, numbers = str(record["event"]), numbers_in(record)
            needed = {name: numbers[name] for name in REQUIRED.get(event, ())}
            if any(not 0 <= value < LARGEST_COUNT for name, value in needed.items() if name != "loss"):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, f" (line {number})") from error
        if event in REQUIRED:
            metrics.append((event, numbers))
    return metrics


def numbers_in(record: Mapping[str, Any]) -> Numbers:
    """The values that are finite numbers, as far as float32 reaches."""
    return {k: v for k, v in record.items() if type(v) in (int, float) and -LARGEST < v < LARGEST}


def damaged(path: Path, place: str = "") -> UserError:
    return UserError(f"{path} is damaged{place}.", "Put the run's own file back, or leave this run out.")


def state_of(folder: Path) -> State:
    if is_locked(folder):
        return "running"
    if (folder / "summary.json").exists():
        return "done"
    return "failed" if (folder / FAILURE).exists() else "interrupted"


def listing(folder: Path) -> list[dict[str, Any]]:
    """One record per run below a folder: where, state, progress, accuracies, speed, and how its recipe differs.

    A damaged run is a row that says so.

    Raises:
        UserError: when the folder does not exist.
    """
    runs: list[tuple[Path, RunFiles | UserError]] = []
    for place in find(folder):
        try:
            runs.append((place, read(place)))
        except UserError as error:
            runs.append((place, error))
    whole = [run for _, run in runs if isinstance(run, RunFiles)]
    changes = iter(differences([run.recipe for run in whole]))
    return [
        entry(run) | {"differences": next(changes)}
        if isinstance(run, RunFiles)
        else {"run_dir": str(place), "state": "damaged", "note": run.what, "differences": {}}
        for place, run in runs
    ]


def entry(run: RunFiles) -> dict[str, Any]:
    """The main figures of one run; None or empty where it has none (yet).

    "validation" holds the numbers of the last evaluation, "test" those of the end under the same keys, and "best_pct"
    the highest of "metric", the accuracy that decides which checkpoint is the best one.
    """
    last, metric = run.steps[-1] if run.steps else {}, run.recipe.evaluate.metric
    best = max(run.evaluations, key=lambda e: e.get(metric, -1.0), default={})
    return {
        "run_dir": str(run.folder),
        "name": run.recipe.name,
        "state": run.state,
        "note": run.failure if run.state == "failed" else None,
        "epoch": last.get("epoch", 0.0),
        "epochs": run.recipe.train.epochs,
        "metric": metric,
        "validation": dict(run.evaluations[-1]) if run.evaluations else {},
        "best_pct": best.get(metric),
        "best_epoch": best["epoch"] if metric in best else None,
        "test": {key.removeprefix("test_"): value for key, value in run.summary.items() if key.startswith("test_")},
        "views_per_s": run.views_per_s,
        "train_s": last.get("train_s", 0.0),
    }


def differences(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """For each recipe, the values of the keys in which the recipes are not all alike (the name apart)."""
    flat = [flattened(recipe.model_dump(mode="json")) for recipe in recipes]
    keys = dict.fromkeys(key for fields in flat for key in fields if key != "name")
    differing = [key for key in keys if any(fields.get(key) != flat[0].get(key) for fields in flat)]
    return [{key: fields[key] for key in differing if key in fields} for fields in flat]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
