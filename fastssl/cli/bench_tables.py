"""Records as rich tables for a terminal."""

import io
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def rendered(*parts: Any) -> str:
    """Tables and lines as text, colored only where the terminal is asked to."""
    console = Console(file=io.StringIO(), width=110, highlight=False, markup=False)
    for part in parts:
        console.print(part)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]


def machine_text(made: dict[str, Any]) -> str:
    """Stages down, their figures across, the ceilings and the bottleneck beneath."""
    rows: list[Row] = made["rows"]
    stages = [one for one in rows if one["impl"] == "fastssl"]
    first = stages[0]["work"]
    title = f"{made['recipe']['name']}: {first['backbone']}, {first['batch']} images x {first['views']} views"
    table = Table(title=f"{title} of {first['side_px']} px on {first['device']}", title_justify="left")
    for name in ("stage", "ms a step [min, max]", "share", "images/s", "of compute", "of bandwidth"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in dict.fromkeys(one["work"]["stage"] for one in stages):
        of = {one["metric"]: one for one in stages if one["work"]["stage"] == stage}
        table.add_row(
            stage,
            spread_text(of["ms_per_step"], 2),
            *(pct(of.get(name)) if name.endswith("pct") else count(of.get(name)) for name in COLUMNS),
        )
    best = [f"{one['impl']} {one['max']:,.2f} {UNITS[one['metric']]}" for one in rows if one["impl"] != "fastssl"]
    lines = ["Ceilings measured: " + ", ".join(best) + ".", f"Bottleneck: {made['bottleneck']['text']}", *made["notes"]]
    return rendered(table, *lines)


COLUMNS = ("share_pct", "images_per_s", "compute_pct", "bandwidth_pct")
UNITS = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s"}


def variants_text(made: dict[str, Any]) -> str:
    """One line a variant, the first of them the one that others are compared with."""
    rows: list[Row] = made["rows"]
    table = Table(title=f"{made['bench']}: {made['recipe']['name']}", title_justify="left")
    metric = rows[0]["metric"]
    for name in ("variant", f"{metric} [min, max]", "against the first"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for one in rows:
        if one["metric"] == metric:
            table.add_row(one["impl"], spread_text(one, 0), f"{one['median'] / rows[0]['median']:.3f}x")
    return rendered(table, *made["notes"])


def table_of(title: str, columns: list[str], lines: list[list[str]]) -> Table:
    """Text to the left in the first column, figures to the right in the others."""
    table = Table(title=title, title_justify="left")
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at else "left")
    for line in lines:
        table.add_row(*line)
    return table


def spread_text(one: Row | None, digits: int) -> str:
    if one is None or one["median"] is None:
        return ""
    return f"{one['median']:,.{digits}f} [{one['min']:,.{digits}f}, {one['max']:,.{digits}f}]"


def pct(one: Row | None) -> str:
    return f"{one['median']:.1f} %" if one else ""


def count(one: Row | None) -> str:
    return f"{one['median']:,.0f}" if one else ""


def tta_text(made: dict[str, Any]) -> str:
    """Per target: when each recipe reached it, and how much sooner than the first."""
    parts: list[Any] = []
    rows: list[Row] = made["rows"]
    for metric, target in made["targets"].items():
        lines = []
        for name in made["recipes"]:
            of = {r["metric"]: r for r in rows if r["impl"] == name and r["work"].get("target") == metric}
            reached = of["train_s"]
            arrived = f"{reached['n']} of {reached['seeds']}"
            figures = [spread_text(reached, 1) or "not reached", arrived]
            figures += [count(of[key]) if of[key]["median"] else "" for key in ("steps", "views")]
            lines.append([name, *figures, f"{of['best_pct']['max']:.1f} %"])
        title = f"{metric.removesuffix('_pct')} {target:g} %"
        columns = ["recipe", "seconds of training [min, max]", "seeds", "steps", "views", "best seen"]
        parts.append(table_of(title, columns, lines))
    return rendered(*parts, *[speed_up_text(one) for one in made["speed_ups"]], f"Clock: {made['clock']}.")


def speed_up_text(one: dict[str, Any]) -> str:
    """One sentence."""
    to = f"{one['metric'].removesuffix('_pct')} {one['target_pct']:g} %"
    if one["ratio"] is None:
        return (
            f"{one['recipe']} against {one['against']} to {to}: seeds of both did not arrive, so nothing can be said."
        )
    bound = "" if one["bound"] == "exact" else one["bound"] + " "
    interval = (
        "one seed, so no interval" if one["low"] is None else f"95 % interval {one['low']:.2f} to {one['high']:.2f}"
    )
    return f"{one['recipe']} reaches {to} {bound}{one['ratio']:.2f} times as fast as {one['against']} ({interval})."


def compare_text(made: dict[str, Any]) -> str:
    """What lies beyond the noise first, then the rest."""
    order = sorted(made["rows"], key=lambda one: one["verdict"] not in ("higher", "lower", "not reached"))
    lines = [
        [
            " ".join([one["impl"], *(str(one["work"][k]) for k in ("stage", "target") if k in one["work"])]),
            one["metric"],
            spread_text(one["a"], 1),
            spread_text(one["b"], 1),
            f"{one['ratio']:.3f}" if one["ratio"] else "",
            one["verdict"],
        ]
        for one in order
    ]
    said = [f"{name}: {', '.join(keys)}" for name, keys in made["differences"].items() if keys]
    alone = [f"{made['unmatched']} rows are in one of them alone."] if made["unmatched"] else []
    table = table_of(made["of"], ["what", "metric", "A [min, max]", "B [min, max]", "B / A", "B is"], lines)
    return rendered(table, *(["Also different:", *said] if said else []), *alone)
