"""The draws, and `sampling.sample_params` of them, in one Triton launch; and what the pixel kernels need besides.

Nothing is decided here: every formula is that of `draws` and `sampling`, in its order of float64 operations.

R pairs of a sample and a view at a time, T tries of a random crop, filled up to TRIES_2.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.augment import draws as hashing
from fastssl.augment.cuda.plan import COLUMN, ROW, WIDTH, numbers
from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import CROPS, NO_SOLARIZE, SLOTS, TRIES, Column, Parameters, Slot, View, table_of

PAIRS = 4
OF_VIEW = (
    *("side_px", "crop", "pad_px", "area_max", "aspect_min", "aspect_max", "aspect_log2"),
    *("solarize_threshold", "posterize_bits", "cutout_side_px"),
)
ENTRY = numbers({name: 2 * SLOTS + i for i, name in enumerate(OF_VIEW)})
ENTRIES = tl.constexpr(2 * SLOTS + len(OF_VIEW))
SLOT = numbers({name: int(slot) for name, slot in Slot.__members__.items()})
CROP = numbers({name: i for i, name in enumerate(CROPS)})
SPAN, T, T_2, COLUMNS, COLUMNS_2 = (
    tl.constexpr(x) for x in (SLOTS, TRIES, triton.next_power_of_2(TRIES), len(Column), 32)
)
GOLDEN, FIRST, SECOND = (tl.constexpr(x) for x in (hashing.GOLDEN, hashing.FIRST, hashing.SECOND))
UNIT, OFF = tl.constexpr(hashing.UNIT), tl.constexpr(NO_SOLARIZE)
# added to a float64 it leaves no place for a fraction: rounds half to even
WHOLE = tl.constexpr(1.5 * 2.0**52)
DEGREE, TURN = tl.constexpr(math.pi / 180), tl.constexpr(2 * math.pi)


def sample(views: tuple[View, ...], key: DrawKey, sizes_B2: Tensor) -> Tensor:
    """The rows of the pixel kernels, float32 (B, V, `WIDTH`): the parameters, then sines and cosines."""
    index_B, batch = key.index_B.contiguous(), len(key.index_B)
    rows_BVP = torch.empty((batch, len(views), len(ROW)), dtype=torch.float32, device=index_B.device)
    on_device = isinstance(key.epoch, Tensor)
    if batch > 0:
        _sample[(triton.cdiv(batch * len(views), PAIRS),)](
            _table(views, index_B.device),
            index_B,
            sizes_B2,
            sizes_B2.stride(0),
            _signed(key.seed),
            key.epoch if on_device else _signed(int(key.epoch)),
            key.first,
            batch * len(views),
            len(views),
            rows_BVP,
            EPOCH_ON_DEVICE=on_device,
            R=PAIRS,
            num_warps=1,
            # a fused multiply-add rounds once where the policy rounds twice
            enable_fp_fusion=False,
        )
    return rows_BVP


def extend(params: Parameters) -> Tensor:
    """The rows of given parameters."""
    packed_BVP = params.packed_BVP.contiguous()
    rows_BVP = packed_BVP.new_empty((*packed_BVP.shape[:2], len(ROW)))
    count = packed_BVP.shape[0] * packed_BVP.shape[1]
    if count > 0:
        _extend[(triton.cdiv(count, PAIRS),)](packed_BVP, count, rows_BVP, R=PAIRS, num_warps=1)
    return rows_BVP


@lru_cache(maxsize=64)
def _table(views: tuple[View, ...], device: torch.device) -> Tensor:
    """float64 (V, `ENTRIES`): low and span of each slot, then the view's other numbers."""
    # built on the CPU, so that it goes to the device in one copy
    table = table_of(views, torch.device("cpu"))
    columns = table.columns | {"aspect_log2": (table.columns["aspect_max"] / table.columns["aspect_min"]).log2()}
    parts = [table.low_VS, table.span_VS, torch.stack([columns[name] for name in OF_VIEW], dim=1)]
    return torch.cat(parts, dim=1).to(device)


def _signed(word: int) -> int:
    """The int64 with the same low 64 bits."""
    return (word + 2**63) % 2**64 - 2**63


