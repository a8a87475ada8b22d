"""Records as rich tables for a terminal."""

import io
import shutil
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def rendered(*parts: Any) -> str:
    """Tables as wide as the terminal allows, and lines, which are never broken: one may be pasted."""
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]


def machine_text(result: dict[str, Any]) -> str:
    """Stages down, their figures across, the ceilings and the bottleneck beneath."""
    rows: list[Row] = result["rows"]
    stages = [row for row in rows if row["impl"] == "fastssl"]
    first = stages[0]["work"]
    title = f"{result['recipe']['name']}: {first['backbone']}, {first['batch']} images x {first['views']} views"
    table = Table(title=f"{title} of {first['side_px']} px on {first['device']}", title_justify="left")
    for name in ("stage", "ms a step [min, max]", "share", "images/s", "of compute", "of bandwidth"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in dict.fromkeys(row["work"]["stage"] for row in stages):
        of = {row["metric"]: row for row in stages if row["work"]["stage"] == stage}
        table.add_row(
            stage,
            spread_text(of["ms_per_step"], 2),
            *(pct(of.get(name)) if name.endswith("pct") else count(of.get(name)) for name in COLUMNS),
        )
    best = [f"{row['impl']} {row['max']:,.2f} {UNITS[row['metric']]}" for row in rows if row["impl"] != "fastssl"]
    lines = [
        "Ceilings measured: " + ", ".join(best) + ".",
        f"Bottleneck: {result['bottleneck']['text']}",
        *result["notes"],
    ]
    return rendered(table, *lines)


COLUMNS = ("share_pct", "images_per_s", "compute_pct", "bandwidth_pct")
UNITS = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s"}


def variants_text(result: dict[str, Any]) -> str:
    """One line a variant, the first of them the one that others are compared with."""
    rows: list[Row] = result["rows"]
    table = Table(title=f"{result['bench']}: {result['recipe']['name']}", title_justify="left")
    metric = rows[0]["metric"]
    for name in ("variant", f"{metric} [min, max]", "against the first"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        if row["metric"] == metric:
            table.add_row(row["impl"], spread_text(row, 0), f"{row['median'] / rows[0]['median']:.3f}x")
    return rendered(table, *result["notes"])


def table_of(title: str, columns: list[str], lines: list[list[str]]) -> Table:
    """Text to the left in the first column, figures to the right in the others."""
    table = Table(title=title, title_justify="left")
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at else "left")
    for line in lines:
        table.add_row(*line)
    return table


def spread_text(row: Row | None, digits: int) -> str:
    if row is None or row["median"] is None:
        return ""
    return f"{row['median']:,.{digits}f} [{row['min']:,.{digits}f}, {row['max']:,.{digits}f}]"


def pct(row: Row | None) -> str:
    return f"{row['median']:.1f} %" if row else ""


def count(row: Row | None) -> str:
    return f"{row['median']:,.0f}" if row else ""


def tta_text(result: dict[str, Any]) -> str:
    """Per target: when each recipe reached it, and how much sooner than the first."""
    parts: list[Any] = []
    rows: list[Row] = result["rows"]
    for metric, target in result["targets"].items():
        lines = []
        for name in result["recipes"]:
            of = {r["metric"]: r for r in rows if r["impl"] == name and r["work"].get("target") == metric}
            reached = of["train_s"]
            arrived = f"{reached['n']} of {reached['seeds']}"
            figures = [spread_text(reached, 1) or "not reached", arrived]
            figures += [count(of[key]) if of[key]["median"] else "" for key in ("steps", "views")]
            lines.append([name, *figures, f"{of['best_pct']['max']:.1f} %"])
        title = f"{metric.removesuffix('_pct')} {target:g} %"
        columns = ["recipe", "seconds of training [min, max]", "seeds", "steps", "views", "best seen"]
        parts.append(table_of(title, columns, lines))
    said = [*[speed_up_text(gain) for gain in result["speed_ups"]], f"Clock: {result['clock']}."]
    return rendered(*parts, *said, *made_earlier(result))


def made_earlier(result: dict[str, Any]) -> list[str]:
    """A sentence where runs of an earlier call are of another commit or machine than this record."""

    def maker(of: dict[str, Any]) -> tuple[Any, ...]:
        hardware = of.get("hardware") or {}
        return of.get("commit"), hardware.get("cpu"), hardware.get("gpus")

    runs = [(name, trial) for name, trials in result["curves"].items() for trial in trials]
    runs = [(name, trial) for name, trial in runs if any((trial.get("made_by") or {}).values())]
    other = [f"{name}, seed {trial['seed']}" for name, trial in runs if maker(trial["made_by"]) != maker(result)]
    if not other:
        return []
    return [f"Made earlier, by another commit or machine (see curves in the record): {'; '.join(other)}."]


def speed_up_text(gain: dict[str, Any]) -> str:
    """One sentence."""
    to = f"{gain['metric'].removesuffix('_pct')} {gain['target_pct']:g} %"
    if gain["ratio"] is None:
        pair = f"{gain['recipe']} against {gain['against']}"
        return f"{pair} to {to}: some seeds of both never reached it, so there is no ratio."
    bound = "" if gain["bound"] == "exact" else gain["bound"] + " "
    interval = (
        "one seed, so no interval"
        if gain["low"] is None
        else f"{gain['low']:.2f} to {gain['high']:.2f} by bootstrap over {gain['n']} seeds"
    )
    return f"{gain['recipe']} reaches {to} {bound}{gain['ratio']:.2f} times as fast as {gain['against']} ({interval})."


def compare_text(result: dict[str, Any]) -> str:
    """What lies beyond the noise first, then the rest."""
    order = sorted(result["rows"], key=lambda row: row["verdict"] not in ("higher", "lower", "not reached"))
    lines = [
        [
            " ".join(
                [row["impl"], *(str(what[k]) for k in ("stage", "target", "part") if k in (what := row | row["work"]))]
            ),
            row["metric"],
            spread_text(row["a"], 1),
            spread_text(row["b"], 1),
            f"{row['ratio']:.3f}" if row["ratio"] else "",
            row["verdict"],
        ]
        for row in order
    ]
    said = [f"{name}: {', '.join(keys)}" for name, keys in result["differences"].items() if keys]
    alone = [f"{result['unmatched']} rows are in one of them alone."] if result["unmatched"] else []
    table = table_of(result["of"], ["what", "metric", "A [min, max]", "B [min, max]", "B / A", "B is"], lines)
    return rendered(table, *(["Also different:", *said] if said else []), *alone)
