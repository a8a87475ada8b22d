"""The whole data set as uint8 in memory, so that loading a batch costs one index.

Each JPEG is decoded once, when the set is opened. The images lie one after another in a flat buffer. A batch of one
size is gathered into (B, H, W, C), unless it is to stay in place; images that differ in size always do: a batch is then
offsets into the buffer, nothing copied.

N stored samples, B batch of one rank, H W height and width in pixels, C channels.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton
from fastssl.data.loaders.layout import Layout, as_batch, empty, ends_of, image_shape, require_memory
from fastssl.data.loaders.loader import BetonLoader, Store
from fastssl.data.loaders.plan import Plan, PlanOptions
from fastssl.data.loaders.threads import spread
from fastssl.data.loaders.transfer import delivered, to_device
from fastssl.runs.machine import cores

Memory = Literal["device", "host", "mmap"]
CHUNK_BYTES = 1 << 26  # staged per copy to an accelerator while loading


def open_loader(
    path: Path,
    *,
    device: torch.device | str,
    memory: Memory = "device",
    threads: int | None = None,
    layout: Layout = "flat",
    in_place: bool = False,
    **plan: Unpack[PlanOptions],
) -> BetonLoader:
    """Load a file.

    Args:
        path: a `.beton`.
        device: where batches arrive.
        memory: "device" holds the pixels there; "host" in pinned host memory, one batch copied ahead; "mmap" in the
            file, decoded at each use, one batch ahead.
        threads: that decode JPEGs; None for one per core.
        layout: of images of different sizes, see `BetonLoader`.
        in_place: with memory "device" and layout "flat", images of one size arrive as offsets into the buffer too.
        plan: see `PlanOptions`.
    """
    device, beton = torch.device(device), Beton(path)
    steps = Plan.make(len(beton), **plan)
    threads = threads or cores().count
    store: Store
    if memory == "mmap":
        store = _Mapped(beton, device, threads)
    elif memory == "host" and device.type != "cpu":
        store = _Host(beton, device, threads)
    else:
        store = _Device(beton, device, threads, in_place=in_place and layout == "flat")
    return BetonLoader(beton, store, steps, torch.from_numpy(beton.labels).to(device), layout)


class _Device:
    """Pixels on the device: a batch is one index, or offsets into the flat buffer: in place, or when sizes differ."""

    def __init__(self, beton: Beton, device: torch.device, threads: int, *, in_place: bool) -> None:
        self._device, self._shape = device, None if in_place else image_shape(beton)
        require_memory(_decoded_bytes(beton), device)
        ends = ends_of(beton.sizes, beton.channels)
        self._flat = empty(int(ends[-1]), beton.dtype, device=device)
        _fill(self._flat, beton, threads)
        self._offsets_N = torch.from_numpy(ends[:-1]).to(device)
        self._sizes_N2 = torch.from_numpy(np.ascontiguousarray(beton.sizes)).to(device)

    def batches(self, index_M: Tensor, parts: list[slice], labels_N: Tensor) -> Iterator[Batch]:
        index_M = to_device(index_M, self._device)
        if self._shape is None:
            for index_B in (index_M[part] for part in parts):
                sizes_B2, offsets_B = self._sizes_N2[index_B], self._offsets_N[index_B]
                yield Batch(self._flat, labels_N[index_B], index_B, sizes_B2, offsets_B)
            return
        for index_B in (index_M[part] for part in parts):
            yield Batch(self._images(index_B, self._shape), labels_N[index_B], index_B)

    def _images(self, index_B: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """These images, of one size."""
        if self._device.type == "cpu":
            # not torch's index: its threads would then wait in a loop next to those that cut the views
            return torch.from_numpy(self._flat.numpy().reshape(-1, *shape).take(index_B.numpy(), axis=0))
        return _selectable(self._flat).view(-1, *shape).index_select(0, index_B).view(self._flat.dtype)


class _Host:
    """Pixels in pinned host memory, gathered and copied one batch ahead."""

    def __init__(self, beton: Beton, device: torch.device, threads: int) -> None:
        require_memory(_decoded_bytes(beton), torch.device("cpu"))
        self._device, self._beton, self._ends = device, beton, ends_of(beton.sizes, beton.channels)
        self._flat = empty(int(self._ends[-1]), beton.dtype, pin=device.type == "cuda")
        _fill(self._flat, beton, threads)

    def batches(self, index_M: Tensor, parts: list[slice], labels_N: Tensor) -> Iterator[Batch]:
        pin = self._device.type == "cuda"
        batches = (_gathered(self._gather, self._beton, index_M[part], pin=pin) for part in parts)
        return delivered(batches, labels_N, self._device)

    def _gather(self, index_B: Tensor, flat: Tensor, ends: np.ndarray) -> None:
        if self._beton.is_uniform:
            rows = _selectable(self._flat).view(len(self._beton), -1)
            torch.index_select(rows, 0, index_B, out=_selectable(flat).view(len(index_B), -1))
            return
        for k, i in enumerate(index_B.tolist()):
            flat[ends[k] : ends[k + 1]] = self._flat[self._ends[i] : self._ends[i + 1]]


class _Mapped:
    """Pixels in the mapped file, decoded at each use, one batch ahead."""

    def __init__(self, beton: Beton, device: torch.device, threads: int) -> None:
        self._device, self._beton, self._threads, self._is_raw = device, beton, threads, beton.is_raw

    def batches(self, index_M: Tensor, parts: list[slice], labels_N: Tensor) -> Iterator[Batch]:
        pin = self._device.type == "cuda"
        batches = (_gathered(self._gather, self._beton, index_M[part], pin=pin) for part in parts)
        return delivered(batches, labels_N, self._device)

    def _gather(self, index_B: Tensor, flat: Tensor, ends: np.ndarray) -> None:
        target = flat.numpy()
        if self._is_raw:
            self._beton.read_raw(target, index_B.numpy())
            return
        index = index_B.tolist()

        def decode(k: int) -> None:
            target[ends[k] : ends[k + 1]] = self._beton.image(index[k]).reshape(-1)

        spread(decode, len(index), self._threads)


_Gather = Callable[[Tensor, Tensor, np.ndarray], None]


def _gathered(gather: _Gather, beton: Beton, index_B: Tensor, *, pin: bool) -> Batch:
    """One batch in host memory, without its labels."""
    sizes_B2 = beton.sizes[index_B.numpy()]
    ends = ends_of(sizes_B2, beton.channels)
    flat = empty(int(ends[-1]), beton.dtype, pin=pin)
    gather(index_B, flat, ends)
    return as_batch(flat, index_B, sizes_B2, beton.channels, image_shape(beton))


def _selectable(tensor: Tensor) -> Tensor:
    """The same bytes as a type that torch can index: it cannot index uint16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor


