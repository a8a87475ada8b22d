"""From any source of images to a `.beton` or to WebDataset shards, in one pass, in parallel, in order.

Choice made: a stream whose order is kept is read, decoded and written at once; one that is to be chosen from or
shuffled goes through an unnamed file on disk first. Memory does not grow with the set.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastssl.data.convert.journal import Journal
from fastssl.data.convert.output import (
    Job,
    Progress,
    check_absent,
    check_pixels,
    check_target,
    converted,
    place,
    read_all,
)
from fastssl.data.convert.prepare import Mode, Shape
from fastssl.data.convert.space import check_space
from fastssl.data.convert.spool import spool
from fastssl.data.convert.subset import check_fraction, choose
from fastssl.data.decode import parse_color
from fastssl.data.formats.decoded import MAX_PIXELS
from fastssl.data.limits import MAX_CHANNELS
from fastssl.data.manifest import Manifest
from fastssl.data.sources import SPLITS, open_source
from fastssl.data.sources.base import Indexed, Source, Stream, check_known, renumber
from fastssl.data.sources.choices import Choices
from fastssl.data.storage import parents
from fastssl.errors import UserError, errors_of, option, raise_all
from fastssl.runs.files import remove_abandoned
from fastssl.runs.machine import cores


def convert(
    source: str | Path,
    out: str | Path | None,
    *,
    split: str = "train",
    format: Literal["beton", "webdataset"] = "beton",
    side_px: int | None = None,
    max_side_px: int | None = None,
    channels: int = 3,
    dtype: Literal["uint8", "uint16"] = "uint8",
    stretch: int | None = None,
    background: str | None = None,
    max_pixels: int = MAX_PIXELS,
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
    image_column: str | None = None,
    label_column: str | None = None,
    image_root: Path | None = None,
    image_key: str | None = None,
    check: bool = False,
    overwrite: bool = True,
    resume: bool = False,
    workers: int | None = None,
    root: Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Convert the images of `source` to `out`, and write `<out>.json`, the manifest, next to it.

    Nothing appears at `out` before it is complete; an error or an interruption leaves what was there.

    Args:
        source: what `open_source` takes: a name or a path.
        out: the .beton to make or replace; for webdataset a folder. Not used with `check`.
        split: train, test, val or unlabeled.
        format: "beton", FFCV's, or "webdataset", tar shards with DALI's index.
        side_px: every image's shorter side is brought to this and its center cut out, square; None keeps sizes.
        max_side_px: longer sides are reduced to this, aspect kept; not together with side_px.
        channels: 1 or 3 converts; any other number has to be the images' own.
        dtype: sample type; 16-bit images are narrowed to "uint8", or 8-bit ones widened to "uint16".
        stretch: value of 16-bit images that becomes the largest of `dtype`, such as 4095 for 12-bit data; None takes
            65535.
        background: color beneath transparent pixels ("white", "#808080"); None shows what the file hides there.
        max_pixels: images of more are refused by their header; raise it for large photos that side_px shrinks.
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
        on_error: "fail" reads all images, then lists those that cannot be read, or "skip", count and list them.
        image_column: of a table, where it has no usual name.
        label_column: likewise.
        image_root: folder that a .csv's paths start from; its own when None.
        image_key: suffix of the image in WebDataset samples that hold several, such as "left.png".
        check: read what would be converted and write nothing.
        overwrite: replace what is at `out`; else that is an error.
        resume: keep finished work when interrupted, in a hidden file next to `out`, and continue from it when called
            again in the same way.
        workers: threads; None takes one per core.
        root: folder of torchvision's files, see `open_source`.
        download: fetch them when they are absent.
        progress: called with the number of images done and, where known, of all.

    Returns:
        The manifest; `account` says what the source held and what was passed over.
    """
    errors = [
        *_unknown(split=split, format=format, mode=mode, dtype=dtype, on_error=on_error),
        *_too_small(side_px=side_px, max_side_px=max_side_px, channels=channels, count=count, workers=workers),
        *_too_small(max_pixels=max_pixels, stretch=stretch, quality=quality, limit=limit),
        *_too_large(channels=(channels, MAX_CHANNELS), quality=(quality, 100)),
        *_unfit(classes=classes, shard_mb=shard_mb, val_count=val_count, side_px=side_px, max_side_px=max_side_px),
        *errors_of(lambda: check_fraction(fraction), lambda: None if background is None else parse_color(background)),
    ]
    if not isinstance(out, str | Path | None):
        errors.append(UserError(f"out is a {type(out).__name__}.", "Pass the path of the file to make."))
    elif out is None and not check:
        errors.append(
            UserError("There is no output to write to.", "Give OUT, for example data/train.beton, or check the source.")
        )
    raise_all(errors)
    options: dict[str, Any] = {
        "source": str(source),
        "split": split,
        "format": format,
        "side_px": side_px,
        "max_side_px": max_side_px,
        "channels": channels,
        "dtype": dtype,
        "stretch": stretch,
        "background": background,
        "max_pixels": max_pixels,
        "mode": mode,
        "quality": quality,
        "shard_mb": shard_mb,
        "val_count": val_count,
        "fraction": fraction,
        "limit": limit,
        "shuffle": shuffle,
        "seed": seed,
        "count": count,
        "classes": None if classes is None else list(classes),
        "on_error": on_error,
        "image_column": image_column,
        "label_column": label_column,
        "image_root": None if image_root is None else str(image_root),
        "image_key": image_key,
        "root": None if root is None else str(root),
    }
    shape = Shape(
        side_px,
        max_side_px,
        channels,
        dtype,
        mode,
        quality,
        encoded=format == "webdataset",
        max_pixels=max_pixels,
        background=None if background is None else parse_color(background),
        stretch=stretch,
    )
    shard_bytes = int(shard_mb * 1e6) if format == "webdataset" else None
    job = Job(shape, shard_bytes, on_error, workers or cores().count, resume, progress or _silent, options)
    choices = Choices(image_column, label_column, image_root, image_key, tuple(classes or ()))

    def opened() -> Source:
        return open_source(
            source, split=split, root=root, download=download, seed=seed, count=count, side_px=side_px, choices=choices
        )

    which = {"seed": seed, "val_count": val_count, "fraction": fraction, "limit": limit, "shuffle": shuffle}
    if check:
        return _check(job, opened, classes=classes, which=which)
    assert out is not None
    return _convert_to(job, opened, Path(out), classes=classes, which=which, overwrite=overwrite)


