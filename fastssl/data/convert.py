"""From any source of images to a `.beton` or to WebDataset shards, in one pass, in parallel, in order.

Choice made: threads, because the decoders let go of the interpreter; runs of items go out to them and come back in
order, and never more than a few are under way, so memory does not grow with the set.
"""

import contextlib
import dataclasses
import functools
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .beton import BetonWriter
from .manifest import Manifest, Tally, make_manifest, manifest_path, write_manifest
from .prepare import Mode, Run, Shape, prepare
from .relabel import relabel
from .sources import SPLITS, open_source
from .sources.base import Indexed, Item, Source, Stream, class_labels
from .spool import spool
from .subset import choose

Progress = Callable[[int, int | None], None]
_STREAM_RUN, _INDEXED_RUN, _RUN_BYTES = 256, 64, 4 << 20


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
    val_count: int = 0,
    fraction: float = 1.0,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    count: int | None = None,
    classes: Sequence[str] | None = None,
    on_error: Literal["fail", "skip"] = "fail",
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
        val_count: so many images, stratified, go to `<out>` with `.val` before its suffix instead.
        fraction: stratified share to keep, in (0, 1].
        limit: the most images to keep, stratified.
        shuffle: store in random order, so that reading in order is reading at random.
        seed: of fraction, limit, val_count and shuffle, and of the shapes.
        count: number of shapes.
        classes: class names by label, where they must match another set's; a folder of no such class is an error.
        on_error: "fail" at the first image that cannot be read, or "skip", count and list it.
        workers: threads; None takes one per core.
        root, download: of torchvision's files, see `open_source`.
        progress: called with the number of images done and, where known, of all.

    Returns:
        The manifest: count, classes, side_px, channels, mean, std (in [0, 1]), digest, version, options, skipped.
    """
    options = {
        key: value for key, value in locals().items() if key not in ("progress", "workers", "download")
    }
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    _check(split=split, format=format, mode=mode, on_error=on_error)
    _check_least(side_px=side_px, max_side_px=max_side_px, channels=channels, count=count, workers=workers)
    shape = Shape(side_px, max_side_px, channels, dtype, mode, quality, encoded=format == "webdataset")
    opened = open_source(
        source, split=split, root=root, download=download, seed=seed, count=count, side_px=side_px
    )
    out = Path(out)
    job = _Job(shape, on_error, workers or os.cpu_count() or 1, progress or _silent, options)
    with _parents(out.parent):
        chosen = bool(val_count or fraction != 1 or limit is not None or shuffle or classes is not None)
        if isinstance(opened, Stream):
            if not chosen and format == "beton":
                return _write(job, out, opened, _item_runs(opened.items(), shape), opened.count)
            opened = spool(opened, out.parent, tick=lambda done: job.progress(done, None))
        if classes is not None:
            opened = _renumber(opened, tuple(classes))
        kept_N, val_N = choose(
            opened.labels_N, seed=seed, val_count=val_count, fraction=fraction, limit=limit, shuffle=shuffle
        )
        if val_count:
            val_out = out.with_name(f"{out.stem}.val{out.suffix}")
            _write(job, val_out, opened, _position_runs(opened, val_N, shape), len(val_N))
        return _write(job, out, opened, _position_runs(opened, kept_N, shape), len(kept_N))


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """What stays the same over all files of one conversion."""

    shape: Shape
    on_error: str
    workers: int
    progress: Progress
    options: dict[str, Any]


def _write(
    job: _Job, out: Path, source: Source, runs: Iterable[Callable[[], Run]], total: int | None
) -> Manifest:
    """Carry out `runs`, store what they return in order, rename the result to `out`, return its manifest."""
    tally = Tally(job.shape.channels, np.iinfo(job.shape.dtype).max)
    labels: array[int] = array("q")
    numbers: dict[
        str, int
    ] = {}  # directories of a stream in order of appearance, until all classes are known
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with _writer(job.shape, temporary, total) as writer:
            for run in _in_order(runs, job.workers):
                if run.refused and job.on_error == "fail":
                    raise UserError(run.refused[0][1], "Mend or remove it, or set on_error to skip.")
                tally.add(run)
                for data, label in zip(run.data, run.labels, strict=True):
                    number = label if isinstance(label, int) else numbers.setdefault(label, len(numbers))
                    writer.add(data, number)
                    labels.append(number)
                job.progress(tally.count + tally.skipped_count, total)
            if not tally.count:
                raise UserError(
                    f"{source.name}: no image could be read", "See whether it holds images at all."
                )
        labels_N = np.frombuffer(labels, np.int64)
        classes = source.classes
        if classes is None:
            assert isinstance(source, Stream)
            classes, label_of = class_labels(source.directories)
            labels_N = _relabel(temporary, labels_N, np.array([label_of[d] for d in numbers], np.int64))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    manifest = make_manifest(
        tally, file_format="beton", classes=classes, labels_N=labels_N, options=job.options
    )
    write_manifest(manifest, manifest_path(out))
    return manifest


def _writer(shape: Shape, path: Path, total: int | None) -> BetonWriter:
    return BetonWriter(
        path,
        count_hint=total,
        mode=shape.mode,
        channels=shape.channels,
        dtype=shape.dtype,
        quality=shape.quality,
        smart_bytes=shape.smart_bytes,
    )


def _relabel(path: Path, labels_N: NDArray[np.int64], final: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the samples of a finished .beton their final labels: `final` by provisional number."""
    renumbered_N = final[labels_N]
    if not np.array_equal(renumbered_N, labels_N):
        relabel(path, renumbered_N)
    return renumbered_N


def _in_order(runs: Iterable[Callable[[], Run]], workers: int) -> Iterator[Run]:
    """Results of `runs` in their order, `workers` at a time, no more than two each under way."""
    pending: deque[Future[Run]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        for run in runs:
            pending.append(pool.submit(run))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _position_runs(
    source: Indexed, positions_N: NDArray[np.int64], shape: Shape
) -> Iterator[Callable[[], Run]]:
    """Runs of items that the workers read themselves."""
    for start in range(0, len(positions_N), _INDEXED_RUN):
        part = positions_N[start : start + _INDEXED_RUN].tolist()
        yield functools.partial(_prepare_at, source, part, shape)


def _prepare_at(source: Indexed, positions: list[int], shape: Shape) -> Run:
    return prepare([source.read(i) for i in positions], shape)


def _item_runs(items: Iterator[Item], shape: Shape) -> Iterator[Callable[[], Run]]:
    """Runs of items read from a stream, by the one thread that reads it."""
    run: list[Item] = []
    size = 0
    for item in items:
        run.append(item)
        size += len(item.data) if isinstance(item.data, bytes) else 0
        if len(run) == _STREAM_RUN or size > _RUN_BYTES:
            yield functools.partial(prepare, run, shape)
            run, size = [], 0
    yield functools.partial(prepare, run, shape)


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