def _decoded_bytes(beton: Beton) -> int:
    return int(ends_of(beton.sizes, beton.channels)[-1]) * beton.dtype.itemsize


def _fill(flat: Tensor, beton: Beton, threads: int) -> None:
    """Decode the whole file into `flat`, through a chunk of host memory when that lies on an accelerator."""
    ends = ends_of(beton.sizes, beton.channels)
    if flat.device.type == "cpu":
        _decode_range(flat.numpy(), beton, 0, ends, threads)
        return
    start = 0
    while start < len(beton):
        limit = ends[start] + CHUNK_BYTES // beton.dtype.itemsize
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")) - 1)
        chunk = np.empty(int(ends[stop] - ends[start]), beton.dtype)
        _decode_range(chunk, beton, start, ends[start : stop + 1] - ends[start], threads)
        flat[ends[start] : ends[stop]] = torch.from_numpy(chunk).to(flat.device)
        start = stop


def _decode_range(target: np.ndarray, beton: Beton, start: int, ends: np.ndarray, threads: int) -> None:
    """Pixels of the samples from `start` on, the k-th into target[ends[k] : ends[k + 1]]."""
    count = len(ends) - 1
    if beton.is_raw:
        beton.read_raw(target, np.arange(start, start + count))
        return

    def decode(k: int) -> None:
        target[ends[k] : ends[k + 1]] = beton.image(start + k).reshape(-1)

    spread(decode, count, threads)
