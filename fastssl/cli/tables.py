"""Records as tables of plain text, as wide as the terminal."""

import io
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fastssl.probes import table as probes
from fastssl.report.cells import MetricColumns, changes_text, clock, value_text

LEAST_TEXT = 20  # characters that a column of text folds down to


def plain_table(left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, then columns of numbers, as wide as the terminal; an unknown width is 160.

    Text folds down to LEAST_TEXT characters and numbers are never cut: where that is too wide, each row is a block.
    """
    width = shutil.get_terminal_size((160, 24)).columns
    names = (*left, *right)
    natural = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
    least = [min(size, LEAST_TEXT) if i < len(left) else size for i, size in enumerate(natural)]
    if sum(least) + 2 * len(names) > width:
        return "\n".join(block(names, row, width, left=len(left)) for row in rows)
    table = Table(box=None, padding=(0, 1), header_style="")
    for i, name in enumerate(names):
        is_text = i < len(left)
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]


def block(names: Sequence[str], row: Sequence[str], width: int, *, left: int) -> str:
    """One row as lines: a run's folder, which is never broken, or all `left` columns; then the other values."""
    texts = [f"{name} {value}" for name, value in zip(names, row, strict=True) if value]
    first, rest = ([row[0]], texts[1:]) if names[0] == "run" else (filled(texts[:left], width), texts[left:])
    return "\n".join([*first, *(f"  {line}" for line in filled(rest, width - 2))])


def filled(texts: Sequence[str], width: int) -> list[str]:
    """Texts in lines of at most this width; a longer text has a line of its own."""
    lines: list[str] = []
    for text in texts:
        if lines and cell_len(f"{lines[-1]}; {text}") <= width:
            lines[-1] += f"; {text}"
        else:
            lines.append(text)
    return lines


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`runs.listing` for people: a line (or block) per run, then what tells each from the others."""
    metrics = MetricColumns(rows)
    lines, differences = [], []
    for row in rows:
        progress = f"{row['epoch']:.3g}/{row['epochs']}" if "epochs" in row else ""
        speed = f"{row['views_per_s']:,.0f}" if row.get("views_per_s") else ""
        remark = row.get("note") or changes_text(row["differences"])
        place = (row["run_dir"], row["state"], progress)
        lines.append((*place, *metrics.cells(row), speed, clock(row.get("train_s"))))
        differences += [f"{row['run_dir']}: {remark}"] if remark else []
    below = ["", "Differences", *(f"  {line}" for line in differences)] if differences else []
    table = plain_table(("run", "state", "epochs"), (*metrics.names(), "views/s", "time"), lines)
    return "\n".join([table, *([metrics.note()] if metrics.note() else []), *below])


def sweep_table(record: Mapping[str, Any]) -> str:
    """`sweep.sweep` for people: every cell, and the combinations over their seeds when there are several."""
    cells = record["cells"]
    keys = list(dict.fromkeys(key for cell in cells for key in cell["changes"]))
    metrics = MetricColumns(cells)
    lines = []
    for cell in cells:
        changed = [value_text(cell["changes"].get(key)) for key in keys]
        speed = f"{cell['views_per_s']:,.0f}" if cell.get("views_per_s") else ""
        lines.append((*changed, cell["state"], *metrics.cells(cell), speed, clock(cell.get("train_s"))))
    parts = [plain_table((*keys, "state"), (*metrics.names(), "views/s", "time"), lines)]
    if any(setting["seeds"] > 1 for setting in record["settings"]):
        parts.append(settings_table(record["settings"]))
    return "\n\n".join([*parts, f"{judged_text(record['settings'])} {metrics.note()}".rstrip()])


def judged_text(settings: Sequence[Mapping[str, Any]]) -> str:
    """By what the combinations are compared, in one line."""
    metric = settings[0]["metric"] if settings else None
    if metric is None:
        return "No cell has been evaluated, so there is nothing to compare."
    images = "held-out images" if metric.endswith("_pct") else "pretraining images; without labels it is only a hint"
    return f"Compared by {probes.label_of(metric)} at the last evaluation, on {images}."


def settings_table(settings: Sequence[Mapping[str, Any]]) -> str:
    """Mean and range over seeds."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting["changes"]))
    metric = settings[0]["metric"]
    heads = (f"{probes.label_of(metric) if metric else 'not measured'}, mean", "min", "max", "seeds")
    lines = []
    for setting in settings:
        changed = [value_text(setting["changes"].get(key)) for key in keys]
        numbers = [probes.value_text(metric or "", setting[name]) for name in ("mean", "min", "max")]
        lines.append((*changed, *numbers, f"{setting['n']} of {setting['seeds']}"))
    return plain_table(keys, heads, lines)


def doctor_text(record: dict[str, Any]) -> str:
    """Tables of what `doctor.examine` found."""
    checks = Table("", "", "works", "found", box=None, pad_edge=False)
    for check in record["checks"]:
        works = Text("yes", "green") if check["works"] else Text("no", "red")
        checks.add_row(check["kind"], check["name"], works, check["detail"])
    tables = []
    if record["stages"]:
        stages = Table("stage", "what was timed", Column("img/s", justify="right"), "", box=None, pad_edge=False)
        for stage in record["stages"]:
            remark = "slowest" if stage["name"] == record["slowest"] else "when opened" if stage["once"] else ""
            stages.add_row(stage["name"], stage["work"], f"{stage['images_per_s']:,.0f}", remark)
        tables.append(stages)
    fixes = [f"{check['name']}: {check['fix']}" for check in record["checks"] if check["fix"]]
    with (out := Console(highlight=False, markup=False)).capture() as text:
        out.print(checks, "")
        if fixes:  # lines that are pasted are never broken
            out.print("\n  ".join(["How to fix it", *fixes]), "", soft_wrap=True)
        for table in tables:
            out.print(table, "")
        if record["note"]:
            out.print(record["note"], soft_wrap=True)
    return text.get().rstrip()
