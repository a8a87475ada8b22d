"""`fastssl embed`: turn every image of a source into features."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastssl.cli.app import JsonOption, app, print_result


@app.command()
def embed(
    weights: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="A run folder, or exported weights.")],
    source: Annotated[str, typer.Argument(help="What `convert` reads: a folder, archive, data file or known name.")],
    out: Annotated[Path, typer.Option(help="features.npy (with a .csv beside it) or features.parquet.")] = Path(
        "features.npy"
    ),
    split: Annotated[
        Literal["train", "test", "val", "unlabelled"], typer.Option(help="Which part of the source.")
    ] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 256,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to run.")] = "auto",
    on_error: Annotated[
        Literal["fail", "skip"], typer.Option(help="What to do at an image that cannot be read.")
    ] = "fail",
    count: Annotated[int | None, typer.Option(help="How many images to generate (shapes only).")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode; one per core when absent.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder with torchvision's files of cifar10, cifar100, stl10.")
    ] = None,
    download: Annotated[bool, typer.Option(help="Download a known data set that is absent.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Turn every image of a source into features, with ids and labels."""
    from fastssl.console import counting
    from fastssl.embedding import embed as run

    with counting("embed") as progress:
        record = run(
            weights,
            source,
            out,
            split=split,
            batch_size=batch_size,
            device=device,
            on_error=on_error,
            count=count,
            root=root,
            download=download,
            workers=workers,
            progress=progress,
        )
    skipped = f", {record['skipped']} skipped" if record["skipped"] else ""
    text = f"{out}: {record['count']} images, {record['features_dim']} features each{skipped}"
    print_result(record, text, as_json)
