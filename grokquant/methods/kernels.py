"""Compiled `rtn` for CPUs: reads, rounds and measures rows in one pass over their memory.

`scales` says the same in torch operations, and the integers are equal bit for bit. 64 rows lie side
by side, as they do in Grok-1's files, so that each step is one of whole vector registers.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

LANES = 64  # rows done at once
BLOCK = 128  # columns in the scratch memory: 32 KB of float32
STEP = 8  # columns whose squared errors are added up first, as a tree
_AHEAD = 32  # columns asked for before their turn, since they lie too far apart to be foreseen

_f32, _u32 = np.float32, np.uint32
_compiled = njit(nogil=True, cache=True, error_model="numpy")


class Rows(NamedTuple):
    """Rows to round, all in one piece of memory with gaps of a fixed size.

    Either float32 rows (or bfloat16 ones, as uint16) that begin `stride` apart, or int8 columns
    that do, with bfloat16 `scales` [groups, rows] widened to float32, for `group_size` columns.
    """

    values: np.ndarray
    stride: int
    scales: np.ndarray
    group_size: int


class Grid(NamedTuple):
    """A scheme in numbers.

    Scales are float32 without the bits below `unit`; `even` and `odd` are added before these are
    cut off. Below `tiny` they are multiples of `step`; 1 below `least`; infinite from `limit` on.
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


@_compiled
def _rounded(x, unit, even, odd):
    """float32 x without its bits below `unit`, ties to even; what is added carries into them."""
    bits = _f32(x).view(_u32)
    carry = odd if bits & unit else even
    return _u32(_u32(bits + carry) & _u32(-unit)).view(_f32)


@_compiled
def _stored(x, grid):
    """The scale as the file will hold it, 1 where that would be 0."""
    size = abs(x)
    value = _rounded(size, grid.unit, grid.even, grid.odd)
    value = _f32(np.rint(_f32(size / grid.step)) * grid.step) if size < grid.tiny else value
    value = _f32(np.inf) if value >= grid.limit else value
    value = -value if x < 0 else value
    return _f32(1) if size < grid.least else value


@_compiled
def _candidates(low, high, shrinks, grid, scales, zeros):
    """The scales and zero points [candidates, LANES] to try for groups that span low..high."""
    for index in range(len(scales)):
        shrink = shrinks[index % len(shrinks)]
        scale, zero = scales[index], zeros[index]
        for n in range(LANES):
            if not grid.symmetric:
                bottom, top = _f32(low[n] * shrink), _f32(high[n] * shrink)
                scale[n] = _stored(_f32(_f32(top - bottom) / _f32(grid.qmax - grid.qmin)), grid)
                offset = _f32(np.rint(_f32(grid.qmin - _f32(bottom / scale[n]))))
                zero[n] = min(max(offset, grid.qmin), grid.qmax)
            elif index < len(shrinks):
                absmax = max(high[n], -low[n])
                scale[n] = _stored(_f32(_f32(absmax * shrink) / grid.qmax), grid)
                zero[n] = 0
            else:  # the lowest code, one further out, goes to the side of the largest weight
                peak = -high[n] if high[n] >= -low[n] else -low[n]
                scale[n] = _stored(_f32(_f32(peak / -grid.qmin) * shrink), grid)
                zero[n] = 0