# numbers that change from call to call must not make another kernel: neither their values nor their alignment
CHANGING = ["size_step", "seed", "epoch", "first_view", "count", "views", "index", "sizes"]


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=["index", "sizes", "epoch"])
def _sample(
    table,
    index,
    sizes,
    size_step: tl.int64,
    seed: tl.int64,
    epoch,
    first_view: tl.int32,
    count: tl.int32,
    views: tl.int32,
    out,
    EPOCH_ON_DEVICE: tl.constexpr,
    R: tl.constexpr,
):
    """One warp for a few pairs: the tries of a crop are its lanes, everything else is the same in all of them."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    # lanes past the end repeat the last pair, so that no load needs a mask
    real_R, i_R = i_R < count, tl.minimum(i_R, count - 1)
    b_R, v_R = i_R // views, i_R % views
    # an epoch on the device is read there, so that one captured graph serves all of them
    era = tl.load(epoch) if EPOCH_ON_DEVICE else epoch
    root = child(child(tl.zeros([], tl.uint64), seed), era)
    # the same tree as `draws`: seed, epoch, sample, view, and the slot below
    key_R = child(child(root, tl.load(index + b_R)), first_view + v_R)
    height_R = tl.load(sizes + b_R * size_step).to(tl.float64)
    width_R = tl.load(sizes + b_R * size_step + 1).to(tl.float64)
    table += v_R * ENTRIES
    out += i_R * WIDTH
    _box(table, key_R, height_R, width_R, out, real_R, T_2)
    _turns(table, key_R, out, real_R)
    _jitter(table, key_R, out, real_R)
    _late(table, key_R, out, real_R)


@triton.jit
def child(key, word):
    """`draws._child`."""
    z = key + (tl.cast(word, tl.uint64) + 1) * GOLDEN
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


@triton.jit
def _value(table, key, slot):
    # the top 24 bits: all that float32 keeps below 1
    draw = (child(key, slot) >> 40).to(tl.float32) * UNIT
    # float64, as in `sampling`: a chance on the edge has to fall the same way everywhere
    return tl.load(table + slot) + tl.load(table + SPAN + slot) * draw.to(tl.float64)


@triton.jit
def _round(x):
    return (x + WHOLE) - WHOLE


@triton.jit
def _put(out, column, value, real):
    tl.store(out + column, value.to(tl.float32), mask=real)


@triton.jit
def _box(table, key_R, height_R, width_R, out, real_R, TRIES_2: tl.constexpr):
    kind_R = tl.load(table + ENTRY.value.crop)
    shift_y_R, shift_x_R = _value(table, key_R, SLOT.value.TOP), _value(table, key_R, SLOT.value.LEFT)
    top_R, left_R, box_height_R, box_width_R = _random_box(
        table, key_R, height_R, width_R, shift_y_R, shift_x_R, TRIES_2
    )
    # all kinds are computed and one is chosen: lanes of a warp that differ would take every branch anyway
    side_R = tl.load(table + ENTRY.value.side_px)
    square_R = _round(tl.minimum(height_R, width_R) * tl.sqrt(tl.load(table + ENTRY.value.area_max)))
    side_R = tl.where(kind_R == CROP.value.center, tl.maximum(square_R, 1.0), side_R)
    centered = (kind_R == CROP.value.center) | (kind_R == CROP.value.none)
    pad_R = tl.load(table + ENTRY.value.pad_px)
    padded, whole = kind_R == CROP.value.pad, (kind_R == CROP.value.pad) | (kind_R == CROP.value.resize)
    top_R = tl.where(centered, _round((height_R - side_R) / 2), tl.where(whole, 0.0, top_R))
    left_R = tl.where(centered, _round((width_R - side_R) / 2), tl.where(whole, 0.0, left_R))
    top_R = tl.where(padded, tl.floor(shift_y_R * (2 * pad_R + 1)) - pad_R, top_R)
    left_R = tl.where(padded, tl.floor(shift_x_R * (2 * pad_R + 1)) - pad_R, left_R)
    _put(out, COLUMN.value.TOP, top_R, real_R)
    _put(out, COLUMN.value.LEFT, left_R, real_R)
    _put(out, COLUMN.value.HEIGHT, tl.where(centered, side_R, tl.where(whole, height_R, box_height_R)), real_R)
    _put(out, COLUMN.value.WIDTH, tl.where(centered, side_R, tl.where(whole, width_R, box_width_R)), real_R)


@triton.jit
def _random_box(table, key_R, height_R, width_R, shift_y_R, shift_x_R, TRIES_2: tl.constexpr):
    """torchvision's RandomResizedCrop: the first try to fit, else the largest box of an allowed shape, centered."""
    # tl.arange takes powers of 2 only: lanes from T on never fit
    t_1T = tl.arange(0, TRIES_2)[None, :]
    table_R1, key_R1 = table[:, None], key_R[:, None]
    height_R1, width_R1 = height_R[:, None], width_R[:, None]
    narrowest_R, widest_R = tl.load(table + ENTRY.value.aspect_min), tl.load(table + ENTRY.value.aspect_max)
    # the sides' product first, as in the policy: another order would round differently
    area_RT = _value(table_R1, key_R1, SLOT.value.AREA + t_1T) * (height_R1 * width_R1)
    exponent_RT = _value(table_R1, key_R1, SLOT.value.ASPECT + t_1T)
    # a power with its logarithm from the host: float64 has no fast one here
    aspect_RT = narrowest_R[:, None] * tl.exp2(tl.load(table_R1 + ENTRY.value.aspect_log2) * exponent_RT)
    tall_RT, wide_RT = area_RT / aspect_RT, area_RT * aspect_RT
    # squares compared, as in the policy: roots of all the tries would cost more
    fits_RT = (tall_RT > 0.25) & (tall_RT < (height_R1 + 0.5) * (height_R1 + 0.5)) & (t_1T < T)
    fits_RT = fits_RT & (wide_RT > 0.25) & (wide_RT < (width_R1 + 0.5) * (width_R1 + 0.5))
    # the first in order, as in the policy, though all are tried at once
    first_R = tl.min(tl.where(fits_RT, t_1T, TRIES_2), axis=1)
    chosen_RT, fits_R = t_1T == first_R[:, None], first_R < TRIES_2
    # a sum with one term: the cheapest way out of the other lanes
    tall_R = tl.sum(tl.where(chosen_RT, tall_RT, 0.0), axis=1)
    wide_R = tl.sum(tl.where(chosen_RT, wide_RT, 0.0), axis=1)
    box_height_R = tl.where(fits_R, _round(tl.sqrt(tall_R)), tl.maximum(_round(width_R / narrowest_R), 1.0))
    box_width_R = tl.where(fits_R, _round(tl.sqrt(wide_R)), tl.maximum(_round(height_R * widest_R), 1.0))
    box_height_R, box_width_R = tl.minimum(box_height_R, height_R), tl.minimum(box_width_R, width_R)
    spare_y_R, spare_x_R = height_R - box_height_R, width_R - box_width_R
    top_R = tl.floor(tl.where(fits_R, shift_y_R * (spare_y_R + 1), spare_y_R / 2))
    left_R = tl.floor(tl.where(fits_R, shift_x_R * (spare_x_R + 1), spare_x_R / 2))
    return top_R, left_R, box_height_R, box_width_R


