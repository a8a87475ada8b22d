"""Turns a stream into items by position: its bytes go to an unnamed file on disk, their places to memory."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from .numbering import Numbering
from .sources.base import Indexed, Item, Stream
from .storage import writing


@contextmanager
def spool(stream: Stream, folder: Path, *, tick: Callable[[int], None]) -> Iterator[Indexed]:
    """Read `stream` to its end; the same items by position, for as long as the context lasts.

    Args:
        folder: where the unnamed file lies.
        tick: called with the number of items so far.
    """
    keys: list[str] = []
    places: list[_Place] = []
    numbering = Numbering()
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        for item in stream.items():
            places.append(_put(item.data, file))
            keys.append(item.key)
            numbering.number(item.label)
            tick(len(keys))
        file.flush()
        classes, labels_N = numbering.finish(stream)

        def read(index: int) -> Item:
            return Item(keys[index], _get(places[index], file.fileno()), int(labels_N[index]))

        yield Indexed(stream.name, classes, labels_N, read)


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where an item's bytes lie; pixels have a dtype, encoded files none, refused items only a reason."""

    offset: int
    size: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    refused: Exception | None = None


def _put(data: bytes | np.ndarray | Exception, file: IO[bytes]) -> _Place:
    if isinstance(data, Exception):
        return _Place(0, 0, refused=data)
    offset = file.tell()
    if isinstance(data, bytes):
        file.write(data)
        return _Place(offset, len(data))
    file.write(data.tobytes())
    return _Place(offset, data.nbytes, data.shape, data.dtype.str)


def _get(place: _Place, descriptor: int) -> bytes | np.ndarray | Exception:
    if place.refused is not None:
        return place.refused
    data = os.pread(descriptor, place.size, place.offset)  # no shared position: any thread may ask
    return np.frombuffer(data, place.dtype).reshape(place.shape) if place.dtype else data
