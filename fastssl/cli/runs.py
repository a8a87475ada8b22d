"""`fastssl runs`: list runs with their state, accuracy, speed and how their recipes differ."""

from pathlib import Path
from typing import Annotated

import typer

from fastssl.cli.app import JsonOption, app, print_result


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run, or a folder of runs.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List runs with their state, best accuracy, speed and how their recipes differ."""
    from fastssl.cli.tables import runs_table
    from fastssl.runs.reading import listing

    rows = listing(folder)
    print_result({"runs": rows}, runs_table(rows) if rows else f"There are no runs in {folder}.", as_json)
