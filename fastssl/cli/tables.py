"""Records as tables of plain text, as wide as the terminal."""

import io
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastssl.report.cells import changes_text, clock, percent, value_text


def text_of(table: Table) -> str:
    """The table as text; an unknown width is 160."""
    width = shutil.get_terminal_size((160, 24)).columns
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]


def runs_table(found: Sequence[Mapping[str, Any]]) -> str:
    """`runs.listing` for people."""
    table = Table(box=None, padding=(0, 1), header_style="")
    for name in ("run", "state", "epochs"):
        table.add_column(name, no_wrap=name != "run", overflow="fold")
    for name in ("best kNN", "test kNN", "linear", "views/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("differs in", overflow="fold")
    for row in found:
        progress = f"{row['epoch']:.3g}/{row['epochs']}" if "epochs" in row else ""
        cells = [percent(row.get(name)) for name in ("best_val_pct", "test_knn_pct", "test_linear_pct")]
        speed = f"{row['views_per_s']:,.0f}" if row.get("views_per_s") else ""
        said = row.get("note") or changes_text(row["differences"])
        table.add_row(row["run_dir"], row["state"], progress, *cells, speed, clock(row.get("train_s")), said)
    return text_of(table)


def sweep_table(made: Mapping[str, Any]) -> str:
    """`sweep.sweep` for people: every cell, and the combinations over their seeds when there are several."""
    keys = list(dict.fromkeys(key for cell in made["cells"] for key in cell["changes"]))
    table = Table(box=None, padding=(0, 1), header_style="")
    for name in (*keys, "state", "best kNN", "test kNN", "linear", "views/s", "time"):
        table.add_column(name, justify="left" if name in keys or name == "state" else "right")
    for cell in made["cells"]:
        changed = [value_text(cell["changes"].get(key)) for key in keys]
        accuracies = [percent(cell.get(name)) for name in ("best_val_pct", "test_knn_pct", "test_linear_pct")]
        speed = f"{cell['views_per_s']:,.0f}" if cell.get("views_per_s") else ""
        table.add_row(*changed, cell["state"], *accuracies, speed, clock(cell.get("train_s")))
    text = text_of(table)
    return (
        text if all(one["seeds"] == 1 for one in made["settings"]) else f"{text}\n\n{settings_table(made['settings'])}"
    )


def settings_table(settings: Sequence[Mapping[str, Any]]) -> str:
    """Mean and range over seeds."""
    keys = list(dict.fromkeys(key for one in settings for key in one["changes"]))
    table = Table(box=None, padding=(0, 1), header_style="")
    for name in (*keys, "kNN, mean", "least", "most", "seeds"):
        table.add_column(name, justify="left" if name in keys else "right")
    for one in settings:
        changed = [value_text(one["changes"].get(key)) for key in keys]
        spread = [percent(one[name]) for name in ("mean", "min", "max")]
        table.add_row(*changed, *spread, f"{one['n']} of {one['seeds']}")
    return text_of(table)