@triton.jit
def _turns(table, key_R, out, real_R):
    zero_R = tl.zeros_like(tl.load(table))
    _put(out, COLUMN.value.HFLIP, tl.where(_value(table, key_R, SLOT.value.HFLIP) > 0, 1.0, zero_R), real_R)
    _put(out, COLUMN.value.VFLIP, tl.where(_value(table, key_R, SLOT.value.VFLIP) > 0, 1.0, zero_R), real_R)
    turns_R = tl.floor(_value(table, key_R, SLOT.value.TURNS))
    _put(out, COLUMN.value.TURNS, tl.where(_value(table, key_R, SLOT.value.TURN) > 0, turns_R, 0.0), real_R)
    angle_R = _value(table, key_R, SLOT.value.ROTATE_DEG)
    # as stored, in float32: other backends turn by what they read
    angle_R = tl.where(_value(table, key_R, SLOT.value.ROTATE) > 0, angle_R, 0.0).to(tl.float32)
    _put(out, COLUMN.value.ROTATE_DEG, angle_R, real_R)
    _put_turn(out, angle_R * DEGREE, COLUMN.value.ROTATE_COS, COLUMN.value.ROTATE_SIN, real_R)


@triton.jit
def _put_turn(out, angle, COS: tl.constexpr, SIN: tl.constexpr, real):
    _put(out, COS, tl.cos(angle), real)
    _put(out, SIN, tl.sin(angle), real)


