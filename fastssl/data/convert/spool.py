"""Turns a stream into items by position: it goes to an unnamed file on disk, 16 bytes an item to memory."""

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastssl.data.convert.labels import Numbering
from fastssl.data.sources.base import Indexed, Item, Stream
from fastssl.data.storage import writing


@contextmanager
def spool(stream: Stream, folder: Path, *, tick: Callable[[int], None]) -> Iterator[Indexed]:
    """Read `stream` to its end; the same items by position, for as long as the context lasts.

    Args:
        folder: where the unnamed file lies.
        tick: called with the number of items so far.
    """
    offsets = array("q", [0])
    numbering = Numbering(stream)
    with tempfile.TemporaryFile(dir=folder) as file:
        for item in stream.items():
            with writing(folder):
                offsets.append(offsets[-1] + _put(item, file))
            numbering.number((item.label,))
            tick(len(offsets) - 1)
        with writing(folder):
            file.flush()
        classes, labels_N = numbering.finish()

        def read(index: int) -> Item:
            size = offsets[index + 1] - offsets[index]
            record = os.pread(file.fileno(), size, offsets[index])  # no shared position: any thread may ask
            return _get(record, int(labels_N[index]))

        yield Indexed(stream.name, classes, labels_N, read, account=stream.account, files=stream.files)


def _put(item: Item, file: IO[bytes]) -> int:
    """Append an item: length of its description, description, bytes. Returns the size of all."""
    data, about = item.data, dict[str, Any](key=item.key)
    if isinstance(data, Exception):
        about["refused"], data = str(data), b""
    elif isinstance(data, np.ndarray):
        about |= {"shape": data.shape, "dtype": data.dtype.str}
        data = data.tobytes()
    head = json.dumps(about).encode()
    return file.write(len(head).to_bytes(4, "little") + head) + file.write(data)


def _get(record: bytes, label: int) -> Item:
    start = 4 + int.from_bytes(record[:4], "little")
    about, data = json.loads(record[4:start]), record[start:]
    if "refused" in about:
        return Item(about["key"], ValueError(about["refused"]), label)
    if "dtype" in about:
        return Item(about["key"], np.frombuffer(data, about["dtype"]).reshape(about["shape"]), label)
    return Item(about["key"], data, label)
