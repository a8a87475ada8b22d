"""`fastssl sweep`: run a grid of recipes, resume it, and tabulate it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastssl.cli.app import JsonOption, RecipeArgument, SetOption, app, print_result
from fastssl.cli.stopped import same_command
from fastssl.errors import Interrupted


@app.command()
def sweep(
    recipe: RecipeArgument,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", metavar="SECTION.KEY=A,B,C", help="Values to try; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each combination, with seeds of their own.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Holds the runs; runs/<name>-sweep when absent.")] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train every combination of a grid; the same command again continues where it stopped.

    Exit codes: 0 all cells are done, 2 some failed, 75 stopped by a signal after saving.
    """
    from fastssl.cli.progress import conversion_progress
    from fastssl.cli.tables import sweep_table
    from fastssl.report.cells import changes_text
    from fastssl.training import guards
    from fastssl.training.progress import TrainingProgress, console
    from fastssl.training.sweep import parse_grid
    from fastssl.training.sweep import sweep as run

    def observe(record: dict[str, Any]) -> None:
        if record["event"] == "cell":
            console.print(f"Cell {record['number']} of {record['of']}: {changes_text(record['changes'])}")
        else:
            progress(record)

    try:
        with conversion_progress() as converting, TrainingProgress() as progress:
            result = run(
                recipe,
                parse_grid(grid or ()),
                seeds=seeds,
                out=out,
                changes=changes or (),
                observe=observe,
                convert_progress=converting,
            )
    except Interrupted as stop:
        print(f"Stopped by {stop.name} after saving.\nContinue: {same_command()}", file=sys.stderr)
        sys.exit(guards.EXIT_CODE)
    failed = [cell for cell in result["cells"] if cell["error"]]
    for cell in failed:
        print(f"Failed: {changes_text(cell['changes'])}: {cell['error']}", file=sys.stderr)
    print_result(result, sweep_table(result), as_json)
    if failed:
        sys.exit(2)
