"""`fastssl duplicates`: find near-duplicates and outliers among images."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastssl.cli.app import (
    CountOption,
    DeviceOption,
    DownloadOption,
    JsonOption,
    OnErrorOption,
    RootOption,
    SplitOption,
    app,
    print_result,
)

SHOWN = 10


@app.command()
def duplicates(
    weights: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="A run folder, or exported weights.")],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="What `convert` reads: a folder, archive, data file or known name.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write every pair and outlier to this .csv, too.")] = None,
    threshold: Annotated[float, typer.Option(help="Smallest cosine similarity of a pair, in [-1, 1].")] = 0.95,
    most: Annotated[int, typer.Option(min=1, help="Of the pairs, and of the outliers.")] = 100,
    split: SplitOption = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 256,
    device: DeviceOption = "auto",
    on_error: OnErrorOption = "fail",
    count: CountOption = None,
    root: RootOption = None,
    download: DownloadOption = True,
    as_json: JsonOption = False,
) -> None:
    """Find near-duplicates and outliers among images, by the features of a trained backbone."""
    from fastssl.cli.progress import counting
    from fastssl.pretrained.duplicates import duplicates as run

    with counting("embed") as progress:
        record = run(
            weights,
            source,
            out,
            threshold=threshold,
            most=most,
            split=split,
            batch_size=batch_size,
            device=device,
            on_error=on_error,
            count=count,
            root=root,
            download=download,
            progress=progress,
        )
    print_result(record, text_of(record, out), as_json)
    if record.get("not_kept"):
        print(f"Warning: {record['not_kept']}", file=sys.stderr)


def text_of(record: dict[str, Any], out: Path | None) -> str:
    pairs, outliers = record["pairs"], record["outliers"]
    count = f"{len(pairs)} or more" if len(pairs) == record["most"] else str(len(pairs))
    lines = [f"{count} pairs of {record['images']} images have a similarity of {record['threshold']:g} or more"]
    lines += [f"  {pair['similarity']:.3f}  {pair['image']}  {pair['other']}" for pair in pairs[:SHOWN]]
    lines += ["Least like their 5 nearest neighbors"]
    lines += [f"  {outlier['similarity']:.3f}  {outlier['image']}" for outlier in outliers[:SHOWN]]
    hidden = max(0, len(pairs) - SHOWN) + max(0, len(outliers) - SHOWN)
    if hidden and out is None:
        lines.append(f"{hidden} more lines: --out duplicates.csv or --json")
    if out is not None:
        lines.append(f"{out}: {len(pairs)} pairs, {len(outliers)} outliers")
    if record.get("kept"):
        lines += ["Their pictures", f"  fastssl report {shlex.quote(str(Path(record['kept']).parent))}"]
    return "\n".join(lines)
