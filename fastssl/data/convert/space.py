"""Whether an output fits on its file system: asked before the work begins, not found out at its end."""

import contextlib
import itertools
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fastssl.data.convert.prepare import Shape, prepare
from fastssl.data.sources.base import Indexed, Item, Source
from fastssl.errors import UserError, option

SAMPLED = 16  # images prepared to estimate the size of all
_MEMBER_BYTES = 2048  # headers, padding and label of an image in a shard
UNKNOWN = "Free space was not checked: the size of the output is not known beforehand"


def check_space(
    source: Source,
    shape: Shape,
    folder: Path,
    *,
    positions_N: NDArray[np.int64] | None = None,
    copies: int = 1,
    present_bytes: int = 0,
) -> None:
    """UserError when the output is larger than what is free in `folder`; a note in the account where nobody knows.

    Args:
        source: of the images.
        shape: as they will be stored.
        folder: that the output goes to.
        positions_N: of those to be stored; None means all.
        copies: how often they lie on the disk before the end.
        present_bytes: of those copies that lie there already.

    Images stored as pixels of one size are counted; others are estimated from a few of them.
    """
    wanted_N = np.arange(len(source)) if positions_N is None and isinstance(source, Indexed) else positions_N
    count = len(wanted_N) if wanted_N is not None else None if isinstance(source, Indexed) else source.count
    each_bytes = None if count is None else _bytes_of_one(source, shape, wanted_N)
    disk = shutil.disk_usage(folder)
    if count is None or each_bytes is None or not disk.total:  # some file systems tell nothing
        source.account.notes.append(UNKNOWN if disk.total else f"Free space was not checked: {folder} does not tell it")
        return
    needed = count * each_bytes * copies - present_bytes
    if needed > disk.free:
        raise UserError(
            f"{count} images of {source.name} need about {_size(needed)}, {folder} has {_size(disk.free)} free.",
            f"Free some space, choose another target, or set {option('side_px')}, {option('max_side_px')}, "
            f"{option('mode', 'jpg')} or {option('fraction')}.",
        )


def _bytes_of_one(source: Source, shape: Shape, wanted_N: NDArray[np.int64] | None) -> float | None:
    """Stored bytes of an image: exact for pixels of one size, else the mean of some; None if none can be read."""
    pixel_bytes = (shape.side_px or 0) ** 2 * shape.channels * np.dtype(shape.dtype).itemsize
    small = shape.mode == "smart" and pixel_bytes <= shape.smart_bytes
    if shape.side_px is not None and not shape.encoded and (shape.mode == "raw" or small):
        return pixel_bytes
    with _some(source, wanted_N) as items:
        run = prepare(items, shape)
    if not run.data:
        return None
    sizes = [data.nbytes if isinstance(data, np.ndarray) else len(data) for data in run.data]
    return sum(sizes) / len(sizes) + (_MEMBER_BYTES if shape.encoded else 0)


@contextlib.contextmanager
def _some(source: Source, wanted_N: NDArray[np.int64] | None) -> Iterator[Iterator[Item]]:
    """Items spread evenly over those wanted; the first ones of a stream."""
    if isinstance(source, Indexed):
        assert wanted_N is not None
        places = np.linspace(0, len(wanted_N) - 1, min(SAMPLED, len(wanted_N))).astype(np.int64)
        yield map(source.read, wanted_N[places].tolist())
        return
    with contextlib.closing(cast("Generator[Item]", source.items())) as items:
        yield itertools.islice(items, SAMPLED)


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(0, count) / 1e6:.1f} MB"
