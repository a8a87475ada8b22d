"""Crop, resize and flip of one view, as numba passes along contiguous memory that write finished pixels.

For each line of the view, source rows are mixed straight from the uint8 image into one row of floats; its pixels are
then mixed four channels at a time, normalized and written in order, so that each store covers what the one before
wrote too far. All of it stays in the first cache, and a flip is an order of the weights. A box of the view's own size
needs no weights: its lines are copied.

C channels, S side of a view, K taps. Places and pitches are in elements.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from fastssl.augment.constants import RGB
from fastssl.augment.cpu.lanes import (
    INNER,
    LANES,
    TILE,
    mix_any,
    mix_three,
    mix_two,
    put_line,
    put_row,
    put_turned_row,
    transpose_tile,
    turn_round,
)

Array = npt.NDArray[Any]
# elements that LLVM's loops take at once: what is left over would go by one at a time
BLOCK = 64
# a Python literal would widen the arithmetic to float64
ZERO, ONE = np.float32(0), np.float32(1)
jit = njit(fastmath=True, **INNER)


@jit
def resample(
    source: Array,
    offset: int,
    pitch: int,
    size_2: Array,
    params: Any,
    cubic: bool,
    channels: int,
    norm_2X: Array,
    lines_2X: Array,
    starts_2S: Array,
    counts_2S: Array,
    weights_2SK: Array,
    out_X: Array,
) -> None:
    """Fill `out_X` (S, S, C) with the view; the buffers after `norm_2X` are scratch, finite from the start.

    A quarter turn is a transposition after a flip: what is written is still to be transposed when their number is odd.

    Args:
        source: the flat image buffer; this image starts at `offset`, its rows are `pitch` apart.
        size_2: height and width of the image.
        params: one record of parameters.
        norm_2X: factor and summand of each element of a line, for pixels in [0, 1].
    """
    side = weights_2SK.shape[1]
    # two quarter turns are both flips; of an odd number `split` does the transposition, on planes
    turns = int(params.turns)
    vflip = (params.vflip > ZERO) != (turns >= 2)
    hflip = (params.hflip > ZERO) != (turns == 1 or turns == 2)
    top, left, height, width = int(params.top), int(params.left), int(params.height), int(params.width)
    bottom, right = min(top + height, size_2[0]), min(left + width, size_2[1])
    first_row, first_column = max(top, 0), max(left, 0)
    place = offset + first_row * pitch + first_column * channels
    # none where padding shifts the image out of the box
    rows, columns = max(0, bottom - first_row), max(0, right - first_column)
    # padded CIFAR: every line would have one weight, 1
    if height == side and width == side:
        box = (place, pitch, rows, columns, first_row - top, first_column - left)
        _shift(source, box, vflip, hflip, side, channels, norm_2X, lines_2X, out_X)
        return
    # goes into the weights of the rows: scaling has no pass of its own
    unit = 1.0 / np.iinfo(source.dtype).max
    _weigh(height, first_row - top, rows, vflip, cubic, unit, starts_2S[0], counts_2S[0], weights_2SK[0])
    taps = _weigh(width, first_column - left, columns, hflip, cubic, 1.0, starts_2S[1], counts_2S[1], weights_2SK[1])
    across, wide = side * channels, columns * channels
    for i in range(side):
        # once for all lines, so that the mixers find elements, not pixels
        starts_2S[1, i] *= channels
    # rows first: they are mixed along memory, and one line of floats stays in the first cache
    for i in range(side):
        first = place + starts_2S[0, i] * pitch
        _mix_rows(source, first, pitch, wide, counts_2S[0, i], weights_2SK[0, i], lines_2X[0])
        _mix_pixels(lines_2X[0], starts_2S[1], weights_2SK[1], taps, channels, norm_2X, lines_2X[1])
        # by way of a line of scratch: mixing writes too far, and behind a view lies another thread's
        put_line(lines_2X[1], 0, across, out_X, i * across)


@jit
def _shift(
    source: Array,
    box: Any,
    vflip: bool,
    hflip: bool,
    side: int,
    channels: int,
    norm_2X: Array,
    lines_2X: Array,
    out_X: Array,
) -> None:
    """The view whose box has its size: what of the box lies in the image, black around it."""
    place, pitch, rows, columns, above, before = box
    # the summands of the norm are what black, 0, normalizes to
    across, black, line, turned = side * channels, norm_2X[1], lines_2X[0], lines_2X[1]
    lead, count = min(before, side) * channels, columns * channels
    # what was black on the left is black on the right
    if hflip:
        lead = across - lead - count
    for i in range(side):
        to = (side - 1 - i if vflip else i) * across
        if i < above or i >= above + rows:
            put_line(black, 0, across, out_X, to)
            continue
        row = place + (i - above) * pitch
        put_line(black, 0, lead, out_X, to)
        if not hflip:
            put_row(source, row, count, norm_2X, out_X, to + lead)
        elif channels == RGB:
            put_turned_row(source, row, count, norm_2X, out_X, to + lead)
        else:
            put_row(source, row, count, norm_2X, line, 0)
            # downwards, as in `_mix_pixels`: each store covers what the one before wrote too far
            for c in range((channels - 1) // LANES * LANES, -1, -LANES):
                turn_round(line, columns, channels, c, turned)
            put_line(turned, 0, count, out_X, to + lead)
        put_line(black, 0, across - lead - count, out_X, to + lead + count)


@jit
def _weigh(
    length: int,
    before: int,
    lines: int,
    flip: bool,
    cubic: bool,
    unit: float,
    start_S: Array,
    count_S: Array,
    weight_SK: Array,
) -> int:
    """First source line, number of lines and their weights for each line of the view, times `unit`.

    torch's antialiased resize. Lines of the box outside the image are black: in the norm, but left out.

    Args:
        length: lines of the box.
        before: how many of them lie before the image's first.
        lines: how many lie in the image, the first of which is number 0.

    Returns:
        The largest number of lines, at least 2; up to it all weights are set.
    """
    # enlarging, with nothing outside: two taps each, and no norm to add up
    if length <= weight_SK.shape[0] and lines == length and not cubic:
        two: int = _weigh_neighbors(length, flip, unit, start_S, count_S, weight_SK)
        return two
    side = weight_SK.shape[0]
    scale = length / side
    reach = max(scale, 1.0)
    support, narrow = (reach * 2.0 if cubic else reach), 1.0 / reach
    most = 2
    for i in range(side):
        line = side - 1 - i if flip else i
        center = (i + 0.5) * scale
        # torch's own rounding of the reach: a line more or less would change the norm
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        first, stop = max(low, before), min(high, before + lines)
        total = 0.0
        for k in range(low, high):
            distance = abs(k - center + 0.5) * narrow
            weight = _keys(distance) if cubic else max(1.0 - distance, 0.0)
            total += weight
            if first <= k:
                weight_SK[line, k - first] = weight
        count = max(0, stop - first)
        norm = unit / total
        for k in range(count):
            weight_SK[line, k] *= norm
        # a line without pixels starts within the buffer too: the mixers read it, with weight 0
        start_S[line] = min(max(first - before, 0), lines)
        count_S[line] = count
        most = max(most, count)
    # every line then has as many taps as the longest, which is what the mixers are unrolled for
    for i in range(side):
        weight_SK[i, count_S[i] : most] = ZERO
    return most


@jit
def _weigh_neighbors(length: int, flip: bool, unit: float, start_S: Array, count_S: Array, weight_SK: Array) -> int:
    """`_weigh` where nothing shrinks and no line is outside: a line lies between two, or on the first or the last."""
    side = weight_SK.shape[0]
    scale = length / side
    for i in range(side):
        line = side - 1 - i if flip else i
        # cut at both ends: there the norm gives all the weight to the one line in reach
        place = max((i + 0.5) * scale - 0.5, 0.0)
        low = min(int(place), length - 1)
        share = place - low if low < length - 1 else 0.0
        start_S[line], count_S[line] = low, min(2, length - low)
        weight_SK[line, 0], weight_SK[line, 1] = (1.0 - share) * unit, share * unit
    return 2


@jit
def _keys(x: float) -> float:
    """Keys' cubic with a = -0.5, what torch uses when it antialiases."""
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