def _check(job: Job, opened: Callable[[], Source], *, classes: Sequence[str] | None, which: dict[str, Any]) -> Manifest:
    """Read what would be converted and write nothing; refuses what a conversion would refuse."""
    check_pixels(job)
    source = opened()
    if isinstance(source, Indexed):
        source = source if classes is None else renumber(source, tuple(classes))
        return read_all(job, source, np.concatenate(choose(source.labels_N, **which)))
    manifest = read_all(job, source)
    if classes is not None:
        check_known(source.name, manifest.classes, classes)
    choose(np.zeros(manifest.count + manifest.skipped_count, np.int64), **which)
    return manifest


def _convert_to(
    job: Job,
    opened: Callable[[], Source],
    out: Path,
    *,
    classes: Sequence[str] | None,
    which: dict[str, Any],
    overwrite: bool,
) -> Manifest:
    """Check the targets, then open the source and convert it."""
    val_out = out.with_name(f"{out.stem}.val{out.suffix}") if which["val_count"] else None
    targets = (out, val_out) if val_out else (out,)
    checks = [partial(check_target, target, job) for target in targets]
    raise_all(errors_of(*checks, *(() if overwrite else [partial(check_absent, target) for target in targets])))
    source = opened()
    unchanged = {"seed": which["seed"], "val_count": 0, "fraction": 1.0, "limit": None, "shuffle": False}
    with parents(out.parent):
        for target in targets:
            remove_abandoned(target)
        if isinstance(source, Stream) and which == unchanged and classes is None and job.shard_bytes is None:
            _check_room(job, targets, source)
            with converted(job, out, source) as whole:
                place(whole)
                return whole.manifest
        return _convert_chosen(job, source, out, val_out, classes=classes, which=which)


