"""What the measured runs say about each of the paper's claims, in numbers with their spread.

"As good as" allows one point, or twice the standard error of the difference when that is more; "better"
asks for half a point or twice that error. Accuracies are top-1 in percent; intervals are +- one standard
deviation over seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

HOLDS, PART, NOT, OPEN = "holds", "holds in part", "does not hold at this scale", "not measured yet"
CLAIMS = {
    "dims": "1. Small projectors suffice when the orthogonality weight is scaled up as D goes down.",
    "views": "2. More views per image give better and earlier features.",
    "data": "3. With more views a quarter of the images gives the same accuracy.",
    "time": "4. The same accuracy in half the wall-clock time.",
}


@dataclass(frozen=True)
class Cell:
    """One configuration: views, projector width, whether the weight follows D, share of the images."""

    views: int
    dim: int
    weight: str
    fraction: float

    @property
    def name(self) -> str:
        return f"V{self.views}-D{self.dim}-{self.weight}-f{self.fraction:g}"


@dataclass(frozen=True)
class Run:
    """One seed of a cell: test accuracy, seconds of training, (epoch, views, train_s, val accuracy) points, the commit
    that it ran at, and the other accuracies on the test set by name."""

    seed: int
    final: float
    train_s: float
    curve: list[tuple[float, float, float, float]]
    commit: str | None = None
    also: dict[str, float] = field(default_factory=dict)


Found = Mapping[Cell, Sequence[Run]]


def finals(runs: Sequence[Run]) -> list[float]:
    return [run.final for run in runs]


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and count, for people."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f} % (n = {len(values)})" if len(values) > 1 else f"{mean} % (n = 1)"


def standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the difference of two means; 0 when neither was repeated."""
    return math.sqrt(sum(statistics.variance(x) / len(x) for x in (a, b) if len(x) > 1))


def as_good(a: Sequence[float], b: Sequence[float]) -> bool:
    return statistics.mean(a) - statistics.mean(b) >= -max(1.0, 2 * standard_error(a, b))


def better(a: Sequence[float], b: Sequence[float]) -> bool:
    return statistics.mean(a) - statistics.mean(b) > max(0.5, 2 * standard_error(a, b))


def at_epoch(runs: Sequence[Run], epoch: float) -> list[float]:
    """Validation accuracy of each seed at an epoch, between evaluations on a straight line."""
    return [float(np.interp(epoch, [p[0] for p in r.curve], [p[3] for p in r.curve])) for r in runs]


def mean_run(runs: Sequence[Run]) -> Run:
    """The seeds' mean, point by point of their curves."""
    curve = [
        tuple(map(statistics.mean, zip(*points, strict=True))) for points in zip(*(r.curve for r in runs), strict=False)
    ]
    return Run(-1, statistics.mean(finals(runs)), statistics.mean(r.train_s for r in runs), curve)


def seconds_to(run: Run, target: float) -> float | None:
    """When the curve first reaches the target, between evaluations on a straight line; None when never."""
    before = (0.0, 0.0, 0.0, 0.0)
    for point in run.curve:
        if point[3] >= target:
            part = (target - before[3]) / (point[3] - before[3]) if before[2] else 1.0
            return before[2] + max(part, 0.0) * (point[2] - before[2])
        before = point
    return None


def verdicts(found: Found, reference: Cell, dim: int) -> list[dict[str, str]]:
    """One {"claim", "outcome", "text"} per claim, in order."""
    judges = {"dims": dims_verdict, "views": views_verdict, "data": data_verdict, "time": time_verdict}
    said = []
    for name, claim in CLAIMS.items():
        outcome, text = judges[name](found, reference, dim)
        if outcome != OPEN and min(map(len, found.values())) == 1:
            outcome += " (some cells have one seed only)"
        said.append({"claim": claim, "outcome": outcome, "text": text})
    return said


def dims_verdict(found: Found, reference: Cell, dim: int) -> tuple[str, str]:
    scaled = {c.dim: finals(r) for c, r in found.items() if (c.views, c.fraction, c.weight) == (2, 1.0, "scaled")}
    fixed = {c.dim: finals(r) for c, r in found.items() if (c.views, c.fraction, c.weight) == (2, 1.0, "fixed")}
    small = sorted(d for d in scaled if d in fixed and d < reference.dim)
    if reference not in found or not small:
        return OPEN, "it needs the reference and one smaller D with both weights."
    goal = fixed[reference.dim]
    results = [f"D = {d}: {spread(scaled[d])} scaled, {spread(fixed[d])} fixed" for d in small]
    text = f"Two views; D = {reference.dim} with its own weight gives {spread(goal)}. {'; '.join(results)}."
    good = [d for d in small if as_good(scaled[d], goal)]
    helped = [d for d in small if better(scaled[d], fixed[d])]
    if good == small and helped:
        return HOLDS, text
    if good == small:
        return PART, f"{text} Small projectors suffice, but the fixed weight is no worse here."
    return (PART, f"{text} As good as the reference only at D = {good}.") if good else (NOT, text)


