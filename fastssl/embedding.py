"""Features of every image of a source, with names and labels: a .npy with a table beside it, or one .parquet.

Choice made: features stream to a file on disk as they come and names to another, so memory does not grow with the set
(a label takes eight bytes); an archive names its last class only at its end, so the table is written last. Images go
through the same conversion as those the backbone was trained on.

B images of a batch, N of all, F features, H W height and width in pixels, C channels.
"""

import contextlib
import csv
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastssl import build, models
from fastssl.data import layout
from fastssl.data.manifest import manifest_path
from fastssl.data.numbering import Numbering
from fastssl.data.prepare import Run, Shape
from fastssl.data.runs import indexed_runs, stream_runs
from fastssl.data.sources import Indexed, Source, open_source
from fastssl.data.storage import parents, temporary_name, writing
from fastssl.data.threads import cpu_count
from fastssl.errors import UserError
from fastssl.pretrained import Pretrained, load

ROW_GROUP = 4096
Progress = Callable[[int, int | None], None]


def embed(
    weights: str | Path | Pretrained,
    source: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    batch_size: int = 256,
    device: str = "auto",
    on_error: Literal["fail", "skip"] = "fail",
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
        out: features.npy, float32 (N, F), with features.csv (id, label, class) beside it; or features.parquet with the
            columns id, label, class and features. Either with a .json that says where they come from.
        split: train, test, val or unlabelled.
        batch_size: images in one forward pass.
        device: "auto", "cpu", "cuda" or "mps".
        on_error: "fail" at the first image that cannot be read, or "skip" and count it.
        count: number of shapes.
        root, download: of torchvision's files.
        workers: threads that decode; None takes one per core.
        progress: called with the number of images done and, where known, of all.

    Returns:
        What the .json holds: count, features_dim, classes, labelled, skipped, seconds and the backbone's origin.

    Raises:
        UserError: for everything a person can mend; nothing is left half-written.
    """
    out = Path(out)
    check(out, batch_size=batch_size)
    pretrained = weights if isinstance(weights, Pretrained) else load(weights, device=device)
    opened = open_source(source, split=split, root=root, download=download, count=count, side_px=side_of(pretrained))
    total = len(opened) if isinstance(opened, Indexed) else opened.count
    start = time.perf_counter()
    with parents(out.parent), Table(out) as table:
        for run in runs_of(opened, shape_of(pretrained), workers or cpu_count()):
            if run.refused and on_error == "fail":
                raise UserError(run.refused[0][1], "Mend or remove it, or set --on-error skip.")
            table.skipped += len(run.refused)
            for first in range(0, len(run.data), batch_size):
                part = slice(first, first + batch_size)
                table.add(features(pretrained, run.data[part], run.sizes[part]), run.keys[part], run.labels[part])
            if progress:
                progress(table.count + table.skipped, total)
        record = table.finish(opened) | {
            "seconds": round(time.perf_counter() - start, 3),
            "source": str(source),
            "split": split,
            "weights": str(weights) if not isinstance(weights, Pretrained) else pretrained.recipe.name,
            "recipe": pretrained.recipe.model_dump(mode="json"),
            "trained_on": pretrained.manifest.get("digest"),
        }
        table.place(record)
    return record


def check(out: Path, *, batch_size: int) -> None:
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out is {out}.", "Give it the suffix .npy or .parquet.")
    if out.is_dir():
        raise UserError(f"{out} is a folder.", "Give the name of a file, such as features.npy.")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}.", "Set it to 1 or more.")
    if out.suffix == ".parquet":
        pyarrow()


def pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError(
            "Writing .parquet needs pyarrow, which is not installed.",
            "Install it with: pip install 'fastssl-vision[parquet]', or write .npy.",
        ) from error


def shape_of(pretrained: Pretrained) -> Shape:
    """How the images of training were converted; others have to come the same way."""
    options = pretrained.manifest.get("options", {})
    return Shape(
        side_px=options.get("side_px"),
        max_side_px=options.get("max_side_px"),
        channels=pretrained.manifest["channels"],
        dtype=options.get("dtype", "uint8"),
    )


def side_of(pretrained: Pretrained) -> int | None:
    side_px: int | None = pretrained.manifest["side_px"]
    return side_px


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
    where = pretrained.device
    offsets_B = torch.from_numpy(layout.ends_of(sizes_B2, pretrained.manifest["channels"])[:-1]).to(where)
    index_B = torch.arange(len(images), device=where)
    (views_VBCHW,) = pretrained.clean(
        torch.from_numpy(flat).to(where),
        index_B,
        0,
        sizes_B2=torch.from_numpy(sizes_B2).to(where),
        offsets_B=offsets_B,
    )
    h_BF = models.embed(pretrained.backbone, views_VBCHW[0], autocast=build.autocast(pretrained.recipe))
    rows: NDArray[np.float32] = h_BF.cpu().numpy()
    return rows


class Table:
    """The output while it grows: features and names in two hidden files, which are gone unless `place` is called.

    Attributes:
        count, skipped: images stored, and images that could not be read.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.count, self.skipped = out, 0, 0
        self.numbering = Numbering()
        self.features_path, self.names_path = temporary_name(out, "npy"), temporary_name(out, "names")
        self.done: list[tuple[Path, Path]] = []  # finished files under their hidden names, and the names they will have
        self.files = contextlib.ExitStack()
        self.features_dim: int | None = None

    def __enter__(self) -> "Table":
        with writing(self.out):
            self.features: IO[bytes] = self.files.enter_context(open(self.features_path, "w+b"))
            self.names: IO[str] = self.files.enter_context(open(self.names_path, "w", encoding="utf-8"))
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.close()
        for path in (self.features_path, self.names_path, *(hidden for hidden, _ in self.done)):
            path.unlink(missing_ok=True)

    def add(self, h_BF: NDArray[np.float32], keys: Sequence[str], labels: Sequence[int | str]) -> None:
        with writing(self.out):
            if self.features_dim is None:
                self.features_dim = h_BF.shape[1]
                self.write_header()
            self.features.write(np.ascontiguousarray(h_BF, np.float32).tobytes())
            self.names.writelines(json.dumps(key) + "\n" for key in keys)
        self.count += len(h_BF)
        for label in labels:
            self.numbering.number(label)

    def write_header(self) -> None:
        """numpy leaves room in the header for the number of rows to grow, so it can be written again at the end."""
        description = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.features_dim)}
        self.features.seek(0)
        np.lib.format.write_array_header_1_0(self.features, description)

    def finish(self, source: Source) -> dict[str, Any]:
        """Completes all files but for their names; returns what they hold."""
        if not self.count:
            raise UserError(f"{source.name}: no image could be read.", "See whether it holds images at all.")
        classes, labels_N = self.numbering.finish(source)
        with writing(self.out):
            self.write_header()
            self.files.close()
            if self.out.suffix == ".npy":
                table = self.hidden(self.out.with_suffix(".csv"))
                write_csv(table, self.rows(classes, labels_N))
                self.done.append((self.features_path, self.out))
            else:
                features_NF = np.load(self.features_path, mmap_mode="r")
                write_parquet(self.hidden(self.out), features_NF, self.rows(classes, labels_N))
        return {
            "files": [str(path) for _, path in self.done],
            "count": self.count,
            "features_dim": self.features_dim,
            "classes": list(classes),
            "labelled": int((labels_N >= 0).sum()),
            "skipped": self.skipped,
        }

    def hidden(self, path: Path) -> Path:
        self.done.append((temporary_name(path, "part"), path))
        return self.done[-1][0]

    def rows(self, classes: Sequence[str], labels_N: NDArray[np.int64]) -> Iterator[tuple[str, int, str]]:
        """(id, label, class) of every image; label -1 and class "" where there is none."""
        with open(self.names_path, encoding="utf-8") as names:
            for name, label in zip(names, labels_N.tolist(), strict=True):
                yield json.loads(name), label, classes[label] if label >= 0 else ""

    def place(self, record: dict[str, Any]) -> None:
        """Gives every file its name, replacing earlier ones, and writes the record beside them."""
        with writing(self.out):
            self.hidden(manifest_path(self.out)).write_text(json.dumps(record, indent=1), encoding="utf-8")
            for hidden, path in self.done:
                os.replace(hidden, path)


def write_csv(path: Path, rows: Iterator[tuple[str, int, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "label", "class"))
        writer.writerows(rows)


def write_parquet(path: Path, features_NF: NDArray[np.float32], rows: Iterator[tuple[str, int, str]]) -> None:
    """Columns id, label, class and features (a list of F float32), ROW_GROUP images at a time."""
    pa, parquet = pyarrow(), importlib.import_module("pyarrow.parquet")
    width = features_NF.shape[1]
    kinds = {"id": pa.string(), "label": pa.int64(), "class": pa.string(), "features": pa.list_(pa.float32(), width)}
    schema = pa.schema(list(kinds.items()))
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(features_NF), ROW_GROUP):
            part_BF = np.asarray(features_NF[first : first + ROW_GROUP])
            ids, labels, names = zip(*(next(rows) for _ in range(len(part_BF))), strict=True)
            values = pa.FixedSizeListArray.from_arrays(pa.array(part_BF.reshape(-1)), width)
            writer.write_table(pa.table([ids, labels, names, values], schema=schema))
