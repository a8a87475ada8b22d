"""Colors in Triton, pixel by pixel in registers, and the last step into the network's layout.

An operation that was not drawn costs one comparison. Values are float32 in [0, 1] until they are normalized.

T side of a tile; P is the `Plan`.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import triton
import triton.language as tl

from fastssl.augment.constants import GRAY_WEIGHTS, RGB, RGB_TO_YIQ, YIQ_TO_RGB
from fastssl.augment.cuda.plan import COLUMN
from fastssl.augment.cuda.resample import flat, in_a_row, inside
from fastssl.augment.policy import JITTER_ORDERS


def _codes(first: int) -> int:
    """Eight jitter orders as an int64: a byte for each order, two bits for each step."""
    orders = enumerate(JITTER_ORDERS[first : first + 8])
    word = sum(operation << (8 * i + 2 * step) for i, order in orders for step, operation in enumerate(order))
    # signed, so that all three words are int64: from 2^63 on Triton would take one as uint64
    return word - (word >> 63 << 64)


RGB_ = tl.constexpr(RGB)
RED, GREEN, BLUE = (tl.constexpr(x) for x in GRAY_WEIGHTS)
# RGB to YIQ and back: (r, g, b) of y, i, q, then (i, q) of red, green, blue
(R_Y, G_Y, B_Y), (R_I, G_I, B_I), (R_Q, G_Q, B_Q) = ([tl.constexpr(x) for x in row] for row in RGB_TO_YIQ)
(_, I_R, Q_R), (_, I_G, Q_G), (_, I_B, Q_B) = ([tl.constexpr(x) for x in row] for row in YIQ_TO_RGB)
CODES_0, CODES_8, CODES_16 = (tl.constexpr(_codes(first)) for first in (0, 8, 16))


@triton.jit
def unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(red, green, blue):
    return red * RED + green * GREEN + blue * BLUE


@triton.jit
def _gray_sum(red, green, blue, y, x, P: tl.constexpr):
    return tl.sum(tl.where(inside(y, x, P), _gray(red, green, blue), 0.0))


@triton.jit
def gray_sum_before_contrast(red, green, blue, y, x, params, P: tl.constexpr):
    red, green, blue = _jittered(red, green, blue, 0.0, y, x, params, True, P)
    return _gray_sum(red, green, blue, y, x, P)


@triton.jit
def colored(red, green, blue, mean, y, x, params, P: tl.constexpr):
    """Jitter, then gray; `mean` is what contrast blends with where the tile does not hold the view."""
    red, green, blue = _jittered(red, green, blue, mean, y, x, params, False, P)
    if tl.load(params + COLUMN.value.GRAY) > 0:
        red = _gray(red, green, blue)
        # one value for three names: the compiler stores it thrice and computes it once
        green, blue = red, red
    return red, green, blue


@triton.jit
def _jittered(red, green, blue, mean, y, x, params, BEFORE_CONTRAST: tl.constexpr, P: tl.constexpr):
    """The four steps in their drawn order, or those before contrast."""
    # all 24 orders in three words: a table in memory would cost a load in every step of every thread
    order = tl.load(params + COLUMN.value.ORDER).to(tl.int32)
    brightness, contrast = tl.load(params + COLUMN.value.BRIGHTNESS), tl.load(params + COLUMN.value.CONTRAST)
    saturation, hue = tl.load(params + COLUMN.value.SATURATION), tl.load(params + COLUMN.value.HUE)
    codes = tl.where(order < 8, CODES_0, tl.where(order < 16, CODES_8, CODES_16)) >> (order % 8 * 8)
    # a bool of the right type, True
    going = order >= 0
    for step in range(0, 4):
        operation = (codes >> (step * 2)).to(tl.int32) & 3
        # what contrast will see: only the steps that the drawn order puts before it
        if BEFORE_CONTRAST:
            going &= operation != 1
        if going & (operation == 0) & (brightness != 1):
            red, green, blue = unit(red * brightness), unit(green * brightness), unit(blue * brightness)
        if going & (operation == 1) & (contrast != 1):
            # the tile holds the view, so its mean needs no pass of its own
            if P.whole:
                here = _gray_sum(red, green, blue, y, x, P) / (P.side * P.side)
                red, green, blue = _blend(red, green, blue, contrast, here)
            else:
                red, green, blue = _blend(red, green, blue, contrast, mean)
        if going & (operation == 2) & (saturation != 1):
            red, green, blue = _blend(red, green, blue, saturation, _gray(red, green, blue))
        if going & (operation == 3) & (hue != 0):
            if P.linear_hue:
                red, green, blue = _yiq_turned(red, green, blue, params)
            else:
                red, green, blue = _hsv_turned(red, green, blue, hue)
    return red, green, blue


@triton.jit
def _blend(red, green, blue, factor, base):
    # one product a pixel less than blending each channel with the base
    rest = (1 - factor) * base
    return unit(red * factor + rest), unit(green * factor + rest), unit(blue * factor + rest)


@triton.jit
def _hsv_turned(red, green, blue, turns):
    """Each channel is the smallest plus a share of the chroma, a trapezoid in the hue."""
    high, low = tl.maximum(tl.maximum(red, green), blue), tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    # gray has no hue: any finite number does, for its chroma is 0
    inverse = 1 / tl.where(chroma > 0, chroma, 1.0)
    from_others = tl.where(high == green, (blue - red) * inverse + 2, (red - green) * inverse + 4)
    hue = tl.where(high == red, (green - blue) * inverse, from_others) + 6 * turns
    # hue turns by half at most, so one step leads back into [0, 6)
    hue = tl.where(hue < 0, hue + 6, hue)
    hue = tl.where(hue >= 6, hue - 6, hue)
    red = low + chroma * unit(tl.abs(hue - 3) - 1)
    return red, low + chroma * unit(2 - tl.abs(hue - 2)), low + chroma * unit(2 - tl.abs(hue - 4))


@triton.jit
def _yiq_turned(red, green, blue, params):
    """The chroma plane of YIQ turned by the angle."""
    cos, sin = tl.load(params + COLUMN.value.HUE_COS), tl.load(params + COLUMN.value.HUE_SIN)
    luma = R_Y * red + G_Y * green + B_Y * blue
    i, q = R_I * red + G_I * green + B_I * blue, R_Q * red + G_Q * green + B_Q * blue
    i, q = cos * i - sin * q, sin * i + cos * q
    red, green, blue = luma + I_R * i + Q_R * q, luma + I_G * i + Q_G * q, luma + I_B * i + Q_B * q
    return unit(red), unit(green), unit(blue)


@triton.jit
def finish(red, green, blue, y_0, x_0, down, right, params, norm, out, P: tl.constexpr):
    """Solarize, posterize, cut out, normalize, store; `down` and `right` are the pixels to the next row, column."""
    red, green, blue = flat(red, green, blue, P)
    y_X, x_X = in_a_row(y_0, x_0, P)
    threshold, bits = tl.load(params + COLUMN.value.SOLARIZE), tl.load(params + COLUMN.value.POSTERIZE_BITS)
    square = tl.load(params + COLUMN.value.CUTOUT_SIDE)
    mean_0, mean_1, mean_2 = tl.load(norm), 0.0, 0.0
    if P.channels == RGB_:
        mean_1, mean_2 = tl.load(norm + 1), tl.load(norm + 2)
    if threshold <= 1:
        red, green, blue = _solarized(red, threshold), _solarized(green, threshold), _solarized(blue, threshold)
    if bits > 0:
        red, green, blue = _posterized(red, bits), _posterized(green, bits), _posterized(blue, bits)
    # the square takes the mean, which normalizes to 0
    if square > 0:
        rest_X = _outside_square(y_X, x_X, down < right, square, params)
        red, green = tl.where(rest_X, red, mean_0), tl.where(rest_X, green, mean_1)
        blue = tl.where(rest_X, blue, mean_2)
    # channels lie side by side, so three stores fill the same sectors
    place_X, real_X = out + (y_X * down + x_X * right) * P.channels, inside(y_X, x_X, P)
    tl.store(place_X, ((red - mean_0) * tl.load(norm + P.channels)).to(out.dtype.element_ty), mask=real_X)
    if P.channels == RGB_:
        tl.store(place_X + 1, ((green - mean_1) * tl.load(norm + 4)).to(out.dtype.element_ty), mask=real_X)
        tl.store(place_X + 2, ((blue - mean_2) * tl.load(norm + 5)).to(out.dtype.element_ty), mask=real_X)


@triton.jit
def _solarized(x, threshold):
    return tl.where(x >= threshold, 1 - x, x)


@triton.jit
def _posterized(x, bits):
    # the last level's floor is white itself, a level too many
    levels = tl.exp2(bits)
    return tl.minimum(tl.floor(x * levels), levels - 1) * tl.exp2(-bits)


@triton.jit
def _outside_square(y, x, transposed, square, params):
    # the square is where the view lies after a quarter turn, the tile where it lay before
    top, left = tl.load(params + COLUMN.value.CUTOUT_TOP), tl.load(params + COLUMN.value.CUTOUT_LEFT)
    top, left = tl.where(transposed, left, top), tl.where(transposed, top, left)
    return (y < top) | (y >= top + square) | (x < left) | (x >= left + square)
