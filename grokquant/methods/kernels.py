"""Compiled `rtn` for CPUs: reads, rounds and measures rows in one pass over their memory.

`scales` does the same in torch operations, and the integers are equal bit for bit. 64 rows lie side
by side, as they do in Grok-1's files, so that each step is one of whole vector registers.

A block of weights while it is worked on, W [columns, LANES] float32, flat:

    W[k * LANES + n]     column k of row n (a "lane")

    | row 0, row 1, .., row 63 | row 0, row 1, .., row 63 | ..
    | column 0                 | column 1                 |

Many results are wrapped in `_f32` or `_u32`: numba widens to 64 bits where operands differ in kind
or are integers, torch does not, and a wider intermediate result could round to another code.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

LANES = 64  # rows rounded together: four vector registers of 512 bits
BLOCK = 128  # columns in the scratch memory: 32 KB of float32, which a first-level cache holds
STEP = 8  # columns whose squared errors are added up first, as a tree
# Columns prefetched before their turn: in stored matrices they lie too far apart for the CPU to
# foresee the next one.
_AHEAD = 32

# Where `level` [5 * LANES] holds the numbers of each lane's grid.
_INVERSE = 0 * LANES  # 1 / scale
_SCALE = 1 * LANES
_LOWEST = 2 * LANES  # lowest code - zero point
_HIGHEST = 3 * LANES  # highest code - zero point
_ZERO = 4 * LANES  # zero point

_f32 = np.float32
_u32 = np.uint32
_compiled = njit(nogil=True, cache=True, error_model="numpy")
# For pieces of the outer loop: a call with many arrays would cost a tenth of a small group.
_inlined = njit(nogil=True, cache=True, error_model="numpy", inline="always")


class RowSource(NamedTuple):
    """Rows to round, in one piece of memory with gaps of a fixed size.

    Dense rows are float32, or bfloat16 seen as uint16; `scales` and `group_size` mean nothing then.
    Stored matrices are int8 codes with bfloat16 `scales` [groups, rows] widened to float32, one for
    each `group_size` columns.

        by row                row r, column k  at  values[r * stride + k]
        by_column, stored     row r, column k  at  values[k * stride + r]
    """

    values: np.ndarray
    stride: int
    by_column: bool
    scales: np.ndarray
    group_size: int


class Grid(NamedTuple):
    """A scheme in numbers, among them how its scale dtype rounds a float32 scale.

    `unit` is the last mantissa bit that the dtype keeps, as a bit of float32; `even` and `odd` are
    what is added to a number, depending on that bit, before the lower bits are cut off, so that
    ties go to even. Scales below `tiny`, the least normal number, are multiples of `step`, the
    least positive one. Scales below `least` would be stored as 0 and become 1; from `limit` on they
    are infinite.
    """

    qmin: np.float32
    qmax: np.float32
    symmetric: bool
    unit: np.uint32
    even: np.uint32
    odd: np.uint32
    limit: np.float32
    tiny: np.float32
    step: np.float32
    least: np.float32


class _Part(NamedTuple):
    """One group of columns, `start` to before `stop`, in `lanes` rows from `first` on."""

    first: int
    lanes: int
    start: int
    stop: int


@_compiled
def rounded(x, unit, even, odd):
    """float32 x without its bits below `unit`, ties to even. See `Grid` for `even` and `odd`."""
    bits = _f32(x).view(_u32)
    carry = odd if bits & unit else even
    return _u32(_u32(bits + carry) & _u32(-unit)).view(_f32)


@_compiled
def stored_scale(x, grid):
    """The scale as the file will hold it, 1 where that would be 0."""
    size = abs(x)
    value = rounded(size, grid.unit, grid.even, grid.odd)
    # Selections instead of branches, so that the compiler can use vectors.
    value = _f32(np.rint(_f32(size / grid.step)) * grid.step) if size < grid.tiny else value
    value = _f32(np.inf) if value >= grid.limit else value
    value = -value if x < 0 else value
    return _f32(1) if size < grid.least else value


@_compiled
def _candidates(low, high, shrinks, grid, scales, zeros):
    """Fills scales and zero points [candidates, LANES] to try for groups that span low..high.

    A symmetric grid gets each shrink twice: once with the largest weight at the highest code, once
    with it at the lowest code, which lies one step further out.
    """
    for index in range(len(scales)):
        shrink = shrinks[index % len(shrinks)]
        scale = scales[index]
        zero = zeros[index]
        for n in range(LANES):
            if not grid.symmetric:
                bottom = _f32(low[n] * shrink)
                top = _f32(high[n] * shrink)
                scale[n] = stored_scale(
                    _f32(_f32(top - bottom) / _f32(grid.qmax - grid.qmin)), grid
                )
                offset = _f32(np.rint(_f32(grid.qmin - _f32(bottom / scale[n]))))
                zero[n] = min(max(offset, grid.qmin), grid.qmax)
            elif index < len(shrinks):
                absmax = max(high[n], -low[n])
                scale[n] = stored_scale(_f32(_f32(absmax * shrink) / grid.qmax), grid)
                zero[n] = 0
            else:  # a negative scale where the largest weight is positive
                peak = -high[n] if high[n] >= -low[n] else -low[n]
                scale[n] = stored_scale(_f32(_f32(peak / -grid.qmin) * shrink), grid)
                zero[n] = 0


@intrinsic
def _prefetch(typing, array, index):
    """Has the CPU load array[index] into the cache; the index may lie outside the array."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        pointer = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), pointer)
        read, all_levels, data_cache = number(0), number(3), number(1)
        builder.call(prefetch, [address, read, all_levels, data_cache])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def transpose(typing, source, at, stride, target, to, step):
    """Turns a square of STEP x STEP elements, from source[at] on, with its rows `stride` apart, to
    target[to] on, with its rows `step` apart. bfloat16, seen as uint16, becomes float32.

    In LLVM's own words: a compiled loop moves one element at a time. Three times each row is
    interleaved with the one half a square below:

        a0 a1 ..      a0 e0 a1 e1 ..      a0 c0 e0 g0 ..      a0 b0 c0 ..
        b0 b1 ..  ->  ..              ->  ..              ->  a1 b1 c1 ..
    """

    def generate(context, builder, signature, arguments):
        bits = ir.IntType(source.dtype.bitwidth)
        word = ir.IntType(32)
        eight = ir.VectorType(word, STEP)

        def address(array, kind, start, row, distance, vector):
            data = context.make_array(kind)(context, builder, array).data
            place = builder.add(start, builder.mul(distance, distance.type(row)))
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        def loaded(row):
            vector = ir.VectorType(bits, STEP)
            place = address(arguments[0], source, arguments[1], row, arguments[2], vector)
            values = builder.load(place, align=bits.width // 8)
            if bits.width == 32:
                return values
            upper = ir.Constant(eight, [16] * STEP)
            return builder.shl(builder.zext(values, eight), upper)

        rows = [loaded(row) for row in range(STEP)]
        half = STEP // 2
        places = [n // 2 + STEP * (n % 2) for n in range(2 * STEP)]
        masks = [ir.Constant(eight, places[:STEP]), ir.Constant(eight, places[STEP:])]
        for _ in range(STEP.bit_length() - 1):
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        for row, values in enumerate(rows):
            place = address(arguments[3], target, arguments[4], row, arguments[5], eight)
            builder.store(values, place, align=4)
        return context.get_dummy_value()

    numbers = types.intp, types.intp
    return types.void(source, *numbers, target, *numbers), generate


@_compiled
def _load_stored(source, first, lanes, column, columns, W):
    size = source.group_size
    stop = column + columns
    for group in range(column // size, (stop - 1) // size + 1):
        scales = source.scales[group, first : first + lanes]
        for k in range(max(group * size, column), min((group + 1) * size, stop)):
            at = k * source.stride + first
            _prefetch(source.values, at + _AHEAD * source.stride)  # type: ignore[call-arg]
            codes = source.values[at : at + lanes]
            line = W[(k - column) * LANES : (k - column + 1) * LANES]
            for n in range(lanes):
                value = _f32(_f32(codes[n]) * scales[n])
                # To bfloat16, as the matrix is dequantized elsewhere: it drops 16 of 32 bits.
                line[n] = rounded(value, _u32(0x10000), _u32(0x7FFF), _u32(0x8000))


@_compiled
def _load_columns(source, first, lanes, column, columns, W):
    for k in range(columns):
        at = (column + k) * source.stride + first
        _prefetch(source.values, at + _AHEAD * source.stride)  # type: ignore[call-arg]
        values = source.values[at : at + lanes]
        line = W[k * LANES : (k + 1) * LANES]
        for n in range(lanes):
            line[n] = values[n]


@_compiled
def _load_dense(source, first, lanes, column, columns, W):
    if source.by_column:
        _load_columns(source, first, lanes, column, columns, W)
        return
    _load_rows(source, first, lanes, column, columns, W)
    for n in range(lanes // STEP * STEP, lanes):
        for k in range(columns):
            W[k * LANES + n] = source.values[(first + n) * source.stride + column + k]


@_compiled
def _load_bfloat16(source, first, lanes, column, columns, W):
    _load_rows(source, first, lanes, column, columns, W)
    for n in range(lanes // STEP * STEP, lanes):
        for k in range(columns):
            value = source.values[(first + n) * source.stride + column + k]
            W[k * LANES + n] = _u32(_u32(value) << _u32(16)).view(_f32)  # widened


@_compiled
def _load_rows(source, first, lanes, column, columns, W):
    """As many lanes as make whole squares."""
    for n in range(0, lanes // STEP * STEP, STEP):
        at = (first + n) * source.stride + column
        for k in range(0, columns, STEP):
            transpose(source.values, at + k, source.stride, W, k * LANES + n, LANES)  # type: ignore[call-arg]


def load_rows(source, first, lanes, column, columns, W):
    """Reads `lanes` rows from `first` on, `columns` columns from `column` on, to W."""


@overload(load_rows)
def _load_any(source, first, lanes, column, columns, W):
    """Chooses the loader at compile time, by the bits of a value."""
    load = {8: _load_stored, 16: _load_bfloat16, 32: _load_dense}[source[0].dtype.bitwidth]
    return lambda source, first, lanes, column, columns, W: load(
        source, first, lanes, column, columns, W
    )


@_compiled
def lowest(w, n):
    """The least of STEP weights of lane n, as a tree: no step waits for the one before."""
    ab = min(w[n], w[LANES + n])
    cd = min(w[2 * LANES + n], w[3 * LANES + n])
    ef = min(w[4 * LANES + n], w[5 * LANES + n])
    gh = min(w[6 * LANES + n], w[7 * LANES + n])
    return min(min(ab, cd), min(ef, gh))


@_compiled
def highest(w, n):
    """The largest of STEP weights of lane n."""
    ab = max(w[n], w[LANES + n])
    cd = max(w[2 * LANES + n], w[3 * LANES + n])
    ef = max(w[4 * LANES + n], w[5 * LANES + n])
    gh = max(w[6 * LANES + n], w[7 * LANES + n])
    return max(max(ab, cd), max(ef, gh))


@_compiled
def _widen(W, columns, low, high):
    """Widens low..high of each lane to hold the weights of a block."""
    for step in range(columns // STEP):
        w = W[step * STEP * LANES : (step + 1) * STEP * LANES]
        for n in range(LANES):
            low[n] = min(low[n], lowest(w, n))
            high[n] = max(high[n], highest(w, n))


@_compiled
def _multiple(w, level, n):
    """code - zero point of w on the grid of lane n, nearest with ties to even."""
    lowest = level[_LOWEST + n]
    highest = level[_HIGHEST + n]
    return np.rint(min(max(_f32(w / level[_SCALE + n]), lowest), highest))


@_compiled
def _square_of_error(w, multiple, scale, grid):
    """(w - dequantized w)^2, dequantized in the scale dtype as engines do."""
    value = rounded(_f32(multiple * scale), grid.unit, grid.even, grid.odd)
    error = _f32(w - value) if abs(value) < grid.limit else _f32(np.inf)
    return _f32(error * error)


@_compiled
def _lost(w, level, n, weight, grid):
    """Weighted squared error of w on the grid of lane n.

    The search multiplies by 1 / scale, which is faster than the division of `_multiple` and may
    round a tie to the other side.
    """
    lowest = level[_LOWEST + n]
    highest = level[_HIGHEST + n]
    multiple = np.rint(min(max(_f32(w * level[_INVERSE + n]), lowest), highest))
    error = _f32(_f32(multiple * level[_SCALE + n]) - w)
    return _f32(_f32(error * error) * weight)


@_compiled
def _lost_as_stored(w, level, n, weight, grid):
    """The same of values in the scale dtype, as engines have them: two thirds slower."""
    multiple = _multiple(w, level, n)
    return _f32(_square_of_error(w, multiple, level[_SCALE + n], grid) * weight)


@_compiled
def _set_level(scale, zero, grid, level):
    """Fills `level` with the grid of each lane."""
    for n in range(LANES):
        level[_INVERSE + n] = _f32(1) / scale[n]
        level[_SCALE + n] = scale[n]
        level[_LOWEST + n] = grid.qmin - zero[n]
        level[_HIGHEST + n] = grid.qmax - zero[n]
        level[_ZERO + n] = zero[n]


def _adder(lost):
    """A function that adds what each lane loses on its grid, as `lost` has it, to `errors`."""

    @_compiled
    def add_errors(W, columns, importance, level, grid, total, errors):
        total[:] = 0
        for step in range(columns // STEP):
            w = W[step * STEP * LANES : (step + 1) * STEP * LANES]
            weight = importance[step * STEP : (step + 1) * STEP]
            for n in range(LANES):
                a = lost(w[n], level, n, weight[0], grid)
                b = lost(w[LANES + n], level, n, weight[1], grid)
                c = lost(w[2 * LANES + n], level, n, weight[2], grid)
                d = lost(w[3 * LANES + n], level, n, weight[3], grid)
                e = lost(w[4 * LANES + n], level, n, weight[4], grid)
                f = lost(w[5 * LANES + n], level, n, weight[5], grid)
                g = lost(w[6 * LANES + n], level, n, weight[6], grid)
                h = lost(w[7 * LANES + n], level, n, weight[7], grid)
                total[n] += ((a + b) + (c + d)) + ((e + f) + (g + h))
        # float32 within a block, float64 beyond: `scales` adds in the same order.
        for n in range(LANES):
            errors[n] += total[n]

    return add_errors


_add_errors = _adder(_lost)
_add_errors_as_stored = _adder(_lost_as_stored)


@_compiled
def _word(m0, m1, m2, m3, zero):
    """Four codes of neighbouring columns as one word, so that memory holds int8 in their order.

    bit  31 .. 24   23 .. 16   15 .. 8   7 .. 0
         code 3     code 2     code 1    code 0
    """
    a = _u32(_u32(np.int32(m0 + zero)) & _u32(255))
    b = _u32(_u32(_u32(np.int32(m1 + zero)) & _u32(255)) << _u32(8))
    c = _u32(_u32(_u32(np.int32(m2 + zero)) & _u32(255)) << _u32(16))
    d = _u32(_u32(np.int32(m3 + zero)) << _u32(24))
    return _u32(_u32(a | b) | _u32(c | d))


@_compiled
def _round_block(W, columns, level, grid, squares, words):
    """Fills words [columns / 4, LANES], flat; adds to the sums of squares of the lanes."""
    for word in range(columns // 4):
        w = W[word * 4 * LANES : (word + 1) * 4 * LANES]
        for n in range(LANES):
            w0 = w[n]
            w1 = w[LANES + n]
            w2 = w[2 * LANES + n]
            w3 = w[3 * LANES + n]
            m0 = _multiple(w0, level, n)
            m1 = _multiple(w1, level, n)
            m2 = _multiple(w2, level, n)
            m3 = _multiple(w3, level, n)
            scale = level[_SCALE + n]
            e0 = _square_of_error(w0, m0, scale, grid)
            e1 = _square_of_error(w1, m1, scale, grid)
            e2 = _square_of_error(w2, m2, scale, grid)
            e3 = _square_of_error(w3, m3, scale, grid)
            squares[n] += (e0 + e1) + (e2 + e3)
            squares[LANES + n] += (w0 * w0 + w1 * w1) + (w2 * w2 + w3 * w3)
            words[word * LANES + n] = _word(m0, m1, m2, m3, level[_ZERO + n])


@_compiled
def store_words(packed, first, lanes, start, count, words):
    """Copies packed [count, LANES], flat, to columns `start` and on of words [rows, in / 4]."""
    width = words.shape[1]
    squares = lanes // STEP * STEP if count % STEP == 0 else 0
    for n in range(0, squares, STEP):
        to = (first + n) * width + start
        for word in range(0, count, STEP):
            transpose(packed, word * LANES + n, LANES, words, to + word, width)  # type: ignore[call-arg]
    for n in range(squares, lanes):
        for word in range(count):
            words[first + n, start + word] = packed[word * LANES + n]


@_compiled
def _keep_best(errors, least, scales, zeros):
    """Moves the candidate of least error, the first of equals, to index 0."""
    least[:] = np.inf
    for index in range(len(errors)):
        for n in range(LANES):
            if errors[index, n] < least[n]:
                least[n] = errors[index, n]
                scales[0, n] = scales[index, n]
                zeros[0, n] = zeros[index, n]


@_inlined
def _span(source, part, W, low, high):
    """Finds the low..high of each lane; leaves the last block in W."""
    low[:] = 0
    high[:] = 0
    for column in range(part.start, part.stop, BLOCK):
        columns = min(BLOCK, part.stop - column)
        load_rows(source, part.first, part.lanes, column, columns, W)
        _widen(W, columns, low, high)


@_inlined
def _search(as_stored, source, part, importance, grid, W, level, total, errors, scales, zeros):
    """Adds up in `errors` what the part loses on each candidate."""
    errors[:] = 0
    for column in range(part.start, part.stop, BLOCK):
        columns = min(BLOCK, part.stop - column)
        if part.stop - part.start > BLOCK:  # a group of one block is still in W
            load_rows(source, part.first, part.lanes, column, columns, W)
        weights = importance[column:]
        for index in range(len(scales)):
            _set_level(scales[index], zeros[index], grid, level)
            if as_stored:
                _add_errors_as_stored(W, columns, weights, level, grid, total, errors[index])
            else:
                _add_errors(W, columns, weights, level, grid, total, errors[index])


@_inlined
def _round_part(source, part, grid, W, level, squares, packed, words, sums):
    """Rounds the part on the grids in `level`."""
    for column in range(part.start, part.stop, BLOCK):
        columns = min(BLOCK, part.stop - column)
        if part.stop - part.start > BLOCK:
            load_rows(source, part.first, part.lanes, column, columns, W)
        squares[:] = 0
        _round_block(W, columns, level, grid, squares, packed)
        for n in range(part.lanes):
            sums[0] += squares[n]
            sums[1] += squares[LANES + n]
        store_words(packed, part.first, part.lanes, column // 4, columns // 4, words)


@_compiled
def round_rows(source, shrinks, candidates, grid, importance, words, scales, zeros, sums):
    """Rounds all rows of `source`, group by group and 64 rows at once.

    Fills `words` uint32 [rows, in / 4] with four int8 codes each, `scales` and `zeros` float32
    [groups, rows], in the order in which they are found. Adds to `sums` float64 [3] the squares of
    the errors, those of the weights, and the number of rows that are zero throughout.
    """
    groups, rows = scales.shape
    size = len(importance) // groups
    # Scratch memory, made once.
    W = np.zeros(BLOCK * LANES, _f32)
    packed = np.empty(BLOCK // 4 * LANES, _u32)
    low = np.empty(LANES, _f32)
    high = np.empty(LANES, _f32)
    level = np.empty(5 * LANES, _f32)
    tried = np.empty((candidates, LANES), _f32)  # scales, of which number 0 is chosen
    tried_zeros = np.empty((candidates, LANES), _f32)
    errors = np.empty((candidates, LANES), np.float64)
    total = np.empty(LANES, _f32)
    least = np.empty(LANES, np.float64)
    squares = np.empty(2 * LANES, _f32)  # of the errors, then of the weights
    peak = np.zeros(rows, _f32)
    for group in range(groups):
        for first in range(0, rows, LANES):
            part = _Part(first, min(LANES, rows - first), group * size, (group + 1) * size)
            _span(source, part, W, low, high)
            _candidates(low, high, shrinks, grid, tried, tried_zeros)
            if candidates > 1:
                _search(
                    False, source, part, importance, grid, W, level, total, errors, tried,
                    tried_zeros,
                )  # fmt: skip
                _keep_best(errors, least, tried, tried_zeros)
                # Number 1 is the whole range again, kept where the best is worse as stored.
                pair, pair_zeros = tried[:2], tried_zeros[:2]
                _candidates(low, high, shrinks, grid, pair[1:], pair_zeros[1:])
                _search(
                    True, source, part, importance, grid, W, level, total, errors[:2],
                    pair, pair_zeros,
                )  # fmt: skip
                _keep_best(errors[:2], least, pair, pair_zeros)
            _set_level(tried[0], tried_zeros[0], grid, level)
            _round_part(source, part, grid, W, level, squares, packed, words, sums)
            for n in range(part.lanes):
                scales[group, first + n] = tried[0, n]
                zeros[group, first + n] = tried_zeros[0, n]
                peak[first + n] = max(peak[first + n], max(high[n], -low[n]))
    for n in range(rows):
        sums[2] += peak[n] == 0
