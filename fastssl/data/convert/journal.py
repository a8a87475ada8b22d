"""Finished runs of a conversion on disk, so that an interrupted one need not start again.

An append-only file of records, each with its length and checksum; a torn last record is cut off and done again.
"""

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import lock_descriptor

from fastssl.data.convert.prepare import Run
from fastssl.data.storage import writing
from fastssl.errors import UserError

_FRAME = struct.Struct("<QI")  # bytes of the record, CRC-32 of the record


class Journal:
    """The journal of one output.

    Args:
        out: the output; the journal is the hidden file `.<name>.resume` next to it.
        fingerprint: a journal that begins with another one is of no use and is started anew.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self._out = out
        self.path = out.with_name(f".{out.name}.resume")
        self._fingerprint = fingerprint.encode()

    def runs(self, rest: Callable[[int], Iterator[Run]]) -> Generator[Run]:
        """The finished runs as they were, then those of `rest`, called with the number of items in the former.

        A run counts as finished once its taker asks for the next one.
        """
        with writing(self.path):
            file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
        with file:
            self._lock(file)
            done = 0
            if _next(file) == self._fingerprint:
                while (record := _next(file)) is not None:
                    run = _unpack(record)
                    done += len(run.data) + len(run.refused)
                    yield run
            else:
                file.seek(0)
                _append(file, self._fingerprint, self.path)
            for run in rest(done):
                yield run
                _append(file, _pack(run), self.path)

    def _lock(self, file: BinaryIO) -> None:
        """UserError where another conversion writes this journal; file systems without locks are taken as they are."""
        with contextlib.suppress(OSError):
            if not lock_descriptor(file.fileno(), blocking=False):
                raise UserError(
                    f"Another process is converting to {self._out}.", "Wait for it, or choose another output."
                )

    def is_stale(self) -> bool:
        """Whether there is a journal, of other work."""
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with writing(self.path), open(self.path, "rb") as file:
            return _next(file) != self._fingerprint

    def remove(self) -> None:
        """Forget everything: the output is complete."""
        self.path.unlink(missing_ok=True)


def _append(file: BinaryIO, record: bytes, path: Path) -> None:
    with writing(path):
        file.truncate()  # whatever a torn or foreign journal still holds from here on
        file.write(_FRAME.pack(len(record), zlib.crc32(record)) + record)
        file.flush()


def _next(file: BinaryIO) -> bytes | None:
    """The next whole record; None, and back to where it would begin, when there is none.

    A record is never empty: zeros, as a loss of power leaves them, are an empty one with its checksum.
    """
    start = file.tell()
    frame = file.read(_FRAME.size)
    if len(frame) == _FRAME.size:
        length, checksum = _FRAME.unpack(frame)
        left = file.seek(0, io.SEEK_END) - start - _FRAME.size
        file.seek(start + _FRAME.size)
        if 0 < length <= left and zlib.crc32(record := file.read(length)) == checksum:
            return record
    file.seek(start)
    return None


def _pack(run: Run) -> bytes:
    arrays = [(d.shape, d.dtype.str) if isinstance(d, np.ndarray) else None for d in run.data]
    parts = [d.tobytes() if isinstance(d, np.ndarray) else d for d in run.data]
    head = json.dumps(
        {
            "arrays": arrays,
            "lengths": [len(part) for part in parts],
            "sizes": run.sizes,
            "labels": run.labels,
            "keys": run.keys,
            "refused": run.refused,
            "warnings": run.warnings,
            "deep": [run.deep_count, run.deep_peak],
            "sums": run.sums_2C.tolist(),
            "pixels": run.pixels,
            "pixel_bytes": run.pixel_bytes,
        }
    ).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(parts)


def _unpack(record: bytes) -> Run:
    (length,) = struct.unpack_from("<Q", record)
    head = json.loads(record[8 : 8 + length])
    at = 8 + length
    data: list[np.ndarray | bytes] = []
    for size, kind in zip(head["lengths"], head["arrays"], strict=True):
        part = record[at : at + size]
        data.append(part if kind is None else np.frombuffer(part, kind[1]).reshape(kind[0]))
        at += size
    return Run(
        data=data,
        sizes=[(height, width) for height, width in head["sizes"]],
        labels=head["labels"],
        keys=head["keys"],
        refused=[(key, reason) for key, reason in head["refused"]],
        warnings=[(key, text) for key, text in head["warnings"]],
        deep_count=head["deep"][0],
        deep_peak=head["deep"][1],
        sums_2C=np.array(head["sums"], np.int64),
        pixels=head["pixels"],
        pixel_bytes=head["pixel_bytes"],
    )
