"""`fastssl embed`: turn every image of a source into features."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastssl.cli.app import (
    CountOption,
    DeviceOption,
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


@app.command()
def embed(
    weights: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="A run folder, or exported weights.")],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="What `convert` reads: a folder, archive, data file or known name.")
    ],
    out: Annotated[Path, typer.Option(help="features.npy (with a .csv of the same name) or features.parquet.")] = Path(
        "features.npy"
    ),
    split: SplitOption = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 256,
    device: DeviceOption = "auto",
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    image_root: ImageRootOption = None,
    image_key: ImageKeyOption = None,
    on_error: OnErrorOption = "fail",
    count: CountOption = None,
    workers: WorkersOption = None,
    root: RootOption = None,
    download: DownloadOption = True,
    as_json: JsonOption = False,
) -> None:
    """Turn every image of a source into features, with ids and labels."""
    from fastssl.cli.account import source_lines, warning_lines
    from fastssl.cli.progress import counting
    from fastssl.data.sources.choices import Choices
    from fastssl.pretrained.embedding.embed import embed as run

    with counting("embed") as progress:
        record = run(
            weights,
            source,
            out,
            split=split,
            batch_size=batch_size,
            device=device,
            on_error=on_error,
            choices=Choices(image_column, label_column, image_root, image_key),
            count=count,
            root=root,
            download=download,
            workers=workers,
            progress=progress,
        )
    skipped = f", {record['skipped']} skipped" if record["skipped"] else ""
    step = f", checkpoint of step {record['step']:,}" if record["step"] is not None else ""
    replaced = [f"Warning: {record['replaced']}"] if record["replaced"] else []
    for line in [*replaced, *warning_lines(record["warnings"])]:
        print(line, file=sys.stderr)
    text = f"{out}: {record['count']} images, {record['features_dim']} features each{skipped}{step}"
    print_result(record, "\n".join([text, *source_lines(record["account"])]), as_json)
