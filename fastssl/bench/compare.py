"""Two results of one benchmark, row by row: what differs beyond the noise. Results of unlike work are refused.

A difference is beyond the noise when the ranges of the repeats do not touch and there are enough repeats that this
happens by chance at most once in twenty times (4 against 4: 2 of 70 orders).
"""

import json
import math
from pathlib import Path
from typing import Any

from fastssl.errors import UserError, option

KEYS = ("bench", "rows", "recipe", "hardware")
CHANCE = 0.05


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Rows of both with their ratio b / a and a verdict, and the keys of recipe, hardware and versions that differ.

    Raises:
        UserError: when bench, data, targets or work are not the same.
    """
    refuse(a, b)
    ours, theirs = keyed(a), keyed(b)
    common = [key for key in ours if key in theirs]
    if not common:
        raise UserError(
            f"The two results have no row of equal work: {first_difference(a['rows'], b['rows'])}.",
            "Measure both with the same settings.",
        )
    alone = [name for rows, others in ((ours, theirs), (theirs, ours)) for name in rows if name not in others]
    return {
        "bench": "compare",
        "of": a["bench"],
        "a": identity(a),
        "b": identity(b),
        "rows": [compared(ours[key], theirs[key]) for key in common],
        "unmatched": len(alone),
        "differences": {name: differing(a.get(name), b.get(name)) for name in ("recipe", "hardware", "versions")},
    }


def refuse(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Results of another benchmark, other data or other targets say nothing about each other."""
    for key, fix in (
        ("bench", "Compare two results of one benchmark."),
        ("data_digest", "Measure both on the same file."),
        ("targets", f"Run `fastssl bench tta` with the same {option('target')}; its finished runs are used again."),
    ):
        if a.get(key) != b.get(key):
            raise UserError(f"The two results differ in {key}: {short(a.get(key))} and {short(b.get(key))}.", fix)


def compared(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    labels = {key: a[key] for key in ("impl", "work", "metric")}
    of = [{key: each[key] for key in ("median", "min", "max", "n")} for each in (a, b)]
    ratio = b["median"] / a["median"] if a["median"] and b["median"] is not None else None
    return labels | {"a": of[0], "b": of[1], "ratio": ratio, "verdict": verdict(a, b)}


def verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    """higher, lower, within noise, too few repeats, or not reached."""
    if a["median"] is None or b["median"] is None:
        return "not reached" if a["median"] is not b["median"] else "within noise"
    (_, most_a), (_, most_b) = of = repeats(a), repeats(b)
    if not (b["min"] > most_a or most_b < a["min"]):
        return "within noise"
    if 2 / math.comb(sum(n for n, _ in of), of[0][0]) > CHANCE:
        return "too few repeats"
    return "higher" if b["min"] > most_a else "lower"


def repeats(row: dict[str, Any]) -> tuple[int, float]:
    """How many there were, and the largest value; that of a seed which did not arrive is beyond any."""
    seeds = row.get("seeds", row["n"])
    return seeds, row["max"] if seeds == row["n"] else math.inf


def keyed(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {json.dumps([r["impl"], r["work"], r["metric"]], sort_keys=True): r for r in result["rows"]}


def first_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> str:
    """In words, of the first rows."""
    if not a or not b:
        return "one of them is empty"
    work = differing(a[0]["work"], b[0]["work"])
    return ", ".join(work) + " differ" if work else f"{a[0]['impl']} and {b[0]['impl']}"


def differing(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two trees differ, with both values."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [f"{prefix or 'all'} ({short(a)} and {short(b)})"]
    keys = sorted({*a, *b})
    return [k for key in keys for k in differing(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]


def identity(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result.get(key) for key in ("date", "commit", "command")}


def short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def read(path: Path) -> dict[str, Any]:
    """A benchmark record from its file.

    Raises:
        UserError: when it is absent or not one.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}.", "Give a file that `fastssl bench` wrote."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON.", "Give a file that `fastssl bench` wrote.") from error
    if not isinstance(result, dict) or any(key not in result for key in KEYS):
        raise UserError(f"{path} is not a benchmark record.", "Give a file that `fastssl bench` wrote.")
    return result
