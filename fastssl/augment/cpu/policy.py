"""The draws, and `sampling.sample_params` of them, in numba: the same numbers, without sixty small tensors a batch.

Nothing is decided here: every formula is that of `draws` and `sampling`, in its order of float64 operations, and a test
holds the two equal. Of the tries at a crop, those after the first that fits are not computed.

B batch, V views, S slots.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from fastssl.augment.cpu.lanes import INNER
from fastssl.augment.draws import FIRST, GOLDEN, SECOND, UNIT
from fastssl.augment.policy import CROPS, NO_SOLARIZE, TRIES, Slot, View, table_of

Array = npt.NDArray[Any]
RANDOM_RESIZED, RESIZE, CENTER, PAD = (CROPS.index(kind) for kind in ("random_resized", "resize", "center", "pad"))
# numba takes uint64 with a Python integer to float64, so every constant of the hash is a uint64
U_GOLDEN, U_FIRST, U_SECOND = np.uint64(GOLDEN), np.uint64(FIRST), np.uint64(SECOND)
U_27, U_30, U_31, U_40, U_1 = (np.uint64(x) for x in (27, 30, 31, 40, 1))
# The policy's rounding is part of its answer. Left out, fastmath would be that of whichever caller compiles it first.
jit = njit(fastmath=False, **INNER)


@lru_cache(maxsize=64)
def rows_of(views: tuple[View, ...]) -> tuple[Array, Array, Array]:
    """Of each slot its lowest value and its span, float64 (V, S), and the view's other numbers, records (V,)."""
    table = table_of(views, torch.device("cpu"))
    # records, so that the kernel names a column instead of numbering it
    rows_V = np.empty(len(views), dtype=[(name, np.float64) for name in table.columns])
    for name, column_V in table.columns.items():
        rows_V[name] = column_V.numpy()
    return table.low_VS.contiguous().numpy(), table.span_VS.contiguous().numpy(), rows_V


@jit
def child(key: Any, word: Any) -> Any:
    """`draws._child` of uint64."""
    # SplitMix64's state only grows by GOLDEN, so output `word` needs none of those before it
    bits = key + (word + U_1) * U_GOLDEN
    bits = (bits ^ (bits >> U_30)) * U_FIRST
    bits = (bits ^ (bits >> U_27)) * U_SECOND
    return bits ^ (bits >> U_31)


@jit
def draw_slots(key: Any, out_S: Array) -> None:
    """The draws of one view, whose generator `key` seeds."""
    for s in range(len(out_S)):
        # the top 24 bits: all that float32 keeps below 1
        out_S[s] = np.float32(child(key, np.uint64(s)) >> U_40) * np.float32(UNIT)


@jit
def sample_view_params(of_view: Any, row: Any, size_2: Array, out: Any) -> None:
    """Fill one record.

    Args:
        of_view: lowest value, span and draw of each slot, (S,).
    """
    _place(of_view, row, float(size_2[0]), float(size_2[1]), out)
    _turn(of_view, out)
    _jitter(of_view, out)
    _finish(of_view, row, out)


@jit
def _value(of_view: Any, slot: int) -> Any:
    low_S, span_S, draw_S = of_view
    # float64, as in `sampling`: a chance on the edge has to fall the same way everywhere
    return low_S[slot] + span_S[slot] * np.float64(draw_S[slot])


@jit
def _on(of_view: Any, slot: int) -> Any:
    return _value(of_view, slot) > 0


@jit
def _place(of_view: Any, row: Any, height: float, width: float, out: Any) -> None:
    # all of "resize", and the size of "pad"
    out.top, out.left, out.height, out.width = 0, 0, height, width
    if row.crop == RANDOM_RESIZED:
        _place_at_random(of_view, row, height, width, out)
    elif row.crop == PAD:
        out.top = math.floor(_value(of_view, Slot.TOP.value) * (2 * row.pad_px + 1)) - row.pad_px
        out.left = math.floor(_value(of_view, Slot.LEFT.value) * (2 * row.pad_px + 1)) - row.pad_px
    elif row.crop != RESIZE:
        side = row.side_px
        if row.crop == CENTER:
            # half to even, as torch rounds
            side = max(np.rint(min(height, width) * math.sqrt(row.area_max)), 1.0)
        out.top, out.left, out.height, out.width = np.rint((height - side) / 2), np.rint((width - side) / 2), side, side


