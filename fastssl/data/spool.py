"""Turns a stream into items by position: its bytes go to an unnamed file on disk, 32 bytes an item to memory."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .numbering import Numbering
from .sources.base import Indexed, Item, Stream
from .storage import writing


def spool(stream: Stream, folder: Path, *, tick: Callable[[int], None]) -> Indexed:
    """Read `stream` to its end and return the same items by position.

    Args:
        folder: where the unnamed file lies; it vanishes with the returned source.
        tick: called with the number of items so far.
    """
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    keys: list[str] = []
    numbering = Numbering()
    places: list[tuple[int, int, tuple[int, ...], str]] = []  # offset, bytes, shape, dtype; no dtype: encoded
    refused: dict[int, Exception] = {}
    end = 0
    for index, item in enumerate(stream.items()):
        data, shape, dtype = item.data, (), ""
        if isinstance(data, Exception):
            refused[index], data = data, b""
        elif isinstance(data, np.ndarray):
            shape, dtype, data = data.shape, data.dtype.str, data.tobytes()
        with writing(folder):
            file.write(data)
        keys.append(item.key)
        numbering.number(item.label)
        places.append((end, len(data), shape, dtype))
        end += len(data)
        tick(index + 1)
    with writing(folder):
        file.flush()
    classes, labels_N = numbering.finish(stream)

    def read(index: int) -> Item:
        offset, size, shape, dtype = places[index]
        data: bytes | np.ndarray | Exception
        if index in refused:
            data = refused[index]
        else:
            data = os.pread(file.fileno(), size, offset)
            data = np.frombuffer(data, dtype).reshape(shape) if dtype else data
        return Item(keys[index], data, int(labels_N[index]))

    return Indexed(stream.name, classes, labels_N, read)