@intrinsic
def _prefetch(typing, array, index):
    """Asks for array[index] to be in the cache soon; it may lie outside of the array."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(prefetch, [address, number(0), number(3), number(1)])  # to read, near, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_compiled
def _load_stored(source, first, lanes, column, columns, W):
    size, stop = source.group_size, column + columns
    for group in range(column // size, (stop - 1) // size + 1):
        scales = source.scales[group, first : first + lanes]
        for k in range(max(group * size, column), min((group + 1) * size, stop)):
            at, to = k * source.stride + first, (k - column) * LANES
            _prefetch(source.values, at + _AHEAD * source.stride)  # type: ignore[call-arg]
            codes, line = source.values[at : at + lanes], W[to : to + LANES]
            for n in range(lanes):
                value = _f32(_f32(codes[n]) * scales[n])
                line[n] = _rounded(value, _u32(0x10000), _u32(0x7FFF), _u32(0x8000))


@_compiled
def _load_dense(source, first, lanes, column, columns, W):
    for n in range(lanes):
        at = (first + n) * source.stride + column
        row = source.values[at : at + columns]
        for k in range(columns):
            W[k * LANES + n] = row[k]


@_compiled
def _load_bfloat16(source, first, lanes, column, columns, W):
    for n in range(lanes):
        at = (first + n) * source.stride + column
        row = source.values[at : at + columns]
        for k in range(columns):
            W[k * LANES + n] = _u32(_u32(row[k]) << _u32(16)).view(_f32)


def _load(source, first, lanes, column, columns, W):
    """`lanes` rows from `first` on of a block of columns, to W [columns, LANES]."""


@overload(_load)
def _load_any(source, first, lanes, column, columns, W):
    load = {8: _load_stored, 16: _load_bfloat16, 32: _load_dense}[source[0].dtype.bitwidth]
    return lambda source, first, lanes, column, columns, W: load(
        source, first, lanes, column, columns, W
    )


@_compiled
def _widen(W, columns, low, high):
    """Lets low..high of each lane span the weights of a block."""
    for step in range(columns // STEP):
        w = W[step * STEP * LANES : (step + 1) * STEP * LANES]
        for n in range(LANES):
            a, b, c, d = w[n], w[LANES + n], w[2 * LANES + n], w[3 * LANES + n]
            e, f, g, h = w[4 * LANES + n], w[5 * LANES + n], w[6 * LANES + n], w[7 * LANES + n]
            bottom = min(min(min(a, b), min(c, d)), min(min(e, f), min(g, h)))
            top = max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))
            low[n], high[n] = min(low[n], bottom), max(high[n], top)


@_compiled
def _lost(w, level, n, weight):
    """Squared error of w on the grid of lane n."""
    code = np.rint(min(max(_f32(w * level[n]), level[2 * LANES + n]), level[3 * LANES + n]))
    error = _f32(_f32(code * level[LANES + n]) - w)
    return _f32(_f32(error * error) * weight)


@_compiled
def _set_level(scale, zero, grid, level):
    """The grid of each lane: 1 / scale, scale, lowest and highest multiple of it, zero point."""
    for n in range(LANES):
        level[n] = _f32(1) / scale[n]
        level[LANES + n] = scale[n]
        level[2 * LANES + n] = grid.qmin - zero[n]
        level[3 * LANES + n] = grid.qmax - zero[n]
        level[4 * LANES + n] = zero[n]


@_compiled
def _add_errors(W, columns, importance, level, total, errors):
    """Adds the weighted squared error of each lane on its grid to `errors`."""
    total[:] = 0
    for step in range(columns // STEP):
        w = W[step * STEP * LANES : (step + 1) * STEP * LANES]
        weight = importance[step * STEP : (step + 1) * STEP]
        for n in range(LANES):
            a = _lost(w[n], level, n, weight[0])
            b = _lost(w[LANES + n], level, n, weight[1])
            c = _lost(w[2 * LANES + n], level, n, weight[2])
            d = _lost(w[3 * LANES + n], level, n, weight[3])
            e = _lost(w[4 * LANES + n], level, n, weight[4])
            f = _lost(w[5 * LANES + n], level, n, weight[5])
            g = _lost(w[6 * LANES + n], level, n, weight[6])
            h = _lost(w[7 * LANES + n], level, n, weight[7])
            total[n] += ((a + b) + (c + d)) + ((e + f) + (g + h))
    for n in range(LANES):
        errors[n] += total[n]


@_compiled
def _multiple(w, level, n):
    """code - zero point of w on the grid of lane n, nearest with ties to even."""
    return np.rint(min(max(_f32(w / level[LANES + n]), level[2 * LANES + n]), level[3 * LANES + n]))


@_compiled
def _square_of_error(w, multiple, scale, grid):
    value = _rounded(_f32(multiple * scale), grid.unit, grid.even, grid.odd)
    error = _f32(w - value) if abs(value) < grid.limit else _f32(np.inf)
    return _f32(error * error)


@_compiled
def _round_block(W, columns, level, grid, sums, words):
    """Words [columns / 4, LANES] of four codes each; adds to the sums of squares of the lanes."""
    for word in range(columns // 4):
        w = W[word * 4 * LANES : (word + 1) * 4 * LANES]
        for n in range(LANES):
            w0, w1, w2, w3 = w[n], w[LANES + n], w[2 * LANES + n], w[3 * LANES + n]
            m0, m1 = _multiple(w0, level, n), _multiple(w1, level, n)
            m2, m3 = _multiple(w2, level, n), _multiple(w3, level, n)
            scale, zero = level[LANES + n], level[4 * LANES + n]
            e0, e1 = _square_of_error(w0, m0, scale, grid), _square_of_error(w1, m1, scale, grid)
            e2, e3 = _square_of_error(w2, m2, scale, grid), _square_of_error(w3, m3, scale, grid)
            sums[n] += (e0 + e1) + (e2 + e3)
            sums[LANES + n] += (w0 * w0 + w1 * w1) + (w2 * w2 + w3 * w3)
            a = _u32(_u32(np.int32(m0 + zero)) & _u32(255))
            b = _u32(_u32(_u32(np.int32(m1 + zero)) & _u32(255)) << _u32(8))
            c = _u32(_u32(_u32(np.int32(m2 + zero)) & _u32(255)) << _u32(16))
            d = _u32(_u32(np.int32(m3 + zero)) << _u32(24))
            words[word * LANES + n] = _u32(_u32(a | b) | _u32(c | d))


@_compiled
def _search(W, columns, importance, grid, scales, zeros, level, total, errors):
    """Adds what a block loses on each of the candidates."""
    for index in range(len(scales)):
        _set_level(scales[index], zeros[index], grid, level)
        _add_errors(W, columns, importance, level, total, errors[index])


@_compiled
def _keep_best(errors, least, scales, zeros):
    """Puts the first of the candidates with the least error in the place of number 0."""
    least[:] = np.inf
    for index in range(len(errors)):
        for n in range(LANES):
            if errors[index, n] < least[n]:
                least[n] = errors[index, n]
                scales[0, n] = scales[index, n]
                zeros[0, n] = zeros[index, n]


@_compiled
def round_rows(source, shrinks, candidates, grid, importance, words, scales, zeros, sums):
    """Rounds all rows of `source`, group by group and 64 rows at once.

    Fills `words` uint32 [rows, in / 4] with four int8 codes each, `scales` and `zeros` float32
    [rows, groups]. Adds to `sums` float64 [3] the squares of the errors, those of the weights, and
    the number of rows that are zero throughout.
    """
    rows, groups = scales.shape
    size = len(importance) // groups
    W, packed = np.zeros(BLOCK * LANES, _f32), np.empty(BLOCK // 4 * LANES, _u32)
    low, high, peak = np.empty(LANES, _f32), np.empty(LANES, _f32), np.zeros(rows, _f32)
    level, total, lost = np.empty(5 * LANES, _f32), np.empty(LANES, _f32), np.empty(2 * LANES, _f32)
    tried, tried_zeros = np.empty((candidates, LANES), _f32), np.empty((candidates, LANES), _f32)
    errors, least = np.empty((candidates, LANES), np.float64), np.empty(LANES, np.float64)
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        for first in range(0, rows, LANES):
            lanes = min(LANES, rows - first)
            low[:], high[:], errors[:] = 0, 0, 0
            for column in range(start, stop, BLOCK):
                columns = min(BLOCK, stop - column)
                _load(source, first, lanes, column, columns, W)
                _widen(W, columns, low, high)
            _candidates(low, high, shrinks, grid, tried, tried_zeros)
            if candidates > 1:
                for column in range(start, stop, BLOCK):
                    columns = min(BLOCK, stop - column)
                    if size > BLOCK:  # else it is still there
                        _load(source, first, lanes, column, columns, W)
                    weights = importance[column:]
                    _search(W, columns, weights, grid, tried, tried_zeros, level, total, errors)
                _keep_best(errors, least, tried, tried_zeros)
            _set_level(tried[0], tried_zeros[0], grid, level)
            for column in range(start, stop, BLOCK):
                columns = min(BLOCK, stop - column)
                if size > BLOCK:
                    _load(source, first, lanes, column, columns, W)
                lost[:] = 0
                _round_block(W, columns, level, grid, lost, packed)
                for n in range(lanes):
                    sums[0] += lost[n]
                    sums[1] += lost[LANES + n]
                    row = words[first + n, column // 4 : (column + columns) // 4]
                    for word in range(columns // 4):
                        row[word] = packed[word * LANES + n]
            for n in range(lanes):
                scales[first + n, group], zeros[first + n, group] = tried[0, n], tried_zeros[0, n]
                peak[first + n] = max(peak[first + n], max(high[n], -low[n]))
    for n in range(rows):
        sums[2] += peak[n] == 0
