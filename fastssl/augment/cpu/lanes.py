"""Vectors that LLVM does not find in scalar loops, written as its instructions: neighboring channels, small squares.

K taps. Places and pitches are in elements.
"""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastssl.augment.constants import RGB

TILE = 8  # side of the squares that are transposed
# channels of a pixel that are mixed at once: one more than RGB has, because 16 bytes are one load
LANES = 4
LINE = 16  # floats in a cache line
# elements that change places at once in a row that is turned round: the least of whole pixels and cache lines
TURNED = RGB * LINE
VECTOR = ir.VectorType(ir.FloatType(), LANES)
# Of functions that kernels alone call. numpy's error model drops the check that each division would branch on; what
# Python and C would call them by is left out, for it takes time to compile.
INNER = {"error_model": "numpy", "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _structs(context: Any, builder: Any, signature: Any, arguments: Any, *which: int) -> list[Any]:
    """These arguments, which are arrays, with their fields."""
    return [cgutils.create_struct_proxy(signature.args[i])(context, builder, value=arguments[i]) for i in which]


def _load(builder: Any, pointer: Any, kind: Any) -> Any:
    # aligned as single floats are: pixels of three channels start anywhere
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def _mixed(builder: Any, pixel: Any, weight: Any, pitch: Any, taps: int | None, count: Any) -> Any:
    """The weighted sum of `taps` vectors, `pitch` floats apart; None: of `count`."""
    zeros, number = ir.Constant(VECTOR, [0.0] * LANES), ir.IntType(64)

    def tap(k: Any) -> Any:
        lanes = _load(builder, builder.gep(pixel, [builder.mul(pitch, k)]), VECTOR)
        one = builder.load(builder.gep(weight, [k]))
        # what LLVM knows as a broadcast: one lane set, then copied to all
        lane = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
        spread = builder.shuffle_vector(lane, lane, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))
        return builder.fmul(lanes, spread, flags=("fast",))

    if taps is not None:
        # unrolled: a loop of two would cost more than what it does
        total = tap(ir.Constant(number, 0))
        for k in range(1, taps):
            total = builder.fadd(total, tap(ir.Constant(number, k)), flags=("fast",))
        return total
    # on the stack in name only: LLVM makes a register of it
    sums = cgutils.alloca_once(builder, VECTOR)
    builder.store(zeros, sums)
    with cgutils.for_range(builder, count) as loop:
        builder.store(builder.fadd(builder.load(sums), tap(loop.index), flags=("fast",)), sums)
    return builder.load(sums)


