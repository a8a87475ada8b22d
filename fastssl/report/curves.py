"""Curves of runs: loss and its terms, accuracy against epochs, views and time, effective rank, where time goes."""

from collections.abc import Callable, Sequence
from typing import Any

from fastssl.recipe.presets import view_table
from fastssl.report.figure import INK, LINE, MUTED, SERIES, Figure, Section, plot
from fastssl.report.inputs import LabeledRun
from fastssl.runs.reading import Numbers

TERMS = ("loss", "invariance", "redundancy", "variance", "covariance")
MAX_POINTS = 400
PROBES = {"knn": "kNN", "ridge": "ridge", "linear": "linear"}


def section(found: Sequence[LabeledRun]) -> Section:
    """What the records of all runs show together."""
    figures, skipped = [], []
    trained = [run for run in found if run.steps]
    if trained:
        names = [name for name in TERMS if any(name in run.steps[-1] for run in trained)]
        figures += [loss_figure(trained, name) for name in names]
    evaluated = [run for run in found if run.evaluations]
    if evaluated:
        figures = accuracy_figures(evaluated) + figures
        if any("rankme" in e for run in evaluated for e in run.evaluations):
            figures.append(rank_figure(evaluated))
    if trained:
        figures.append(time_figure(trained))
    tested = [run for run in found if test_accuracies(run)]
    if tested:
        figures.insert(0, test_figure(tested))
    skipped += [f"{run.label}: no step is logged yet, so it has no curves." for run in found if not run.steps]
    skipped += [
        f"{run.label}: no evaluation is logged, so it has no accuracy curve (data.val_count holds images out)."
        for run in found
        if run.steps and not run.evaluations
    ]
    return Section("Training", figures=figures, skipped=skipped)


def color(run: LabeledRun) -> str:
    return SERIES[run.group % len(SERIES)]


def curve_axes(axes: Any, found: Sequence[LabeledRun], *, labels: bool = True) -> None:
    """The legend, when there is more than one line to tell apart."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    if labels and len(once) > 1:
        axes.legend(once.values(), once.keys(), loc="best")
    axes.margins(x=0.02)


def group_name(run: LabeledRun, found: Sequence[LabeledRun]) -> str:
    """What sets a group of seeds apart; the run's own label when it is alone."""
    alike = [other for other in found if other.group == run.group]
    if len(alike) == 1:
        return run.label
    return f"{alike[0].label} + {len(alike) - 1} other seed" + ("s" if len(alike) > 2 else "")


def loss_figure(found: Sequence[LabeledRun], name: str) -> Figure:
    def draw(axes: Any) -> None:
        for run in found:
            points = [(step["epoch"], step[name]) for step in run.steps if name in step]
            line(axes, thinned(points), color=color(run), label=group_name(run, found), lw=1.6)
        axes.set_xlabel("epochs")
        curve_axes(axes, found)

    what = "The loss as minimized" if name == "loss" else f"The loss's {name} term, without its weight"
    many = max(len(run.steps) for run in found) > MAX_POINTS
    caption = what + (", averaged over neighboring log steps." if many else ", at each log step.")
    return plot(f"curve-{name}", name.capitalize(), caption, draw)


