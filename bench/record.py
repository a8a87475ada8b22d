"""The benchmark record every script here writes: one JSON object with its machine, versions and rows."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastssl.environment import environment


def record(bench: str, rows: list[dict[str, Any]], recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `fastssl.report` reads: rows of {"impl", "work", "metric", "median", "min", "max", "n"}."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"bench": bench, "date": date, **environment(), "recipe": recipe or {}, "rows": rows}


def write(path: Path, bench: str, rows: list[dict[str, Any]], recipe: dict[str, Any] | None = None) -> None:
    """The record as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(bench, rows, recipe), indent=1) + "\n", encoding="utf-8")


def row(impl: str, work: dict[str, Any], metric: str, values: Sequence[float]) -> dict[str, Any]:
    """One row from repeated measurements; the median of an even count is the mean of the middle two."""
    v = sorted(values)
    median = (v[len(v) // 2] + v[(len(v) - 1) // 2]) / 2
    return {
        "impl": impl,
        "work": work,
        "metric": metric,
        "median": median,
        "min": v[0],
        "max": v[-1],
        "n": len(v),
    }
