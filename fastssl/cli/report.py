"""`fastssl report`: one page of what runs and benchmarks show."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastssl.cli.app import JsonOption, app, print_result


@app.command()
def report(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="RUN|RESULT...", help="Run folders, folders of runs, benchmark records.")
    ],
    out: Annotated[Path, typer.Option(help="Where the page and its figures go.")] = Path("report"),
    images: Annotated[int, typer.Option(min=16, max=20000, help="How many images to embed for each run.")] = 1500,
    live: Annotated[
        bool, typer.Option("--live", help="Write the page again while runs train; ends with them.")
    ] = False,
    every_s: Annotated[float, typer.Option(min=1, help="Seconds from one page to the next, with --live.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Draw what runs and benchmarks show: one HTML page that works offline, and every figure as a file."""
    from fastssl.report import report as once
    from fastssl.report.live import live_report

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    if live:
        record = live_report(inputs, out, images=images, every_s=every_s, on_progress=tell)
    else:
        record = once(inputs, out, images=images, on_progress=tell)
    left_out = [f"  {note}" for note in record["skipped"]]
    text = [f"{record['page']} and {len(record['files']) - 1} figures next to it", *(["Left out:"] if left_out else [])]
    print_result(record, "\n".join(text + left_out), as_json)
