"""Crop, resize, flip and quarter turn of one view, as numba passes along contiguous memory.

Rows are mixed first, straight from the uint8 image; the result is transposed, columns are mixed as rows, and
it is transposed back. Nothing is gathered, so LLVM vectorises every loop, and a flip is an order of the
weights.

C channels, S side of a view, K taps. Places and pitches are in elements.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Array = npt.NDArray[Any]
TILE = 8
ZERO, ONE = np.float32(0), np.float32(1)  # a Python literal would widen the arithmetic to float64
jit = njit(fastmath=True, error_model="numpy", nogil=True)


@jit
def resample(
    source: Array,
    offset: int,
    pitch: int,
    size_2: Array,
    drawn: Any,
    cubic: bool,
    channels: int,
    mixed_2X: Array,
    planes_X: Array,
    spare_X: Array,
    spans_22S: Array,
    weights_2SK: Array,
) -> None:
    """Fill `planes_X` (C, S, S) with the view in [0, 1]; the other buffers are scratch.

    Args:
        source: the flat image buffer; this image starts at `offset`, its rows are `pitch` apart.
        size_2: height and width of the image.
        drawn: one record of parameters.
    """
    side = weights_2SK.shape[1]
    turns, top, left = int(drawn.turns), int(drawn.top), int(drawn.left)
    # a quarter turn is a transposition after a flip
    vflip = (drawn.vflip > ZERO) != (turns >= 2)
    hflip = (drawn.hflip > ZERO) != (turns == 1 or turns == 2)
    unit = 1.0 / np.iinfo(source.dtype).max
    _weigh(top, int(drawn.height), size_2[0], vflip, cubic, unit, spans_22S[0], weights_2SK[0])
    _weigh(left, int(drawn.width), size_2[1], hflip, cubic, 1.0, spans_22S[1], weights_2SK[1])
    first = max(left, 0)
    width = max(0, min(left + int(drawn.width), size_2[1]) - first) * channels
    rows_X, columns_X = mixed_2X[0][: side * width], mixed_2X[1][: side * width]
    _mix(source, offset + first * channels, pitch, width, spans_22S[0], weights_2SK[0], rows_X)
    transpose(rows_X, side, width, columns_X)
    across = side * channels
    _mix(columns_X, -first * across, across, across, spans_22S[1], weights_2SK[1], spare_X)
    if turns % 2 == 1:
        _transpose_pixels(spare_X, side, channels, planes_X)
    else:
        transpose(spare_X, side, across, planes_X)
    if cubic:
        for i in range(len(planes_X)):
            planes_X[i] = min(max(planes_X[i], ZERO), ONE)


@jit
def transpose(source: Array, rows: int, columns: int, out: Array) -> None:
    """(rows, columns) to (columns, rows), float32; the last tiles overlap the ones before."""
    if rows < TILE or columns < TILE:
        for i in range(rows):
            for j in range(columns):
                out[j * rows + i] = source[i * columns + j]
        return
    for tile_j in range(0, columns, TILE):
        j = min(tile_j, columns - TILE)
        for tile_i in range(0, rows, TILE):
            i = min(tile_i, rows - TILE)
            _transpose_tile(source, i * columns + j, columns, out, j * rows + i, rows)


@jit
def _weigh(
    start: int, length: int, size: int, flip: bool, cubic: bool, unit: float, span_2S: Array, weight_SK: Array
) -> None:
    """First source line, number of lines and their weights for each line of the view, times `unit`.

    torch's antialiased resize. Lines of the box outside the image are black: in the norm, but left out.
    """
    side = weight_SK.shape[0]
    scale = length / side
    reach = max(scale, 1.0)
    support = reach * 2.0 if cubic else reach
    for i in range(side):
        line = side - 1 - i if flip else i
        centre = (i + 0.5) * scale
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        total = 0.0
        for k in range(low, high):
            distance = abs(k - centre + 0.5) / reach
            weight = _keys(distance) if cubic else max(1.0 - distance, 0.0)
            weight_SK[line, k - low] = weight
            total += weight
        skip = max(0, -start - low)
        count = max(0, min(high, size - start) - low - skip)
        for k in range(count):
            weight_SK[line, k] = weight_SK[line, k + skip] * unit / total
        span_2S[0, line] = start + low + skip
        span_2S[1, line] = count


@jit
def _keys(x: float) -> float:
    """Keys' cubic with a = -0.5, what torch uses when it antialiases."""
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


@jit
def _mix(source: Array, offset: int, pitch: int, width: int, span_2S: Array, weight_SK: Array, out: Array) -> None:
    """Line i of `out` is the weighted sum of lines span_2S[0, i] onwards of the source."""
    for i in range(weight_SK.shape[0]):
        place, count = offset + span_2S[0, i] * pitch, span_2S[1, i]
        line = out[i * width : (i + 1) * width]
        if count == 0:
            line[:] = ZERO
            continue
        one, weight = source[place : place + width], weight_SK[i, 0]
        if count == 1:
            for j in range(width):
                line[j] = weight * np.float32(one[j])
            continue
        other, weight_other = source[place + pitch : place + pitch + width], weight_SK[i, 1]
        for j in range(width):
            line[j] = weight * np.float32(one[j]) + weight_other * np.float32(other[j])
        for k in range(2, count):
            one, weight = source[place + k * pitch : place + k * pitch + width], weight_SK[i, k]
            for j in range(width):
                line[j] += weight * np.float32(one[j])


@jit
def _transpose_pixels(source: Array, side: int, channels: int, out: Array) -> None:
    """(S, C, S) to (C, S, S): what is left to do after a quarter turn."""
    for i in range(side):
        for c in range(channels):
            for j in range(side):
                out[(c * side + i) * side + j] = source[(i * channels + c) * side + j]


@intrinsic
def _transpose_tile(typing: Any, source: Any, place: Any, pitch: Any, out: Any, out_place: Any, out_pitch: Any) -> Any:
    """Transpose 8 x 8 floats in registers: LLVM finds no shuffles in scalar loops, 4 to 7 times slower."""
    vector = ir.VectorType(ir.FloatType(), TILE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def line(which: int, k: int) -> Any:
            array, start, step = arguments[3 * which : 3 * which + 3]
            data = cgutils.create_struct_proxy(signature.args[3 * which])(context, builder, value=array).data
            place = builder.add(start, builder.mul(step, ir.Constant(ir.IntType(64), k)))
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        lines = [builder.load(line(0, k), align=4) for k in range(TILE)]
        for step in (1, 2, 4):
            for k in (k for k in range(TILE) if not k & step):
                pair = lines[k], lines[k + step]
                lines[k], lines[k + step] = (builder.shuffle_vector(*pair, mask) for mask in _masks(step))
        for k in range(TILE):
            builder.store(lines[k], line(1, k), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, out, types.intp, types.intp), generate


def _masks(step: int) -> tuple[ir.Constant, ir.Constant]:
    """Swap the off-diagonal blocks of `step` lanes of two lines; lanes TILE onwards are the second line's."""
    kind = ir.VectorType(ir.IntType(32), TILE)
    upper = [j - step + TILE if j & step else j for j in range(TILE)]
    lower = [j + TILE if j & step else j + step for j in range(TILE)]
    return ir.Constant(kind, upper), ir.Constant(kind, lower)
