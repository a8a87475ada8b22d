"""Two results of one benchmark, row by row: what differs beyond the noise. Results of unlike work are refused.

A difference is beyond the noise when the ranges of the repeats do not touch and there are enough repeats that this
happens by chance at most once in twenty times (4 against 4: 2 of 70 orders).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastssl.errors import UserError, option, raise_all

KEYS = ("bench", "rows", "recipe", "hardware")
IDENTITY = ("impl", "work", "metric", "part")  # of a row; a part is one of the measurements that a record joins
CHANCE = 0.05


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Rows of both with their ratio b / a and a verdict, and the keys of recipe, hardware and versions that differ.

    Raises:
        UserError: when bench, data, targets or work are not the same, or a result has a row twice.
    """
    refuse(a, b)
    ours, theirs = keyed(a), keyed(b)
    recipes = "recipes" if "recipes" in a or "recipes" in b else "recipe"  # `recipe` is then the first of them
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
        "differences": {name: differing(a.get(name), b.get(name)) for name in (recipes, "hardware", "versions")},
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
    labels = {key: a[key] for key in IDENTITY if key in a}
    of = [{key: each[key] for key in ("median", "min", "max", "n")} for each in (a, b)]
    ratio = b["median"] / a["median"] if a["median"] and b["median"] is not None else None
    return labels | {"a": of[0], "b": of[1], "ratio": ratio, "verdict": verdict(a, b)}


def verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    """higher, lower, within noise, too few repeats, and where either has no median, not reached or not measured."""
    if a["median"] is None or b["median"] is None:
        return "not reached" if has_target(a) or has_target(b) else "not measured"
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


def has_target(row: dict[str, Any]) -> bool:
    """Whether the row is of a target, which a seed may not reach."""
    return "target" in row["work"] or row.get("seeds", row["n"]) > row["n"]


def keyed(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by what they measured.

    Raises:
        UserError: naming rows that measured the same.
    """
    rows: dict[str, dict[str, Any]] = {}
    twice = []
    for row in result["rows"]:
        key = json.dumps([row.get(name) for name in IDENTITY], sort_keys=True)
        if key in rows:
            what = f"{row['metric']} of {row['impl']} {short(row['work'])}"
            twice.append(UserError(f"A result has the row {what} twice.", "Remove all but one, or name their `part`."))
        rows[key] = row
    raise_all(twice)
    return rows


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
    wrong = wrong_row(result["rows"])
    if wrong:
        raise UserError(f"{path} is not a benchmark record: {wrong}.", "Give a file that `fastssl bench` wrote.")
    return result


def wrong_row(rows: Any) -> str:
    """What makes rows no measurements, in words; empty when they are."""
    if not isinstance(rows, list):
        return "its rows are not a list"
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            return f"row {number} is not a mapping"
        wrong = [key for key, fits in FIELDS.items() if not fits(row.get(key, MISSING))]
        wrong += ["seeds"] if "seeds" in row and not is_count(row["seeds"]) else []
        if wrong:
            return f"row {number} has no valid {' and '.join(wrong)}"
        if row["n"] and row["median"] is not None and None in (row["min"], row["max"]):
            return f"row {number} has a median without min and max"
    return ""


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_number_or_none(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


MISSING = object()
FIELDS: dict[str, Callable[[Any], bool]] = {
    "impl": is_text,
    "work": lambda value: isinstance(value, dict),
    "metric": is_text,
    "median": is_number_or_none,
    "min": is_number_or_none,
    "max": is_number_or_none,
    "n": is_count,
}