def views_verdict(found: Found, reference: Cell, dim: int) -> tuple[str, str]:
    by_views = {c.views: r for c, r in found.items() if (c.dim, c.fraction, c.weight) == (dim, 1.0, "scaled")}
    if 2 not in by_views or len(by_views) < 2:
        return OPEN, f"it needs D = {dim} with two views and with more."
    results, earlier, best = [], [], []
    for views in sorted(v for v in by_views if v > 2):
        epoch = min(run.curve[-1][0] for v in (2, views) for run in by_views[v])
        many, two = at_epoch(by_views[views], epoch), at_epoch(by_views[2], epoch)
        earlier += [views] if better(many, two) else []
        best += [views] if better(finals(by_views[views]), finals(by_views[2])) else []
        results.append(
            f"V = {views}: {spread(many)} against {spread(two)} on validation at epoch {epoch:g}, "
            f"{spread(finals(by_views[views]))} on test after the same views in all"
        )
    text = f"V = 2 gives {spread(finals(by_views[2]))} on test. {'; '.join(results)}."
    if set(earlier) & set(best):
        return HOLDS, text
    if earlier:
        return PART, f"{text} Better at equal epochs, not at equal views and time."
    return (PART, f"{text} Better at equal views, not at equal epochs.") if best else (NOT, text)


def data_verdict(found: Found, reference: Cell, dim: int) -> tuple[str, str]:
    """Twice: after equally many views, where fewer images mean more epochs, and after equally many epochs, the paper's
    reading. Where two views of all images were not trained with `dim`, the reference stands for them."""
    mine = {(c.views, c.fraction): r for c, r in found.items() if (c.dim, c.weight) == (dim, "scaled")}
    pairs = sorted((v, f) for v, f in mine if v > 2 and math.isclose(v * f, 2))
    all_images, equal = "V = 2 on 100 %", "In equal time"
    if (2, 1.0) not in mine and reference in found:
        mine[2, 1.0] = found[reference]
        all_images, equal = f"{all_images} with D = {reference.dim}", "After equally many views"
    if (2, 1.0) not in mine or not pairs:
        return OPEN, f"it needs D = {dim}, two views of all images and more views of fewer."
    few, epoch = sorted((v, f) for v, f in mine if v == 2 and f < 1), mine[2, 1.0][0].curve[-1][0]
    late = {key: finals(runs) for key, runs in mine.items()}
    early = {key: at_epoch(runs, epoch) for key, runs in mine.items()}
    results = [
        "; ".join(
            f"{all_images if f == 1 else f'V = {v} on {100 * f:g} %'} {spread(at[v, f])}"
            for v, f in [(2, 1.0), *pairs, *few]
        )
        for at in (late, early)
    ]
    text = f"{equal}, on test: {results[0]}. After {epoch:g} epochs each, on validation: {results[1]}."
    good = [f for v, f in pairs if as_good(late[v, f], late[2, 1.0])]
    if not good:
        return NOT, text
    least = min(good)
    if least > 0.25:
        return PART, f"{text} Down to {100 * least:g} % of the images."
    if (2, least) not in few or not as_good(late[2, least], late[2, 1.0]):
        return HOLDS, text
    if better(early[2, 1.0], early[2, least]):
        return PART, f"{text} At equal epochs more views make up for fewer images; {equal.lower()} two views do so too."
    return PART, f"{text} Fewer images cost nothing even with two views here, so views are not what saves them."


def times_sooner(found: Found, reference: Cell) -> tuple[float, float, dict[Cell, float]]:
    """What the reference ends with on validation, after how many seconds, and how many times sooner each cell that gets
    there does, on average over seeds."""
    base = found[reference]
    target = statistics.mean(run.curve[-1][3] for run in base)
    # Its curve may have been there before it ended, so the reference is given the same reading as its rivals.
    whole = seconds_to(mean_run(base), target - 1e-9) or statistics.mean(run.train_s for run in base)
    reached = {cell: seconds_to(mean_run(runs), target - 1e-9) for cell, runs in found.items()}
    return target, whole, {cell: whole / seconds for cell, seconds in reached.items() if seconds is not None}


def time_verdict(found: Found, reference: Cell, dim: int) -> tuple[str, str]:
    rivals = {c for c in found if c.weight == "scaled" and c.dim < reference.dim}
    if reference not in found or not rivals:
        return OPEN, "it needs the reference and one scaled cell."
    target, whole, every = times_sooner(found, reference)
    ratios = {cell: ratio for cell, ratio in every.items() if cell in rivals}
    text = f"{reference.name} ends at {target:.1f} % on validation, first reached after {whole:.0f} s."
    if not ratios:
        return NOT, f"{text} No scaled cell reaches that on average over seeds."
    cell = max(ratios, key=lambda c: ratios[c])
    text += f" {cell.name} reaches it in {whole / ratios[cell]:.0f} s, {ratios[cell]:.1f} times sooner"
    text += f" ({len(ratios)} of {len(rivals)} scaled cells reach it)."
    return (HOLDS if ratios[cell] >= 2 else PART if ratios[cell] > 1.1 else NOT), text
