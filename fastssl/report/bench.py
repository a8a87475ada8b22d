"""Benchmark records as figures: time to accuracy with its spread, throughput by stage, and every row as a table."""

import json
import math
from collections.abc import Sequence
from typing import Any

from fastssl.report.curves import short_count
from fastssl.report.figure import INK, MUTED, SERIES, Figure, Grid, Section, plot
from fastssl.report.inputs import Record, Row, plain

MOST_BARS = 24


def slugs(names: Sequence[str]) -> list[str]:
    """What the files of each record's figures begin with; numbered where two names look alike."""
    short = ["".join(c if c.isalnum() or c in "-." else "_" for c in name)[:40] for name in names]
    return [slug if short.count(slug) == 1 else f"{slug}-{number}" for number, slug in enumerate(short, start=1)]


def section(name: str, record: Record, *, slug: str) -> Section:
    """One record: bars where rows compare, then its rows.

    Args:
        name: of the record, for people.
        record: to show.
        slug: begins the names of its figures' files.
    """
    timed = [row for row in record.rows if row.target]
    staged = [row for row in record.rows if "stage" in row.work]
    figures = tta_figures(slug, record, timed) + stage_figures(slug, staged)
    if not figures:
        figures = metric_figures(slug, record.rows)
    rows = [cells(row) for row in record.rows]
    heads = ["what", "work", "metric", "median", "least", "most", "n"]
    about = record.about
    intro = ", ".join(plain(str(about[key]), 120) for key in ("command", "date", "commit") if about.get(key))
    return Section(f"Benchmark: {plain(name)}", intro, figures, [Grid(heads, rows, fold=len(rows) > 12)])


def cells(row: Row) -> list[str]:
    n = f"{row.n}" if row.n == row.attempts else f"{row.n} of {row.attempts}"
    return [
        row.impl,
        work_text(row.work),
        row.metric,
        *(figure(v) or absent(row) for v in (row.median, row.low, row.high)),
        n,
    ]


def absent(row: Row) -> str:
    """What a row without a number says: only a target can be missed."""
    return "not reached" if row.target or "target" in row.work or row.attempts > row.n else "not measured"


def figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def work_text(work: dict[str, Any]) -> str:
    parts = (f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in work.items())
    return plain(", ".join(parts), 160)


def tta_figures(slug: str, record: Record, rows: Sequence[Row]) -> list[Figure]:
    """One figure per target: seconds of training until each recipe first reached it."""
    targets = list(dict.fromkeys(row.target for row in rows if row.target))
    return [
        tta_figure(f"{slug}-tta{i}", record, target, [r for r in rows if r.target == target][:MOST_BARS])
        for i, target in enumerate(targets)
    ]


def tta_figure(name: str, record: Record, target: tuple[str, float], rows: Sequence[Row]) -> Figure:
    accuracy, pct = target
    texts = [f"{plain(row.impl, 34)}\n{row.n} of {row.attempts} seeds" for row in rows]

    def draw(axes: Any) -> None:
        bars(axes, rows, texts, unit=" s")
        axes.set_xlabel("seconds of training", color=MUTED)

    caption = (
        f"Bars are medians over seeds, lines run from least to most, points are seeds. {speed_ups(record, target)}"
    )
    return plot(
        name, f"Time to {accuracy} of {pct:g} %", caption.strip(), draw, size_in=(4.3, bars_height_in(len(rows)))
    )


def speed_ups(record: Record, target: tuple[str, float]) -> str:
    """The record's own speed-ups at this target, in words."""
    listed = record.about.get("speed_ups")
    sentences = [speed_up_text(entry, target) for entry in (listed if isinstance(listed, list) else [])]
    return plain(" ".join(sentence for sentence in sentences if sentence), 400)


def speed_up_text(of: Any, target: tuple[str, float]) -> str:
    """One sentence; empty for another target, and for a malformed one: the rows say the same."""
    try:
        if (str(of["metric"]).removesuffix("_pct"), float(of["target_pct"])) != target:
            return ""
        bound = "" if of.get("bound") == "exact" else f"{of['bound']} "
        if of["ratio"] is None:
            return f"{of['recipe']} against {of['against']}: unknown, some seeds of both never reached the target."
        seeds = f"{of['n']} seeds" if "n" in of else "seeds"
        interval = f" ({of['low']:.2f} to {of['high']:.2f} by bootstrap over {seeds})" if of.get("low") else ""
        return f"{of['recipe']} is {bound}{of['ratio']:.2f} times as fast as {of['against']}{interval}."
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return ""