def line(axes: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    marker = "o" if len(points) < 12 else ""
    axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, ms=3.5, **style)


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbors, so that a long run stays a small file."""
    size = -(-len(points) // most) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def accuracy_figures(found: Sequence[LabeledRun]) -> list[Figure]:
    """Validation accuracy against epochs, views forwarded and training time."""
    axes_of: tuple[tuple[str, str, Callable[[LabeledRun, Numbers], float]], ...] = (
        ("epochs", "epochs", lambda run, e: e["epoch"]),
        ("views", "views forwarded", lambda run, e: e["images"] * len(view_table(run.recipe.augment))),
        ("time", "minutes of training", lambda run, e: e["train_s"] / 60),
    )
    return [accuracy_figure(found, name, label, x_of) for name, label, x_of in axes_of]


def accuracy_figure(
    found: Sequence[LabeledRun], name: str, label: str, x_of: Callable[[LabeledRun, Numbers], float]
) -> Figure:
    alone = len(found) == 1

    def draw(axes: Any) -> None:
        for run in found:
            keys = [k for k in run.evaluations[-1] if probe_name(k)] if alone else [run.knn]
            for i, key in enumerate(keys):
                points = [(x_of(run, e), e[key]) for e in run.evaluations if key in e]
                tint = SERIES[i % len(SERIES)] if alone else color(run)
                line(axes, points, color=tint, label=probe_name(key) if alone else group_name(run, found), lw=1.8)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %" if alone else f"{probe_name(found[0].knn)} accuracy, %")
        if name == "epochs":
            axes.xaxis.get_major_locator().set_params(integer=True)
        if name == "views":
            axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
        curve_axes(axes, found)

    caption = "Top-1 on held-out images, backbone frozen; evaluation and saving are not in the time."
    return plot(f"accuracy-{name}", f"Accuracy against {name}", caption, draw)


def probe_name(key: str) -> str:
    """knn20_pct is kNN (k = 20); empty for what is not an accuracy."""
    name = key.removeprefix("test_").removesuffix("_pct")
    if not key.endswith("_pct"):
        return ""
    k = name.removeprefix("knn")
    return f"kNN (k = {k})" if name.startswith("knn") and k.isdigit() else PROBES.get(name, "")


def short_count(x: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def rank_figure(found: Sequence[LabeledRun]) -> Figure:
    def draw(axes: Any) -> None:
        for run in found:
            points = [(e["epoch"], e["rankme"]) for e in run.evaluations if "rankme" in e]
            line(axes, points, color=color(run), label=group_name(run, found), lw=1.8)
        axes.set_xlabel("epochs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        curve_axes(axes, found)
        axes.set_ylim(0, 1.1 * max(e["rankme"] for run in found for e in run.evaluations if "rankme" in e) or 1)

    caption = "RankMe of the held-out features: about how many directions are in use. A fall to one is a collapse."
    return plot("rankme", "Effective dimensions", caption, draw)


def test_accuracies(run: LabeledRun) -> dict[str, float]:
    """Final accuracies in percent by what they are called, baselines last."""
    first = run.knn.removesuffix("_pct")
    found = {probe_name(k): v for k, v in run.summary.items() if k.startswith("test_") and probe_name(k)}
    baselines = {"raw_pixel": "raw pixels, kNN", "untrained": "untrained network, kNN"}
    return found | {text: run.summary[k] for b, text in baselines.items() if (k := f"{b}_{first}_pct") in run.summary}


def test_figure(found: Sequence[LabeledRun]) -> Figure:
    """Bars of one run's accuracies, or one row of points a group of seeds."""
    alone = len(found) == 1
    if alone:
        bars = {name: [value] for name, value in test_accuracies(found[0]).items()}
    else:
        bars = {}
        for run in found:
            if f"test_{run.knn}" in run.summary:
                bars.setdefault(group_name(run, found), []).append(run.summary[f"test_{run.knn}"])

    def draw(axes: Any) -> None:
        names = list(bars)
        means = [sum(values) / len(values) for values in bars.values()]
        tints = [LINE if alone and ("raw" in n or "untrained" in n) else SERIES[0] for n in names]
        horizontal_bars(axes, names, means, tints)
        for y, values in enumerate(bars.values()):
            if len(values) > 1:
                axes.plot(values, [y] * len(values), "o", ms=4, color=INK, alpha=0.7, lw=0)
        axes.set_xlabel("accuracy on test, %" if alone else f"{probe_name(found[0].knn)} accuracy on test, %")

    caption = "Backbone frozen; measured once, at the end." + ("" if alone else " A bar is a mean, a point one seed.")
    return plot("accuracy-test", "Accuracy on test", caption, draw)


def horizontal_bars(axes: Any, names: Sequence[str], values: Sequence[float], tints: Sequence[str]) -> None:
    """Bars from the top down, each with its value at its end."""
    axes.barh(range(len(names)), values, color=list(tints), height=0.62)
    for y, value in enumerate(values):
        axes.annotate(f"{value:.1f}", (value, y), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.margins(x=0.14)


def time_figure(found: Sequence[LabeledRun]) -> Figure:
    """Of each second of training: waiting for images, making views, and the network with its update."""

    def draw(axes: Any) -> None:
        names = [run.label for run in found]
        last = [run.steps[-1] for run in found]
        load = [step.get("load_pct", 0.0) for step in last]
        views = [step.get("views_pct", 0.0) for step in last]
        network = [max(0.0, 100 - a - b) for a, b in zip(load, views, strict=True)]
        left = [0.0] * len(found)
        kinds = (("waiting for images", load, 1), ("making views", views, 2), ("network", network, 0))
        for text, shares, tint in kinds:
            axes.barh(names, shares, left=left, color=SERIES[tint], height=0.5, label=text)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        for y, run in enumerate(found):
            rate = f"{run.views_per_s:,.0f} views/s" if run.views_per_s else ""
            axes.annotate(rate, (100, y), (-6, 0), textcoords="offset points", va="center", ha="right", color="#ffffff")
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("share of training time, %", color=MUTED)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1.2, handlelength=1.0)

    caption = "Measured in the loop; on a GPU work is queued, so waits show where the host stood still."
    height = 1.5 + 0.34 * len(found)
    return plot("time", "Where the time goes", caption, draw, size_in=(4.3, min(max(height, 1.9), 9.0)))
