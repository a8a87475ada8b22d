"""`fastssl train`: pretrain a backbone as a recipe says."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastssl.cli.app import JsonOption, RecipeOrImagesArgument, SetOption, app, print_result
from fastssl.cli.stopped import command, same_command
from fastssl.errors import Interrupted, UserError

if TYPE_CHECKING:
    from fastssl.bench.own_images import Plan
    from fastssl.recipe.schema import Model


@app.command()
def train(
    recipe: RecipeOrImagesArgument,
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
    """Pretrain a backbone as a recipe says, or on a folder of images, which is converted and given a recipe first."""
    from fastssl.recipe.load import load

    plan = images_plan(recipe, changes or ())
    if plan is not None and dry_run and not (plan.data.exists() and plan.recipe.exists()):
        print_result(
            {"source": str(plan.source), "data": str(plan.data), "recipe": str(plan.recipe)}, plan.text(), as_json
        )
        return
    if plan is not None:
        recipe = str(made_recipe(plan))
    resolved = load(recipe, changes or ())
    if dry_run:
        from fastssl.bench.dry_run import describe

        described = describe(resolved)
        print_result(described, described["text"], as_json)
        return
    from fastssl.build import ranks
    from fastssl.cli.progress import conversion_progress, summary_text
    from fastssl.training import guards
    from fastssl.training.loop import train as run
    from fastssl.training.progress import TrainingProgress

    folder = run_dir or Path("runs") / resolved.name
    try:
        with conversion_progress() as converting, TrainingProgress() as progress:
            summary = run(resolved, run_dir=folder, resume=resume, observe=progress, convert_progress=converting)
    except Interrupted as stop:
        # torchrun sends SIGTERM to all ranks once one has ended; an exception while Python shuts down would abort
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if ranks.is_main():
            print(stop if ranks.world() > 1 else stop_text(stop), file=sys.stderr)
        ranks.stop()
        sys.exit(guards.EXIT_CODE)
    except (KeyboardInterrupt, SystemExit) as stop:  # a second signal, or one before the first step
        if saved := saved_text(folder):
            stop.add_note(saved)
        raise
    if ranks.is_main():
        print_result(summary, f"{summary_text(summary)}\n{next_text(summary, resolved.model)}", as_json)
    ranks.stop()


def stop_text(stop: Interrupted) -> str:
    """What was kept, and the command that continues."""
    return f"Stopped by {stop.name} after saving.\nContinue: {same_command('--resume')}"


def saved_text(folder: Path) -> str:
    """What of a run is on disk; empty where nothing is."""
    from fastssl.runs import checkpoint

    newest = next(iter(checkpoint.existing(folder / "checkpoints")), None)
    return f"The first {checkpoint.steps_in(newest):,} steps are saved in {folder}." if newest else ""


def next_text(summary: dict[str, Any], model: "Model") -> str:
    """What one does with a trained network, as commands; the export is one that needs no fastssl."""
    from fastssl.models.resnet import in_hubs

    run, library = Path(summary["run_dir"]), model.backbone.rpartition("/")[0]
    if in_hubs(model.backbone) and model.width == 1:
        library = "torchvision"
    to, suffix = (library, ".safetensors") if library else ("torch-export", ".pt2")
    weights = Path(f"{run.name}{suffix}")
    return "\n".join(
        [
            f"Evaluate it: {command('eval', run)}",
            f"See the report: {command('report', run)}",
            f"Export it: {command('export', run, '--to', to, '--out', weights)}",
        ]
    )


def images_plan(recipe: str, changes: Sequence[str]) -> "Plan | None":
    """What to make of a folder or file of images given in place of a recipe."""
    if not Path(recipe).exists() or Path(recipe).suffix in (".yaml", ".yml"):
        return None
    from fastssl.bench.own_images import plan_of

    return plan_of(recipe, changes)


def made_recipe(plan: "Plan") -> Path:
    """Says what will happen, and does it up to the recipe."""
    from fastssl.bench.own_images import carry_out
    from fastssl.cli.progress import conversion_progress
    from fastssl.training.progress import console

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{plan.source} holds images, and several ranks were started.",
            f"Convert first: `{command('convert', plan.source, plan.data)}`, then "
            f"`{command('recipe', 'new', plan.data, '--out', plan.recipe)}`.",
        )
    console.print(plan.text())
    with conversion_progress() as converting:
        return carry_out(plan, converting)