@triton.jit
def _jitter(table, key_R, out, real_R):
    on_R = _value(table, key_R, SLOT.value.JITTER) > 0
    brightness_R, contrast_R = _value(table, key_R, SLOT.value.BRIGHTNESS), _value(table, key_R, SLOT.value.CONTRAST)
    saturation_R, hue_R = _value(table, key_R, SLOT.value.SATURATION), _value(table, key_R, SLOT.value.HUE)
    _put(out, COLUMN.value.BRIGHTNESS, tl.where(on_R, brightness_R, 1.0), real_R)
    _put(out, COLUMN.value.CONTRAST, tl.where(on_R, contrast_R, 1.0), real_R)
    _put(out, COLUMN.value.SATURATION, tl.where(on_R, saturation_R, 1.0), real_R)
    # as stored, in float32, like the angle above
    hue_R = tl.where(on_R, hue_R, 0.0).to(tl.float32)
    _put(out, COLUMN.value.HUE, hue_R, real_R)
    _put_turn(out, hue_R * TURN, COLUMN.value.HUE_COS, COLUMN.value.HUE_SIN, real_R)
    order_R = tl.floor(_value(table, key_R, SLOT.value.ORDER))
    _put(out, COLUMN.value.ORDER, tl.where(on_R, order_R, 0.0), real_R)
    gray_R = tl.where(_value(table, key_R, SLOT.value.GRAY) > 0, 1.0, tl.zeros_like(order_R))
    _put(out, COLUMN.value.GRAY, gray_R, real_R)


@triton.jit
def _late(table, key_R, out, real_R):
    """Blur, solarize, posterize and cutout."""
    sigma_R = _value(table, key_R, SLOT.value.BLUR_SIGMA)
    sigma_R = tl.where(_value(table, key_R, SLOT.value.BLUR) > 0, sigma_R, 0.0)
    # a reflected border is never wider than the view
    last_R = tl.load(table + ENTRY.value.side_px) - 1
    _put(out, COLUMN.value.BLUR_SIGMA_PX, sigma_R, real_R)
    _put(out, COLUMN.value.BLUR_RADIUS_PX, tl.minimum(tl.ceil(3 * sigma_R), last_R), real_R)
    threshold_R, bits_R = tl.load(table + ENTRY.value.solarize_threshold), tl.load(table + ENTRY.value.posterize_bits)
    threshold_R = tl.where(_value(table, key_R, SLOT.value.SOLARIZE) > 0, threshold_R, OFF)
    bits_R = tl.where(_value(table, key_R, SLOT.value.POSTERIZE) > 0, bits_R, 0.0)
    square_R = tl.load(table + ENTRY.value.cutout_side_px)
    square_R = tl.where(_value(table, key_R, SLOT.value.CUTOUT) > 0, square_R, 0.0)
    _put(out, COLUMN.value.SOLARIZE, threshold_R, real_R)
    _put(out, COLUMN.value.POSTERIZE_BITS, bits_R, real_R)
    # drawn even where nothing is cut out: a side of 0 says so, and the columns equal the policy's
    _put(out, COLUMN.value.CUTOUT_TOP, tl.floor(_value(table, key_R, SLOT.value.CUTOUT_TOP)), real_R)
    _put(out, COLUMN.value.CUTOUT_LEFT, tl.floor(_value(table, key_R, SLOT.value.CUTOUT_LEFT)), real_R)
    _put(out, COLUMN.value.CUTOUT_SIDE, square_R, real_R)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["packed"])
def _extend(packed, count: tl.int32, out, R: tl.constexpr):
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    real_R = i_R < count
    column_1P = tl.arange(0, COLUMNS_2)[None, :]
    real_RP = real_R[:, None] & (column_1P < COLUMNS)
    # copied, because the pixel kernels' rows are wider than what is given
    row_RP = tl.load(packed + i_R[:, None] * COLUMNS + column_1P, mask=real_RP, other=0)
    out += i_R * WIDTH
    tl.store(out[:, None] + column_1P, row_RP, mask=real_RP)
    packed += i_R * COLUMNS
    # parameters that came from elsewhere lack only their sines and cosines
    degrees_R = tl.load(packed + COLUMN.value.ROTATE_DEG, mask=real_R, other=0)
    turns_R = tl.load(packed + COLUMN.value.HUE, mask=real_R, other=0)
    _put_turn(out, degrees_R * DEGREE, COLUMN.value.ROTATE_COS, COLUMN.value.ROTATE_SIN, real_R)
    _put_turn(out, turns_R * TURN, COLUMN.value.HUE_COS, COLUMN.value.HUE_SIN, real_R)
