"""`fastssl bench`: measure this machine, one stage's variants, or the time to an accuracy; compare two results."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastssl.cli.app import JsonOption, SetOption, app, print_result
from fastssl.cli.stopped import same_command
from fastssl.errors import Interrupted

OptionalRecipe = Annotated[str, typer.Argument(metavar="[RECIPE]", help="A YAML file, or a shipped recipe's name.")]
OnlyOption = Annotated[list[str] | None, typer.Option(help="Only variants whose name has this in it; repeatable.")]
SecondsOption = Annotated[float, typer.Option(min=0.01, help="Measured in all, after an untimed warm-up.")]
OutOption = Annotated[Path | None, typer.Option(help="Also write the record to this file.")]


class MachineByDefault(TyperGroup):
    """`fastssl bench RECIPE` is `fastssl bench machine RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["machine", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=MachineByDefault,
    help="Measure this machine: `bench [RECIPE]` checks every stage; sub-commands look closer.",
)
app.add_typer(bench, name="bench")


@bench.command()
def machine(
    recipe: OptionalRecipe = "quickstart",
    changes: SetOption = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Spent on steps; ceilings and evaluation take more.")] = 30.0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every stage of a step on this machine, in under two minutes (the default)."""
    from fastssl.bench.machine import machine_check
    from fastssl.cli.bench_tables import machine_text

    check_out(out)
    result = machine_check(ready(recipe, changes), seconds=seconds, say=say)
    finish(result, machine_text(result), out, as_json)


def add_stage(stage: str, seconds_each: float, text: str) -> None:
    """A sub-command that sets the variants of one stage side by side."""

    def command(
        recipe: OptionalRecipe = "quickstart",
        changes: SetOption = None,
        only: OnlyOption = None,
        seconds: SecondsOption = seconds_each,
        out: OutOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from fastssl.bench import variants
        from fastssl.cli.bench_tables import variants_text

        check_out(out)
        result = getattr(variants, stage)(ready(recipe, changes), seconds=seconds, only=only)
        finish(result, variants_text(result), out, as_json)

    bench.command(stage, help=text)(command)


add_stage("loader", 30.0, "Set every installed loader side by side on the recipe's images.")
add_stage("augment", 30.0, "Set the backends of the augmentation side by side on one batch.")
add_stage("step", 60.0, "Set the step's settings side by side, and the step as trained against one fed a fixed batch.")


@bench.command()
def tta(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="The first is the baseline.")],
    target: Annotated[str, typer.Option(help="Accuracies in percent, such as knn=80,ridge=82.")],
    changes: SetOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe.")] = 3,
    run_dir: Annotated[Path, typer.Option(help="Folder for the runs, one for each recipe and seed.")] = Path(
        "runs/tta"
    ),
    stop_at_target: Annotated[
        bool, typer.Option("--stop-at-target", help="End a run once all targets are reached.")
    ] = False,
    budget_s: Annotated[
        float, typer.Option(min=0, help="End a run at the first evaluation after so many seconds of training.")
    ] = math.inf,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time to accuracy: seconds of training until a recipe first reaches a target, against the first recipe.

    Finished runs in --run-dir are reused and unfinished ones continue, so the same command continues after a stop.
    """
    from fastssl.bench.record import save
    from fastssl.bench.tta import parse_targets
    from fastssl.bench.tta import tta as run
    from fastssl.cli.bench_tables import tta_text
    from fastssl.training import guards
    from fastssl.training.progress import TrainingProgress

    check_out(out)
    loaded = [ready(recipe, changes) for recipe in recipes]
    try:
        with TrainingProgress() as progress:
            result = run(
                loaded,
                parse_targets(target, loaded[0]),
                seeds=seeds,
                folder=run_dir,
                stop_at_target=stop_at_target,
                budget_s=budget_s,
                observe=progress,
                say=say,
                keep=lambda record: save(out, record) if out else None,
            )
    except Interrupted as stop:
        print(f"Stopped by {stop.name} after saving.\nContinue: {same_command()}", file=sys.stderr)
        sys.exit(guards.EXIT_CODE)
    finish(result, tta_text(result), out, as_json)


@bench.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A result that --out wrote.")],
    b: Annotated[Path, typer.Argument(help="Another of the same benchmark.")],
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two results beyond the noise."""
    from fastssl.bench.compare import compare as run
    from fastssl.bench.compare import read
    from fastssl.cli.bench_tables import compare_text

    result = run(read(a), read(b))
    print_result(result, compare_text(result), as_json)


def ready(recipe: str, changes: list[str] | None) -> Any:
    """The resolved recipe, its data converted."""
    from fastssl import build
    from fastssl.cli.progress import conversion_progress

    resolved = build.run_data.load(recipe, changes or ())
    build.preflight.check(resolved)
    with conversion_progress() as progress:
        build.data.ensure_data(resolved, progress=progress, only_train=resolved.data.probe_path is None)
    return resolved


def check_out(out: Path | None) -> None:
    """Refuses, before anything is measured, a result file that cannot be written."""
    from fastssl.errors import UserError

    if out is None:
        return
    parent = next(p for p in out.absolute().parents if p.exists())
    if out.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out} is not a file that can be written.", "Give for example --out results/step.json.")


def say(text: str) -> None:
    from fastssl.training.progress import console

    console.print(text)


def finish(result: dict[str, Any], text: str, out: Path | None, as_json: bool) -> None:
    from fastssl.bench.record import save

    if out is not None:
        save(out, result)
    print_result(result, text, as_json)
