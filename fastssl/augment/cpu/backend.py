"""The CPU backend: one fused numba kernel that draws, samples and cuts an image's views and writes the network's layout
once; threads share the images of a batch.

A view's bits depend on its image and its parameters alone, not on the batch or the threads. The compiled
kernel is kept on disk, so that only the first process on a machine waits for it. Choice made: the threads are Python's
and not those of numba's `parallel`, which takes twice as long to compile and waits at the end of every launch for a
thread that another program has taken the core from before it began.

B batch, V views, C channels, S side of a view (of draws: slots), K taps. Places in the source are in elements.
"""

import hashlib
import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from fastssl.augment.backend import BackendName, Images, Output
from fastssl.augment.cpu.color import blur_scratch, interleave, interleave_narrow, is_plain, narrowed, split, transform
from fastssl.augment.cpu.lanes import LANES, LINE
from fastssl.augment.cpu.policy import child, draw_slots, rows_of, sample_view_params
from fastssl.augment.cpu.resample import BLOCK, resample
from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import SLOTS, Column, Parameters, View, blur_radius_px
from fastssl.runs import numba_cache

Array = npt.NDArray[Any]
# a record over the packed floats, so that kernels name a column instead of numbering it
RECORD = np.dtype([(column.name.lower(), np.float32) for column in Column])
# every file a kernel may take a function or a constant from: one left out would leave a stale kernel on disk
STAMPED = [path for folder in Path(__file__).parents[:2] for path in sorted(folder.glob("*.py"))]

CHUNKS = 8  # of a thread: images differ in work, and one each would wait for the slowest
WORTH_PX = 1 << 15  # pixels of views, about a millisecond: less work ends before a helper has woken

_local = threading.local()


def _stamp() -> Array:
    """An empty array whose type names a digest: numba's disk cache watches this file, not those it takes
    functions and constants from, but it does look at the types of the arguments."""
    texts = b"".join(path.read_bytes() for path in STAMPED)
    return np.empty(0, dtype=[("sha_" + hashlib.sha256(texts).hexdigest()[:16], np.uint8)])


