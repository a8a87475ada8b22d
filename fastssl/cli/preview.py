"""`fastssl preview`: draw a recipe's views of real images."""

from pathlib import Path
from typing import Annotated

import typer

from fastssl.cli.app import JsonOption, RecipeArgument, SetOption, app, print_result


@app.command()
def preview(
    recipe: RecipeArgument,
    changes: SetOption = None,
    out: Annotated[Path, typer.Option(help="The .png to write.")] = Path("preview.png"),
    images: Annotated[int, typer.Option(min=1, max=64, help="How many images to show.")] = 6,
    epoch: Annotated[int, typer.Option(min=0, help="Whose draws to show.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw a recipe's views of real images, and every operation at four strengths."""
    from fastssl import build
    from fastssl.cli.progress import conversion_progress
    from fastssl.report.preview import check_out
    from fastssl.report.preview import preview as run

    check_out(out)
    resolved = build.run_data.load(recipe, changes or ())
    with conversion_progress() as progress:
        build.data.ensure_data(resolved, progress=progress, only_train=True)
    written = [str(path) for path in run(resolved, out, images=images, epoch=epoch)]
    print_result({"files": written}, "\n".join(written), as_json)