def _convert_chosen(
    job: Job, source: Source, out: Path, val_out: Path | None, *, classes: Sequence[str] | None, which: dict[str, Any]
) -> Manifest:
    """Convert what `choose` makes of `which`; both outputs are complete before either takes its name."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Stream):
            spooled = spool(source, out.parent, tick=lambda done: job.progress(done, None))
            source = stack.enter_context(spooled)
        if classes is not None:
            source = renumber(source, tuple(classes))
        chosen_N, val_N = choose(source.labels_N, **which)
        _check_room(job, (out, val_out) if val_out else (out,), source, np.concatenate([chosen_N, val_N]))
        chosen = stack.enter_context(converted(job, out, source, chosen_N))
        val = [] if val_out is None else [stack.enter_context(converted(job, val_out, source, val_N))]
        place(chosen, *val)
        return chosen.manifest


def _check_room(
    job: Job, targets: Sequence[Path], source: Source, positions_N: NDArray[np.int64] | None = None
) -> None:
    """UserError when the outputs do not fit; a journal holds every image a second time."""
    journals = [Journal(target, "").path for target in targets] if job.resume else []
    check_space(
        source,
        job.shape,
        targets[0].parent,
        positions_N=positions_N,
        copies=2 if job.resume else 1,
        present_bytes=sum(path.stat().st_size for path in journals if path.exists()),
    )


def _unknown(**choices: str) -> Iterator[UserError]:
    allowed = {
        "split": tuple(SPLITS),
        "format": ("beton", "webdataset"),
        "mode": ("raw", "jpg", "smart"),
        "dtype": ("uint8", "uint16"),
        "on_error": ("fail", "skip"),
    }
    for name, value in choices.items():
        if value not in allowed[name]:
            yield UserError(
                f"{option(name)} is {value!r}.", f"Set {option(name)} to one of: {', '.join(allowed[name])}."
            )


def _too_small(**numbers: int | None) -> Iterator[UserError]:
    for name, value in numbers.items():
        if value is not None and not isinstance(value, int):
            yield UserError(f"{option(name)} is {value!r}.", f"Set {option(name)} to a whole number.")
        elif value is not None and value < 1:
            yield UserError(f"{option(name)} is {value}.", f"Set {option(name)} to 1 or more.")


def _too_large(**numbers: tuple[int, int]) -> Iterator[UserError]:
    for name, (value, most) in numbers.items():
        if isinstance(value, int) and value > most:
            yield UserError(f"{option(name)} is {value}.", f"Set {option(name)} to 1 to {most}.")


def _unfit(
    *, classes: object, shard_mb: float, val_count: int, side_px: int | None, max_side_px: int | None
) -> Iterator[UserError]:
    if isinstance(classes, str):
        yield UserError(f"classes is {classes!r}, a text.", "Pass a list of names, in the order of their labels.")
    if not 0 < shard_mb < math.inf:
        yield UserError(
            f"{option('shard_mb')} is {shard_mb:g}.", f"Set {option('shard_mb')} above 0, to 256 for example."
        )
    if not isinstance(val_count, int) or val_count < 0:
        yield UserError(f"{option('val_count')} is {val_count!r}.", f"Set {option('val_count')} to 0 or more.")
    if side_px is not None and max_side_px is not None:
        yield UserError(
            f"{option('side_px')} and {option('max_side_px')} are both set.",
            f"Set one of them: {option('side_px')} makes all images one size.",
        )


def _silent(done: int, total: int | None) -> None:
    """Progress for nobody."""
