"""Curves of runs: loss and its terms, accuracy against epochs, views and time, effective rank, where time goes."""

from collections.abc import Callable, Sequence
from typing import Any

from fastssl.probes import table as probes
from fastssl.recipe.presets import view_table
from fastssl.report.figure import INK, LINE, MUTED, SERIES, Figure, Section, plot
from fastssl.report.inputs import OWN_LOSS, LabeledRun, plain
from fastssl.runs.reading import Numbers

MAX_POINTS = 400
FIRST_SPIKE = 4.0  # times the range of the rest that a curve's beginning may take before the axis leaves it out


def section(runs: Sequence[LabeledRun]) -> Section:
    """What the records of all runs show together."""
    skipped = []
    trained = [run for run in runs if run.steps]
    judged = [run for run in runs if any(run.recipe.evaluate.metric in e for e in run.evaluations)]
    figures = accuracy_figures(judged) if judged else []
    figures += loss_figures(trained)
    figures += probe_figures([run for run in runs if run.evaluations])
    if trained:
        figures.append(time_figure(trained))
    tested = [run for run in runs if test_accuracies(run)]
    if tested:
        figures.insert(0, test_figure(tested))
    skipped += [f"{run.label}: no step is logged yet, so it has no curves." for run in runs if not run.steps]
    skipped += [
        f"{run.label}: no accuracy is logged, so it has no accuracy curve (data.val_count holds labeled images out)."
        for run in runs
        if run.steps and run not in judged
    ]
    return Section("Training", figures=figures, skipped=skipped)


def color(run: LabeledRun) -> str:
    return SERIES[run.group % len(SERIES)]


def curve_axes(axes: Any, runs: Sequence[LabeledRun], *, labels: bool = True) -> None:
    """The legend, when there is more than one line to tell apart."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    if labels and len(once) > 1:
        axes.legend(once.values(), once.keys(), loc="best")
    axes.margins(x=0.02)


def group_name(run: LabeledRun, runs: Sequence[LabeledRun]) -> str:
    """What sets a group of runs of one recipe apart; the run's own label when it is alone."""
    alike = [other for other in runs if other.group == run.group]
    if len(alike) == 1:
        return run.label
    others, seeds = len(alike) - 1, {other.recipe.seed for other in alike}
    kind = "other seed" if len(seeds) == len(alike) else "more run"
    return f"{alike[0].label} + {others} {kind}" + ("s" if others > 1 else "")


def loss_figures(runs: Sequence[LabeledRun]) -> list[Figure]:
    """One chart per loss, since values of two losses do not compare, and one per term."""
    figures = []
    names = list(dict.fromkeys(run.loss for run in runs))
    for name in names:
        alike = [run for run in runs if run.loss == name]
        terms = dict.fromkeys(term for run in alike for term in ("loss", *run.terms))
        several = len(names) > 1
        for i, term in enumerate(terms):
            file = f"term{i}" if i and name == OWN_LOSS else term  # an own term may have any name
            figures.append(loss_figure(alike, term, file=f"curve-{file}" + (f"-{name}" if several else "")))
    return figures


def loss_figure(runs: Sequence[LabeledRun], name: str, *, file: str) -> Figure:
    curves = [[(step["epoch"], step[name]) for step in run.steps if name in step] for run in runs]
    top = robust_top([[y for _, y in curve] for curve in curves])

    def draw(axes: Any) -> None:
        for run, points in zip(runs, curves, strict=True):
            line(axes, thinned(points), color=color(run), label=group_name(run, runs), lw=1.6)
        axes.set_xlabel("epochs")
        curve_axes(axes, runs)
        if top is not None:
            axes.set_ylim(top=top)

    label, is_own = runs[0].loss_label, runs[0].own_loss
    what = f"The {plain(name)} term of {label}, without its weight"
    if name == "loss" or is_own:
        what = (
            f"The loss of {label} as minimized" if name == "loss" else f"The {plain(name)} term of a loss from Python"
        )
    many = max(len(run.steps) for run in runs) > MAX_POINTS
    caption = what + (", averaged over neighboring log steps." if many else ", at each log step.")
    caption += " The first steps lie above the axis." if top is not None else ""
    title = f"{capital(name)} of {label}" if file.endswith(f"-{runs[0].loss}") else capital(name)
    return plot(file, title, caption, draw)


