"""Records as tables of plain text, as wide as the terminal."""

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def text_of(table: Table) -> str:
    """The table as text; an unknown width is 160."""
    width = shutil.get_terminal_size((160, 24)).columns
    console = Console(file=io.StringIO(), width=width, color_system=None)
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


def changes_text(changes: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()
    )


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def clock(seconds: float | None) -> str:
    """Seconds as a person says them: 9 s, 9.4 min, 3.2 h."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
