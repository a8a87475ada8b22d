"""An evaluation's record as a table for people."""

import io
import shutil
from typing import Any

from rich.console import Console
from rich.table import Table

from fastssl.cli.account import many, source_lines, warning_lines
from fastssl.probes.table import figures_text


def table(record: dict[str, Any]) -> str:
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
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    console = Console(file=out, width=width, highlight=False, markup=False)
    if record["rows"]:
        console.print(lines)
    for layer, metrics in record["spectrum"].items():
        console.print(f"{layer}: {figures_text(metrics)}", soft_wrap=True)
    for text in record["warnings"]:
        console.print(f"Warning: {text}", soft_wrap=True)
    judged = record["judged"]
    step = f", checkpoint of step {record['step']:,}" if record["step"] is not None else ""
    step += ", averaged weights (optim.ema)" if record["averaged"] else ""
    images = "pretraining images without labels" if record["on"] == "pretraining" else record["on"]
    place = f"{judged['path']} at {record['side_px']} px{step}"
    console.print(f"On {images}: n = {judged['images']:,} of {place}", soft_wrap=True)
    if record["on"] == "pretraining":
        console.print("No accuracy: name labeled images with --data for one.", soft_wrap=True)
    for part in (record["train"], judged):
        for text in part_lines(part or {}):
            console.print(text, soft_wrap=True)
    return out.getvalue().rstrip()


def part_lines(part: dict[str, Any]) -> list[str]:
    """What the source of a part held and what was passed over; nothing of a .beton."""
    if "source" not in part:
        return []
    skipped = f", {part['skipped']} skipped" if part["skipped"] else ""
    first = f"{part['source']}, split {part['split']}: {many(part['images'], 'labeled image')} used{skipped}."
    return [first, *source_lines(part["account"]), *warning_lines(part["notices"])]
