"""Streams a `.beton` through FFCV: its C decoder in its epoch thread; everything else follows on the device.

FFCV's `Loader` compiles its pipelines anew in every process and would hand out the slots of a small ring, overwritten
a few steps later. Here the one kernel around FFCV's decoder is compiled once and cached on disk, and each batch has
memory of its own, so that a batch stays what it was. A thread of FFCV's that dies or hangs becomes an error.

N stored samples, B batch of one rank, H W height and width in pixels, C channels, L bytes of the largest image.
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import Empty
from time import monotonic
from types import SimpleNamespace
from typing import Any, Unpack

import numpy as np
import torch
from llvmlite import binding  # type: ignore[import-untyped]
from numba import config as numba_config
from numba import get_num_threads, njit, prange, set_num_threads, types
from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton
from fastssl.data.loaders.layout import TORCH_TYPES, Layout, image_shape, require_memory
from fastssl.data.loaders.loader import BetonLoader
from fastssl.data.loaders.plan import Plan, PlanOptions
from fastssl.data.loaders.threads import EXIT_S, WATCHDOG_S, ended_at_exit, hang
from fastssl.data.loaders.transfer import to_device
from fastssl.errors import UserError
from fastssl.runs import numba_cache
from fastssl.runs.machine import cores

_threads = torch.get_num_threads(), get_num_threads()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # FFCV imports distutils
    try:
        from ffcv import _libffcv
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.memory_managers.os_cache import OSCacheContext
    except ImportError as error:
        raise UserError(
            f"FFCV cannot be imported: {str(error).rstrip('.')}.",
            "Run `apt-get install libopencv-dev libturbojpeg0-dev pkg-config`, "
            "then `pip install 'fastssl-vision[ffcv]'`.",
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


def open_loader(
    path: Path,
    *,
    device: torch.device | str,
    threads: int | None = None,
    limit_s: float = WATCHDOG_S,
    layout: Layout = "flat",
    **plan: Unpack[PlanOptions],
) -> BetonLoader:
    """Open a file that need not fit in memory.

    Args:
        path: a `.beton`.
        device: where batches arrive.
        threads: that decode; None for one per core.
        limit_s: longest wait for one batch in seconds.
        layout: of images of different sizes, see `BetonLoader`.
        plan: see `PlanOptions`.
    """
    device, beton = torch.device(device), Beton(path)
    steps = Plan.make(len(beton), **plan)
    store = _Store(beton, device, threads or cores().count, limit_s)
    store.source(steps.batch_size // steps.world)  # refuses batches that memory cannot hold
    return BetonLoader(beton, store, steps, store.labels_N, layout)


class _Store:
    """Decodes by FFCV's kernel in FFCV's epoch thread, one of these an epoch."""

    def __init__(self, beton: Beton, device: torch.device, threads: int, limit_s: float) -> None:
        self._beton, self._device, self._limit_s = beton, device, limit_s
        self._threads = min(threads, numba_config.NUMBA_NUM_THREADS)
        self._length = int(beton.sizes.prod(axis=1).max()) * beton.channels
        self._dtype, self._shape = TORCH_TYPES[beton.dtype.name], image_shape(beton)
        reader = SimpleNamespace(file_name=beton.path)
        # once for all epochs: a fresh mapping costs a page fault for each of the file's pages
        self._mapped = OSCacheContext(SimpleNamespace(reader=reader, ptrs=None, sizes=None))
        self._sizes_N2 = torch.from_numpy(np.ascontiguousarray(beton.sizes)).to(device)
        self.labels_N = torch.from_numpy(beton.labels).to(device)

    def batches(self, index_M: Tensor, parts: list[slice], labels_N: Tensor) -> Iterator[Batch]:
        if not parts:
            return
        wanted = [index_M[part] for part in parts]
        stream = _Epoch(self.source(max(1, len(wanted[0]))), torch.cat(wanted).numpy())
        nothing = torch.empty((0, self._length), dtype=self._dtype), np.zeros(0, np.bool_)
        with ended_at_exit(partial(stream.end, EXIT_S)):
            try:
                for index_B in wanted:
                    # a last batch smaller than the number of ranks leaves some of them without a sample
                    pixels_BL, failed_B = stream.next_within(self._limit_s) if len(index_B) else nothing
                    yield self._batch(pixels_BL, failed_B, index_B, labels_N)
            finally:
                stream.end(self._limit_s)

    def _batch(self, pixels_BL: Tensor, failed_B: np.ndarray, index_B: Tensor, labels_N: Tensor) -> Batch:
        if failed_B.any():
            self._beton.image(int(index_B[int(failed_B.argmax())]))  # says what is wrong with it
            raise UserError(f"FFCV cannot decode an image of {self._beton.path}.", "Convert the data again.")
        index_B = to_device(index_B, self._device)
        images_BL = pixels_BL.to(self._device, non_blocking=True)
        if self._shape is not None:
            return Batch(images_BL.view(-1, *self._shape), labels_N[index_B], index_B)
        offsets_B = torch.arange(len(index_B), device=self._device) * self._length
        return Batch(images_BL.view(-1), labels_N[index_B], index_B, self._sizes_N2[index_B], offsets_B)

    def decode(self, batch_indices: np.ndarray, storage_state: tuple, **_: Any) -> tuple[Any]:
        """The one stage of FFCV's pipeline: a batch in memory of its own, and which of its images failed."""
        pin = self._device.type == "cuda"
        pixels = torch.empty((len(batch_indices), self._length), dtype=self._dtype, pin_memory=pin)
        failed_B = np.zeros(len(batch_indices), np.bool_)
        target_BL = pixels.numpy().view(np.uint8)
        file, beton = np.asarray(storage_state[0]), self._beton
        _decode(batch_indices, file, *beton.extents, beton.sizes, target_BL, failed_B)
        return ((pixels, failed_B),)

    def source(self, batch_size: int) -> Any:
        """What FFCV's epoch thread asks of a Loader: the mapped file, and the stage that decodes a batch."""
        queued = 5  # batches that FFCV's thread may be ahead, and the one it is at
        require_memory(queued * batch_size * self._length * self._beton.dtype.itemsize, torch.device("cpu"))
        return SimpleNamespace(
            batch_size=batch_size,
            batches_ahead=queued - 2,
            num_workers=self._threads,
            reader=SimpleNamespace(metadata=None),
            memory_manager=SimpleNamespace(schedule_epoch=lambda batches: self._mapped),
            graph=SimpleNamespace(allocate_memory=lambda batch_size, slots: {"operation": {}, "shared": {}}),
            traversal_order=None,
            code=([(self.decode, ["image"])], ["image"]),
        )