@jit
def _mix_rows(source: Array, place: int, pitch: int, width: int, count: int, weight_K: Array, out: Array) -> None:
    """The weighted sum of `count` rows, the first at `place`; what follows up to a whole BLOCK is not to be used."""
    if count == 0:
        out[:width] = ZERO
        return
    # up to a whole block, into whatever follows in the buffer, but never past its end
    width = min((width + BLOCK - 1) // BLOCK * BLOCK, len(source) - place - (count - 1) * pitch)
    line = out[:width]
    one, weight = source[place : place + width], weight_K[0]
    if count == 1:
        for j in range(width):
            line[j] = weight * np.float32(one[j])
        return
    # the first two at once: enlarging takes no more, and the line is written only once
    other, weight_other = source[place + pitch : place + pitch + width], weight_K[1]
    for j in range(width):
        line[j] = weight * np.float32(one[j]) + weight_other * np.float32(other[j])
    # rows outside and elements inside, because LLVM makes vectors of inner loops only
    for k in range(2, count):
        one, weight = source[place + k * pitch : place + k * pitch + width], weight_K[k]
        for j in range(width):
            line[j] += weight * np.float32(one[j])


@jit
def _mix_pixels(
    line: Array, place_S: Array, weight_SK: Array, taps: int, channels: int, norm_2X: Array, out: Array
) -> None:
    """Each pixel of `out` is the weighted sum of pixels of the line from place_S onwards, in [0, 1], normalized."""
    last = (channels - 1) // LANES * LANES
    # downwards: the lanes written too far are those written next
    for first in range(last, -1, -LANES):
        # asked once a line: the loop over its pixels is in the mixer
        if taps <= 2:
            mix_two(line, place_S, weight_SK, taps, channels, norm_2X, first, out)
        elif taps == 3:
            mix_three(line, place_S, weight_SK, taps, channels, norm_2X, first, out)
        else:
            mix_any(line, place_S, weight_SK, taps, channels, norm_2X, first, out)


@jit
def copy(source: Array, out: Array) -> None:
    """`out[:] = source`, for whose message on shapes that differ numba would compile texts for seconds."""
    for i in range(len(source)):
        out[i] = source[i]


@jit
def transpose(source: Array, rows: int, columns: int, out: Array) -> None:
    """(rows, columns) to (columns, rows), float32; the last tiles overlap the ones before."""
    # too small for one square of registers
    if rows < TILE or columns < TILE:
        for i in range(rows):
            for j in range(columns):
                out[j * rows + i] = source[i * columns + j]
        return
    for tile_j in range(0, columns, TILE):
        j = min(tile_j, columns - TILE)
        for tile_i in range(0, rows, TILE):
            i = min(tile_i, rows - TILE)
            transpose_tile(source, i * columns + j, columns, out, j * rows + i, rows)
