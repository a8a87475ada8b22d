"""The four figures of the claims, from the runs alone. Bands and bars run from the lowest seed to the highest."""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from claims_verdicts import Cell, Found, Run, at_epoch, finals

COLORS = ("#1f6f8b", "#dd8452", "#6a9f58", "#8172b3", "#c44e52", "#937860")
GRAY = "0.6"


def draw(folder: Path, found: Found, reference: Cell, dim: int, metric: str) -> None:
    """claims_dims.png, claims_views.png, claims_fractions.png, claims_pareto.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    folder.mkdir(parents=True, exist_ok=True)
    for name, panels, fill in (
        ("dims", 1, dims_figure),
        ("views", 3, views_figure),
        ("fractions", 2, fractions_figure),
        ("pareto", 1, pareto_figure),
    ):
        fig, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.4), layout="constrained", sharey=True)
        fill(axes, found, reference, dim, metric)
        fig.savefig(folder / f"claims_{name}.png", dpi=150)
        plt.close(fig)


def log_axis(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """A logarithmic x axis with plain numbers, at the given ticks or at every doubling."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(base=2))
    axis.xaxis.set_minor_locator(NullLocator())
    if ticks is not None:
        axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 10_000 else f"{value / 1000:,.0f}k")


def named(metric: str) -> str:
    """ridge_pct is "ridge accuracy, %"."""
    return f"{metric.removesuffix('_pct')} accuracy, %" if metric.endswith("_pct") else metric


def label_lines(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def bars(axis: Any, at: Sequence[float], groups: Sequence[list[float]], **style: Any) -> None:
    """Means joined by a line, with bars from lowest to highest."""
    means = [statistics.mean(g) for g in groups]
    low = [m - min(g) for m, g in zip(means, groups, strict=True)]
    high = [max(g) - m for m, g in zip(means, groups, strict=True)]
    axis.errorbar(at, means, yerr=[low, high], marker="o", ms=4, lw=1.6, capsize=3, **style)


def dims_figure(axis: Any, found: Found, reference: Cell, dim: int, metric: str) -> None:
    for weight, color in (("scaled", COLORS[0]), ("fixed", COLORS[1])):
        mine = {c.dim: finals(r) for c, r in found.items() if (c.views, c.fraction, c.weight) == (2, 1.0, weight)}
        if weight == "scaled" and reference in found:
            mine[reference.dim] = finals(found[reference])
        if mine:
            bars(axis, sorted(mine), [mine[d] for d in sorted(mine)], color=color, label=f"weight {weight}")
    log_axis(axis, sorted({c.dim for c in found}))
    axis.set(xlabel="projector width D", ylabel=f"test {named(metric)}", title="accuracy against D, two views")
    label_lines(axis)


def views_figure(axes: Any, found: Found, reference: Cell, dim: int, metric: str) -> None:
    mine = {c.views: r for c, r in found.items() if (c.dim, c.fraction, c.weight) == (dim, 1.0, "scaled")}
    for axis, what, label in zip(axes, (0, 1, 2), ("epochs", "views forwarded", "seconds of training"), strict=True):
        for color, views in zip(COLORS, sorted(mine), strict=False):
            curve_band(axis, mine[views], what, color=color, label=f"V = {views}")
        axis.set(xlabel=label)
        log_axis(axis)
    axes[0].set_ylabel(f"validation {named(metric)}")
    label_lines(axes[0])


def curve_band(axis: Any, runs: Sequence[Run], what: int, *, color: str, label: str) -> None:
    points = list(zip(*(run.curve for run in runs), strict=False))
    x = [statistics.mean(p[what] for p in at) for at in points]
    y = [[p[3] for p in at] for at in points]
    axis.plot(x, [statistics.mean(v) for v in y], color=color, label=label, marker="o", ms=3, lw=1.6)
    axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=color, alpha=0.15, lw=0)


def fractions_figure(axes: Any, found: Found, reference: Cell, dim: int, metric: str) -> None:
    """In equal time on test, and on validation after as many epochs as two views of all images take."""
    mine = {(c.views, c.fraction): r for c, r in found.items() if (c.dim, c.weight) == (dim, "scaled")}
    epoch = mine[2, 1.0][0].curve[-1][0] if (2, 1.0) in mine else 0.0
    lines = (
        ("V × fraction constant", COLORS[0], [k for k in mine if math.isclose(k[0] * k[1], 2)]),
        ("V = 2", COLORS[1], [k for k in mine if k[0] == 2]),
    )
    for label, color, keys in lines:
        keys = sorted(keys, key=lambda k: k[1])
        for axis, read in zip(axes, (finals, partial(at_epoch, epoch=epoch)), strict=True):
            if keys:
                bars(axis, [100 * k[1] for k in keys], [read(mine[k]) for k in keys], color=color, label=label)
    for axis, title, of in zip(axes, ("in equal time", f"after {epoch:g} epochs"), ("test", "validation"), strict=True):
        log_axis(axis, sorted({100 * fraction for _, fraction in mine}))
        axis.set(xlabel="share of the images, %", ylabel=f"{of} {named(metric)}", title=f"accuracy {title}")
    label_lines(axes[0])


def pareto_figure(axis: Any, found: Found, reference: Cell, dim: int, metric: str) -> None:
    """Every evaluation of every run, and the front no other point beats in both time and error."""
    points = []
    for cell, runs in found.items():
        x, y = [p[2] for r in runs for p in r.curve], [100 - p[3] for r in runs for p in r.curve]
        points += list(zip(x, y, strict=True))
        style = {"color": COLORS[1], "label": reference.name, "zorder": 3} if cell == reference else {"color": GRAY}
        axis.scatter(x, y, s=9, **style)
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    axis.step(*zip(*front, strict=True), where="post", color=COLORS[0], lw=1.6, label="front") if front else None
    log_axis(axis)
    axis.set(xlabel="seconds of training", ylabel=f"error, 100 - validation {named(metric)}", title="error and time")
    label_lines(axis)
