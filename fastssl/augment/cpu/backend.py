"""The CPU backend: one fused numba kernel, parallel over images, that draws, settles and cuts an image's views and
writes the network's layout once.

A view's bits depend on its image and its parameters alone, not on the batch or the threads. The compiled
kernel is kept on disk, so that only the first process on a machine waits for it.

B batch, V views, C channels, S side of a view (of draws: slots), K taps, T threads. Places in the source are in
elements.
"""

import hashlib
import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from torch import Tensor

from fastssl.augment.cpu.color import blur_scratch, interleave, interleave_narrow, is_plain, narrowed, split, transform
from fastssl.augment.cpu.lanes import LANES, LINE
from fastssl.augment.cpu.policy import rows_of, settle, settle_view
from fastssl.augment.cpu.resample import BLOCK, resample
from fastssl.augment.draws import FIRST, GOLDEN, SECOND, UNIT, Draw
from fastssl.augment.policy import SLOTS, Column, Parameters, View, blur_radius_px

Array = npt.NDArray[Any]
RECORD = np.dtype([(column.name.lower(), np.float32) for column in Column])
INLINED = ("color.py", "lanes.py", "policy.py", "resample.py", "../policy.py")
U_GOLDEN, U_FIRST, U_SECOND = np.uint64(GOLDEN), np.uint64(FIRST), np.uint64(SECOND)
U_27, U_30, U_31, U_40, U_1 = (np.uint64(x) for x in (27, 30, 31, 40, 1))


_local = threading.local()


def _stamp() -> Array:
    """An empty array whose type names a digest: numba's disk cache watches this file, not those it takes
    functions and constants from, but it does look at the types of the arguments."""
    texts = b"".join(Path(__file__).parent.joinpath(name).read_bytes() for name in INLINED)
    return np.empty(0, dtype=[("sha_" + hashlib.sha256(texts).hexdigest()[:16], np.uint8)])


STAMP = _stamp()


def draws(seed: int, epoch: int | Tensor, index_B: Tensor, *, views: int, slots: int) -> Tensor:
    """`fastssl.augment.draws.draws`: the same bits, in one pass."""
    _threads()
    out_BVS = np.empty((len(index_B), views, slots), dtype=np.float32)
    index = index_B.contiguous().numpy().view(np.uint64)
    _draw(np.uint64(seed % 2**64), np.uint64(int(epoch) % 2**64), index, out_BVS)
    return torch.from_numpy(out_BVS)


def parameters(views: tuple[View, ...], draws_BVS: Tensor, sizes_B2: Tensor) -> Parameters:
    """`policy.parameters`, in one pass."""
    _threads()
    packed_BVP = np.empty((len(draws_BVS), len(views), len(Column)), dtype=np.float32)
    settle(STAMP, *rows_of(views), draws_BVS.numpy(), sizes_B2.contiguous().numpy(), packed_BVP.view(RECORD)[..., 0])
    return Parameters(torch.from_numpy(packed_BVP))