STAMP = _stamp()


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """The `Backend` of fused numba kernels."""

    name: BackendName = "cpu"
    runs_in_thread: bool = True
    reads_in_place: bool = True

    def limit_threads(self, threads: int) -> None:
        """What the calling thread makes from now on uses so many threads at most."""
        _local.threads = threads

    def sample_params(self, views: tuple[View, ...], key: DrawKey, sizes_B2: Tensor) -> Parameters:
        """In one launch, by the calling thread."""
        packed_BVP = np.empty((len(key.index_B), len(views), len(Column)), dtype=np.float32)
        _sample(STAMP, *_words(key), *rows_of(views), sizes_B2.contiguous().numpy(), packed_BVP.view(RECORD)[..., 0])
        return Parameters(torch.from_numpy(packed_BVP))

    def apply(self, images: Images, params: Parameters | DrawKey, views: tuple[View, ...], output: Output) -> Tensor:
        """In one pass, which draws too. float16 views are written as float32 and converted."""
        pixels, sizes_B2, channels = images.pixels, images.sizes_B2.contiguous().numpy(), len(output.mean_C)
        batch, side, narrow = len(sizes_B2), views[0].side_px, output.dtype == torch.bfloat16
        # one of the two is empty, so that one compiled kernel serves both
        wide_VBX = _aligned(len(views), batch, 0 if narrow else side * side * channels)
        narrow_VBX = np.empty((len(views), batch, side * side * channels if narrow else 0), dtype=np.uint16)
        if isinstance(params, DrawKey):
            words_3, index_B = _words(params)
            packed_BVP = np.empty((batch, len(views), len(Column)), dtype=np.float32)
        else:
            # no indices say that parameters are given: None would be another type, and another kernel to compile
            words_3, index_B = np.empty(3, np.uint64), np.empty(0, np.uint64)
            packed_BVP = params.packed_BVP.contiguous().numpy()
        largest = sizes_B2.max(axis=0, initial=1).tolist()
        arguments = (
            # flat, so that one kernel serves a padded batch and a buffer of images of all sizes
            pixels.contiguous().view(-1).numpy(),
            *_places(pixels, sizes_B2, images.offsets_B, channels),
            sizes_B2,
            words_3,
            index_B,
            *rows_of(views),
            packed_BVP.view(RECORD)[..., 0],
            *_constants(views, output.mean_C, output.std_C),
            wide_VBX,
            narrow_VBX,
        )
        # as many threads as torch uses, so that one setting rules both and ranks of one machine do not crowd it
        threads = min(getattr(_local, "threads", torch.get_num_threads()), 1 + batch * len(views) * side**2 // WORTH_PX)
        _divide(
            lambda first, last: _render(STAMP, first, last, *arguments, *_scratch(channels, views, *largest)),
            batch,
            threads,
        )
        wide = torch.from_numpy(wide_VBX)
        # numpy knows no bfloat16: its bits go by as integers
        views_VBX = torch.from_numpy(narrow_VBX).view(torch.bfloat16) if narrow else wide.to(output.dtype)
        # channels last in memory, as convolutions read fastest; only the strides say (V, B, C, S, S)
        return views_VBX.view(len(views), batch, side, side, channels).permute(0, 1, 4, 2, 3)


def _words(key: DrawKey) -> tuple[Array, Array]:
    """Seed, epoch and first view, and each sample's index, as uint64."""
    # the low 64 bits of any integer, as torch's int64 wraps: negative seeds agree too
    words_3 = np.array([key.seed % 2**64, int(key.epoch) % 2**64, key.first], dtype=np.uint64)
    # the same bits as unsigned: the hash shifts zeros in, and int64 would copy its sign
    return words_3, key.index_B.contiguous().numpy().view(np.uint64)


@lru_cache(maxsize=64)
def _constants(views: tuple[View, ...], mean_C: tuple[float, ...], std_C: tuple[float, ...]) -> tuple[Array, ...]:
    """What `_render` takes that only the policy decides, from cubic_V to norm_22X: factor and summand of each element
    of a view's line, for finished pixels and for pixels in [0, 1]."""
    mean, std = np.array(mean_C), np.array(std_C)
    # (x - mean) / std as x * (1 / std) - mean / std: one multiply-add a value
    norm_22C = np.array([[1 / std, -mean / std], [np.ones_like(std), np.zeros_like(std)]], dtype=np.float32)
    cubic_V = np.array([view.interpolation == "bicubic" for view in views])
    linear_V = np.array([view.hue_mode == "linear" for view in views])
    # LANES pixels more than a line: of a tiny view a vector reads past the last one
    line_22X = np.tile(norm_22C, views[0].side_px + LANES)
    return cubic_V, linear_V, mean.astype(np.float32), (1 / std).astype(np.float32), line_22X


def _divide(work: Callable[[int, int], None], images: int, threads: int) -> None:
    """Calls with (first, last) for ranges of the images until all are done, here and in threads that are free."""
    if threads < 2:
        work(0, images)
        return
    size, starts = -(-images // (CHUNKS * threads)), itertools.count()  # whose next() is atomic

    def take() -> None:
        while (first := next(starts) * size) < images:
            work(first, min(first + size, images))

    helpers = [_helpers().submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        # one that has not begun has nothing left to do
        waited = [helper for helper in helpers if not helper.cancel()]
        for helper in waited:
            helper.result()


@lru_cache(maxsize=1)
def _helpers() -> ThreadPoolExecutor:
    """Threads that wait for work, as many as were ever wanted at once."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="fastssl-views")


# of a forked process none is left
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def _places(images: Tensor, sizes_B2: Array, offsets_B: Tensor | None, channels: int) -> tuple[Array, Array]:
    """First element and row pitch of each image."""
    # images of a flat buffer lie there without padding, so a row's pitch is its own width
    if offsets_B is not None:
        return offsets_B.contiguous().numpy(), sizes_B2[:, 1] * channels
    count, height, width, _ = images.shape
    return np.arange(count) * (height * width * channels), np.full(count, width * channels)


def _scratch(channels: int, views: tuple[View, ...], height: int, width: int) -> tuple[Array, ...]:
    """This thread's buffers, kept between calls: fresh pages would cost more than some of the passes."""
    side = views[0].side_px
    reach = 2 if any(view.interpolation == "bicubic" for view in views) else 1
    # enough for the largest box, the whole image: what a view needs is known only in the kernel
    taps = 2 * math.ceil(reach * max(1.0, max(height, width) / side)) + 2
    radius = max(blur_radius_px(view.blur_sigma_max_px, side) if view.blur_p > 0 else 0 for view in views)
    key = (channels, side, taps, radius, width)
    if getattr(_local, "key", None) != key:
        _local.key = key
        _local.buffers = (
            # longer than a line: taps of no weight are read past its end, and whole blocks written
            _rows(2, max(side, width + taps) * channels + BLOCK),
            _rows(2, channels * side * side),
            _rows(blur_scratch(side, radius)),
            np.empty((2, 2, side), dtype=np.int64),
            np.empty((2, side, taps), dtype=np.float32),
            np.empty(SLOTS, dtype=np.float32),
        )
    buffers: tuple[Array, ...] = _local.buffers
    return buffers


def _rows(*shape: int) -> Array:
    """Scratch: float32 zeros whose rows start on cache lines, because a load that straddles two takes twice as long."""
    *rows, wanted = shape
    buffer = _aligned(*rows, -(-wanted // LINE) * LINE)
    # a kernel may read what it gives no weight, and that must be finite
    buffer[:] = 0
    return buffer


def _aligned(*shape: int) -> Array:
    """Unset float32 that starts on a cache line. numpy's, because it asks for huge pages and torch does not: fresh
    memory is then four times as fast."""
    count = math.prod(shape)
    buffer = np.empty(count + LINE, dtype=np.float32)
    first = -buffer.ctypes.data // buffer.itemsize % LINE
    return buffer[first : first + count].reshape(shape)


# no fastmath: how a box rounds decides which pixels it holds
@numba_cache.locked
@njit(cache=True, nogil=True, error_model="numpy")
def _sample(
    stamp: Array,
    words_3: Array,
    index_B: Array,
    low_VS: Array,
    span_VS: Array,
    rows_V: Array,
    size_B2: Array,
    out_BV: Array,
) -> None:
    """Fill the records of `out_BV`."""
    root = child(child(np.uint64(0), words_3[0]), words_3[1])
    draws_S = np.empty(SLOTS, dtype=np.float32)
    for b in range(len(out_BV)):
        for v in range(len(rows_V)):
            draw_slots(child(child(root, index_B[b]), words_3[2] + np.uint64(v)), draws_S)
            sample_view_params((low_VS[v], span_VS[v], draws_S), rows_V[v], size_B2[b], out_BV[b, v])


@numba_cache.locked
@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _render(
    stamp: Array,
    first: int,
    last: int,
    source: Array,
    offset_B: Array,
    pitch_B: Array,
    size_B2: Array,
    words_3: Array,
    index_B: Array,
    low_VS: Array,
    span_VS: Array,
    rows_V: Array,
    params_BV: Array,
    cubic_V: Array,
    linear_V: Array,
    mean_C: Array,
    scale_C: Array,
    norm_22X: Array,
    wide_out_VBX: Array,
    narrow_out_VBX: Array,
    lines_2X: Array,
    planes_2X: Array,
    blur_X: Array,
    spans_22S: Array,
    weights_2SK: Array,
    draws_S: Array,
) -> None:
    """Fill whichever of the two outputs is not empty, and `params_BV` unless `index_B` is empty, for images first to
    last - 1."""
    size, narrow = max(wide_out_VBX.shape[2], narrow_out_VBX.shape[2]), narrow_out_VBX.shape[2] > 0
    side = weights_2SK.shape[1]
    planes_X, spare_X = planes_2X[0, :size], planes_2X[1, :size]
    root = child(child(np.uint64(0), words_3[0]), words_3[1])
    # by image, not by view: all its views read the same bytes while they are in the cache
    for b in range(first, last):
        for v in range(params_BV.shape[1]):
            params = params_BV[b, v]
            if len(index_B) > 0:
                draw_slots(child(child(root, index_B[b]), words_3[2] + np.uint64(v)), draws_S)
                sample_view_params((low_VS[v], span_VS[v], draws_S), rows_V[v], size_B2[b], params)
            place = (source, offset_B[b], pitch_B[b], size_B2[b], params, cubic_V[v], len(mean_C))
            scratch = (lines_2X, spans_22S[0], spans_22S[1], weights_2SK)
            plain = is_plain(params)
            norm_2X, pixels_X = norm_22X[1], spare_X
            if plain:
                # then lines are normalized as they are mixed, and there are no planes
                norm_2X = norm_22X[0]
                if not narrow:
                    pixels_X = wide_out_VBX[v, b]
            resample(*place, norm_2X, *scratch, pixels_X)
            if plain:
                if narrow:
                    narrowed(spare_X, narrow_out_VBX[v, b])
                continue
            # colors work on planes: with channels side by side LLVM would find no whole vectors
            split(spare_X, side, params.turns % 2 == 1, planes_X)
            transform(planes_X, spare_X, blur_X, side, params, linear_V[v], mean_C)
            if narrow:
                interleave_narrow(planes_X, mean_C, scale_C, narrow_out_VBX[v, b])
            else:
                interleave(planes_X, mean_C, scale_C, wide_out_VBX[v, b])
