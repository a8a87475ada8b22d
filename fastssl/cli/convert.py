"""`fastssl convert`: convert images into one file that loads at memory speed."""

import itertools
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastssl.cli.app import (
    CountOption,
    DownloadOption,
    ImageColumnOption,
    ImageKeyOption,
    ImageRootOption,
    JsonOption,
    LabelColumnOption,
    OnErrorOption,
    RootOption,
    SplitOption,
    WorkersOption,
    app,
    print_result,
)
from fastssl.cli.stopped import command

FileFormat = Literal["beton", "webdataset"]
Mode = Literal["raw", "jpg", "smart"]
Dtype = Literal["uint8", "uint16"]


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="shapes, cifar10, cifar100, stl10, or a folder, archive or data file."),
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The file to write, for example data/train.beton.")
    ] = None,
    split: SplitOption = "train",
    format: Annotated[FileFormat, typer.Option(help="One .beton file, or a folder of tar shards.")] = "beton",
    side_px: Annotated[
        int | None, typer.Option(help="Resize to this side: the shorter side, then a center crop.")
    ] = None,
    max_side_px: Annotated[int | None, typer.Option(help="Shrink longer images to this, keeping their aspect.")] = None,
    mode: Annotated[Mode, typer.Option(help="Store pixels, JPEG, or JPEG for large images only.")] = "raw",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEGs encoded here.")] = 90,
    channels: Annotated[int, typer.Option(min=1, help="Channels to store.")] = 3,
    dtype: Annotated[Dtype, typer.Option(help="Sample type to store.")] = "uint8",
    stretch: Annotated[
        int | None, typer.Option(help="Value of 16-bit images that becomes white, such as 4095 for 12-bit data.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Color beneath transparent pixels, such as white or #808080.")
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Refuse images of more pixels; raise it for large photos that are shrunk.")
    ] = 89_478_485,
    shard_mb: Annotated[float, typer.Option(help="Size of one shard (webdataset only).")] = 256.0,
    fraction: Annotated[float, typer.Option(help="Stratified share to keep, in (0, 1].")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="The most images to keep, stratified.")] = None,
    val_count: Annotated[
        int, typer.Option(help="Images to hold out into a second file, OUT with .val in its name.")
    ] = 0,
    classes: Annotated[
        str | None,
        typer.Option(help="Class names in the order of their labels: a manifest, a file of lines, or a,b,c."),
    ] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Store in random order.")] = False,
    seed: Annotated[int, typer.Option(help="Of subsets, of the random order and of the shapes.")] = 0,
    count: CountOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    image_root: ImageRootOption = None,
    image_key: ImageKeyOption = None,
    on_error: OnErrorOption = "fail",
    check: Annotated[bool, typer.Option("--check", help="Read and decode everything, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an earlier call was stopped.")] = False,
    workers: WorkersOption = None,
    root: RootOption = None,
    download: DownloadOption = True,
    as_json: JsonOption = False,
) -> None:
    """Convert images into one file that loads at memory speed."""
    from fastssl.cli.account import account_lines, warning_lines
    from fastssl.cli.progress import conversion_progress
    from fastssl.data.convert.convert import convert as run
    from fastssl.data.convert.labels import read_classes

    with conversion_progress() as progress:
        manifest = run(
            source,
            out,
            split=split,
            format=format,
            side_px=side_px,
            max_side_px=max_side_px,
            channels=channels,
            dtype=dtype,
            stretch=stretch,
            background=background,
            max_pixels=max_pixels,
            mode=mode,
            quality=quality,
            shard_mb=shard_mb,
            val_count=val_count,
            fraction=fraction,
            limit=limit,
            shuffle=shuffle,
            seed=seed,
            count=count,
            classes=read_classes(classes) if classes else None,
            on_error=on_error,
            image_column=image_column,
            label_column=label_column,
            image_root=image_root,
            image_key=image_key,
            check=check,
            overwrite=force,
            resume=resume,
            workers=workers,
            root=root,
            download=download,
            progress=lambda done, total: progress(str(out or source), done, total),
        )
    for line in warning_lines(warned._asdict() for warned in manifest.warnings):
        print(line, file=sys.stderr)
    lines = account_lines(manifest, source if out is None or check else str(out))
    if not check and format == "beton":
        lines.append(f"Next: {command('recipe', 'new', out, '--out', free_name(Path(str(out)).stem))}")
    print_result(manifest.to_json(), "\n".join(lines), as_json)


def free_name(stem: str) -> Path:
    """Of a recipe in this folder that is not there yet."""
    marks = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (Path(f"{stem}{mark}.yaml") for mark in marks)
    return next(path for path in names if not path.exists())