def apply(
    images: Tensor,
    sizes_B2: Tensor,
    offsets_B: Tensor | None,
    drawn: Parameters | Draw,
    views: tuple[View, ...],
    mean_C: tuple[float, ...],
    std_C: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Cut and transform views of one side length; arguments and result as in `torch_ops.apply`, but `drawn` may be
    left to the kernel.

    float16 views are written as float32 and converted.
    """
    batch, side, channels = len(sizes_B2), views[0].side_px, len(mean_C)
    sizes, narrow = sizes_B2.contiguous().numpy(), dtype == torch.bfloat16
    wide_VBX = _aligned(len(views), batch, 0 if narrow else side * side * channels)
    narrow_VBX = np.empty((len(views), batch, side * side * channels if narrow else 0), dtype=np.uint16)
    if isinstance(drawn, Draw):
        words = np.array([drawn.seed % 2**64, int(drawn.epoch) % 2**64, drawn.first], dtype=np.uint64)
        index = drawn.index_B.contiguous().numpy().view(np.uint64)
        packed_BVP = np.empty((batch, len(views), len(Column)), dtype=np.float32)
    else:
        words, index, packed_BVP = np.empty(3, np.uint64), np.empty(0, np.uint64), drawn.packed_BVP.contiguous().numpy()
    threads = _threads()
    with numba.parallel_chunksize(max(1, batch // (8 * threads))):
        _render(
            STAMP,
            images.contiguous().view(-1).numpy(),
            *_places(images, sizes, offsets_B, channels),
            sizes,
            words,
            index,
            *rows_of(views),
            packed_BVP.view(RECORD)[..., 0],
            *_constants(views, mean_C, std_C),
            wide_VBX,
            narrow_VBX,
            *_scratch(threads, channels, views, *sizes.max(axis=0, initial=1).tolist()),
        )
    views_VBX = torch.from_numpy(narrow_VBX).view(torch.bfloat16) if narrow else torch.from_numpy(wide_VBX).to(dtype)
    return views_VBX.view(len(views), batch, side, side, channels).permute(0, 1, 4, 2, 3)


def limit_threads(threads: int) -> None:
    """Kernels that this thread calls use so many at most."""
    _local.threads = threads


@lru_cache(maxsize=64)
def _constants(views: tuple[View, ...], mean_C: tuple[float, ...], std_C: tuple[float, ...]) -> tuple[Array, ...]:
    """What `_render` takes that only the policy decides, from cubic_V to norm_22X: factor and summand of each element
    of a view's line, for finished pixels and for pixels in [0, 1]."""
    mean, std = np.array(mean_C), np.array(std_C)
    norm_22C = np.array([[1 / std, -mean / std], [np.ones_like(std), np.zeros_like(std)]], dtype=np.float32)
    cubic_V = np.array([view.interpolation == "bicubic" for view in views])
    linear_V = np.array([view.hue_mode == "linear" for view in views])
    line_22X = np.tile(norm_22C, views[0].side_px + LANES)
    return cubic_V, linear_V, mean.astype(np.float32), (1 / std).astype(np.float32), line_22X


def _threads() -> int:
    """As many as torch uses, so that one setting rules both and ranks of one machine do not crowd it."""
    wanted = getattr(_local, "threads", torch.get_num_threads())
    threads: int = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


def _places(images: Tensor, sizes_B2: Array, offsets_B: Tensor | None, channels: int) -> tuple[Array, Array]:
    """First element and row pitch of each image."""
    if offsets_B is not None:
        return offsets_B.contiguous().numpy(), sizes_B2[:, 1] * channels
    count, height, width, _ = images.shape
    return np.arange(count) * (height * width * channels), np.full(count, width * channels)


def _scratch(threads: int, channels: int, views: tuple[View, ...], height: int, width: int) -> tuple[Array, ...]:
    """Each thread's buffers, kept between calls: fresh pages would cost more than some of the passes."""
    side = views[0].side_px
    reach = 2 if any(view.interpolation == "bicubic" for view in views) else 1
    taps = 2 * math.ceil(reach * max(1.0, max(height, width) / side)) + 2
    radius = max(blur_radius_px(view.blur_sigma_max_px, side) if view.blur_p > 0 else 0 for view in views)
    key = (threads, channels, side, taps, radius, width)
    if getattr(_local, "key", None) != key:
        _local.key = key
        _local.buffers = (
            _rows(threads, 2, max(side, width + taps) * channels + BLOCK),
            _rows(threads, 2, channels * side * side),
            _rows(threads, blur_scratch(side, radius)),
            np.empty((threads, 2, 2, side), dtype=np.int64),
            np.empty((threads, 2, side, taps), dtype=np.float32),
            np.empty((threads, SLOTS), dtype=np.float32),
        )
    buffers: tuple[Array, ...] = _local.buffers
    return buffers


def _rows(*shape: int) -> Array:
    """Scratch: float32 zeros whose rows start on cache lines, because a load that straddles two takes twice as long."""
    *rows, wanted = shape
    buffer = _aligned(*rows, -(-wanted // LINE) * LINE)
    buffer[:] = 0  # a kernel may read what it gives no weight, and that must be finite
    return buffer


def _aligned(*shape: int) -> Array:
    """Unset float32 that starts on a cache line. numpy's, because it asks for huge pages and torch does not: fresh
    memory is then four times as fast."""
    count = math.prod(shape)
    buffer = np.empty(count + LINE, dtype=np.float32)
    first = -buffer.ctypes.data // buffer.itemsize % LINE
    return buffer[first : first + count].reshape(shape)


@njit(cache=True, nogil=True)
def _child(key: Any, word: Any) -> Any:
    z = key + (word + U_1) * U_GOLDEN
    z = (z ^ (z >> U_30)) * U_FIRST
    z = (z ^ (z >> U_27)) * U_SECOND
    return z ^ (z >> U_31)


@njit(cache=True, nogil=True, parallel=True)
def _draw(seed: int, epoch: int, index_B: Array, out_BVS: Array) -> None:
    root = _child(_child(np.uint64(0), seed), epoch)
    for b in prange(len(index_B)):
        sample = _child(root, index_B[b])
        for v in range(out_BVS.shape[1]):
            _draw_slots(_child(sample, np.uint64(v)), out_BVS[b, v])


@njit(cache=True, nogil=True)
def _draw_slots(key: Any, out_S: Array) -> None:
    for s in range(len(out_S)):
        out_S[s] = np.float32(_child(key, np.uint64(s)) >> U_40) * np.float32(UNIT)


@njit(cache=True, nogil=True, parallel=True, fastmath=True, error_model="numpy")
def _render(
    stamp: Array,
    source: Array,
    offset_B: Array,
    pitch_B: Array,
    size_B2: Array,
    words_3: Array,
    index_B: Array,
    low_VS: Array,
    span_VS: Array,
    rows_V: Array,
    drawn_BV: Array,
    cubic_V: Array,
    linear_V: Array,
    mean_C: Array,
    scale_C: Array,
    norm_22X: Array,
    wide_out_VBX: Array,
    narrow_out_VBX: Array,
    lines_T2X: Array,
    planes_T2X: Array,
    blur_TX: Array,
    spans_T22S: Array,
    weights_T2SK: Array,
    draws_TS: Array,
) -> None:
    """Fill whichever of the two outputs is not empty, and `drawn_BV` unless `index_B` is empty."""
    size, narrow = max(wide_out_VBX.shape[2], narrow_out_VBX.shape[2]), narrow_out_VBX.shape[2] > 0
    side = weights_T2SK.shape[2]
    root = _child(_child(np.uint64(0), words_3[0]), words_3[1])
    for b in prange(drawn_BV.shape[0]):
        t = numba.get_thread_id()
        planes_X, spare_X = planes_T2X[t, 0, :size], planes_T2X[t, 1, :size]
        for v in range(drawn_BV.shape[1]):
            drawn = drawn_BV[b, v]
            if len(index_B) > 0:
                _draw_slots(_child(_child(root, index_B[b]), words_3[2] + np.uint64(v)), draws_TS[t])
                settle_view((low_VS[v], span_VS[v], draws_TS[t]), rows_V[v], size_B2[b], drawn)
            place = (source, offset_B[b], pitch_B[b], size_B2[b], drawn, cubic_V[v], len(mean_C))
            scratch = (lines_T2X[t], spans_T22S[t, 0], spans_T22S[t, 1], weights_T2SK[t])
            plain = is_plain(drawn)
            norm_2X, pixels_X = norm_22X[1], spare_X
            if plain:
                norm_2X = norm_22X[0]
                if not narrow:
                    pixels_X = wide_out_VBX[v, b]
            resample(*place, norm_2X, *scratch, pixels_X)
            if plain:
                if narrow:
                    narrowed(spare_X, narrow_out_VBX[v, b])
                continue
            split(spare_X, side, drawn.turns % 2 == 1, planes_X)
            transform(planes_X, spare_X, blur_TX[t], side, drawn, linear_V[v], mean_C)
            if narrow:
                interleave_narrow(planes_X, mean_C, scale_C, narrow_out_VBX[v, b])
            else:
                interleave(planes_X, mean_C, scale_C, wide_out_VBX[v, b])