class _Epoch(EpochIterator):  # type: ignore[misc]
    """FFCV's thread over one epoch, which can be waited for with a limit, can fail aloud and can be ended."""

    error: BaseException | None = None
    hangs: bool = False

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
                self.hangs = True
                raise hang(limit_s)
        (batch,) = next(self)
        return batch  # type: ignore[no-any-return]

    def end(self, limit_s: float) -> None:
        """End the thread, whatever it is waiting for, once it is done with the batch in hand."""
        self.iter_ixes = iter(())  # FFCV looks whether it is closed only while its queue is full
        self.close()
        stop = monotonic() + (min(EXIT_S, limit_s) if self.hangs else limit_s)
        while self.is_alive() and monotonic() < stop:
            with contextlib.suppress(Empty):
                self.output_queue.get(timeout=0.02)


@numba_cache.locked
@njit(parallel=True, nogil=True, cache=True)  # type: ignore[misc]
def _decode(index_B, file, modes_N, offsets_N, lengths_N, sizes_N2, pixels_BL, failed_B):  # type: ignore[no-untyped-def]
    """Raw images are copied, JPEGs decoded by FFCV; failed_B marks those it cannot decode."""
    # addresses, because slices of one array in several threads fight for its reference count
    first, target, pitch = np.int64(file.ctypes.data), np.int64(pixels_BL.ctypes.data), pixels_BL.shape[1]
    for k in prange(len(index_B)):
        i = index_B[k]
        start, length, end = np.int64(offsets_N[i]), np.int64(lengths_N[i]), target + np.int64(k) * pitch
        height, width = sizes_N2[i, 0], sizes_N2[i, 1]
        if modes_N[i] == 0:
            if not _states_size(file[start : start + length], height, width):
                failed_B[k] = True  # FFCV would scale the image to whatever fits
                continue
            result = _imdecode(first + start, length, height, width, end, height, width, 0, 0, 1, 1, 0, 0)
            failed_B[k] = result != 0
        else:
            _copy(first + start, end, length)


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
