"""Streams a `.beton` through FFCV: its C decoder in its epoch thread; everything else follows on the device.

FFCV's `Loader` compiles its pipelines anew in every process and would hand out the slots of a small ring, overwritten
a few steps later. Here the one kernel around FFCV's decoder is compiled once and cached on disk, and each batch has
memory of its own, so that a batch stays what it was. A thread of FFCV's that dies or hangs becomes an error.

N stored samples, B batch of one rank, H W height and width in pixels, C channels, L bytes of the largest image.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from time import monotonic
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from llvmlite import binding  # type: ignore[import-untyped]
from numba import config as numba_config
from numba import get_num_threads, njit, prange, set_num_threads, types
from torch import Tensor

from ..errors import UserError
from . import layout
from .batch import Batch
from .beton import Beton
from .plan import Order, Plan
from .threads import WATCHDOG_S, cpu_count, hang

_threads = torch.get_num_threads(), get_num_threads()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # FFCV imports distutils
    try:
        from ffcv import _libffcv
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.memory_managers.os_cache import OSCacheContext
    except ImportError as error:
        raise UserError(
            f"FFCV cannot be imported: {error}",
            "Install it: apt-get install libopencv-dev libturbojpeg0-dev pkg-config, then pip install ffcv.",
        ) from error
torch.set_num_threads(_threads[0])  # importing FFCV leaves torch and numba with one thread each
set_num_threads(_threads[1])

# by symbol and not by address, because numba caches no function that holds an address
binding.load_library_permanently(_libffcv.__file__)
_imdecode = types.ExternalFunction(
    "imdecode",
    types.int32(
        *(types.uintp, types.uint64, types.uint32, types.uint32, types.uintp),
        *(types.uint32,) * 6,
        *(types.uint8,) * 2,
    ),
)
_copy = types.ExternalFunction("my_memcpy", types.void(types.uintp, types.uintp, types.uint64))


class Ffcv:
    """Loader of a `.beton` that need not fit in memory; `Ffcv.open` makes one.

    Attributes:
        labels: int64 (N,) of the whole file, on the device.
        image_shape: (H, W, C), or None when sizes differ; a batch then is flat, with sizes and offsets.
    """

    def __init__(self, beton: Beton, plan: Plan, source: Any, device: torch.device, limit_s: float) -> None:
        self.plan, self.device, self._beton = plan, device, beton
        self._source, self._limit_s = source, limit_s
        self.labels = torch.from_numpy(beton.labels).to(device)
        self.image_shape = layout.image_shape(beton)
        self._sizes_N2 = torch.from_numpy(np.ascontiguousarray(beton.sizes)).to(device)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        device: torch.device | str,
        batch_size: int,
        order: Order,
        indices: Tensor | None = None,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        limit_s: float = WATCHDOG_S,
    ) -> Self:
        """Open a file; arguments as for `Resident.open`, and `limit_s`: longest wait for one batch in seconds."""
        beton, device = Beton(path), torch.device(device)
        plan = Plan.make(
            len(beton),
            batch_size=batch_size,
            order=order,
            indices=indices,
            drop_last=drop_last,
            rank=rank,
            world=world,
        )
        source = _source(beton, batch_size // world, threads or cpu_count(), pin=device.type == "cuda")
        return cls(beton, plan, source, device, limit_s)

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.plan)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from `start_step` on."""
        return self._batches(self.plan, epoch, start_step)

    def all(self) -> Iterator[Batch]:
        """Every chosen sample once, first to last, the last batch as short as it comes."""
        return self._batches(self.plan.in_order(), 0, 0)

    def _batches(self, plan: Plan, epoch: int, start_step: int) -> Iterator[Batch]:
        index_M = plan.epoch(epoch)
        parts = [index_M[part] for part in plan.slices(start_step)]
        if not parts:
            return
        stream = _Epoch(self._source, torch.cat(parts).numpy())
        try:
            for index_B in parts:
                # a last batch smaller than the number of ranks leaves some of them without a sample
                decoded = stream.next_within(self._limit_s) if len(index_B) else self._source.nothing
                yield self._batch(decoded[0], decoded[1], index_B)
        finally:
            stream.end(self._limit_s)

    def _batch(self, pixels_BL: Tensor, failed_B: np.ndarray, index_B: Tensor) -> Batch:
        if failed_B.any():
            self._beton.image(int(index_B[int(failed_B.argmax())]))  # says what is wrong with it
            raise UserError(f"FFCV cannot decode an image of {self._beton.path}", "Convert the data again.")
        index_B = index_B.to(self.device)
        images_BL = pixels_BL.to(self.device, non_blocking=True)
        if self.image_shape is not None:
            return Batch(images_BL.view(-1, *self.image_shape), self.labels[index_B], index_B)
        offsets_B = torch.arange(len(index_B), device=self.device) * images_BL.shape[1]
        return Batch(images_BL.view(-1), self.labels[index_B], index_B, self._sizes_N2[index_B], offsets_B)


