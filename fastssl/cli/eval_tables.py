"""An evaluation's record as a table for people."""

import io
from typing import Any

from rich.console import Console
from rich.table import Table


def table(record: dict[str, Any], *, width: int = 100) -> str:
    """The rows, the spectrum's figures, and what they were measured on."""
    lines = Table("probe", "layer", "views", "labels", "top-1 %", "95 % interval", box=None, pad_edge=False)
    for row in record["rows"]:
        lines.add_row(
            row["probe"],
            row["layer"],
            str(row["views"]),
            f"{row['label_share_pct']:g} % ({row['train_images']:,})",
            f"{row['pct']:.2f}",
            f"{row['low_pct']:.2f} to {row['high_pct']:.2f}",
        )
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False)
    console.print(lines)
    for layer, found in record["spectrum"].items():
        console.print(f"{layer}: {figures_text(found)}", soft_wrap=True)
    for text in record["warnings"]:
        console.print(f"Warning: {text}", soft_wrap=True)
    judged = record["judged"]
    console.print(f"On {record['on']}: {judged['images']:,} images of {judged['path']}", soft_wrap=True)
    return out.getvalue().rstrip()


def figures_text(found: dict[str, float]) -> str:
    parts = [f"{found['dims']:.0f} dimensions, {found['dead_dims']:.0f} dead", f"RankMe {found['rankme']:.1f}"]
    parts.append(f"participation ratio {found['participation_ratio']:.1f}")
    if "alpha" in found:
        parts.append(f"alpha {found['alpha']:.2f} (R² {found['alpha_r2']:.2f})")
    return ", ".join([*parts, f"orthogonality residual {found['orthogonality_residual']:.3f}"])
