"""The benchmark record, one JSON object with machine, versions, recipe, data and rows: `compare` reads nothing else."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastssl.runs.environment import environment
from fastssl.runs.files import atomic_json


def record(bench: str, rows: list[dict[str, Any]], recipe: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """One result.

    Args:
        bench: which benchmark; only results of the same one are compared.
        rows: from `row`.
        recipe: resolved, as JSON values.
        more: keys of this benchmark alone, such as data_digest.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"bench": bench, "date": date, **environment(), "recipe": recipe or {}, **more, "rows": rows}


def write(
    path: Path, bench: str, rows: list[dict[str, Any]], recipe: dict[str, Any] | None = None, **more: Any
) -> None:
    """The record as a file."""
    save(path, record(bench, rows, recipe, **more))


def save(path: Path, result: dict[str, Any]) -> None:
    """A finished record as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_json(path, result)


def row(impl: str, work: dict[str, Any], metric: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """One row from repeated measurements, the values kept in their order; of none, the median is None.

    Args:
        impl: what was measured; peers are rows of the same table.
        work: what it was given to do; only rows of equal work are compared.
        metric: its name ends in its unit, as in views_per_s.
        values: one a repeat.
        more: keys of this row alone, such as note.
    """
    return {"impl": impl, "work": work, "metric": metric, **spread(values), "values": list(values), **more}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median (of an even count, the mean of the middle two), least, most and how many."""
    v = sorted(values)
    if not v:
        return {"median": None, "min": None, "max": None, "n": 0}
    return {"median": (v[len(v) // 2] + v[(len(v) - 1) // 2]) / 2, "min": v[0], "max": v[-1], "n": len(v)}
