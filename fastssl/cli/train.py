"""`fastssl train`: pretrain a backbone as a recipe says."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastssl.cli.app import JsonOption, RecipeArgument, SetOption, app, print_result
from fastssl.errors import Interrupted


@app.command()
def train(
    recipe: RecipeArgument,
    changes: SetOption = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where results go; runs/<name> when absent.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint; safe to give always.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, shapes, steps and an estimate.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Pretrain a backbone as a recipe says."""
    from fastssl.recipe.load import load

    resolved = load(recipe, changes or ())
    if dry_run:
        from fastssl.bench.dry_run import describe

        described = describe(resolved)
        print_result(described, described["text"], as_json)
        return
    from fastssl.build import ranks
    from fastssl.cli.progress import TrainingProgress, console, conversion_progress, summary_text
    from fastssl.training import guards
    from fastssl.training.loop import train as run
    from fastssl.training.trackers import Writers

    folder = run_dir or Path("runs") / resolved.name
    try:
        with (
            conversion_progress() as converting,
            TrainingProgress() as progress,
            Writers(resolved, folder, warn=lambda text: console.print(f"Warning: {text}")) as writers,
        ):

            def observe(record: dict[str, Any]) -> None:
                for told in (progress, writers):
                    told(record)

            summary = run(resolved, run_dir=folder, resume=resume, observe=observe, convert_progress=converting)
            writers.summary(summary)
    except Interrupted as stop:
        if ranks.is_main():
            print(stop, file=sys.stderr)
        ranks.stop()
        sys.exit(guards.EXIT_CODE)
    if ranks.is_main():
        print_result(summary, summary_text(summary), as_json)
    ranks.stop()
