"""The CPU applier: one fused numba kernel, parallel over images, that writes the network's layout once.

Every pass runs along contiguous memory so that LLVM vectorises it: rows are mixed first, straight from the uint8
image, then the result is transposed and columns are mixed as rows; colour works on planes; the last pass normalises,
interleaves and narrows. A view's bits depend on its image and its parameters alone, not on the batch or the threads.

B batch, V views, C channels, S side of a view, K taps, T threads, P parameters. Source places are in elements.
"""

import math
import threading

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fastssl.augment.draws import FIRST, GOLDEN, SECOND, UNIT
from fastssl.augment.policy import JITTER_ORDERS, Column, Parameters, View, blur_radius_px

# numba reads module constants when it compiles; float32 ones keep the arithmetic in float32
ZERO, HALF, ONE, TWO, THREE, FOUR, SIX = (np.float32(x) for x in (0, 0.5, 1, 2, 3, 4, 6))
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
TINY = np.float32(1e-12)
TILE = 8
LINE = 16  # floats of a 64-byte cache line
ORDERS = np.array(JITTER_ORDERS, dtype=np.int64)
TOP, LEFT, HEIGHT, WIDTH = (int(c) for c in (Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH))
HFLIP, VFLIP, TURNS, ROTATE_DEG = (
    int(c) for c in (Column.HFLIP, Column.VFLIP, Column.TURNS, Column.ROTATE_DEG)
)
BRIGHTNESS, CONTRAST, SATURATION = (int(c) for c in (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION))
HUE, ORDER, GRAY, SOLARIZE = (int(c) for c in (Column.HUE, Column.ORDER, Column.GRAY, Column.SOLARIZE))
BLUR_SIGMA, BLUR_RADIUS = int(Column.BLUR_SIGMA_PX), int(Column.BLUR_RADIUS_PX)
POSTERIZE, CUTOUT_TOP = int(Column.POSTERIZE_BITS), int(Column.CUTOUT_TOP)
CUTOUT_LEFT, CUTOUT_SIDE = int(Column.CUTOUT_LEFT), int(Column.CUTOUT_SIDE)
U_GOLDEN, U_FIRST, U_SECOND = np.uint64(GOLDEN), np.uint64(FIRST), np.uint64(SECOND)
U_30, U_27, U_31, U_40, U_1 = (np.uint64(x) for x in (30, 27, 31, 40, 1))

_jit = njit(cache=True, fastmath=True, error_model="numpy", nogil=True)
_parallel_jit = njit(cache=True, fastmath=True, error_model="numpy", nogil=True, parallel=True)
_local = threading.local()


def draws(seed: int, epoch: int | Tensor, index_B: Tensor, *, views: int, slots: int) -> Tensor:
    """`fastssl.augment.draws.draws`, the same bits in one pass."""
    out_BVS = np.empty((len(index_B), views, slots), dtype=np.float32)
    _draw(np.uint64(seed % 2**64), np.uint64(int(epoch) % 2**64), index_B.numpy().view(np.uint64), out_BVS)
    return torch.from_numpy(out_BVS)


