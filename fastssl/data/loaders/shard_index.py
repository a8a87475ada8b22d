"""Where each sample of a folder of WebDataset shards lies, from the `.idx` files that DALI reads too.

N samples of all shards together, numbered in the order of the shards' names.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastssl.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a folder.

    Attributes:
        shards: paths of the .tar files, sorted.
        offsets: first byte of each sample's image in its shard, ascending, int64; one array a shard.
        first: number of each shard's first sample, and at the end N.
    """

    shards: tuple[Path, ...]
    offsets: tuple[NDArray[np.int64], ...]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def index_paths(self) -> tuple[Path, ...]:
        return tuple(path.with_suffix(".idx") for path in self.shards)

    def numbers(self, shard_B: NDArray[np.int64], offset_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each sample whose image starts at this byte of this shard."""
        pairs = zip(shard_B.tolist(), offset_B.tolist(), strict=True)
        return np.array([self.first[s] + np.searchsorted(self.offsets[s], at) for s, at in pairs], np.int64)


def read_index(folder: Path) -> ShardIndex:
    """The shards of a folder and their samples.

    Raises:
        UserError: when there is no shard, or one lacks a sound index.
    """
    shards = tuple(sorted(folder.glob("*.tar")))
    if not shards:
        fix = "Make them with: fastssl convert SOURCE OUT --format webdataset."
        raise UserError(f"{folder} holds no .tar shards.", fix)
    offsets = tuple(_image_offsets(path.with_suffix(".idx")) for path in shards)
    return ShardIndex(shards, offsets, np.cumsum([0, *map(len, offsets)]))


def _image_offsets(path: Path) -> NDArray[np.int64]:
    """First byte of the image of each line: a line is (suffix, offset, size, name) for every member of a sample."""
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        version, count = head.split()
        if version != "v1.2" or int(count) != len(lines):
            raise ValueError(head)
        offsets = [_image_offset(line.split(" ")) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is missing or no index of version 1.2: {error}.",
            f"Convert {path.parent} to new shards, or make the index with DALI's wds2idx.",
        ) from error
    return np.array(offsets, np.int64)


def _image_offset(words: list[str]) -> int:
    for suffix, offset in zip(words[::4], words[1::4], strict=True):
        if suffix.lower() in IMAGE_SUFFIXES:
            return int(offset)
    raise ValueError("a sample has no image")
