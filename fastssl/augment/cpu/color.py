"""Everything after the crop, as numba passes in place over one view's planes, and the last pass into pixels.

An operation that was not drawn costs one comparison; the others are straight loops that LLVM vectorizes.

C channels, S side of a view, N = S * S pixels. Values are float32 in [0, 1] until the last pass.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from fastssl.augment.constants import GRAY_WEIGHTS, RGB, RGB_TO_YIQ, YIQ_TO_RGB
from fastssl.augment.cpu.lanes import INNER
from fastssl.augment.cpu.resample import copy, transpose
from fastssl.augment.policy import JITTER_ORDERS

Array = npt.NDArray[Any]
# a Python literal would widen the arithmetic to float64
ZERO, ONE, TWO, THREE, FOUR, SIX = (np.float32(x) for x in (0, 1, 2, 3, 4, 6))
RED, GREEN, BLUE = (np.float32(x) for x in GRAY_WEIGHTS)
TINY = np.float32(1e-12)
HALF_BELOW, SIXTEEN, LAST_BIT = np.uint32(0x7FFF), np.uint32(16), np.uint32(1)
TO_YIQ, TO_RGB = np.array(RGB_TO_YIQ), np.array(YIQ_TO_RGB)
ORDERS = np.array(JITTER_ORDERS, dtype=np.int64)
# fastmath lets sums become vectors
jit = njit(fastmath=True, **INNER)


@jit
def transform(
    planes_X: Array, spare_X: Array, blur_X: Array, side: int, params: Any, linear: bool, mean_C: Array
) -> None:
    """Rotation, color, blur, solarize, posterize and cutout of planes (C, S, S), as `params` says.

    Args:
        spare_X: scratch as large as the planes.
        blur_X: scratch of `blur_scratch` floats.
        linear: whether hue turns in YIQ.
    """
    n = side * side
    # compared once a view: branches inside the loops would keep LLVM from vectors
    if params.rotate_deg != ZERO:
        copy(planes_X, spare_X)
        _rotate(spare_X, side, params.rotate_deg, planes_X)
    if len(mean_C) == RGB:
        _color(planes_X, planes_X[:n], planes_X[n : 2 * n], planes_X[2 * n :], params, linear)
    if params.blur_radius_px > ZERO:
        _blur(planes_X, blur_X, side, int(params.blur_radius_px), params.blur_sigma_px)
    if params.solarize <= ONE:
        threshold = params.solarize
        for i in range(len(planes_X)):
            # stored either way: a selection becomes a vector, a branch about a store does not
            planes_X[i] = ONE - planes_X[i] if planes_X[i] >= threshold else planes_X[i]
    if params.posterize_bits > ZERO:
        # the last level's floor is white itself, a level too many
        levels = np.float32(2.0**params.posterize_bits)
        for i in range(len(planes_X)):
            planes_X[i] = min(np.floor(planes_X[i] * levels), levels - ONE) / levels
    if params.cutout_side > ZERO:
        _cut_out(planes_X, side, int(params.cutout_top), int(params.cutout_left), int(params.cutout_side), mean_C)


@jit
def is_plain(params: Any) -> bool:
    """Whether nothing but the crop and the flips has been drawn."""
    # a half turn is two flips, so it is plain; an odd one leaves a transposition
    still = params.turns % TWO == ZERO and params.rotate_deg == ZERO and params.cutout_side == ZERO
    jittered = params.brightness != ONE or params.contrast != ONE or params.saturation != ONE or params.hue != ZERO
    late = params.gray > ZERO or params.blur_radius_px > ZERO or params.solarize <= ONE or params.posterize_bits > ZERO
    return still and not jittered and not late


@jit
def split(pixels_X: Array, side: int, turned: bool, planes_X: Array) -> None:
    """Pixels (S, S, C) into planes (C, S, S), transposed if `turned`; then the pixels are lost."""
    n = side * side
    channels = len(planes_X) // n
    if channels == RGB:
        red, green, blue = planes_X[:n], planes_X[n : 2 * n], planes_X[2 * n :]
        for i in range(n):
            # three channels written out: the stride is then a constant
            red[i] = pixels_X[3 * i]
            green[i] = pixels_X[3 * i + 1]
            blue[i] = pixels_X[3 * i + 2]
    else:
        for c in range(channels):
            plane = planes_X[c * n : (c + 1) * n]
            for i in range(n):
                plane[i] = pixels_X[i * channels + c]
    if turned:
        # planes transpose as squares of registers; pixels of several channels would not
        copy(planes_X, pixels_X)
        for first in range(0, len(planes_X), n):
            transpose(pixels_X[first : first + n], side, side, planes_X[first : first + n])


@jit
def interleave(planes_X: Array, mean_C: Array, scale_C: Array, out_X: Array) -> None:
    """Normalize planes into float32 pixels."""
    channels = len(mean_C)
    n = len(planes_X) // channels
    if channels == RGB:
        red, green, blue = planes_X[:n], planes_X[n : 2 * n], planes_X[2 * n :]
        mean_0, mean_1, mean_2 = mean_C
        scale_0, scale_1, scale_2 = scale_C
        for i in range(n):
            out_X[3 * i] = (red[i] - mean_0) * scale_0
            out_X[3 * i + 1] = (green[i] - mean_1) * scale_1
            out_X[3 * i + 2] = (blue[i] - mean_2) * scale_2
        return
    for c in range(channels):
        plane, mean, scale = planes_X[c * n : (c + 1) * n], mean_C[c], scale_C[c]
        for i in range(n):
            out_X[i * channels + c] = (plane[i] - mean) * scale


@jit
def interleave_narrow(planes_X: Array, mean_C: Array, scale_C: Array, out_X: Array) -> None:
    """Normalize planes, in place, and write them as pixels of bfloat16 bit patterns."""
    channels = len(mean_C)
    n = len(planes_X) // channels
    for c in range(channels):
        plane, mean, scale = planes_X[c * n : (c + 1) * n], mean_C[c], scale_C[c]
        for i in range(n):
            plane[i] = (plane[i] - mean) * scale
    # a pass of its own before: rounding works on bits, and one loop of both does not vectorize
    bits_X = planes_X.view(np.uint32)
    if channels == RGB:
        red, green, blue = bits_X[:n], bits_X[n : 2 * n], bits_X[2 * n :]
        for i in range(n):
            out_X[3 * i] = _narrow(red[i])
            out_X[3 * i + 1] = _narrow(green[i])
            out_X[3 * i + 2] = _narrow(blue[i])
        return
    for c in range(channels):
        bits = bits_X[c * n : (c + 1) * n]
        for i in range(n):
            out_X[i * channels + c] = _narrow(bits[i])


@jit
def narrowed(pixels_X: Array, out_X: Array) -> None:
    """float32 as bfloat16 bit patterns."""
    bits_X = pixels_X.view(np.uint32)
    for i in range(len(out_X)):
        out_X[i] = _narrow(bits_X[i])


@jit
def _narrow(bits: Any) -> Any:
    """float32 bits to bfloat16 bits, to nearest, ties to even."""
    # just under half and the last kept bit: their sum carries exactly where rounding goes up
    odd = (bits >> SIXTEEN) & LAST_BIT
    return np.uint16((bits + HALF_BELOW + odd) >> SIXTEEN)


@jit
def _unit(x: Any) -> Any:
    return min(max(x, ZERO), ONE)


@jit
def _rotate(source: Array, side: int, angle_deg: float, out: Array) -> None:
    """Counterclockwise about the center, bilinear, black outside."""
    # angles in float64: on a large view an error of the angle moves a corner by pixels
    cos, sin = np.float32(math.cos(math.radians(angle_deg))), np.float32(math.sin(math.radians(angle_deg)))
    middle = np.float32(0.5 * (side - 1))
    n = side * side
    for y in range(side):
        for x in range(side):
            u, v = np.float32(x) - middle, np.float32(y) - middle
            column, row = cos * u - sin * v + middle, sin * u + cos * v + middle
            left, top = int(np.floor(column)), int(np.floor(row))
            right_share, lower_share = column - np.float32(left), row - np.float32(top)
            # channels inside: the four places and shares are the same for all
            for first in range(0, len(out), n):
                total = ZERO
                for dy in range(2):
                    for dx in range(2):
                        if 0 <= top + dy < side and 0 <= left + dx < side:
                            share = right_share if dx == 1 else ONE - right_share
                            share *= lower_share if dy == 1 else ONE - lower_share
                            total += share * source[first + (top + dy) * side + left + dx]
                out[first + y * side + x] = total


@jit
def _color(planes_X: Array, red_N: Array, green_N: Array, blue_N: Array, params: Any, linear: bool) -> None:
    for step in range(4):
        # data, not code: there are 24 orders, and each sample draws its own
        operation = ORDERS[int(params.order), step]
        if operation == 0 and params.brightness != ONE:
            _brighten(planes_X, params.brightness)
        elif operation == 1 and params.contrast != ONE:
            _contrast(planes_X, red_N, green_N, blue_N, params.contrast)
        elif operation == 2 and params.saturation != ONE:
            _saturate(red_N, green_N, blue_N, params.saturation)
        elif operation == 3 and params.hue != ZERO:
            if linear:
                _turn_yiq(red_N, green_N, blue_N, params.hue)
            else:
                _turn_hsv(red_N, green_N, blue_N, params.hue)
    # gray is no saturation at all
    if params.gray > ZERO:
        _saturate(red_N, green_N, blue_N, ZERO)


@jit
def _brighten(planes_X: Array, factor: float) -> None:
    for i in range(len(planes_X)):
        planes_X[i] = _unit(planes_X[i] * factor)


@jit
def _contrast(planes_X: Array, red_N: Array, green_N: Array, blue_N: Array, factor: float) -> None:
    # of the view as it is by now: what contrast blends with depends on the steps before
    total = ZERO
    for i in range(len(red_N)):
        total += RED * red_N[i] + GREEN * green_N[i] + BLUE * blue_N[i]
    base = (ONE - factor) * total / np.float32(len(red_N))
    for i in range(len(planes_X)):
        planes_X[i] = _unit(planes_X[i] * factor + base)


@jit
def _saturate(red_N: Array, green_N: Array, blue_N: Array, factor: float) -> None:
    rest = ONE - factor
    for i in range(len(red_N)):
        base = rest * (RED * red_N[i] + GREEN * green_N[i] + BLUE * blue_N[i])
        red_N[i] = _unit(red_N[i] * factor + base)
        green_N[i] = _unit(green_N[i] * factor + base)
        blue_N[i] = _unit(blue_N[i] * factor + base)


@jit
def _turn_hsv(red_N: Array, green_N: Array, blue_N: Array, turns: float) -> None:
    """Each channel is the smallest plus a share of the chroma, a trapezoid in the hue."""
    # hue in sixths of a turn, one for each edge of the hexagon
    shift = SIX * turns
    for i in range(len(red_N)):
        red, green, blue = red_N[i], green_N[i], blue_N[i]
        high, low = max(max(red, green), blue), min(min(red, green), blue)
        chroma = high - low
        # gray has no hue: any finite number does, for its chroma is 0
        inverse = ONE / max(chroma, TINY)
        # all three candidates, then two selections: a branch would go pixel by pixel
        from_blue = (red - green) * inverse + FOUR
        from_green = (blue - red) * inverse + TWO
        from_red = (green - blue) * inverse
        hue = from_red if high == red else (from_green if high == green else from_blue)
        hue += shift
        # hue turns by half at most, so one step leads back into [0, 6), and a remainder is no vector instruction
        hue = hue + SIX if hue < ZERO else hue
        hue = hue - SIX if hue >= SIX else hue
        red_N[i] = low + chroma * _unit(abs(hue - THREE) - ONE)
        green_N[i] = low + chroma * _unit(TWO - abs(hue - TWO))
        blue_N[i] = low + chroma * _unit(TWO - abs(hue - FOUR))


@jit
def _turn_yiq(red_N: Array, green_N: Array, blue_N: Array, turns: float) -> None:
    """The chroma plane of YIQ turned by the angle, as one 3 x 3 matrix."""
    # to YIQ, the turn and back are linear: one product of matrices a view, not three a pixel
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    m_33 = np.empty((3, 3), dtype=np.float32)
    for i in range(3):
        for j in range(3):
            turned_i = cos * TO_YIQ[1, j] - sin * TO_YIQ[2, j]
            turned_q = sin * TO_YIQ[1, j] + cos * TO_YIQ[2, j]
            # luma goes back into every channel with weight 1, so it has no factor here
            m_33[i, j] = TO_YIQ[0, j] + TO_RGB[i, 1] * turned_i + TO_RGB[i, 2] * turned_q
    for n in range(len(red_N)):
        red, green, blue = red_N[n], green_N[n], blue_N[n]
        red_N[n] = _unit(m_33[0, 0] * red + m_33[0, 1] * green + m_33[0, 2] * blue)
        green_N[n] = _unit(m_33[1, 0] * red + m_33[1, 1] * green + m_33[1, 2] * blue)
        blue_N[n] = _unit(m_33[2, 0] * red + m_33[2, 1] * green + m_33[2, 2] * blue)


def blur_scratch(side: int, radius: int) -> int:
    """Floats that blurring with at most this radius needs."""
    border = 3 * ((radius + 2) // 3)
    return side * (2 * side + 2 * border) + border + 1 if radius > 0 else 0


@jit
def _blur(planes_X: Array, work_X: Array, side: int, radius: int, sigma: float) -> None:
    """Separable: blur along columns and transpose, twice. Taps go by threes, filled up with zeros."""
    border = 3 * ((radius + 2) // 3)
    n, padded_n = side * side, (side + 2 * border) * side
    mixed_N, padded_X, kernel = work_X[:n], work_X[n : n + padded_n], work_X[n + padded_n :][: border + 1]
    _gaussian(kernel, radius, sigma)
    for first in range(0, len(planes_X), n):
        plane_N = planes_X[first : first + n]
        # along columns both times, where neighbors in memory are neighbors in a vector
        for _ in range(2):
            _pad(plane_N, side, border, radius, padded_X)
            _convolve(padded_X, border * side, side, kernel, mixed_N)
            transpose(mixed_N, side, side, plane_N)


@jit
def _gaussian(kernel: Array, radius: int, sigma: float) -> None:
    # the taps that fill up the last three weigh nothing
    kernel[:] = ZERO
    total = ZERO
    # one side only: the kernel is symmetric, so the other half counts in the norm and is not stored
    for k in range(radius + 1):
        kernel[k] = np.float32(math.exp(-0.5 * (k / sigma) ** 2))
        total += kernel[k] if k == 0 else TWO * kernel[k]
    for k in range(radius + 1):
        kernel[k] /= total


@jit
def _pad(plane_N: Array, side: int, border: int, radius: int, padded_X: Array) -> None:
    """Reflect `radius` rows above and below; the rest of the border meets zero weights and must be finite."""
    copy(plane_N, padded_X[border * side : (border + side) * side])
    padded_X[: (border - radius) * side] = ZERO
    padded_X[(border + side + radius) * side :] = ZERO
    for k in range(1, radius + 1):
        # the edge itself is not repeated: torchvision's reflection
        top, bottom = border - k, border + side - 1 + k
        copy(plane_N[k * side : (k + 1) * side], padded_X[top * side : (top + 1) * side])
        copy(plane_N[(side - 1 - k) * side : (side - k) * side], padded_X[bottom * side : (bottom + 1) * side])


@jit
def _convolve(source: Array, place: int, pitch: int, kernel: Array, out: Array) -> None:
    """out[i] is the kernel about source[place + i], with `pitch` elements between taps."""
    n = len(out)
    # slices rather than offsets: their bounds are checked once, outside the loops
    middle, weight = source[place : place + n], kernel[0]
    for i in range(n):
        out[i] = weight * middle[i]
    # by threes, so that the sums are read and written a third as often
    for k in range(1, len(kernel), 3):
        near, mid, far = k * pitch, (k + 1) * pitch, (k + 2) * pitch
        up_1, down_1 = source[place - near : place - near + n], source[place + near : place + near + n]
        up_2, down_2 = source[place - mid : place - mid + n], source[place + mid : place + mid + n]
        up_3, down_3 = source[place - far : place - far + n], source[place + far : place + far + n]
        weight_1, weight_2, weight_3 = kernel[k], kernel[k + 1], kernel[k + 2]
        for i in range(n):
            # the two taps of a pair weigh the same, so they are added first and share a product
            pairs = weight_1 * (up_1[i] + down_1[i]) + weight_2 * (up_2[i] + down_2[i])
            out[i] += pairs + weight_3 * (up_3[i] + down_3[i])


@jit
def _cut_out(planes_X: Array, side: int, top: int, left: int, square: int, mean_C: Array) -> None:
    """The square takes the mean, which normalizes to 0."""
    for c in range(len(mean_C)):
        for y in range(top, top + square):
            row = (c * side + y) * side + left
            planes_X[row : row + square] = mean_C[c]
