"""Near-duplicates and outliers of a source, by the features of a trained backbone.

N images, H W height and width in pixels, C channels.
"""

import base64
import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from fastssl.data.convert.chunks import indexed_runs, stream_runs
from fastssl.data.sources import Indexed, Source, open_source
from fastssl.data.sources.base import Item
from fastssl.data.storage import writing
from fastssl.errors import UserError, errors_of, option, raise_all
from fastssl.pretrained.embedding.embed import embed, side_of
from fastssl.pretrained.embedding.table import check_no_source
from fastssl.pretrained.load import Pretrained, load
from fastssl.pretrained.preparation import shape_of
from fastssl.probes.duplicates import near_duplicates, outliers
from fastssl.runs.directory import DUPLICATES
from fastssl.runs.files import atomic_json, atomic_write, mode_of_new_files
from fastssl.training.plain import plain_torch

NEIGHBORS = 5
COLUMNS = ("kind", "image", "other", "similarity")
SHOWN, TILE_PX = 16, 64  # pairs and outliers with a picture in the run's file
Progress = Callable[[int, int | None], None]


@plain_torch()
def duplicates(
    weights: str | Path | Pretrained,
    source: str | Path,
    out: str | Path | None = None,
    *,
    threshold: float = 0.95,
    most: int = 100,
    split: str = "train",
    batch_size: int = 256,
    device: str = "auto",
    on_error: Literal["fail", "skip"] = "fail",
    count: int | None = None,
    root: Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pairs of images that look alike to a backbone, and images that look like none of the others.

    The result of a run's weights is kept in the run as duplicates.json, with small pictures of the first pairs and
    outliers, and `report` shows it.

    Args:
        weights: a run folder, exported weights, or what `load` gave.
        source: what `convert` reads.
        out: a .csv to write (kind, image, other, similarity); none when absent.
        threshold: smallest cosine similarity of a pair, in [-1, 1].
        most: of the pairs and of the outliers, >= 1.
        split: as for `embed`.
        batch_size: as for `embed`.
        device: as for `embed`.
        on_error: as for `embed`.
        count: as for `embed`.
        root: as for `embed`.
        download: as for `embed`.
        progress: as for `embed`.

    Returns:
        source, split, step, images, skipped, threshold and most; pairs: [{"image", "other", "similarity"}], the most
        similar first; outliers: [{"image", "similarity"}], by the mean similarity to the 5 nearest others, the least
        similar first; kept: the file in the run's folder, or not_kept: why it could not be written.

    Raises:
        UserError: for everything a person can fix.
    """
    raise_all(unfit(out, source, threshold=threshold, most=most))
    if out is not None:
        check_writable(Path(out))
    pretrained = weights if isinstance(weights, Pretrained) else load(weights, device=device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        written = embed(
            pretrained,
            source,
            path,
            split=split,
            batch_size=batch_size,
            on_error=on_error,
            count=count,
            root=root,
            download=download,
            progress=progress,
        )
        features_NF = torch.from_numpy(np.load(path))
        with open(path.with_suffix(".csv"), encoding="utf-8", errors="surrogateescape", newline="") as file:
            names = [row["id"] for row in csv.DictReader(file)]
    if len(names) < 2:
        raise UserError(f"{source} holds {len(names)} readable image.", "Give a source of two or more.")
    pairs_P2, similarity = near_duplicates(features_NF, threshold=threshold, most=most)
    lonely, nearness = outliers(features_NF, k=NEIGHBORS, most=most)
    record: dict[str, Any] = {
        "source": str(source),
        "split": split,
        "step": pretrained.step,
        "images": len(names),
        "skipped": written["skipped"],
        "threshold": threshold,
        "most": most,
        "pairs": [
            {"image": names[a], "other": names[b], "similarity": round(value, 4)}
            for (a, b), value in zip(pairs_P2.tolist(), similarity.tolist(), strict=True)
        ],
        "outliers": [
            {"image": names[i], "similarity": round(value, 4)}
            for i, value in zip(lonely.tolist(), nearness.tolist(), strict=True)
        ],
    }
    if out is not None:
        with writing(Path(out)):
            atomic_write(Path(out), table_of(record).encode(errors="surrogateescape"))
    if pretrained.run_dir is None:
        return record
    opened = open_source(source, split=split, count=count, root=root, side_px=side_of(pretrained))
    positions = sorted({*pairs_P2[:SHOWN].flatten().tolist(), *lonely[:SHOWN].tolist()})
    pictures = thumbnails(pretrained, opened, names, positions, whole=not written["skipped"])
    return record | keep(record | {"pictures": pictures}, pretrained.run_dir / DUPLICATES)


def unfit(out: str | Path | None, source: str | Path, *, threshold: float, most: int) -> Iterator[UserError]:
    if not -1 <= threshold <= 1:
        yield UserError(
            f"{option('threshold')} is {threshold:g}, and similarities lie in [-1, 1].",
            f"Set {option('threshold')} to 0.95, for example.",
        )
    if most < 1:
        yield UserError(f"{option('most')} is {most}.", f"Set {option('most')} to 1 or more.")
    if out is not None and Path(out).suffix != ".csv":
        yield UserError(f"{option('out')} is {out}.", f"Give {option('out')} the suffix .csv.")
    elif out is not None:
        fix = f"Give {option('out')} another name, such as duplicates.csv."
        yield from errors_of(lambda: check_no_source(Path(out), source, fix=fix))


def check_writable(out: Path) -> None:
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        mode_of_new_files(out)  # makes and removes a file there: better now than after all images


def table_of(record: dict[str, Any]) -> str:
    """The record as CSV, one line per pair and outlier."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"kind": "pair"} | pair for pair in record["pairs"])
    writer.writerows({"kind": "outlier"} | outlier for outlier in record["outliers"])
    return text.getvalue()


def keep(record: dict[str, Any], path: Path) -> dict[str, str]:
    """Writes the record; a sentence where it cannot be written, since the result is worth more."""
    try:
        atomic_json(path, record)
    except OSError as error:
        return {"not_kept": f"The result is not kept in {path.parent}: {error.strerror or error}."}
    return {"kept": str(path)}


def thumbnails(
    pretrained: Pretrained, opened: Source, names: Sequence[str], positions: Sequence[int], *, whole: bool
) -> dict[str, str]:
    """Small JPEGs of some images by name, in base64; none of images that are neither gray nor RGB.

    Args:
        opened: the source of the features.
        names: of all images that have features.
        positions: in `names`.
        whole: whether no image was skipped, so that positions are the source's own.
    """
    shape, wanted = shape_of(pretrained.manifest), {names[i] for i in positions}
    if shape.channels not in (1, 3):
        return {}
    if isinstance(opened, Indexed) and whole:
        runs = indexed_runs(opened, np.array(positions, np.int64), shape, 1)
    else:
        items = map(opened.read, range(len(opened))) if isinstance(opened, Indexed) else opened.items()
        runs = stream_runs(named(items, wanted), shape, 1)
    return {key: thumbnail(np.asarray(image)) for run in runs for key, image in zip(run.keys, run.data, strict=True)}


def named(items: Iterable[Item], wanted: set[str]) -> Iterator[Item]:
    """The items of these names; ends with the last of them."""
    for item in items:
        if item.key in wanted:
            yield item
            wanted = wanted - {item.key}
            if not wanted:
                return


def thumbnail(image_HWC: np.ndarray) -> str:
    pixels_HWC = (image_HWC >> 8).astype(np.uint8) if image_HWC.dtype == np.uint16 else image_HWC
    image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)
    image.thumbnail((TILE_PX, TILE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
