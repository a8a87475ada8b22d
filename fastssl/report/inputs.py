"""What a report is made of: run directories with short labels, and benchmark records, checked before they are used."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastssl.build.losses import LOSSES
from fastssl.errors import UserError
from fastssl.runs import reading
from fastssl.training.own_parts import TAKEN

MAX_BYTES = 64 << 20
OWN_LOSS = "own"
TARGET_METRIC = re.compile(r"time_to_(?P<target>\w+?)_(?P<pct>\d+(?:\.\d+)?)_s")


@dataclass(frozen=True)
class LabeledRun(reading.RunFiles):
    """A run with the name it has in figures, and the group of runs that differ from it in the seed alone."""

    label: str
    slug: str
    group: int
    differences: dict[str, Any]

    @property
    def loss(self) -> str:
        """The name of the recipe's loss, or OWN_LOSS."""
        return OWN_LOSS if self.own_loss else self.recipe.loss.name

    @property
    def loss_label(self) -> str:
        return "own loss" if self.own_loss else LOSSES[self.recipe.loss.name].label

    @property
    def terms(self) -> list[str]:
        """The names of the loss's terms that its steps hold."""
        return own_terms(self) if self.own_loss else [t for t in LOSSES[self.loss].terms if t in self.steps[-1]]


@dataclass(frozen=True)
class Row:
    """One measurement of a benchmark record.

    Attributes:
        impl: what was measured.
        work: what it was given to do.
        metric: its name ends in its unit.
        median, low, high: None when nothing was measured (a target not reached).
        values: single measurements, where the record keeps them.
        n, attempts: how many measurements there are, of how many.
    """

    impl: str
    work: dict[str, Any]
    metric: str
    median: float | None
    low: float | None
    high: float | None
    values: tuple[float, ...]
    n: int
    attempts: int

    @property
    def target(self) -> tuple[str, float] | None:
        """(accuracy, percent) when this is a time to accuracy: `work` names target and pct and the metric is train_s or
        time_to_target_s, or the metric itself is named like time_to_knn20_80_s."""
        named = TARGET_METRIC.fullmatch(self.metric)
        if named:
            return named["target"], float(named["pct"])
        pct = self.work.get("pct", self.work.get("target_pct"))
        if (
            self.metric in ("train_s", "time_to_target_s")
            and "target" in self.work
            and pct is not None
            and is_number(pct)
        ):
            return str(self.work["target"]).removesuffix("_pct"), float(pct)
        return None


@dataclass(frozen=True)
class Record:
    """A benchmark record: its rows, and everything else it says."""

    rows: tuple[Row, ...]
    about: dict[str, Any]


def read_inputs(paths: Sequence[Path]) -> tuple[list[LabeledRun], list[tuple[str, Record]]]:
    """Runs and (name, record), in the order given; a record's name is its file's, with folders that tell it apart.

    Raises:
        UserError: naming the first input that is neither, or is damaged.
    """
    folders: list[Path] = []
    files: dict[Path, Record] = {}
    for path in paths:
        if path.is_dir():
            folders_below = reading.find(path)
            if not folders_below:
                raise UserError(f"{path} holds no run.", "Give a folder that `fastssl train` wrote, or one above it.")
            folders += [folder for folder in folders_below if folder not in folders]
        elif path.is_file():
            files.setdefault(path.resolve(), read_record(path))
        else:
            raise UserError(f"{path} does not exist.", "Give run folders and benchmark records (.json).")
    records = zip(shortest_ends([file.with_suffix("") for file in files]), files.values(), strict=True)
    return labeled([reading.read(folder) for folder in folders]), list(records)


def labeled(runs: Sequence[reading.RunFiles]) -> list[LabeledRun]:
    """Labels are the shortest ends of the folders' paths that tell them apart."""
    runs = [replace(run, own_loss=has_own_loss(run)) for run in runs]
    labels = shortest_ends([run.folder.resolve() for run in runs])
    changes = changes_of(runs)
    kinds = [
        json.dumps([{k: v for k, v in change.items() if k != "seed"}, own_terms(run)], sort_keys=True)
        for run, change in zip(runs, changes, strict=True)
    ]
    groups = list(dict.fromkeys(kinds))
    return [
        LabeledRun(
            **vars(run),
            label=plain(label, 100),
            slug=f"run{i}-" + re.sub(r"[^A-Za-z0-9.-]+", "_", run.folder.name or "run")[:40],
            group=groups.index(kind),
            differences=change,
        )
        for i, (run, label, kind, change) in enumerate(zip(runs, labels, kinds, changes, strict=True))
    ]


def shortest_ends(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths, all of as many parts, that tell them apart."""
    parts = [path.parts for path in paths]
    depth = next((d for d in range(1, 9) if len({p[-d:] for p in parts}) == len(parts)), 9)
    return ["/".join(p[-depth:]) for p in parts]


def has_own_loss(run: reading.RunFiles) -> bool:
    """Whether the loss was a function from Python; before a run's end its steps tell, which lack the recipe's terms."""
    terms = LOSSES[run.recipe.loss.name].terms
    return run.own_loss or bool(run.steps and terms and not any(term in run.steps[-1] for term in terms))


def own_terms(run: reading.RunFiles) -> list[str]:
    """What the steps of a run with a loss of its own hold besides what every step does; empty for other runs."""
    return [name for name in (run.steps[-1] if run.own_loss and run.steps else {}) if name not in {*TAKEN, "loss"}]


def changes_of(runs: Sequence[reading.RunFiles]) -> list[dict[str, Any]]:
    """How the runs differ: their recipes, of which an own loss replaces the section `loss`."""
    changes = reading.differences([run.recipe for run in runs])
    if len({run.own_loss for run in runs}) < 2:
        return changes
    return [
        {k: v for k, v in change.items() if not k.startswith("loss.")} | {"loss": "own loss"}
        if run.own_loss
        else change
        for run, change in zip(runs, changes, strict=True)
    ]


def read_record(path: Path) -> Record:
    """A benchmark record.

    Raises:
        UserError: when the file is not one.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError
        about = json.loads(path.read_bytes())
        rows = tuple(row_of(row) for row in about.pop("rows"))
        str(about["bench"])
        if not isinstance(about.get("hardware", {}), dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a benchmark record.", "Give a file that `fastssl bench` or bench/*.py wrote."
        ) from error
    return Record(rows, about)


def row_of(row: Any) -> Row:
    """Raises ValueError, KeyError, TypeError or AttributeError when the row is not one."""
    median, low, high = (number_or_none(row[name]) for name in ("median", "min", "max"))
    values = tuple(float(value) for value in row.get("values") or () if is_number(value))
    n, work = row["n"], dict(row["work"])
    attempts = row.get("seeds", n)
    if not (is_number(n) and is_number(attempts)):
        raise ValueError
    return Row(
        plain(str(row["impl"])), work, plain(str(row["metric"])), median, low, high, values, int(n), int(attempts)
    )


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < reading.LARGEST_COUNT


def number_or_none(value: Any) -> float | None:
    if value is not None and not is_number(value):
        raise ValueError
    return None if value is None else float(value)


def plain(text: str, most: int = 60) -> str:
    """Printable characters alone, and not too many: names come from files."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"