class _Epoch(EpochIterator):  # type: ignore[misc]
    """FFCV's thread over one epoch, which can be waited for with a limit, can fail aloud and can be ended."""

    error: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error

    def next_within(self, limit_s: float) -> tuple[Tensor, np.ndarray]:
        """The next batch's (pixels_BL, failed_B)."""
        stop = monotonic() + limit_s
        queue = self.output_queue
        while True:
            alive = self.is_alive()
            with queue.not_empty:
                if queue.queue or queue.not_empty.wait(min(0.5, limit_s)) or queue.queue:
                    break
            if not alive:
                raise RuntimeError("FFCV's thread ended early") from self.error
            if monotonic() > stop:
                raise hang(limit_s)
        (batch,) = next(self)
        return batch  # type: ignore[no-any-return]

    def end(self, limit_s: float) -> None:
        """End the thread, whatever it is waiting for."""
        self.close()
        stop = monotonic() + limit_s
        while self.is_alive() and monotonic() < stop:
            with contextlib.suppress(Empty):
                self.output_queue.get(timeout=0.02)


def _source(beton: Beton, batch_size: int, threads: int, *, pin: bool) -> Any:
    """What FFCV's epoch thread asks of a Loader: the mapped file, and one stage that decodes a batch."""
    length = int(beton.sizes.prod(axis=1).max()) * beton.channels
    queued = 5  # batches that FFCV's thread may be ahead, and the one it is at
    layout.require_memory(queued * batch_size * length * beton.dtype.itemsize, torch.device("cpu"))
    dtype = layout.TORCH_TYPES[beton.dtype.name]

    def decode(batch_indices: np.ndarray, storage_state: tuple, **_: Any) -> tuple[Any]:
        pixels = torch.empty((len(batch_indices), length), dtype=dtype, pin_memory=pin)
        failed_B = np.zeros(len(batch_indices), np.bool_)
        target_BL = pixels.numpy().view(np.uint8)
        _decode(batch_indices, np.asarray(storage_state[0]), *beton.extents, beton.sizes, target_BL, failed_B)
        return ((pixels, failed_B),)

    context = OSCacheContext(SimpleNamespace(reader=SimpleNamespace(file_name=beton.path), ptrs=None, sizes=None))
    return SimpleNamespace(
        batch_size=batch_size,
        batches_ahead=queued - 2,
        num_workers=min(threads, numba_config.NUMBA_NUM_THREADS),
        reader=SimpleNamespace(metadata=None),
        memory_manager=SimpleNamespace(schedule_epoch=lambda batches: context),
        graph=SimpleNamespace(allocate_memory=lambda batch_size, slots: {"operation": {}, "shared": {}}),
        traversal_order=None,
        nothing=(torch.empty((0, length), dtype=dtype), np.zeros(0, np.bool_)),
        code=([(decode, ["image"])], ["image"]),
    )


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[misc]
def _decode(index_B, file, modes_N, offsets_N, lengths_N, sizes_N2, pixels_BL, failed_B):  # type: ignore[no-untyped-def]
    """Raw images are copied, JPEGs decoded by FFCV; failed_B marks those it cannot decode."""
    for k in prange(len(index_B)):
        i = index_B[k]
        data = file[offsets_N[i] : offsets_N[i] + lengths_N[i]]
        height, width = sizes_N2[i, 0], sizes_N2[i, 1]
        if modes_N[i] == 0:
            if not _states_size(data, height, width):
                failed_B[k] = True  # FFCV would scale the image to whatever fits
                continue
            target = pixels_BL[k].ctypes.data
            result = _imdecode(data.ctypes.data, data.size, height, width, target, height, width, 0, 0, 1, 1, 0, 0)
            failed_B[k] = result != 0
        else:
            _copy(data.ctypes.data, pixels_BL[k].ctypes.data, data.size)


@njit(nogil=True, cache=True)  # type: ignore[misc]
def _states_size(data, height, width):  # type: ignore[no-untyped-def]
    """True when the JPEG's frame header states this size; False for another, or when there is none."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            stated_height = data[at + 5] * 256 + data[at + 6]
            stated_width = data[at + 7] * 256 + data[at + 8]
            return stated_height == height and stated_width == width
        at += 1 if marker == 0xFF else 2 + data[at + 2] * 256 + data[at + 3]
    return False