@jit
def _place_at_random(of_view: Any, row: Any, height: float, width: float, out: Any) -> None:
    # if no try fits: the largest box of an allowed shape, cut to the image below
    box_height, box_width = np.rint(width / row.aspect_min), np.rint(height * row.aspect_max)
    fits = False
    for k in range(TRIES):
        area = _value(of_view, Slot.AREA.value + k) * (height * width)
        aspect = row.aspect_min * (row.aspect_max / row.aspect_min) ** _value(of_view, Slot.ASPECT.value + k)
        tall, wide = area / aspect, area * aspect
        # squares compared, as in `sampling`: of tries that do not fit no root is taken
        fits = 0.25 < tall < (height + 0.5) * (height + 0.5) and 0.25 < wide < (width + 0.5) * (width + 0.5)
        # `sampling` tries all and takes the first that fits: here the others need not be tried
        if fits:
            box_height, box_width = np.rint(math.sqrt(tall)), np.rint(math.sqrt(wide))
            break
    out.height, out.width = min(max(box_height, 1.0), height), min(max(box_width, 1.0), width)
    # of the stored box: a whole number that float32 keeps
    spare_top, spare_left = height - np.float64(out.height), width - np.float64(out.width)
    out.top = math.floor(_value(of_view, Slot.TOP.value) * (spare_top + 1) if fits else spare_top / 2)
    out.left = math.floor(_value(of_view, Slot.LEFT.value) * (spare_left + 1) if fits else spare_left / 2)


@jit
def _turn(of_view: Any, out: Any) -> None:
    out.hflip, out.vflip = _on(of_view, Slot.HFLIP.value), _on(of_view, Slot.VFLIP.value)
    out.turns = math.floor(_value(of_view, Slot.TURNS.value)) if _on(of_view, Slot.TURN.value) else 0
    out.rotate_deg = _value(of_view, Slot.ROTATE_DEG.value) if _on(of_view, Slot.ROTATE.value) else 0


@jit
def _jitter(of_view: Any, out: Any) -> None:
    out.brightness, out.contrast, out.saturation, out.hue, out.order = 1, 1, 1, 0, 0
    if _on(of_view, Slot.JITTER.value):
        out.brightness, out.contrast = _value(of_view, Slot.BRIGHTNESS.value), _value(of_view, Slot.CONTRAST.value)
        out.saturation, out.hue = _value(of_view, Slot.SATURATION.value), _value(of_view, Slot.HUE.value)
        out.order = math.floor(_value(of_view, Slot.ORDER.value))
    out.gray = _on(of_view, Slot.GRAY.value)


@jit
def _finish(of_view: Any, row: Any, out: Any) -> None:
    sigma = _value(of_view, Slot.BLUR_SIGMA.value) if _on(of_view, Slot.BLUR.value) else 0.0
    out.blur_sigma_px, out.blur_radius_px = sigma, min(math.ceil(3 * sigma), row.side_px - 1)
    out.solarize = row.solarize_threshold if _on(of_view, Slot.SOLARIZE.value) else NO_SOLARIZE
    out.posterize_bits = row.posterize_bits if _on(of_view, Slot.POSTERIZE.value) else 0
    out.cutout_top = math.floor(_value(of_view, Slot.CUTOUT_TOP.value))
    out.cutout_left = math.floor(_value(of_view, Slot.CUTOUT_LEFT.value))
    out.cutout_side = row.cutout_side_px if _on(of_view, Slot.CUTOUT.value) else 0
