"""From any source of images to a `.beton` or to WebDataset shards, in one pass, in parallel, in order.

Choice made: a stream whose order is kept is read, decoded and written at once; one that is to be chosen from or
shuffled goes through an unnamed file on disk first. Memory does not grow with the set.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import __version__
from ..errors import UserError
from .beton import BetonWriter
from .journal import Journal
from .manifest import Manifest, Tally, make_manifest, manifest_path, write_manifest
from .numbering import Numbering
from .prepare import Mode, Run, Shape
from .relabel import relabel
from .runs import in_order, item_runs, position_runs
from .shards import ShardWriter, check_replaceable, replace_folder
from .sources import SPLITS, open_source
from .sources.base import Indexed, Item, Source, Stream
from .spool import spool
from .storage import temporary_name, writing
from .subset import choose

Progress = Callable[[int, int | None], None]
_NOT_RECORDED = ("out", "progress", "workers", "download", "resume")  # options that do not change the result


def convert(
    source: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    format: Literal["beton", "webdataset"] = "beton",
    side_px: int | None = None,
    max_side_px: int | None = None,
    channels: int = 3,
    dtype: Literal["uint8", "uint16"] = "uint8",
    mode: Mode = "raw",
    quality: int = 90,
    shard_mb: float = 256.0,
    val_count: int = 0,
    fraction: float = 1.0,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    count: int | None = None,
    classes: Sequence[str] | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    resume: bool = False,
    workers: int | None = None,
    root: Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Convert the images of `source` to `out`, and write `<out>.json`, the manifest, beside it.

    Nothing appears at `out` before it is complete; an error or an interruption leaves what was there.

    Args:
        source: what `open_source` takes: a name or a path.
        out: the .beton to make or replace; for webdataset a folder.
        split: train, test, val or unlabelled.
        format: "beton", FFCV's, or "webdataset", tar shards with DALI's index.
        side_px: every image's shorter side is brought to this and its centre cut out, square; None keeps sizes.
        max_side_px: longer sides are reduced to this, aspect kept.
        channels: 1 or 3 converts; any other number has to be the images' own.
        dtype: sample type; 16-bit images are narrowed to "uint8", or 8-bit ones widened to "uint16".
        mode: "raw" pixels, "jpg", or "smart": JPEG for images of more than 64 KiB. JPEG files that need no change
            keep their bytes.
        quality: 1..100, of JPEGs encoded here.
        shard_mb: size of a WebDataset shard at most, in 10^6 bytes.
        val_count: so many images, stratified, go to `<out>` with `.val` before its suffix instead.
        fraction: stratified share to keep, in (0, 1].
        limit: the most images to keep, stratified.
        shuffle: store in random order, so that reading in order is reading at random.
        seed: of fraction, limit, val_count and shuffle, and of the shapes.
        count: number of shapes.
        classes: class names by label, where they must match another set's; a folder of no such class is an error.
        on_error: "fail" at the first image that cannot be read, or "skip", count and list it.
        resume: keep finished work when interrupted, in a hidden file beside `out`, and go on from it when called
            again in the same way.
        workers: threads; None takes one per core.
        root, download: of torchvision's files, see `open_source`.
        progress: called with the number of images done and, where known, of all.

    Returns:
        The manifest: count, classes, side_px, channels, mean, std (in [0, 1]), digest, version, options, skipped.
    """
    options = {key: value for key, value in locals().items() if key not in _NOT_RECORDED}
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    out = Path(out)
    _check(split=split, format=format, mode=mode, on_error=on_error)
    _check_least(side_px=side_px, max_side_px=max_side_px, channels=channels, count=count, workers=workers)
    _check_target(out, format, dtype, channels)
    shape = Shape(side_px, max_side_px, channels, dtype, mode, quality, encoded=format == "webdataset")
    opened = open_source(
        source, split=split, root=root, download=download, seed=seed, count=count, side_px=side_px
    )
    shard_bytes = int(shard_mb * 1e6) if format == "webdataset" else None
    job = _Job(
        shape, on_error, workers or os.cpu_count() or 1, progress or _silent, options, shard_bytes, resume
    )
    with _parents(out.parent), contextlib.ExitStack() as stack:
        chosen = bool(val_count or fraction != 1 or limit is not None or shuffle or classes is not None)
        if isinstance(opened, Stream):
            if not chosen and format == "beton":
                return _write(job, out, opened, item_runs(opened.items(), shape), opened.count)
            spooled = spool(opened, out.parent, tick=lambda done: job.progress(done, None))
            opened = stack.enter_context(spooled)
        if classes is not None:
            opened = _renumber(opened, tuple(classes))
        kept_N, val_N = choose(
            opened.labels_N, seed=seed, val_count=val_count, fraction=fraction, limit=limit, shuffle=shuffle
        )
        if val_count:
            val_out = out.with_name(f"{out.stem}.val{out.suffix}")
            _check_target(val_out, format, dtype, channels)
            _write(job, val_out, opened, position_runs(opened, val_N, shape), len(val_N))
        return _write(job, out, opened, position_runs(opened, kept_N, shape), len(kept_N))


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """What stays the same over all files of one conversion."""

    shape: Shape
    on_error: str
    workers: int
    progress: Progress
    options: dict[str, Any]
    shard_bytes: int | None  # None: a .beton
    resume: bool


