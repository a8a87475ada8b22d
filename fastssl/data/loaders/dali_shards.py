"""Streams a folder of WebDataset shards through DALI's own reader, for data that is not on a local disk.

The order is the stream's, unlike the other loaders': in each epoch the shards come in an order drawn from (seed,
epoch), ranks read contiguous parts of that sequence, and samples leave a buffer at random. So an epoch depends on the
seed, the epoch and the number of ranks alone, every sample comes once, and a restart reads and drops what came before
it. `index_B` is the sample's number over all shards, which the index tells, so its draws are as everywhere else.

N samples, B batch of one rank, H W height and width in pixels, C channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.loaders.dali import dali, decoded, device_id, fn, packed
from fastssl.data.loaders.layout import Layout, as_batch, padded
from fastssl.data.loaders.plan import check_batch_size
from fastssl.data.loaders.shard_index import IMAGE_SUFFIXES, ShardIndex, read_index
from fastssl.data.loaders.threads import WATCHDOG_S
from fastssl.data.loaders.transfer import delivered
from fastssl.errors import UserError
from fastssl.runs.machine import cores

BUFFER = 1024  # encoded samples from which each next one is drawn


def open_stream(
    folder: Path,
    *,
    device: torch.device | str,
    batch_size: int,
    order: Callable[[int, int], Tensor],
    seed: int,
    drop_last: bool = True,
    rank: int = 0,
    world: int = 1,
    threads: int | None = None,
    limit_s: float = WATCHDOG_S,
    layout: Layout = "flat",
    channels: int = 3,
    image_shape: tuple[int, int, int] | None = None,
) -> "DaliStream":
    """Open a folder of shards, each with its index next to it.

    Args:
        folder: of .tar and .idx files, as `convert --format webdataset` writes them.
        device: where batches arrive.
        batch_size: images of one global batch.
        order: (epoch, count) -> permutation of range(count), int64; a pure function, for the shards.
        seed: of the buffer.
        drop_last: leave out the last short batch.
        rank, world: this process and how many there are.
        threads: that decode; None for one per core.
        limit_s: longest wait for one batch in seconds.
        layout: of images of different sizes, "flat" or "padded".
        channels: 3, or 1 for gray.
        image_shape: (H, W, C) where all images are known to have one.

    Raises:
        UserError: when the shards are not sound or fewer than a batch.
    """
    check_batch_size(batch_size, world)
    index = read_index(folder)
    if drop_last and len(index) < batch_size:
        raise UserError(
            f"batch_size {batch_size} is larger than the set of {len(index)} images.", "Set data.batch_size lower."
        )
    device, threads = torch.device(device), threads or cores().count
    return DaliStream(
        index, device, batch_size, order, seed, drop_last, rank, world, threads, limit_s, layout, channels, image_shape
    )


@dataclass(frozen=True)
class DaliStream:
    """Batches of a folder of shards; `open_stream` makes one and explains its fields."""

    index: ShardIndex
    device: torch.device
    batch_size: int
    order: Callable[[int, int], Tensor]
    seed: int
    drop_last: bool
    rank: int
    world: int
    threads: int
    limit_s: float
    layout: Layout
    channels: int
    image_shape: tuple[int, int, int] | None

    def __len__(self) -> int:
        """Steps per epoch, the same for every rank."""
        whole, rest = divmod(len(self.index), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from `start_step` on; labels are -1 where a sample has no `.cls` with a number."""
        yield from delivered(self._batches(epoch, start_step), None, self.device, limit_s=self.limit_s)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        share = self.batch_size // self.world
        first, last = (len(self.index) * (self.rank + i) // self.world for i in (0, 1))
        try:
            pipeline = self._build(epoch, share)
            for step in range(len(self)):
                outputs = pipeline.run()
                if step >= start_step:
                    yield self._batch(*outputs, count=min(share, max(0, last - first - step * share)))
        except RuntimeError as error:  # DALI's pipeline is lost then
            folder = self.index.shards[0].parent
            raise UserError(
                f"DALI cannot read {folder}: {str(error).rstrip('.')}.", "Convert the data again."
            ) from error

    def _build(self, epoch: int, batch_size: int) -> Any:
        chosen = self.order(epoch, len(self.index.shards)).tolist()
        seed = (self.seed * 1_000_003 + epoch) % (1 << 31)
        pipeline = dali.Pipeline(batch_size, self.threads, device_id(self.device), seed=seed, exec_dynamic=True)
        with pipeline:
            read: Any = fn.readers.webdataset(
                paths=[str(self.index.shards[i]) for i in chosen],
                index_paths=[str(self.index.index_paths[i]) for i in chosen],
                ext=[";".join(IMAGE_SUFFIXES), "cls"],
                missing_component_behavior="empty",
                random_shuffle=True,
                initial_fill=BUFFER,
                seed=seed,
                shard_id=self.rank,
                num_shards=self.world,
                dont_use_mmap=True,  # a page fault over a network holds up a whole thread
            )
            encoded, label = read
            place = fn.get_property(encoded, key="source_info")
            images = decoded(encoded, self.device, gray=self.channels == 1, upright=True)
            pipeline.set_outputs(images, label, place)
        pipeline.build()
        return pipeline

    def _batch(self, images: Any, labels: Any, places: Any, *, count: int) -> Batch:
        """The first `count` samples of what the pipeline delivered."""
        sizes_B2 = np.array(images.shape(), np.int64)[:count, :2].reshape(count, 2)
        flat = packed(images, self.device)[: int(sizes_B2.prod(axis=1).sum()) * self.channels]
        if self.image_shape is not None and (sizes_B2 != self.image_shape[:2]).any():
            raise UserError(
                "The images differ in size, and their manifest says they do not.", "Convert the data again."
            )
        index_B = torch.from_numpy(self._numbers([bytes(places.at(k)).decode() for k in range(count)]))
        batch = as_batch(flat, index_B, sizes_B2, self.channels, self.image_shape)
        batch.labels_B[:] = torch.tensor([label_of(bytes(labels.at(k))) for k in range(count)], dtype=torch.int64)
        return padded(batch, sizes_B2, self.channels) if self.layout == "padded" else batch

    def _numbers(self, places: list[str]) -> np.ndarray:
        """Sample numbers from what DALI says of their source: path of the shard, first byte, name."""
        shard_of = {str(path): i for i, path in enumerate(self.index.shards)}
        parts = [place.split(".tar:", 1) for place in places]
        shard_B = np.array([shard_of[path + ".tar"] for path, _ in parts], np.int64)
        return self.index.numbers(shard_B, np.array([int(rest.split(":", 1)[0]) for _, rest in parts], np.int64))


def label_of(content: bytes) -> int:
    """The number in a `.cls` file, -1 where there is none."""
    return int(content) if content.strip().isdigit() else -1
