"""Features of every image of a source, with names and labels: a .npy with a table next to it, or one .parquet.

Choice made: features stream to a file on disk as they come and names to another, so memory does not grow with the set
(a label takes eight bytes); an archive names its last class only at its end, so the table is written last. Images go
through the same conversion as those the backbone was trained on.

B images of a batch, N of all, F features, H W height and width in pixels, C channels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastssl import build
from fastssl.data.batch import Batch
from fastssl.data.convert.chunks import indexed_runs, stream_runs
from fastssl.data.convert.output import unreadable
from fastssl.data.convert.prepare import Run, Shape
from fastssl.data.convert.tally import Notices
from fastssl.data.loaders import layout
from fastssl.data.sources import Indexed, Source, open_source
from fastssl.data.sources.choices import Choices
from fastssl.data.storage import parents
from fastssl.errors import UserError, errors_of, option, raise_all
from fastssl.models import pretrainer
from fastssl.pretrained.embedding.table import Table, check_replaceable, pyarrow
from fastssl.pretrained.load import Pretrained, load
from fastssl.pretrained.preparation import shape_of
from fastssl.runs.machine import cores
from fastssl.training.guards import lack_explained
from fastssl.training.plain import plain_torch
from fastssl.training.threads import within_cores

Progress = Callable[[int, int | None], None]


@plain_torch()
@within_cores()
def embed(
    weights: str | Path | Pretrained,
    source: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    batch_size: int = 256,
    device: str = "auto",
    on_error: Literal["fail", "skip"] = "fail",
    choices: Choices | None = None,
    count: int | None = None,
    root: Path | None = None,
    download: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the features of a source's images, in its order.

    Args:
        weights: a run folder, exported weights, or what `load` gave.
        source: what `convert` reads.
        out: features.npy, float32 (N, F), with features.csv (id, label, class) next to it; or features.parquet with the
            columns id, label, class and features, where bytes of a name that are no UTF-8 are `\\udcXX`. Either with a
            .json that says where they come from.
        split: train, test, val or unlabeled.
        batch_size: images in one forward pass.
        device: "auto", "cpu", "cuda" or "mps".
        on_error: "fail" after listing all images that cannot be read, or "skip" and count them.
        choices: columns and keys of the source, where the usual ones do not fit.
        count: number of shapes.
        root: folder of torchvision's files.
        download: fetch them when they are absent.
        workers: threads that decode; None takes one per core.
        progress: called with the number of images done and, where known, of all.

    Returns:
        What the .json holds: count, features_dim, classes, labeled, skipped, account, warnings, seconds and the
        backbone's origin.

    Raises:
        UserError: for everything a person can fix; nothing is left half-written.
    """
    out = Path(out)
    raise_all(
        [*unfit(out, batch_size=batch_size, on_error=on_error), *errors_of(lambda: check_replaceable(out, source))]
    )
    pretrained = weights if isinstance(weights, Pretrained) else load(weights, device=device)
    opened = open_source(
        source, split=split, root=root, download=download, count=count, side_px=side_of(pretrained), choices=choices
    )
    total = len(opened) if isinstance(opened, Indexed) else opened.count
    start = time.perf_counter()
    refused: list[tuple[str, str]] = []
    read, notices, shape = 0, Notices(), shape_of(pretrained.manifest)
    fixes = [f"{option('batch_size')} to {batch_size // 2}"] if batch_size > 1 else []
    fixes += [f"{option('device')} to cpu"] if pretrained.device.type != "cpu" else []
    fix = f"Set {' or '.join(fixes)}." if fixes else "Leave more memory free."
    lack = lack_explained(f"with {option('batch_size')} {batch_size}", fix)
    with lack, parents(out.parent), Table(out, opened) as table:
        for run in runs_of(opened, shape, workers or cores().count):
            refused += run.refused
            notices.add(run)
            table.skipped += len(run.refused)
            if refused and on_error == "fail":  # the rest is only read, to list all
                read += len(run.data)
                continue
            for first in range(0, len(run.data), batch_size):
                part = slice(first, first + batch_size)
                table.add(features(pretrained, run.data[part], run.sizes[part]), run.keys[part], run.labels[part])
            if progress:
                progress(table.count + table.skipped, total)
        if refused and on_error == "fail":
            raise unreadable(opened.name, refused, len(refused), table.count + read + len(refused))
        record = table.finish() | {
            "warnings": [warned._asdict() for warned in notices.all(stretch=shape.stretch)],
            "seconds": round(time.perf_counter() - start, 3),
            "source": str(source),
            "split": split,
            "weights": str(weights) if not isinstance(weights, Pretrained) else pretrained.recipe.name,
            "recipe": pretrained.recipe.model_dump(mode="json"),
            "step": pretrained.step,
            "averaged": pretrained.weights == "ema",
            "precision": str(pretrained.autocast or torch.float32).removeprefix("torch."),
            "replaced": build.hardware.replaced(pretrained.recipe, pretrained.device),
            "trained_on": pretrained.manifest.digest,
        }
        table.place(record)
    return record


def unfit(out: Path, *, batch_size: int, on_error: str) -> Iterator[UserError]:
    if out.suffix not in (".npy", ".parquet"):
        yield UserError(f"{option('out')} is {out}.", f"Give {option('out')} the suffix .npy or .parquet.")
    elif out.is_dir():
        yield UserError(f"{out} is a folder.", "Give the name of a file, such as features.npy.")
    if batch_size < 1:
        yield UserError(f"{option('batch_size')} is {batch_size}.", f"Set {option('batch_size')} to 1 or more.")
    if on_error not in ("fail", "skip"):
        yield UserError(f"{option('on_error')} is {on_error!r}.", f"Set {option('on_error')} to fail or skip.")
    if out.suffix == ".parquet":
        yield from errors_of(pyarrow)


def side_of(pretrained: Pretrained) -> int | None:
    return pretrained.manifest.side_px


def runs_of(source: Source, shape: Shape, workers: int) -> Iterator[Run]:
    if isinstance(source, Indexed):
        return indexed_runs(source, np.arange(len(source)), shape, workers)
    return stream_runs(source.items(), shape, workers)


def features(
    pretrained: Pretrained, images: Sequence[np.ndarray | bytes], sizes: Sequence[tuple[int, int]]
) -> NDArray[np.float32]:
    """Features (B, F) of images (H, W, C) of any sizes, in one forward pass."""
    flat = np.concatenate([np.ascontiguousarray(image).reshape(-1) for image in images])
    sizes_B2 = np.array(sizes, np.int64)
    device = pretrained.device
    offsets_B = torch.from_numpy(layout.ends_of(sizes_B2, pretrained.manifest.channels)[:-1]).to(device)
    index_B = torch.arange(len(images), device=device)
    pixels, size_B2 = torch.from_numpy(flat).to(device), torch.from_numpy(sizes_B2).to(device)
    (views_VBCHW,) = pretrained.clean(Batch(pixels, torch.full_like(index_B, -1), index_B, size_B2, offsets_B), 0)
    h_BF = pretrainer.embed(pretrained.backbone, views_VBCHW[0], autocast=pretrained.autocast)
    rows: NDArray[np.float32] = h_BF.cpu().numpy()
    return rows
