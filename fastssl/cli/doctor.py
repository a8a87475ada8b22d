"""`fastssl doctor`: what works on this machine, and where a recipe's time goes."""

from pathlib import Path
from typing import Annotated

import typer

from fastssl.cli.app import JsonOption, SetOption, app, print_result
from fastssl.errors import UserError


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|DATA]", help="A recipe, a .beton or a folder of shards to time.")
    ] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report what works on this machine, why the rest does not, and which stage of a recipe is the slowest."""
    from fastssl.bench.doctor import examine
    from fastssl.build.run_data import load
    from fastssl.cli.tables import doctor_text

    is_data = target is not None and (target.endswith(".beton") or Path(target).is_dir())
    if changes and (is_data or not target):
        raise UserError("-s changes a recipe, and none is given.", "Give a recipe, or leave -s out.")
    result = examine(Path(target) if is_data and target else load(target, changes or ()) if target else None)
    print_result(result, "" if as_json else doctor_text(result), as_json)