def capital(name: str) -> str:
    return plain(name[:1].upper() + name[1:])


def robust_top(curves: Sequence[Sequence[float]]) -> float | None:
    """Where the axis ends when the first tenth of the steps would take most of it; None where all of it is shown."""
    rest = [y for curve in curves for y in curve[len(curve) // 10 + 1 :]]
    highest = max((y for curve in curves for y in curve), default=0.0)
    if len(rest) < 10:
        return None
    low, top = min(rest), max(rest)
    return top + 0.1 * (top - low) if highest - low > FIRST_SPIKE * (top - low) > 0 else None


def line(axes: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    marker = "o" if len(points) < 12 else ""
    axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, ms=3.5, **style)


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbors, so that a long run stays a small file."""
    size = -(-len(points) // most) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def accuracy_figures(runs: Sequence[LabeledRun]) -> list[Figure]:
    """Validation accuracy against epochs, views forwarded and training time."""
    axes_of: tuple[tuple[str, str, Callable[[LabeledRun, Numbers], float]], ...] = (
        ("epochs", "epochs", lambda run, e: e["epoch"]),
        ("views", "views forwarded", lambda run, e: e["images"] * len(view_table(run.recipe.augment))),
        ("time", "minutes of training", lambda run, e: e["train_s"] / 60),
    )
    return [accuracy_figure(runs, name, label, x_of) for name, label, x_of in axes_of]


def accuracy_figure(
    runs: Sequence[LabeledRun], name: str, label: str, x_of: Callable[[LabeledRun, Numbers], float]
) -> Figure:
    alone = len(runs) == 1

    def draw(axes: Any) -> None:
        for run in runs:
            keys = list(accuracy_keys(run)) if alone else [run.recipe.evaluate.metric]
            for i, key in enumerate(keys):
                points = [(x_of(run, e), e[key]) for e in run.evaluations if key in e]
                tint = SERIES[i % len(SERIES)] if alone else color(run)
                line(axes, points, color=tint, label=probes.label_of(key) if alone else group_name(run, runs), lw=1.8)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %" if alone else f"{probes.label_of(runs[0].recipe.evaluate.metric)} accuracy, %")
        if name == "epochs":
            axes.xaxis.get_major_locator().set_params(integer=True)
        if name == "views":
            axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
        curve_axes(axes, runs)

    count = runs[0].evaluations[-1].get("val_images")
    images = f"{count:,.0f} held-out images" if count else "held-out images"
    caption = f"Top-1 on {images}, backbone frozen; evaluation and saving are not in the time."
    return plot(f"accuracy-{name}", f"Accuracy against {name}", caption, draw)


def accuracy_keys(run: LabeledRun) -> list[str]:
    """Keys of the last evaluation's accuracies, in the table's order."""
    return [key for probe in probes.ACCURACIES for key in run.evaluations[-1] if probe.matches(key)]


def short_count(x: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def probe_figures(runs: Sequence[LabeledRun]) -> list[Figure]:
    """A curve for each figure of the table that has a direction and needs no label, where it changes at all."""
    figures = []
    for probe in probes.FIGURES:
        values = {e[probe.key] for run in runs for e in run.evaluations if probe.key in e}
        if probe.higher_is_better is not None and values and (any(values) or probe is probes.FIGURES[0]):
            figures.append(probe_figure(runs, probe))
    return figures


def probe_figure(runs: Sequence[LabeledRun], probe: probes.Probe) -> Figure:
    def draw(axes: Any) -> None:
        for run in runs:
            points = [(e["epoch"], e[probe.key]) for e in run.evaluations if probe.key in e]
            line(axes, points, color=color(run), label=group_name(run, runs), lw=1.8)
        axes.set_xlabel("epochs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        curve_axes(axes, runs)
        axes.set_ylim(0, 1.1 * highest or 1.0)

    highest = max(e[probe.key] for run in runs for e in run.evaluations if probe.key in e)
    last = next(e for run in runs for e in reversed(run.evaluations) if probe.key in e)
    count = f"{last['spectrum_images']:,.0f} " if "spectrum_images" in last else ""
    better = "Higher is better." if probe.higher_is_better else "Lower is better."
    caption = f"{probe.meaning} Of the features of {count}pretraining images, without labels. {better}"
    return plot(probe.key, probe.label[0].upper() + probe.label[1:], caption, draw)


def test_accuracies(run: LabeledRun) -> dict[str, float]:
    """Final accuracies in percent by what they are called, baselines last."""
    tested = probes.accuracies_in(run.summary, prefix=probes.TEST)
    metric = run.recipe.evaluate.metric
    baselines = {
        f"kNN of {what}": run.summary[key]
        for prefix, what in probes.BASELINES.items()
        if (key := f"{prefix}{metric}") in run.summary
    }
    return tested | baselines


def test_figure(runs: Sequence[LabeledRun]) -> Figure:
    """Bars of one run's accuracies, or one row of points for each group of runs of one recipe."""
    alone = len(runs) == 1
    metric = runs[0].recipe.evaluate.metric
    if alone:
        bars = {name: [value] for name, value in test_accuracies(runs[0]).items()}
    else:
        bars = {}
        for run in runs:
            if (key := f"{probes.TEST}{run.recipe.evaluate.metric}") in run.summary:
                bars.setdefault(group_name(run, runs), []).append(run.summary[key])

    def draw(axes: Any) -> None:
        names = list(bars)
        means = [sum(values) / len(values) for values in bars.values()]
        tints = [LINE if alone and n.startswith("kNN of ") else SERIES[0] for n in names]
        horizontal_bars(axes, names, means, tints)
        for y, values in enumerate(bars.values()):
            if len(values) > 1:
                axes.plot(values, [y] * len(values), "o", ms=4, color=INK, alpha=0.7, lw=0)
        axes.set_xlabel("accuracy on test, %" if alone else f"{probes.label_of(metric)} accuracy on test, %")

    count = runs[0].summary.get(f"{probes.TEST}images")
    images = f" on {count:,.0f} images" if count else ""
    caption = f"Backbone frozen; measured once, at the end{images}."
    return plot(
        "accuracy-test",
        "Accuracy on test",
        caption + ("" if alone else " Bars are means; points are single runs."),
        draw,
    )


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


def time_figure(runs: Sequence[LabeledRun]) -> Figure:
    """Of each second of training: waiting for images, making views, and the network with its update."""

    def draw(axes: Any) -> None:
        names = [run.label for run in runs]
        last = [run.steps[-1] for run in runs]
        load = [step.get("load_pct", 0.0) for step in last]
        views = [step.get("views_pct", 0.0) for step in last]
        network = [max(0.0, 100 - a - b) for a, b in zip(load, views, strict=True)]
        left = [0.0] * len(runs)
        kinds = (("waiting for images", load, 1), ("making views", views, 2), ("network", network, 0))
        for text, shares, tint in kinds:
            axes.barh(names, shares, left=left, color=SERIES[tint], height=0.5, label=text)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        for y, run in enumerate(runs):
            rate = f"{run.views_per_s:,.0f} views/s" if run.views_per_s else ""
            axes.annotate(rate, (100, y), (-6, 0), textcoords="offset points", va="center", ha="right", color="#ffffff")
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("share of training time, %", color=MUTED)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1.2, handlelength=1.0)

    caption = "Measured in the loop; on a GPU work is queued, so waits show where the host stood still."
    height = 1.5 + 0.34 * len(runs)
    return plot("time", "Where the time goes", caption, draw, size_in=(4.3, min(max(height, 1.9), 9.0)))