def _pixel_mixer(taps: int | None) -> Any:
    @intrinsic
    def mix(
        typing: Any,
        line: Any,
        place_S: Any,
        weight_SK: Any,
        count: Any,
        channels: Any,
        norm_2X: Any,
        first: Any,
        out: Any,
    ) -> Any:
        """LANES channels from `first` on of each pixel of a line: the sum of `count` weighted pixels of `line`, from
        place_S onwards, cut to [0, 1] and normalized. Writes up to LANES - 1 channels too far."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            line, place, weight, norm, out = _structs(context, builder, signature, arguments, 0, 1, 2, 5, 7)
            count, channels, first = arguments[3], arguments[4], arguments[6]
            side, taps_wide = cgutils.unpack_tuple(builder, weight.shape, 2)
            across = cgutils.unpack_tuple(builder, norm.shape, 2)[1]
            # once a line: every pixel has the same channels
            factor = _load(builder, builder.gep(norm.data, [first]), VECTOR)
            summand = _load(builder, builder.gep(norm.data, [builder.add(first, across)]), VECTOR)
            with cgutils.for_range(builder, side) as loop:
                pixel = builder.gep(
                    line.data, [builder.add(first, builder.load(builder.gep(place.data, [loop.index])))]
                )
                weights = builder.gep(weight.data, [builder.mul(loop.index, taps_wide)])
                mixed = _mixed(builder, pixel, weights, channels, taps, count)
                # a comparison and a selection are one instruction of the processor, min or max
                for sign, bound in ((">", 0.0), ("<", 1.0)):
                    limit = ir.Constant(VECTOR, [bound] * LANES)
                    mixed = builder.select(builder.fcmp_ordered(sign, mixed, limit, flags=("fast",)), mixed, limit)
                done = builder.fadd(builder.fmul(mixed, factor, flags=("fast",)), summand, flags=("fast",))
                to = builder.gep(out.data, [builder.add(first, builder.mul(loop.index, channels))])
                # in order: the next pixel's store covers what this one writes too far
                builder.store(done, builder.bitcast(to, VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        number = types.intp
        return types.void(line, place_S, weight_SK, number, number, norm_2X, number, out), generate

    return mix


# two taps enlarge and three shrink a little: so few are not worth a loop
mix_two, mix_three, mix_any = _pixel_mixer(2), _pixel_mixer(3), _pixel_mixer(None)


def _each_vector(builder: Any, count: Any, put: Any, lanes: int = LINE, least: int = 1) -> None:
    """`put(place, lanes)` over `count` elements, so many at a time; the last vector overlaps the one before. Fewer
    elements than that go by `least`, which divides both."""
    wide, rounding, step = (ir.Constant(ir.IntType(64), number) for number in (lanes, lanes - 1, least))
    with builder.if_else(builder.icmp_signed(">=", count, wide)) as (many, few):
        with many:
            last, vectors = builder.sub(count, wide), builder.sdiv(builder.add(count, rounding), wide)
            with cgutils.for_range(builder, vectors) as loop:
                # the last vector is drawn back over the one before, so no loop over a rest is needed
                place = builder.mul(loop.index, wide)
                put(builder.select(builder.icmp_signed("<", place, last), place, last), lanes)
        with few, cgutils.for_range(builder, builder.sdiv(count, step)) as loop:
            put(builder.mul(loop.index, step), least)


def _at(builder: Any, data: Any, place: Any, lanes: int) -> Any:
    """Pointer to so many elements from `place` on."""
    pointer = builder.gep(data, [place])
    return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, lanes).as_pointer())


def _row_putter(turns: bool) -> Any:
    @intrinsic
    def put(typing: Any, source: Any, start: Any, count: Any, norm_2X: Any, out: Any, to: Any) -> Any:
        """`count` unsigned integers of `source` from `start` on, in [0, 1] and normalized."""
        # from the type: uint8 and uint16 compile a kernel each, with nothing to ask in the loop
        bits = source.dtype.bitwidth

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, norm, out = _structs(context, builder, signature, arguments, 0, 3, 4)
            _, start, count, _, _, to = arguments
            across = cgutils.unpack_tuple(builder, norm.shape, 2)[1]

            def put_vector(place: Any, lanes: int) -> None:
                kind, first = ir.VectorType(ir.FloatType(), lanes), place
                if turns:
                    # read from the end and written from the start, so that one loop serves both kinds of rows
                    first = builder.sub(builder.sub(count, place), ir.Constant(ir.IntType(64), lanes))
                pixels = builder.load(_at(builder, source.data, builder.add(start, first), lanes), align=bits // 8)
                if turns:
                    # pixels change places, their channels do not
                    order = [lanes - RGB * (k // RGB + 1) + k % RGB for k in range(lanes)]
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), order)
                    pixels = builder.shuffle_vector(pixels, pixels, mask)
                # times the reciprocal: a division takes several times as long
                unit = builder.fmul(builder.uitofp(pixels, kind), ir.Constant(kind, [1 / (2**bits - 1)] * lanes))
                factor = builder.load(_at(builder, norm.data, place, lanes), align=4)
                summand = builder.load(_at(builder, norm.data, builder.add(across, place), lanes), align=4)
                done = builder.fadd(builder.fmul(unit, factor, flags=("fast",)), summand, flags=("fast",))
                builder.store(done, _at(builder, out.data, builder.add(to, place), lanes), align=4)

            _each_vector(builder, count, put_vector, *((TURNED, RGB) if turns else (LINE, 1)))
            return context.get_dummy_value()

        number = types.intp
        return types.void(source, number, number, norm_2X, out, number), generate

    return put


put_row, put_turned_row = _row_putter(False), _row_putter(True)  # turned: of RGB pixels, the last one first


@intrinsic
def put_line(typing: Any, line: Any, first: Any, count: Any, out: Any, to: Any) -> Any:
    """`count` floats of `line` from `first` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, out = _structs(context, builder, signature, arguments, 0, 3)
        _, first, count, _, to = arguments

        def put(place: Any, lanes: int) -> None:
            floats = builder.load(_at(builder, line.data, builder.add(first, place), lanes), align=4)
            builder.store(floats, _at(builder, out.data, builder.add(to, place), lanes), align=4)

        _each_vector(builder, count, put)
        return context.get_dummy_value()

    return types.void(line, types.intp, types.intp, out, types.intp), generate


@intrinsic
def turn_round(typing: Any, line: Any, side: Any, channels: Any, first: Any, out: Any) -> Any:
    """LANES channels from `first` on of each pixel of `line`, the last pixel first. Writes as far as the mixers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, out = _structs(context, builder, signature, arguments, 0, 4)
        side, channels, first = arguments[1:4]
        with cgutils.for_range(builder, side) as loop:
            # pixel by pixel, for any number of channels: RGB has its shuffles in `put_turned_row`
            other = builder.sub(builder.sub(side, loop.index), ir.Constant(ir.IntType(64), 1))
            start, end = (builder.add(first, builder.mul(i, channels)) for i in (other, loop.index))
            lanes = _load(builder, builder.gep(line.data, [start]), VECTOR)
            to = builder.gep(out.data, [end])
            builder.store(lanes, builder.bitcast(to, VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(line, types.intp, types.intp, types.intp, out), generate


@intrinsic
def transpose_tile(typing: Any, source: Any, place: Any, pitch: Any, out: Any, out_place: Any, out_pitch: Any) -> Any:
    """Transpose 8 x 8 floats in registers: LLVM finds no shuffles in scalar loops, 4 to 7 times slower."""
    vector = ir.VectorType(ir.FloatType(), TILE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def line(which: int, k: int) -> Any:
            array, start, step = arguments[3 * which : 3 * which + 3]
            data = cgutils.create_struct_proxy(signature.args[3 * which])(context, builder, value=array).data
            place = builder.add(start, builder.mul(step, ir.Constant(ir.IntType(64), k)))
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        # three rounds that exchange single lanes, pairs and fours, as the butterflies of an FFT
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
