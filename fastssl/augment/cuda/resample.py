"""Whatever is linear in Triton: crop, resize, flip, blur and rotation of one tile of a view.

Crop and blur are banded matrices on either side of the image, formed in registers and multiplied by the tensor cores.
Pixels of 8 bits are exact in float16; the weights are divided by the sum of what they were rounded to, so a flat image
stays flat.

T side of a tile, X = T * T its pixels in a row, J rows and K columns of the source at a time; V, S, C as in `cuda`. An
`axis` is (line, rate, reach, first, low, high, gain): where the tile's lines lie among those of the box, what a
distance is multiplied by, how far a line reaches, the box's first line in the source, its lines within reach of the
tile, what sums are multiplied by.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import math

import triton
import triton.language as tl

from fastssl.augment.constants import RGB
from fastssl.augment.cuda.plan import COLUMN, WEIGHTS

RGB_ = tl.constexpr(RGB)
# J and K; 16 is the least a product takes, for registers' sake
ROWS, COLUMNS = tl.constexpr(16), tl.constexpr(32)
# exp(-0.5 x^2) = 2^-(BELL x)^2, which the hardware has
BELL = tl.constexpr(math.sqrt(0.5 * math.log2(math.e)))


@triton.jit
def crop_axis(out, params, AXIS: tl.constexpr, size, P: tl.constexpr):
    """A quarter turn is a flip and a transposition; the transposition is left to the stores."""
    # TOP and LEFT, HEIGHT and WIDTH follow one another, so an axis is an offset
    first = tl.load(params + COLUMN.value.TOP + AXIS).to(tl.int32)
    length = tl.load(params + COLUMN.value.HEIGHT + AXIS)
    turns = tl.load(params + COLUMN.value.TURNS)
    if AXIS == 0:
        flip = (tl.load(params + COLUMN.value.VFLIP) > 0) ^ (turns >= 2)
    else:
        flip = (tl.load(params + COLUMN.value.HFLIP) > 0) ^ ((turns == 1) | (turns == 2))
    scale = length / P.side
    # antialiasing: a line that shrinks weighs every source line it covers
    width = tl.maximum(scale, 1.0)
    rate = 1 / width
    reach = width * 2 if P.resize == WEIGHTS.value.BICUBIC else width
    # lines past the view repeat its last, so that no norm is 0 / 0
    out = tl.minimum(out, P.side - 1)
    line = (tl.where(flip, P.side - 1 - out, out) + 0.5) * scale - 0.5
    # sums the weights as rounded, not as meant: a flat image then stays flat in float16
    norm = line * 0
    start = tl.ceil(line - reach)
    for k in range(0, tl.floor(2 * reach).to(tl.int32) + 1):
        weight = _rounded(_weight(start + k, line, rate, reach, P.resize), P)
        norm += tl.where((start + k >= 0) & (start + k < length), weight, 0.0)
    low, high = _range(line, reach)
    # lines of the box outside the image are black: in the norm, but never loaded
    low, high = tl.maximum(low, tl.maximum(0, -first)), tl.minimum(high, tl.minimum(length.to(tl.int32), size - first))
    return line, rate, reach, first, low, high, 1 / norm


@triton.jit
def blur_axis(out, params, P: tl.constexpr):
    """Lines beyond the border are reflected as they are loaded."""
    reach = tl.load(params + COLUMN.value.BLUR_RADIUS_PX)
    # exp2 is one instruction, exp is two
    rate = 1 / tl.load(params + COLUMN.value.BLUR_SIGMA_PX) * BELL
    line = tl.minimum(out, P.side - 1).to(tl.float32)
    half = 0.5
    # the kernel is symmetric, so half of it, with half its center, is half the sum
    for k in range(1, reach.to(tl.int32) + 1):
        half += _rounded(_weight(k, 0 * reach, rate, reach, WEIGHTS.value.GAUSSIAN), P)
    low, high = _range(line, reach)
    return line, rate, reach, 0, low, high, 0.5 / half


@triton.jit
def _range(line, reach):
    return tl.ceil(tl.min(line) - reach).to(tl.int32), tl.floor(tl.max(line) + reach).to(tl.int32) + 1


@triton.jit
def _weight(place, line, rate, reach, KIND: tl.constexpr):
    """Of line `place` of the box, before the norm; any shapes that broadcast."""
    # formed in registers wherever it is needed: a table would be read more slowly than this is computed
    distance = tl.abs(place - line)
    x = distance * rate
    if KIND == WEIGHTS.value.GAUSSIAN:
        weight = tl.where(distance <= reach, tl.exp2(-x * x), 0.0)
    elif KIND == WEIGHTS.value.BICUBIC:  # Keys' cubic with a = -0.5, what torch uses when it antialiases
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        weight = tl.maximum(1 - x, 0.0)
    return weight


@triton.jit
def _operand(x, P: tl.constexpr):
    return x.to(tl.float32 if P.exact else tl.float16)


@triton.jit
def _rounded(weight, P: tl.constexpr):
    return _operand(weight, P).to(tl.float32)


@triton.jit
def _product(left, right, P: tl.constexpr):
    # three products of TF32 keep float32's precision on tensor cores
    return tl.dot(_operand(left, P), _operand(right, P), input_precision="tf32x3")


@triton.jit
def mixed(source, pitch_y, pitch_x, pitch_channel, y, x, KIND: tl.constexpr, P: tl.constexpr):
    """A tile of each plane: the y axis's matrix times the source times the x axis's."""
    line_T1, y_rate, y_reach, top, y_low, y_high, y_gain = y
    line_1T, x_rate, x_reach, left, x_low, x_high, x_gain = x
    tile: tl.constexpr = P.tile
    red = tl.zeros([tile, tile], tl.float32)
    green, blue = red, red
    # addresses as one row: of a square of them Triton 3.6 gives each lane another row, so nothing coalesces
    i_X = tl.arange(0, ROWS * COLUMNS)
    for p in range(y_low, y_high, ROWS):
        row_J, row_X = p + tl.arange(0, ROWS), p + i_X // COLUMNS
        red_JT = tl.zeros([ROWS, tile], tl.float32)
        green_JT, blue_JT = red_JT, red_JT
        line_X = source + _place(row_X, top, KIND, P) * pitch_y
        for q in range(x_low, x_high, COLUMNS):
            column_K, column_X = q + tl.arange(0, COLUMNS), q + i_X % COLUMNS
            weight_KT = _weight(column_K[:, None].to(tl.float32), line_1T, x_rate, x_reach, KIND)
            real_X = (row_X < y_high) & (column_X < x_high)
            place_X = line_X + _place(column_X, left, KIND, P) * pitch_x
            red_JT += _product(_loaded(place_X, real_X), weight_KT, P)
            if P.channels == RGB_:
                green_JT += _product(_loaded(place_X + pitch_channel, real_X), weight_KT, P)
                blue_JT += _product(_loaded(place_X + 2 * pitch_channel, real_X), weight_KT, P)
        # per 16 source rows, so that what lies between the two products never leaves the registers
        weight_TJ = _weight(row_J[None, :].to(tl.float32), line_T1, y_rate, y_reach, KIND)
        red += _product(weight_TJ, red_JT * x_gain, P)
        if P.channels == RGB_:
            green += _product(weight_TJ, green_JT * x_gain, P)
            blue += _product(weight_TJ, blue_JT * x_gain, P)
    return red * y_gain, green * y_gain, blue * y_gain


@triton.jit
def _loaded(place_X, real_X):
    return tl.reshape(tl.load(place_X, mask=real_X, other=0), [ROWS, COLUMNS])


@triton.jit
def _place(line_K, first, KIND: tl.constexpr, P: tl.constexpr):
    place_K = first + line_K
    if KIND == WEIGHTS.value.GAUSSIAN:
        place_K = tl.abs(place_K)
        # reflected at both ends; the radius is smaller than the view, so once is enough
        place_K -= 2 * tl.maximum(place_K - (P.side - 1), 0)
    return place_K


@triton.jit
def blurred_tile(red, green, blue, params, P: tl.constexpr):
    """Of a view that is one tile: pixels stay in registers, what the border reflects is added to the weights."""
    kind: tl.constexpr = WEIGHTS.value.GAUSSIAN
    place_T1, last = tl.arange(0, P.tile)[:, None].to(tl.float32), P.side - 1.0
    line_1T, rate, reach, _, _, _, gain = blur_axis(tl.arange(0, P.tile)[None, :], params, P)
    weight_TT = _weight(place_T1, line_1T, rate, reach, kind)
    weight_TT += tl.where(place_T1 > 0, _weight(-place_T1, line_1T, rate, reach, kind), 0.0)
    weight_TT += tl.where(place_T1 < last, _weight(2 * last - place_T1, line_1T, rate, reach, kind), 0.0)
    # a tile's lines past the view hold repeats, which must not be blurred in
    weight_TT = tl.where(place_T1 <= last, weight_TT * gain, 0.0)
    red = _product(tl.trans(weight_TT), _product(red, weight_TT, P), P)
    if P.channels == RGB_:
        green = _product(tl.trans(weight_TT), _product(green, weight_TT, P), P)
        blue = _product(tl.trans(weight_TT), _product(blue, weight_TT, P), P)
    return red, green, blue


@triton.jit
def rotated(planes, y_X, x_X, params, P: tl.constexpr):
    """Counterclockwise about the center, bilinear, black outside."""
    cos, sin = tl.load(params + COLUMN.value.ROTATE_COS), tl.load(params + COLUMN.value.ROTATE_SIN)
    middle = 0.5 * (P.side - 1)
    column = cos * (x_X - middle) - sin * (y_X - middle) + middle
    row = sin * (x_X - middle) + cos * (y_X - middle) + middle
    left, top = tl.floor(column), tl.floor(row)
    red = tl.zeros_like(column)
    green, blue = red, red
    for corner in tl.static_range(4):
        x, y = left + corner % 2, top + corner // 2
        # corners outside are loaded as black, so the border fades as torchvision's does
        share = (1 - tl.abs(column - x)) * (1 - tl.abs(row - y))
        one_red, one_green, one_blue = load_planes(planes, y.to(tl.int32), x.to(tl.int32), P)
        red, green, blue = red + share * one_red, green + share * one_green, blue + share * one_blue
    return red, green, blue


@triton.jit
def inside(y, x, P: tl.constexpr):
    return (y >= 0) & (y < P.side) & (x >= 0) & (x < P.side)


@triton.jit
def load_planes(planes, y, x, P: tl.constexpr):
    """Black outside the view."""
    place, real = planes + y * P.side + x, inside(y, x, P)
    red = tl.load(place, mask=real, other=0).to(tl.float32)
    green, blue = red, red
    if P.channels == RGB_:
        green = tl.load(place + P.side * P.side, mask=real, other=0).to(tl.float32)
        blue = tl.load(place + 2 * P.side * P.side, mask=real, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def in_a_row(y_0, x_0, P: tl.constexpr):
    """(X,) lines and columns of a tile's pixels, row after row, from its corner."""
    i_X = tl.arange(0, P.pixels)
    return y_0 + i_X // P.tile, x_0 + i_X % P.tile


@triton.jit
def flat(red, green, blue, P: tl.constexpr):
    """Squares as rows, whose lanes follow one another along a line whatever the strides are."""
    pixels: tl.constexpr = P.pixels
    red = tl.reshape(red, [pixels])
    if P.channels == RGB_:
        green, blue = tl.reshape(green, [pixels]), tl.reshape(blue, [pixels])
    else:
        # a single channel needs the names too: unused, they cost nothing
        green, blue = red, red
    return red, green, blue


@triton.jit
def store_planes(red, green, blue, y, x, down, right, planes, P: tl.constexpr):
    place, real = planes + (y * down + x * right), inside(y, x, P)
    tl.store(place, _operand(red, P), mask=real)
    if P.channels == RGB_:
        tl.store(place + P.side * P.side, _operand(green, P), mask=real)
        tl.store(place + 2 * P.side * P.side, _operand(blue, P), mask=real)
