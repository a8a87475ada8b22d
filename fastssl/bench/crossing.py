"""When a run first reached an accuracy, and how much sooner one recipe does than another. Pure functions of curves.

A run that did not reach the target is a result: in medians its time is longer than any, in a speed-up what it trained
for is the least it can be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Crossing:
    """The first evaluation at or above a target; the true moment lies up to `gap_s` before it."""

    train_s: float
    steps: int
    epochs: float
    images: int
    views: int
    value_pct: float
    gap_s: float


def first_crossing(
    evaluations: Sequence[dict[str, Any]], metric: str, target_pct: float, *, views: int
) -> Crossing | None:
    """The crossing, or None when no evaluation is at or above the target.

    Args:
        evaluations: records of metrics.jsonl, in their order.
        metric: such as knn20_pct.
        target_pct: in percent.
        views: V, views of each image.
    """
    before_s = 0.0
    for evaluation in evaluations:
        if evaluation.get(metric, -math.inf) >= target_pct:
            return Crossing(
                train_s=evaluation["train_s"],
                steps=evaluation["step"],
                epochs=evaluation["epoch"],
                images=evaluation["images"],
                views=evaluation["images"] * views,
                value_pct=evaluation[metric],
                gap_s=round(evaluation["train_s"] - before_s, 3),
            )
        before_s = evaluation["train_s"]
    return None


def median_or_none(values: Sequence[float | None]) -> float | None:
    """Median where None is longer than any number; None when the median itself was not reached, and of nothing."""
    if not values:
        return None
    median = float(np.median([math.inf if value is None else value for value in values]))
    return median if math.isfinite(median) else None


@dataclass(frozen=True)
class Timed:
    """Seconds to the target, or seconds trained in vain."""

    seconds: float
    reached: bool


def speed_up(
    base: Sequence[Timed], other: Sequence[Timed], *, resamples: int = 10_000, level: float = 0.95
) -> dict[str, Any]:
    """How many times sooner `other` gets there: ratio of median times with its bootstrap interval over seeds.

    Returns:
        ratio, low, high, n; bound is "exact", "at least" (seeds of the base did not arrive), "at most" (seeds of the
        other did not) or "unknown" (of both; then there is no ratio). With one seed there is no interval, and with
        fewer than six it holds the ratio of the true medians less often than `level` says.
    """
    bound = {(True, True): "exact", (False, True): "at least", (True, False): "at most", (False, False): "unknown"}[
        all(run.reached for run in base), all(run.reached for run in other)
    ]
    if not base or not other:
        bound = "unknown"
    result: dict[str, Any] = {"bound": bound, "ratio": None, "low": None, "high": None, "n": min(len(base), len(other))}
    if bound == "unknown":
        return result
    rng = np.random.default_rng(0)
    a, b = (np.array([run.seconds for run in timed]) for timed in (base, other))
    result["ratio"] = float(np.median(a) / np.median(b))
    if result["n"] > 1:
        medians = [np.median(x[rng.integers(0, len(x), (resamples, len(x)))], axis=1) for x in (a, b)]
        low, high = np.quantile(medians[0] / medians[1], [(1 - level) / 2, (1 + level) / 2])
        result |= {"low": float(low), "high": float(high)}
    return result
