"""The passes of the CUDA backend: each program does one tile of one view in one of them.

V views, C channels, S side of a view, T side of a tile, G tiles of a view, P columns of a row of parameters.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import triton
import triton.language as tl

from fastssl.augment.constants import RGB
from fastssl.augment.cuda.color import colored, finish, gray_sum_before_contrast, unit
from fastssl.augment.cuda.plan import COLUMN, PASS, WEIGHTS, WIDTH
from fastssl.augment.cuda.resample import (
    blur_axis,
    blurred_tile,
    crop_axis,
    flat,
    in_a_row,
    load_planes,
    mixed,
    rotated,
    store_planes,
)

RGB_ = tl.constexpr(RGB)
# numbers and places that change from call to call must not make another kernel, whatever divides them
CHANGING = ["size_step", "row_step", "start", "batch", "image_step", "pitch", "out_step"]
ANYWHERE = ["images", "offsets", "sizes", "rows", "out"]


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=ANYWHERE)
def run_pass(
    images,
    offsets,
    sizes,
    size_step: tl.int64,
    rows,
    row_step: tl.int64,
    norm,
    scratch,
    turned,
    sums,
    out,
    start: tl.int32,
    batch: tl.int32,
    image_step: tl.int64,
    pitch: tl.int64,
    out_step: tl.int64,
    STAGE: tl.constexpr,
    FLAT: tl.constexpr,
    P: tl.constexpr,
):
    """One pass over one tile of one view; of one channel, where the channels are not colors.

    Args:
        images: the first pixel; image_step and pitch are elements between images and between rows.
        offsets: int64 (B,), where FLAT.
        sizes: int64 (B, 2), size_step elements between images.
        rows: float32 (B, V, P), row_step elements between images.
        norm: float32 (2, C).
        scratch, turned: of a group (batch, V, C, S, S) in [0, 1]: the crop, later its colors; the rotated crop.
        sums: of a group float32 (batch, V, G), each tile's gray before contrast.
        out: (V, B, S, S, C); views are out_step apart.
        start, batch: first image of the group, and how many it has.
    """
    G: tl.constexpr = P.across * P.across
    tile = tl.program_id(0) % G
    # tiles of a view follow one another, so neighbors in time read the same source rows
    n = tl.program_id(0) // G % (P.views * batch)
    channel = tl.program_id(0) // (G * P.views * batch)
    # 64 bits from here on: a large batch has more than 2^31 elements
    b, v = (start + n // P.views).to(tl.int64), (n % P.views).to(tl.int64)
    y_0, x_0 = tile // P.across * P.tile, tile % P.across * P.tile
    params = rows + b * row_step + v * WIDTH
    norm += channel
    sums += n * G
    scratch += (n.to(tl.int64) * P.channels + channel) * (P.side * P.side)
    turned += (n.to(tl.int64) * P.channels + channel) * (P.side * P.side)
    out += v * out_step + b * (P.side * P.side * P.channels) + channel
    if STAGE == PASS.value.CROP:
        images += channel + (tl.load(offsets + b) if FLAT else b * image_step)
        _crop(images, sizes + b * size_step, pitch, tile, y_0, x_0, params, norm, scratch, sums, out, FLAT, P)
    elif STAGE == PASS.value.ROTATE:
        _rotate(tile, y_0, x_0, params, scratch, turned, sums, P)
    elif STAGE == PASS.value.COLOR:
        _color(y_0, x_0, params, norm, scratch, turned, sums, out, P)
    else:
        _blur(y_0, x_0, params, norm, scratch, out, P)


@triton.jit
def _square(y_0, x_0, P: tl.constexpr):
    """(T, 1) lines and (1, T) columns of a tile, from its corner."""
    return y_0 + tl.arange(0, P.tile)[:, None], x_0 + tl.arange(0, P.tile)[None, :]


@triton.jit
def _crop(images, sizes, pitch, tile, y_0, x_0, params, norm, scratch, sums, out, FLAT: tl.constexpr, P: tl.constexpr):
    height, width = tl.load(sizes).to(tl.int32), tl.load(sizes + 1).to(tl.int32)
    y_T1, x_1T = _square(y_0, x_0, P)
    if FLAT:
        # images of a flat buffer lie there without padding, so a row's pitch is its own width
        pitch = (width * P.channels).to(tl.int64)
    y, x = crop_axis(y_T1, params, 0, height, P), crop_axis(x_1T, params, 1, width, P)
    red, green, blue = mixed(images, pitch, P.channels, 1, y, x, P.resize, P)
    # a constant to multiply by: a division would be several instructions a pixel
    white: tl.constexpr = 1 / P.white
    # bicubic overshoots
    red, green, blue = unit(red * white), unit(green * white), unit(blue * white)
    # an odd quarter turn is a transposition, which costs nothing as the strides of a store
    odd = tl.load(params + COLUMN.value.TURNS).to(tl.int32) % 2 == 1
    down, right = tl.where(odd, 1, P.side), tl.where(odd, P.side, 1)
    # all of the view is in registers, so what needs its neighbors needs no pass of its own
    if P.whole:
        if P.channels == RGB_:
            red, green, blue = colored(red, green, blue, 0.0, y_T1, x_1T, params, P)
        if tl.load(params + COLUMN.value.BLUR_RADIUS_PX) > 0:
            red, green, blue = blurred_tile(red, green, blue, params, P)
        finish(red, green, blue, y_0, x_0, down, right, params, norm, out, P)
    elif P.waits:
        _store_anyhow(red, green, blue, y_0, x_0, down, right, scratch, P)
        if P.channels == RGB_:
            # each tile to its own place: atomics would add up in another order every time, to other bits
            tl.store(sums + tile, gray_sum_before_contrast(red, green, blue, y_T1, x_1T, params, P))
    else:
        _color_and_leave(red, green, blue, 0.0, y_0, x_0, down, right, params, norm, scratch, out, P)


@triton.jit
def _rotate(tile, y_0, x_0, params, scratch, turned, sums, P: tl.constexpr):
    # the others stay where the crop left them, and are not copied
    if tl.load(params + COLUMN.value.ROTATE_DEG) != 0:
        y_X, x_X = in_a_row(y_0, x_0, P)
        red, green, blue = rotated(scratch, y_X, x_X, params, P)
        store_planes(red, green, blue, y_X, x_X, P.side, 1, turned, P)
        if P.channels == RGB_:
            # over the crop's sum: contrast sees the rotated view, whose corners are black
            tl.store(sums + tile, gray_sum_before_contrast(red, green, blue, y_X, x_X, params, P))


@triton.jit
def _color(y_0, x_0, params, norm, scratch, turned, sums, out, P: tl.constexpr):
    # a choice of pointers, so that views which are not rotated need no copy
    source = tl.where(tl.load(params + COLUMN.value.ROTATE_DEG) != 0, turned, scratch)
    y_T1, x_1T = _square(y_0, x_0, P)
    red, green, blue = load_planes(source, y_T1, x_1T, P)
    mean = 0.0
    if P.channels == RGB_:
        # every tile adds up all sums by itself: cheaper than one more launch
        part = tl.arange(0, P.parts)
        mean = tl.sum(tl.load(sums + part, mask=part < P.across * P.across, other=0)) / (P.side * P.side)
    _color_and_leave(red, green, blue, mean, y_0, x_0, P.side, 1, params, norm, scratch, out, P)


@triton.jit
def _blur(y_0, x_0, params, norm, scratch, out, P: tl.constexpr):
    if tl.load(params + COLUMN.value.BLUR_RADIUS_PX) > 0:
        y_T1, x_1T = _square(y_0, x_0, P)
        # from the scratch copy, because a blur reads the colors of neighboring tiles
        y, x = blur_axis(y_T1, params, P), blur_axis(x_1T, params, P)
        red, green, blue = mixed(scratch, P.side, 1, P.side * P.side, y, x, WEIGHTS.value.GAUSSIAN, P)
        finish(red, green, blue, y_0, x_0, P.side, 1, params, norm, out, P)


@triton.jit
def _color_and_leave(red, green, blue, mean, y_0, x_0, down, right, params, norm, scratch, out, P: tl.constexpr):
    """Color a tile; a blur takes it up from the scratch copy, otherwise it is finished."""
    y_T1, x_1T = _square(y_0, x_0, P)
    if P.channels == RGB_:
        red, green, blue = colored(red, green, blue, mean, y_T1, x_1T, params, P)
    if tl.load(params + COLUMN.value.BLUR_RADIUS_PX) > 0:
        # where colors wait, the strides are constants by now, and a square stores 16 bytes a lane
        if P.waits:
            store_planes(red, green, blue, y_T1, x_1T, P.side, 1, scratch, P)
        else:
            _store_anyhow(red, green, blue, y_0, x_0, down, right, scratch, P)
    else:
        finish(red, green, blue, y_0, x_0, down, right, params, norm, out, P)


@triton.jit
def _store_anyhow(red, green, blue, y_0, x_0, down, right, planes, P: tl.constexpr):
    """`store_planes` where a quarter turn may exchange the strides."""
    red, green, blue = flat(red, green, blue, P)
    y_X, x_X = in_a_row(y_0, x_0, P)
    store_planes(red, green, blue, y_X, x_X, down, right, planes, P)
