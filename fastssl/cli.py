"""The command `fastssl`: verbs that parse, call and print. Heavy imports happen inside a verb, so --help is instant.

Standard output carries results (with --json exactly one record, on the last line); progress and messages go to
standard error. Exit codes: 0 done, 2 a mistake a person can mend, 75 stopped by a signal after saving.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastssl.errors import UserError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain a vision backbone on unlabelled images as fast as the hardware allows.",
)

Split = Literal["train", "test", "val", "unlabelled"]
FileFormat = Literal["beton", "webdataset"]
OnError = Literal["fail", "skip"]
Mode = Literal["raw", "jpg", "smart"]
Dtype = Literal["uint8", "uint16"]
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")]
SetOption = Annotated[
    list[str] | None, typer.Option("-s", "--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")]


def main() -> None:
    """Runs a verb; turns a UserError into two lines and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        if os.environ.get("FASTSSL_TRACEBACK") == "1":
            raise
        print(f"Error: {error.what}\n{error.fix}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if os.environ.get("FASTSSL_TRACEBACK") == "1":
            raise
        print(f"Error: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        print("Check the path, its permissions and the space left; FASTSSL_TRACEBACK=1 shows where.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="shapes, cifar10, cifar100, stl10, or a folder, archive or data file.")],
    out: Annotated[Path, typer.Argument(help="The file to write, for example data/train.beton.")],
    split: Annotated[Split, typer.Option(help="Which part of the source.")] = "train",
    format: Annotated[FileFormat, typer.Option(help="One .beton file, or a folder of tar shards.")] = "beton",
    side_px: Annotated[
        int | None, typer.Option(help="Resize to this side: the shorter side, then a centre crop.")
    ] = None,
    max_side_px: Annotated[int | None, typer.Option(help="Shrink longer images to this, keeping their aspect.")] = None,
    mode: Annotated[Mode, typer.Option(help="Store pixels, JPEG, or JPEG for large images only.")] = "raw",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEGs encoded here.")] = 90,
    channels: Annotated[int, typer.Option(min=1, help="Channels to store.")] = 3,
    dtype: Annotated[Dtype, typer.Option(help="Sample type to store.")] = "uint8",
    shard_mb: Annotated[float, typer.Option(help="Size of one shard (webdataset only).")] = 256.0,
    fraction: Annotated[float, typer.Option(help="Stratified share to keep, in (0, 1].")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="The most images to keep, stratified.")] = None,
    val_count: Annotated[
        int, typer.Option(help="Images to hold out into a second file, OUT with .val in its name.")
    ] = 0,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Store in random order.")] = False,
    seed: Annotated[int, typer.Option(help="Of subsets, of the random order and of the shapes.")] = 0,
    count: Annotated[int | None, typer.Option(help="How many images to generate (shapes only).")] = None,
    on_error: Annotated[OnError, typer.Option(help="What to do at an image that cannot be read.")] = "fail",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier call was stopped.")] = False,
    workers: Annotated[int | None, typer.Option(help="Threads that decode; one per core when absent.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder with torchvision's files of cifar10, cifar100, stl10.")
    ] = None,
    download: Annotated[bool, typer.Option(help="Download a known data set that is absent.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Convert images into one file that loads at memory speed."""
    from fastssl.console import conversion_progress
    from fastssl.data.convert import convert as run

    options = {k: v for k, v in locals().items() if k not in ("source", "out", "as_json", "run", "conversion_progress")}
    with conversion_progress() as progress:
        manifest = run(source, out, **options, progress=lambda done, total: progress(str(out), done, total))
    skipped = f", {manifest['skipped_count']} skipped" if manifest["skipped_count"] else ""
    text = f"{out}: {manifest['count']} images, {len(manifest['classes'])} classes{skipped}"
    print_result(dict(manifest), text, as_json)


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
    from fastssl.recipe import load

    resolved = load(recipe, changes or ())
    if dry_run:
        from fastssl.dryrun import describe

        described = describe(resolved)
        print_result(described, described["text"], as_json)
        return
    from fastssl import interrupts
    from fastssl.console import TrainingProgress, conversion_progress, summary_text
    from fastssl.training import train as run

    try:
        with conversion_progress() as converting, TrainingProgress() as progress:
            summary = run(resolved, run_dir=run_dir, resume=resume, observe=progress, convert_progress=converting)
    except interrupts.Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(interrupts.EXIT_CODE)
    print_result(summary, summary_text(summary), as_json)


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
    from fastssl.console import conversion_progress
    from fastssl.preview import preview as run
    from fastssl.recipe import load

    resolved = load(recipe, changes or ())
    with conversion_progress() as progress:
        build.ensure_data(resolved, progress=progress, only_train=True)
    written = [str(path) for path in run(resolved, out, images=images, epoch=epoch)]
    print_result({"files": written}, "\n".join(written), as_json)


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the shipped recipes with the first lines of their headers."""
    from fastssl.recipe import header, shipped

    found = {path.name: header(path) for path in shipped()}
    print_result({"recipes": found}, "\n\n".join(f"{name}\n{text}" for name, text in found.items()), as_json)


def print_result(record: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(record) if as_json else text)