def bars(axes: Any, rows: Sequence[Row], names: Sequence[str], *, unit: str = "") -> None:
    """Medians with a line from least to most and a point per measurement; what was not reached is written out."""
    longest = max((row.high or row.median or 0.0 for row in rows), default=0.0) or 1.0
    impls = list(dict.fromkeys(row.impl for row in rows))
    for y, row in enumerate(rows):
        tint = SERIES[impls.index(row.impl) % len(SERIES)]
        if row.median is None:
            axes.annotate(absent(row), (0, y), (4, 0), textcoords="offset points", va="center", color=MUTED)
            continue
        axes.barh(y, row.median, color=tint, height=0.6, alpha=0.9)
        low, high = row.low if row.low is not None else row.median, row.high if row.high is not None else row.median
        if row.n > 1:
            axes.plot([low, high], [y, y], color=INK, lw=1.2)
            axes.plot(row.values, [y] * len(row.values), "o", ms=3.2, color=INK, lw=0)
        text = f"{figure(row.median)}{unit}"
        at = max(high, row.median)
        axes.annotate(text, (at, y), (6, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.25)
    axes.grid(visible=False)


def bars_height_in(count: int) -> float:
    return min(1.1 + 0.42 * count, 12.0)


def stage_figures(slug: str, rows: Sequence[Row]) -> list[Figure]:
    """Each stage's rate (on a logarithmic axis: the slowest decides) and its share of the step."""
    figures = []
    for metric, title, caption in (
        ("images_per_s", "Throughput by stage", "Images per second of each stage alone; the slowest sets the pace."),
        ("share_pct", "Share of a step", "Percent of the step's time; evaluation's at the recipe's frequency."),
    ):
        chosen = [row for row in rows if row.metric == metric and row.median is not None and row.median > 0][:MOST_BARS]
        if chosen:
            figures.append(stage_figure(f"{slug}-{metric}", title, caption, chosen, log=metric == "images_per_s"))
    return figures


def stage_figure(name: str, title: str, caption: str, rows: Sequence[Row], *, log: bool) -> Figure:
    def draw(axes: Any) -> None:
        bars(axes, rows, [stage_name(row, rows) for row in rows], unit="" if log else " %")
        if log:
            values = [row.low or row.median or 1.0 for row in rows]
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
            axes.set_xlim(10 ** math.floor(math.log10(min(values)) - 0.3), max(row.high or 1.0 for row in rows) * 8)
        axes.set_xlabel("images per second" if log else "% of a step", color=MUTED)

    return plot(name, title, caption, draw, size_in=(4.3, bars_height_in(len(rows))))


def stage_name(row: Row, rows: Sequence[Row]) -> str:
    stage = plain(str(row.work["stage"]), 30)
    return f"{stage}, {plain(row.impl, 34)}" if len({other.impl for other in rows}) > 1 else stage


def metric_figures(slug: str, rows: Sequence[Row]) -> list[Figure]:
    """For any other record: one figure per metric, when its rows are few enough to read."""
    figures = []
    for i, metric in enumerate(dict.fromkeys(row.metric for row in rows)):
        mine = [row for row in rows if row.metric == metric]
        if 2 <= len(mine) <= MOST_BARS and not any(row.median is not None and row.median < 0 for row in mine):
            figures.append(metric_figure(f"{slug}-metric{i}", metric, mine))
    return figures


def metric_figure(name: str, metric: str, rows: Sequence[Row]) -> Figure:
    differing = [k for k in rows[0].work if len({json.dumps(r.work.get(k), sort_keys=True) for r in rows}) > 1]
    names = []
    for row in rows:
        what = work_text({k: row.work.get(k) for k in differing})
        names.append(plain(row.impl, 34) + (f"\n{plain(what, 40)}" if what else ""))

    def draw(axes: Any) -> None:
        bars(axes, rows, names)
        axes.set_xlabel(metric, color=MUTED)

    caption = "Medians; lines run from least to most."
    return plot(name, metric, caption, draw, size_in=(4.3, bars_height_in(len(rows))))
