"""Prepared samples into one output: written under a hidden name, described by a manifest, then put in place."""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastssl import __version__
from fastssl.data.beton.reader import BetonWriter
from fastssl.data.convert.chunks import indexed_runs, stream_runs
from fastssl.data.convert.journal import Journal
from fastssl.data.convert.labels import Numbering, relabel
from fastssl.data.convert.prepare import Run, Shape
from fastssl.data.convert.shards import ShardWriter, check_replaceable
from fastssl.data.convert.tally import Tally, make_manifest
from fastssl.data.manifest import Manifest, manifest_path
from fastssl.data.sources.base import Indexed, Source
from fastssl.data.storage import writing
from fastssl.errors import UserError, option
from fastssl.runs.files import atomic_json, put_in_place, remove, sync, temporary_name

MAX_SHOWN = 1000  # unreadable images named in an error
Progress = Callable[[int, int | None], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What all outputs of one conversion have in common.

    Attributes:
        shape: of every image.
        shard_bytes: size of a WebDataset shard; None makes a .beton.
        on_error: "fail" or "skip".
        workers: threads.
        resume: keep and use a journal.
        progress: called with the number of images done and of all, None where that is not known.
        options: for the manifest.
    """

    shape: Shape
    shard_bytes: int | None
    on_error: str
    workers: int
    resume: bool
    progress: Progress
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class HiddenOutput:
    """An output complete but for its name."""

    temporary: Path
    out: Path
    manifest: Manifest
    journal: Journal | None


@contextlib.contextmanager
def converted(
    job: Job, out: Path, source: Source, positions_N: NDArray[np.int64] | None = None
) -> Iterator[HiddenOutput]:
    """Convert `source`, or its items at `positions_N`, to a hidden file that is gone when the context ends.

    Unless `place` was called within.
    """
    temporary = temporary_name(out, "part")
    try:
        journal = Journal(out, _fingerprint(source, positions_N, job.options)) if job.resume else None
        if journal is not None and journal.is_stale():
            source.account.notes.append(
                f"{option('resume', True)}: the source or the options changed since the interrupted conversion, "
                "which starts anew"
            )
        yield HiddenOutput(temporary, out, _write(job, temporary, source, positions_N, journal), journal)
    except UserError as error:
        raise UserError(error.what.replace(str(temporary), str(out)), error.fix) from error
    finally:
        remove(temporary)
        for left in out.parent.glob(f".{glob.escape(temporary.name)}.*"):  # of a signal between opening and writing
            remove(left)


def place(*outputs: HiddenOutput) -> None:
    """Give the outputs of one conversion their names, replacing earlier ones, and then their manifests.

    A kill leaves new data without a manifest, never under the manifest of other data nor next to another's split.
    """
    with contextlib.ExitStack() as stack:
        hidden = [_hidden_manifest(output, stack) for output in outputs]
        for output in outputs:
            stack.enter_context(writing(output.out))
            if output.temporary.is_dir():
                check_replaceable(output.out)
        for output in outputs:
            manifest_path(output.out).unlink(missing_ok=True)
        sync(outputs[0].out.parent)
        for output in outputs:
            put_in_place(output.temporary, output.out)
        for output, temporary in zip(outputs, hidden, strict=True):
            put_in_place(temporary, manifest_path(output.out))
    for output in outputs:
        if output.journal is not None:
            output.journal.remove()


def _hidden_manifest(output: HiddenOutput, stack: contextlib.ExitStack) -> Path:
    """Write the manifest under a hidden name, which is gone when the context ends unless it took its own."""
    temporary = temporary_name(manifest_path(output.out))
    stack.callback(remove, temporary)
    with writing(manifest_path(output.out)):
        atomic_json(temporary, output.manifest.to_json())
    return temporary


def _write(
    job: Job, path: Path | None, source: Source, positions_N: NDArray[np.int64] | None, journal: Journal | None
) -> Manifest:
    """Store all runs in order at `path`, nowhere when None; returns the manifest."""
    tally, numbering = Tally(job.shape.channels, np.iinfo(job.shape.dtype).max), Numbering(source)
    total = (
        len(positions_N) if positions_N is not None else len(source) if isinstance(source, Indexed) else source.count
    )

    def rest(start: int) -> Iterator[Run]:
        if isinstance(source, Indexed):
            wanted_N = np.arange(len(source)) if positions_N is None else positions_N
            return indexed_runs(source, wanted_N[start:], job.shape, job.workers)
        return stream_runs(itertools.islice(source.items(), start, None), job.shape, job.workers)

    with contextlib.ExitStack() as stack:
        # closed at an error, too, whose traceback would otherwise hold the journal's lock
        runs = rest(0) if journal is None else stack.enter_context(contextlib.closing(journal.runs(rest)))
        writer = None if path is None else _writer(job, path, total)
        if writer is not None:
            stack.enter_context(writer)
        for run in runs:
            tally.add(run)
            numbers = numbering.number(run.labels)
            if writer is not None and not _failed(job, tally):  # after a failure the rest is only read
                writer.extend(run.data, numbers)
            job.progress(tally.count + tally.skipped_count, total)
        if _failed(job, tally):
            raise unreadable(source.name, tally.skipped, tally.skipped_count, tally.count + tally.skipped_count)
        if not tally.count:
            raise UserError(f"{source.name}: no image could be read.", "See whether it holds images at all.")
    if path is None and job.shard_bytes is None and tally.smallest != tally.largest:
        _check_sizes(job.shape, source.name)
    classes, labels_N = numbering.finish()
    if numbering.changed and path is not None:
        relabel(path, labels_N)
    is_beton = job.shard_bytes is None
    return make_manifest(
        tally,
        file_format="beton" if is_beton else "webdataset",
        classes=classes,
        labels_N=labels_N,
        options=job.options,
        account=source.account,
        shards=writer.shards if isinstance(writer, ShardWriter) else None,
    )


def read_all(job: Job, source: Source, positions_N: NDArray[np.int64] | None = None) -> Manifest:
    """Read and decode everything, or the items at `positions_N`, write nothing; the manifest of a conversion."""
    return _write(job, None, source, positions_N, None)


def _check_sizes(shape: Shape, name: str) -> None:
    """UserError where a `.beton` cannot hold images that differ in size."""
    if shape.channels != 3 or shape.dtype != "uint8":
        raise UserError(
            f"The images of {name} differ in size; in a .beton only 8-bit RGB images may.",
            "Set side_px so that all images get one size.",
        )


def _failed(job: Job, tally: Tally) -> bool:
    return tally.skipped_count > 0 and job.on_error == "fail"


def unreadable(name: str, skipped: Sequence[tuple[str, str]], count: int, total: int) -> UserError:
    """The error that lists the images that cannot be read, (key, reason), `count` of `total`."""
    lines = [reason if key in reason or repr(key) in reason else f"{key!r}: {reason}" for key, reason in skipped]
    skip = f"{option('on_error', 'skip')}, for `fastssl train` with -s data.on_error=skip"
    fix = f"Fix or remove what cannot be read, or leave it out with {skip}."
    if count == 1:
        return UserError(f"{lines[0].rstrip('.')}.", fix)
    more = count - len(lines[:MAX_SHOWN])
    listed = "\n".join(f"  {line}" for line in lines[:MAX_SHOWN]) + (f"\n  and {more} more" if more else "")
    return UserError(
        f"{count} of {total} images of {name} cannot be read:\n{listed}.",
        fix,
    )


def _writer(job: Job, path: Path, total: int | None) -> BetonWriter | ShardWriter:
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


def _fingerprint(source: Source, positions_N: NDArray[np.int64] | None, options: dict[str, Any]) -> str:
    """What has to be the same for finished work to be of use: version, options, and every file of the source."""
    digest = hashlib.sha256()
    for path in source.files() if source.files is not None else [Path(source.name)]:
        digest.update(os.fsencode(path) + b"\0")
        with contextlib.suppress(OSError, ValueError):  # absent is a state too
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    digest.update(source.labels_N.tobytes() if isinstance(source, Indexed) else b"")
    digest.update(b"" if positions_N is None else positions_N.tobytes())
    return json.dumps([__version__, options, digest.hexdigest()], sort_keys=True)


def check_absent(out: Path) -> None:
    """UserError where the output is there, or where a file that is no manifest has its manifest's name."""
    record = manifest_path(out)
    if out.exists() or (record.exists() and not is_manifest(record)):
        raise UserError(
            f"{out if out.exists() else record} exists already.",
            f"Add {option('overwrite', True, flag='force')} to replace it, or choose another output.",
        )


def is_manifest(path: Path) -> bool:
    """Whether a conversion wrote this file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"count", "classes", "digest", "options"} <= record.keys()


def check_target(out: Path, job: Job) -> None:
    """What would fail at the end, found at the start."""
    if job.shard_bytes is None and out.is_dir():
        raise UserError(f"{out} is a folder.", "Give the name of a file, such as train.beton.")
    if job.shard_bytes is not None:
        check_replaceable(out)
    check_pixels(job)


def check_pixels(job: Job) -> None:
    """UserError for channels and sample types that the format cannot hold."""
    if job.shard_bytes is not None:
        if job.shape.dtype != "uint8" or job.shape.channels not in (1, 3):
            raise UserError(
                f"WebDataset shards hold PNG or JPEG, not {job.shape.channels} channels of {job.shape.dtype}.",
                "Set format to beton, or channels to 1 or 3 and dtype to uint8.",
            )
    elif job.shape.mode != "raw" and (job.shape.dtype != "uint8" or job.shape.channels != 3):
        raise UserError(
            f"mode is {job.shape.mode}, but a .beton holds JPEGs of 3 channels of uint8 alone.",
            "Set mode to raw, or channels to 3 and dtype to uint8.",
        )