def _write(
    job: _Job, out: Path, source: Source, runs: Iterable[Callable[[], Run]], total: int | None
) -> Manifest:
    """Carry out `runs`, store what they return in order, rename the result to `out`, return its manifest."""
    tally = Tally(job.shape.channels, np.iinfo(job.shape.dtype).max)
    numbering = Numbering()
    temporary = temporary_name(out, "part")
    journal = Journal(out, _fingerprint(source, job.options)) if job.resume else None
    try:
        with _writer(job, temporary, total) as writer:
            for run in in_order(runs, job.workers) if journal is None else journal.runs(runs, job.workers):
                if run.refused and job.on_error == "fail":
                    raise UserError(run.refused[0][1], "Mend or remove it, or set on_error to skip.")
                tally.add(run)
                for data, label in zip(run.data, run.labels, strict=True):
                    writer.add(data, numbering.number(label))
                job.progress(tally.count + tally.skipped_count, total)
            if not tally.count:
                raise UserError(
                    f"{source.name}: no image could be read", "See whether it holds images at all."
                )
        classes, labels_N = numbering.finish(source)
        if numbering.changed:
            relabel(temporary, labels_N)
        with writing(out):
            if job.shard_bytes is None:
                os.replace(temporary, out)
            else:
                replace_folder(temporary, out)
            manifest = make_manifest(
                tally,
                file_format="beton" if job.shard_bytes is None else "webdataset",
                classes=classes,
                labels_N=labels_N,
                options=job.options,
                **({"shards": writer.shards} if isinstance(writer, ShardWriter) else {}),
            )
            write_manifest(manifest, manifest_path(out))
    finally:
        temporary.unlink(missing_ok=True) if job.shard_bytes is None else shutil.rmtree(temporary, True)
    if journal is not None:
        journal.remove()
    return manifest


def _writer(job: _Job, path: Path, total: int | None) -> BetonWriter | ShardWriter:
    if job.shard_bytes is not None:
        return ShardWriter(path, shard_bytes=job.shard_bytes)
    return BetonWriter(
        path,
        count_hint=total,
        mode=job.shape.mode,
        channels=job.shape.channels,
        dtype=job.shape.dtype,
        quality=job.shape.quality,
        smart_bytes=job.shape.smart_bytes,
    )


def _fingerprint(source: Source, options: dict[str, Any]) -> str:
    """What has to be the same for finished work to be of use: options, version, and the source's size and date."""
    path = Path(source.name)
    status = path.stat() if path.exists() else None
    seen = (status.st_size, status.st_mtime_ns) if status else ()
    count = len(source) if isinstance(source, Indexed) else source.count
    return json.dumps([__version__, options, seen, count], sort_keys=True)


def _renumber(source: Indexed, classes: tuple[str, ...]) -> Indexed:
    """The same items with labels that index `classes`."""
    unknown = set(source.classes) - set(classes)
    if unknown:
        raise UserError(
            f"{source.name} has classes that are not in the given list: {', '.join(sorted(unknown))}",
            "Give a list of classes that names them all.",
        )
    table = np.array([classes.index(name) for name in source.classes] + [-1], np.int64)
    labels_N = table[source.labels_N]  # -1 picks the last entry, -1

    def read(index: int) -> Item:
        return dataclasses.replace(source.read(index), label=int(labels_N[index]))

    return Indexed(source.name, classes, labels_N, read)


def _check(**choices: str) -> None:
    allowed = {
        "split": tuple(SPLITS),
        "format": ("beton", "webdataset"),
        "mode": ("raw", "jpg", "smart"),
        "on_error": ("fail", "skip"),
    }
    for name, value in choices.items():
        if value not in allowed[name]:
            raise UserError(f"{name} is {value!r}", f"Set {name} to one of: {', '.join(allowed[name])}.")


def _check_least(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}", f"Set {name} to 1 or more.")


def _check_target(out: Path, file_format: str, dtype: str, channels: int) -> None:
    """What would fail at the end, found at the start."""
    if file_format == "webdataset":
        check_replaceable(out)
        if dtype != "uint8" or channels not in (1, 3):
            raise UserError(
                f"webdataset shards hold PNG or JPEG, not {channels} channels of {dtype}",
                "Set format to beton, or channels to 1 or 3 and dtype to uint8.",
            )
    elif out.is_dir():
        raise UserError(f"{out} is a folder", "Give the name of a file, such as train.beton.")


def _silent(done: int, total: int | None) -> None:
    """Progress for nobody."""


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make the folder; if what follows fails, remove again what was made here."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}", "Choose another target.") from error
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