def apply(
    images: Tensor,
    sizes_B2: Tensor,
    offsets_B: Tensor | None,
    parameters: Parameters,
    views: tuple[View, ...],
    mean_C: tuple[float, ...],
    std_C: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Cut and transform views of one side length; arguments and result as in `torch_ops.apply`.

    float16 views are written as float32 and converted.
    """
    batch, side, channels = len(sizes_B2), views[0].side_px, len(mean_C)
    narrow = dtype == torch.bfloat16
    # numpy's large arrays ask for huge pages, torch's do not: touching fresh memory is then twice as fast or more
    out_VBX = np.empty((len(views), batch, side * side * channels), dtype=np.uint16 if narrow else np.float32)
    nothing = np.empty((len(views), batch, 0))
    sizes = sizes_B2.numpy()
    _render(
        images.contiguous().view(-1).numpy(),
        *_places(images, sizes, offsets_B, channels),
        sizes,
        parameters.packed_BVP.numpy(),
        np.array([view.interpolation == "bicubic" for view in views]),
        np.array([view.hue_mode == "linear" for view in views]),
        np.array(mean_C, dtype=np.float32),
        (1 / np.array(std_C)).astype(np.float32),
        nothing.astype(np.float32) if narrow else out_VBX,
        out_VBX if narrow else nothing.astype(np.uint16),
        *_scratch(numba.get_num_threads(), channels, side, views, *sizes.max(axis=0).tolist()),
    )
    views_VBX = torch.from_numpy(out_VBX)
    views_VBX = views_VBX.view(torch.bfloat16) if narrow else views_VBX.to(dtype)
    return views_VBX.view(len(views), batch, side, side, channels).permute(0, 1, 4, 2, 3)


def _places(
    images: Tensor, sizes_B2: npt.NDArray, offsets_B: Tensor | None, channels: int
) -> tuple[npt.NDArray, npt.NDArray]:
    """First element and row pitch of each image."""
    if offsets_B is not None:
        return offsets_B.numpy(), sizes_B2[:, 1] * channels
    _, height, width, _ = images.shape
    count = len(sizes_B2)
    return np.arange(count) * (height * width * channels), np.full(count, width * channels)


def _scratch(
    threads: int, channels: int, side: int, views: tuple[View, ...], height: int, width: int
) -> tuple[npt.NDArray, ...]:
    """Each thread's buffers, kept between calls: fresh pages would cost more than some of the passes."""
    reach = 2 if any(view.interpolation == "bicubic" for view in views) else 1
    longest = max(height, width, side) + 2 * max(view.pad_px for view in views)
    taps = 2 * math.ceil(reach * max(1.0, longest / side)) + 2
    radius = max(blur_radius_px(view.blur_sigma_max_px, side) if view.blur_p > 0 else 0 for view in views)
    border = 3 * ((radius + 2) // 3)
    blur = side * (2 * side + 2 * border) + border + 1 if radius else 0
    key = (threads, channels, side, taps, blur, width)
    if getattr(_local, "key", None) != key:
        _local.key = key
        _local.buffers = (
            _aligned(threads, 2, side * channels * width),
            _aligned(threads, 2, channels * side * side),
            _aligned(threads, blur),
            np.empty((threads, 2, 2, side), dtype=np.int64),
            np.empty((threads, 2, side, taps), dtype=np.float32),
        )
    return _local.buffers


def _aligned(*shape: int) -> npt.NDArray:
    """float32 whose rows start on cache lines when views are whole lines wide: a split load takes twice as long."""
    *rows, wanted = shape
    pitch = -(-wanted // LINE) * LINE
    buffer = np.empty(math.prod(rows) * pitch + LINE, dtype=np.float32)
    first = -buffer.ctypes.data // buffer.itemsize % LINE
    return buffer[first : first + math.prod(rows) * pitch].reshape(*rows, pitch)


@_jit
def _child(key, word):
    z = key + (word + U_1) * U_GOLDEN
    z = (z ^ (z >> U_30)) * U_FIRST
    z = (z ^ (z >> U_27)) * U_SECOND
    return z ^ (z >> U_31)


@_parallel_jit
def _draw(seed, epoch, index_B, out_BVS):
    root = _child(_child(np.uint64(0), seed), epoch)
    for b in prange(len(index_B)):
        sample = _child(root, index_B[b])
        for v in range(out_BVS.shape[1]):
            view = _child(sample, np.uint64(v))
            for s in range(out_BVS.shape[2]):
                out_BVS[b, v, s] = np.float32(_child(view, np.uint64(s)) >> U_40) * np.float32(UNIT)


@_parallel_jit
def _render(
    source, offset_B, pitch_B, size_B2, drawn_BVP, cubic_V, linear_V, mean_C, scale_C, wide_out_VBX, narrow_out_VBX,
    mixed_T2X, planes_T2X, blur_TX, spans_T22S, weights_T2SK,
):  # fmt: skip
    size = max(wide_out_VBX.shape[2], narrow_out_VBX.shape[2])
    for b in prange(drawn_BVP.shape[0]):
        t = numba.get_thread_id()
        planes_X, spare_X = planes_T2X[t, 0, :size], planes_T2X[t, 1, :size]
        for v in range(drawn_BVP.shape[1]):
            drawn_P = drawn_BVP[b, v]
            _resample(
                source, offset_B[b], pitch_B[b], size_B2[b], drawn_P, cubic_V[v], len(mean_C),
                mixed_T2X[t], planes_X, spare_X, spans_T22S[t], weights_T2SK[t],
            )  # fmt: skip
            _transform(planes_X, spare_X, blur_TX[t], drawn_P, linear_V[v], mean_C)
            if narrow_out_VBX.shape[2] > 0:
                _interleave_narrow(planes_X, mean_C, scale_C, narrow_out_VBX[v, b])
            else:
                _interleave(planes_X, mean_C, scale_C, wide_out_VBX[v, b])


@_jit
def _resample(
    source, offset, pitch, size_2, drawn_P, cubic, channels, mixed_2X, planes_X, spare_X, spans_22S, weights_2SK
):  # fmt: skip
    """Crop, resize, flip and turn into planes_X, as planes (C, S, S)."""
    side = weights_2SK.shape[1]
    turns = int(drawn_P[TURNS])
    vflip = (drawn_P[VFLIP] > ZERO) != (turns >= 2)
    hflip = (drawn_P[HFLIP] > ZERO) != (turns == 1 or turns == 2)
    unit = 1.0 / np.iinfo(source.dtype).max
    top, left = int(drawn_P[TOP]), int(drawn_P[LEFT])
    _taps(top, int(drawn_P[HEIGHT]), size_2[0], vflip, cubic, unit, spans_22S[0], weights_2SK[0])
    _taps(left, int(drawn_P[WIDTH]), size_2[1], hflip, cubic, 1.0, spans_22S[1], weights_2SK[1])
    first = max(left, 0)
    width = (min(left + int(drawn_P[WIDTH]), size_2[1]) - first) * channels
    rows_X, columns_X = mixed_2X[0][: side * width], mixed_2X[1][: side * width]
    _mix(source, offset + first * channels, pitch, width, spans_22S[0], weights_2SK[0], rows_X)
    _transpose(rows_X, side, width, columns_X)
    across = side * channels
    _mix(columns_X, -first * across, across, across, spans_22S[1], weights_2SK[1], spare_X)
    if turns % 2 == 1:
        _transpose_pixels(spare_X, side, channels, planes_X)
    else:
        _transpose(spare_X, side, across, planes_X)
    if cubic:
        _scale(planes_X, ONE)


@_jit
def _taps(start, length, size, flip, cubic, unit, span_2S, weight_SK):
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


@_jit
def _keys(x):
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


@_jit
def _mix(source, offset, pitch, width, span_2S, weight_SK, out):
    """Line i of `out` is the weighted sum of lines span_2S[0, i] onwards of the source."""
    for i in range(weight_SK.shape[0]):
        place, count = offset + span_2S[0, i] * pitch, span_2S[1, i]
        line = out[i * width : (i + 1) * width]
        if count < 2:
            weight = weight_SK[i, 0] if count == 1 else ZERO
            only = source[place : place + width] if count == 1 else source[:width]
            for j in range(width):
                line[j] = weight * np.float32(only[j])
            continue
        one, other = source[place : place + width], source[place + pitch : place + pitch + width]
        weight, weight_other = weight_SK[i, 0], weight_SK[i, 1]
        for j in range(width):
            line[j] = weight * np.float32(one[j]) + weight_other * np.float32(other[j])
        for k in range(2, count):
            one, weight = source[place + k * pitch : place + k * pitch + width], weight_SK[i, k]
            for j in range(width):
                line[j] += weight * np.float32(one[j])


@intrinsic
def _transpose_tile(typing, source, place, pitch, out, out_place, out_pitch):
    """Transpose 8 x 8 floats in registers: LLVM finds no shuffles in the scalar loop, which costs three times more."""

    def generate(context, builder, signature, arguments):
        data = [
            cgutils.create_struct_proxy(signature.args[i])(context, builder, value=arguments[i]).data for i in (0, 3)
        ]
        eight = ir.VectorType(ir.FloatType(), TILE)

        def line(which, k):
            step = builder.mul(arguments[3 * which + 2], ir.Constant(ir.IntType(64), k))
            address = builder.gep(data[which], [builder.add(arguments[3 * which + 1], step)])
            return builder.bitcast(address, eight.as_pointer())

        lines = [builder.load(line(0, k), align=4) for k in range(TILE)]
        for step in (1, 2, 4):
            low = [j - step + TILE if j & step else j for j in range(TILE)]
            high = [j + TILE if j & step else j + step for j in range(TILE)]
            for k in (k for k in range(TILE) if not k & step):
                pair = lines[k], lines[k + step]
                lines[k], lines[k + step] = (builder.shuffle_vector(*pair, _mask(m)) for m in (low, high))
        for k in range(TILE):
            builder.store(lines[k], line(1, k), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, out, types.intp, types.intp), generate


def _mask(lanes):
    return ir.Constant(ir.VectorType(ir.IntType(32), TILE), lanes)


@_jit
def _transpose(source, rows, columns, out):
    """(rows, columns) to (columns, rows); the last tiles overlap the ones before."""
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


@_jit
def _transpose_pixels(source, side, channels, out):
    """(S, C, S) to (C, S, S): what a quarter turn leaves to do."""
    for i in range(side):
        for c in range(channels):
            for j in range(side):
                out[(c * side + i) * side + j] = source[(i * channels + c) * side + j]


@_jit
def _transform(planes_X, spare_X, blur_X, drawn_P, linear, mean_C):
    """Everything after the geometry of the crop, in place, in the policy's order."""
    channels = len(mean_C)
    n = len(planes_X) // channels
    side = int(round(math.sqrt(n)))
    if drawn_P[ROTATE_DEG] != ZERO:
        spare_X[:] = planes_X
        _rotate(spare_X, channels, side, drawn_P[ROTATE_DEG], planes_X)
    if channels == 3:
        _colour(planes_X, planes_X[:n], planes_X[n : 2 * n], planes_X[2 * n :], drawn_P, linear)
    if drawn_P[BLUR_RADIUS] > ZERO:
        _blur(planes_X, blur_X, channels, side, int(drawn_P[BLUR_RADIUS]), drawn_P[BLUR_SIGMA])
    if drawn_P[SOLARIZE] <= ONE:
        threshold = drawn_P[SOLARIZE]
        for i in range(len(planes_X)):
            planes_X[i] = ONE - planes_X[i] if planes_X[i] >= threshold else planes_X[i]
    if drawn_P[POSTERIZE] > ZERO:
        levels = np.float32(2.0 ** drawn_P[POSTERIZE])
        for i in range(len(planes_X)):
            planes_X[i] = min(np.floor(planes_X[i] * levels), levels - ONE) / levels
    if drawn_P[CUTOUT_SIDE] > ZERO:
        top, left, square = int(drawn_P[CUTOUT_TOP]), int(drawn_P[CUTOUT_LEFT]), int(drawn_P[CUTOUT_SIDE])
        for c in range(channels):
            for y in range(top, top + square):
                planes_X[c * n + y * side + left : c * n + y * side + left + square] = mean_C[c]


@_jit
def _rotate(source, channels, side, angle_deg, out):
    """Anticlockwise about the centre, bilinear, black outside."""
    cos, sin = np.float32(math.cos(math.radians(angle_deg))), np.float32(math.sin(math.radians(angle_deg)))
    middle = np.float32(0.5 * (side - 1))
    for y in range(side):
        for x in range(side):
            u, v = np.float32(x) - middle, np.float32(y) - middle
            column, row = cos * u - sin * v + middle, sin * u + cos * v + middle
            left, top = int(np.floor(column)), int(np.floor(row))
            right_share, lower_share = column - np.float32(left), row - np.float32(top)
            for c in range(channels):
                total = ZERO
                for dy in range(2):
                    for dx in range(2):
                        if 0 <= top + dy < side and 0 <= left + dx < side:
                            share = right_share if dx == 1 else ONE - right_share
                            share *= lower_share if dy == 1 else ONE - lower_share
                            total += share * source[(c * side + top + dy) * side + left + dx]
                out[(c * side + y) * side + x] = total


@_jit
def _colour(planes_X, red_N, green_N, blue_N, drawn_P, linear):
    for step in range(4):
        operation = ORDERS[int(drawn_P[ORDER]), step]
        if operation == 0 and drawn_P[BRIGHTNESS] != ONE:
            _scale(planes_X, drawn_P[BRIGHTNESS])
        elif operation == 1 and drawn_P[CONTRAST] != ONE:
            _contrast(planes_X, red_N, green_N, blue_N, drawn_P[CONTRAST])
        elif operation == 2 and drawn_P[SATURATION] != ONE:
            _saturate(red_N, green_N, blue_N, drawn_P[SATURATION])
        elif operation == 3 and drawn_P[HUE] != ZERO:
            if linear:
                _turn_yiq(red_N, green_N, blue_N, drawn_P[HUE])
            else:
                _turn_hsv(red_N, green_N, blue_N, drawn_P[HUE])
    if drawn_P[GRAY] > ZERO:
        _saturate(red_N, green_N, blue_N, ZERO)


@_jit
def _unit(x):
    return min(max(x, ZERO), ONE)


@_jit
def _scale(planes_X, factor):
    for i in range(len(planes_X)):
        planes_X[i] = _unit(planes_X[i] * factor)


@_jit
def _contrast(planes_X, red_N, green_N, blue_N, factor):
    total = ZERO
    for i in range(len(red_N)):
        total += RED * red_N[i] + GREEN * green_N[i] + BLUE * blue_N[i]
    base = (ONE - factor) * total / np.float32(len(red_N))
    for i in range(len(planes_X)):
        planes_X[i] = _unit(planes_X[i] * factor + base)


@_jit
def _saturate(red_N, green_N, blue_N, factor):
    rest = ONE - factor
    for i in range(len(red_N)):
        base = rest * (RED * red_N[i] + GREEN * green_N[i] + BLUE * blue_N[i])
        red_N[i] = _unit(red_N[i] * factor + base)
        green_N[i] = _unit(green_N[i] * factor + base)
        blue_N[i] = _unit(blue_N[i] * factor + base)


@_jit
def _turn_hsv(red_N, green_N, blue_N, turns):
    """Each channel is the value less its share of the chroma, a trapezoid in the hue."""
    shift = SIX * turns
    for i in range(len(red_N)):
        red, green, blue = red_N[i], green_N[i], blue_N[i]
        high, low = max(max(red, green), blue), min(min(red, green), blue)
        chroma = high - low
        inverse = ONE / max(chroma, TINY)
        from_blue = (red - green) * inverse + FOUR
        from_green = (blue - red) * inverse + TWO
        from_red = (green - blue) * inverse
        hue = from_red if high == red else (from_green if high == green else from_blue)
        hue += shift
        hue = hue + SIX if hue < ZERO else hue
        hue = hue - SIX if hue >= SIX else hue
        red_N[i] = low + chroma * _unit(abs(hue - THREE) - ONE)
        green_N[i] = low + chroma * _unit(TWO - abs(hue - TWO))
        blue_N[i] = low + chroma * _unit(TWO - abs(hue - FOUR))


@_jit
def _turn_yiq(red_N, green_N, blue_N, turns):
    cos, sin = np.float32(math.cos(2 * math.pi * turns)), np.float32(math.sin(2 * math.pi * turns))
    for n in range(len(red_N)):
        red, green, blue = red_N[n], green_N[n], blue_N[n]
        luma = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue
        old_i = np.float32(0.596) * red - np.float32(0.274) * green - np.float32(0.322) * blue
        old_q = np.float32(0.211) * red - np.float32(0.523) * green + np.float32(0.312) * blue
        i, q = cos * old_i - sin * old_q, sin * old_i + cos * old_q
        red_N[n] = _unit(luma + np.float32(0.956) * i + np.float32(0.621) * q)
        green_N[n] = _unit(luma - np.float32(0.272) * i - np.float32(0.647) * q)
        blue_N[n] = _unit(luma - np.float32(1.106) * i + np.float32(1.703) * q)


@_jit
def _blur(planes_X, work_X, channels, side, radius, sigma):
    """Separable: blur along columns and transpose, twice. Taps go by threes, the last filled up with zeros."""
    border = 3 * ((radius + 2) // 3)
    n, padded_n = side * side, (side + 2 * border) * side
    mixed_N, padded_X, kernel = work_X[:n], work_X[n : n + padded_n], work_X[n + padded_n :][: border + 1]
    _gaussian(kernel, radius, sigma)
    for c in range(channels):
        plane_N = planes_X[c * n : (c + 1) * n]
        for _ in range(2):
            _pad(plane_N, side, border, radius, padded_X)
            _convolve(padded_X, border * side, side, kernel, mixed_N)
            _transpose(mixed_N, side, side, plane_N)


@_jit
def _gaussian(kernel, radius, sigma):
    kernel[:] = ZERO
    total = ZERO
    for k in range(radius + 1):
        kernel[k] = np.float32(math.exp(-0.5 * (k / sigma) ** 2))
        total += kernel[k] if k == 0 else TWO * kernel[k]
    for k in range(radius + 1):
        kernel[k] /= total


@_jit
def _pad(plane_N, side, border, radius, padded_X):
    """Reflect `radius` rows above and below; the rest of the border meets zero weights and must be finite."""
    padded_X[border * side : (border + side) * side] = plane_N
    padded_X[: (border - radius) * side] = ZERO
    padded_X[(border + side + radius) * side :] = ZERO
    for k in range(1, radius + 1):
        top, bottom = border - k, border + side - 1 + k
        padded_X[top * side : (top + 1) * side] = plane_N[k * side : (k + 1) * side]
        padded_X[bottom * side : (bottom + 1) * side] = plane_N[(side - 1 - k) * side : (side - k) * side]


@_jit
def _convolve(source, place, pitch, kernel, out):
    """out[i] is the kernel about source[place + i], with `pitch` elements between taps."""
    n = len(out)
    middle, weight = source[place : place + n], kernel[0]
    for i in range(n):
        out[i] = weight * middle[i]
    for k in range(1, len(kernel), 3):
        near, mid, far = k * pitch, (k + 1) * pitch, (k + 2) * pitch
        up_1, down_1 = source[place - near : place - near + n], source[place + near : place + near + n]
        up_2, down_2 = source[place - mid : place - mid + n], source[place + mid : place + mid + n]
        up_3, down_3 = source[place - far : place - far + n], source[place + far : place + far + n]
        weight_1, weight_2, weight_3 = kernel[k], kernel[k + 1], kernel[k + 2]
        for i in range(n):
            out[i] += (
                weight_1 * (up_1[i] + down_1[i]) + weight_2 * (up_2[i] + down_2[i]) + weight_3 * (up_3[i] + down_3[i])
            )


@_jit
def _interleave(planes_X, mean_C, scale_C, out_X):
    """Normalise into pixels."""
    channels = len(mean_C)
    n = len(planes_X) // channels
    if channels == 3:
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


@_jit
def _interleave_narrow(planes_X, mean_C, scale_C, out_X):
    """Normalise into pixels of bfloat16 bit patterns."""
    channels = len(mean_C)
    n = len(planes_X) // channels
    for c in range(channels):
        plane, mean, scale = planes_X[c * n : (c + 1) * n], mean_C[c], scale_C[c]
        for i in range(n):
            plane[i] = (plane[i] - mean) * scale
    bits_X = planes_X.view(np.uint32)
    if channels == 3:
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


@_jit
def _narrow(bits):
    """float32 bits to bfloat16 bits, to nearest, ties to even."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
