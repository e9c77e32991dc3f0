"""The grids of llama.cpp on CPUs, compiled: finds the levels of blocks, rounds and measures them.

`fits` and `find_blocks` find the same in torch operations, bit for bit, and explain the steps. 64
rows lie side by side as in `kernels`, whose picture and rules about dtypes hold here too:

    a block of 256 columns, W    | group 0 | group 1 | ..      each [group_size, LANES]
    scales[group, n]             of a group of row n (a "lane")
    d[n]                         the float16 step of the block: scales are multiples of it

Loops over `STEP` columns have a fixed length. The compiler unrolls them, then it makes vector
instructions of the loop over lanes around them.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from grokquant.methods.fits import STEP
from grokquant.methods.kernels import LANES, highest, load_rows, lowest, rounded, store_words

_f32 = np.float32
_u32 = np.uint32
# Python calls none of them, and what would let it takes a third of the time of compiling. numba's
# types do not know these two options.
_compiled = njit(  # type: ignore[call-overload]
    nogil=True, cache=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)

# float16: the last bit of a float32 mantissa that it keeps, what rounding adds to the bits below,
# its least normal number, the distance of smaller ones, and what is infinite.
_HALF_UNIT = _u32(1 << 13)
_HALF_EVEN = _u32((1 << 12) - 1)
_HALF_ODD = _u32(1 << 12)
_HALF_NORMAL = _f32(2.0**-14)
_HALF_STEP = _f32(2.0**-24)
_HALF_LIMIT = _f32(65536.0)
# By how much the number of steps of a group may change, in the order of `find_blocks`.
_MOVES = np.array([0, -1, 1], _f32)

# Where `level` holds what the weights of each lane are divided by, its scale and its offset; and
# `totals` its squared errors and weights, and the largest magnitudes of weights and rounded ones.
_SCALE, _OFFSET = 1 * LANES, 2 * LANES
_NORM, _PEAK, _ROUNDED_PEAK = 1 * LANES, 2 * LANES, 3 * LANES


class BlockGrid(NamedTuple):
    """A grid of llama.cpp in numbers.

    Codes are `lowest` to `highest`, or places in a table. A search scales the far end of a group to
    each of `reaches` float32 [tries] in turn; without one there are none. Where a block has a
    header, scales and minima are `least` to `most` steps of it, `step_reaches` float32 is what its
    largest scale may be, and each of them is moved by one `refinements` times.

    A table: its `entries` float32 [codes], which rise, the `middles` between them, and in
    `half_steps` the entry nearest to each half step from the lowest one. `farthest` is the entry of
    largest magnitude, or the highest code.

    Steps below `least_step` and sums of squares below `least_squares` count as these.
    """

    group_size: int
    lowest: np.float32
    highest: np.float32
    farthest: np.float32
    has_offsets: bool
    any_sign: bool
    has_header: bool
    least: np.float32
    most: np.float32
    refinements: int
    reaches: np.ndarray
    step_reaches: np.ndarray
    has_table: bool
    entries: np.ndarray
    middles: np.ndarray
    half_steps: np.ndarray
    least_step: np.float32
    least_squares: np.float32


class _Lanes(NamedTuple):
    """Scratch memory for one group, float32 [LANES] each: `edge` is its lowest weight or its peak,
    `inverse` 1 / range or 1 / peak; sums of weights w times codes c and columns x; a candidate with
    its error, and the least error so far."""

    edge: np.ndarray
    inverse: np.ndarray
    factor: np.ndarray
    wx: np.ndarray
    wc: np.ndarray
    wcc: np.ndarray
    wcx: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    error: np.ndarray
    least: np.ndarray


class _Block(NamedTuple):
    """Scratch memory for a block of LANES rows, all of float32 but `words`, with what `Outputs`
    holds of it. W [columns * LANES]; values of groups [groups, LANES]; codes and values of one
    group [group_size * LANES]; `words` [columns / 4, LANES]; `level` [3 * LANES] and `totals`
    [4 * LANES], whose parts are named above; all others [LANES]."""

    W: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray
    whole: np.ndarray
    minima: np.ndarray
    costs: np.ndarray
    codes: np.ndarray
    values: np.ndarray
    words: np.ndarray
    level: np.ndarray
    totals: np.ndarray
    d: np.ndarray
    dmin: np.ndarray
    peak: np.ndarray
    best: np.ndarray
    error: np.ndarray
    least: np.ndarray
    tried: np.ndarray
    tried_minima: np.ndarray
    start: np.ndarray
    start_minima: np.ndarray


class Outputs(NamedTuple):
    """What `round_blocks` fills, float32 except `words` and `sums`.

    `words` uint32 [rows, in / 4], four int8 codes each; `scales` and `offsets` [groups, rows], and
    `whole` and `minima`, the same in the steps `d` and `dmin` [blocks, rows]; `peaks` [2, rows],
    the largest magnitudes of weights and of rounded ones. Adds to `sums` float64 [2]: squares of
    errors, and of weights.
    """

    words: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray
    whole: np.ndarray
    minima: np.ndarray
    d: np.ndarray
    dmin: np.ndarray
    peaks: np.ndarray
    sums: np.ndarray


def scratch(groups: int, group_size: int) -> tuple[_Lanes, _Block]:
    """Memory for blocks of so many groups."""
    columns = groups * group_size
    of_groups = ("scales", "offsets", "whole", "minima", "costs")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(of_groups, (groups, LANES)) | {
        "W": (columns * LANES,),
        "codes": (group_size * LANES,),
        "values": (group_size * LANES,),
        "words": (columns // 4, LANES),
        "level": (3 * LANES,),
        "totals": (4 * LANES,),
    }
    lanes = _Lanes(*(np.zeros(LANES, _f32) for _ in _Lanes._fields))
    block = (np.zeros(shapes.get(name, (LANES,)), _f32) for name in _Block._fields)
    return lanes, _Block(*block)._replace(words=np.zeros(shapes["words"], _u32))


@_compiled
def _half(x):
    """x rounded to float16."""
    size = abs(x)
    value = rounded(size, _HALF_UNIT, _HALF_EVEN, _HALF_ODD)
    value = _f32(np.rint(_f32(size / _HALF_STEP)) * _HALF_STEP) if size < _HALF_NORMAL else value
    value = _f32(np.inf) if value >= _HALF_LIMIT else value
    return _f32(np.copysign(value, x))  # of -0, too


@_compiled
def _half_above(x):
    """The least float16 that is not below x, which is not negative."""
    value = _half(x)
    if value >= x:
        return value
    if value < _HALF_NORMAL:
        return _f32(value + _HALF_STEP)
    bits = _u32(_f32(value).view(_u32) + _HALF_UNIT)
    following = bits.view(_f32)
    return _f32(np.inf) if following >= _HALF_LIMIT else following


# --- columns of one group, W [columns, LANES], with the cost of an error in each in `weights`


@_compiled
def _code(x, lowest, highest):
    return min(max(np.rint(x), lowest), highest)


@_compiled
def _entry(x, grid):
    """The entry of the table nearest to x."""
    low = grid.entries[0]
    high = grid.entries[len(grid.entries) - 1]
    inside = x if x > low else low  # so NaN is inside, too
    inside = inside if inside < high else high
    return grid.half_steps[np.int32(_f32(_f32(inside - low) * _f32(2)))]


@_compiled
def _set_errors(W, weights, grid, scale, offset, lanes):
    """Sets the weighted squared errors of rounding to these levels."""
    lanes.error[:] = 0
    for n in range(LANES):
        small = abs(scale[n]) < grid.least_step
        lanes.factor[n] = grid.least_step if small else scale[n]
    for start in range(0, len(weights), STEP):
        w = W[start * LANES : (start + STEP) * LANES]
        weight = weights[start : start + STEP]
        if grid.has_table:
            _add_table_errors(w, weight, grid, lanes)
        else:
            _add_errors(w, weight, grid, offset, lanes)


@_compiled
def _add_errors(w, weight, grid, offset, lanes):
    low = grid.lowest
    high = grid.highest
    for n in range(LANES):
        scale = lanes.factor[n]
        inverse = _f32(1) / scale
        shift = offset[n]
        total = _f32(0)
        for k in range(STEP):
            x = w[k * LANES + n]
            value = _code(_f32(_f32(x - shift) * inverse), low, high)
            error = _f32(_f32(_f32(value * scale) + shift) - x)
            total += _f32(_f32(error * error) * weight[k])
        lanes.error[n] += total


@_compiled
def _add_table_errors(w, weight, grid, lanes):
    for n in range(LANES):
        scale = lanes.factor[n]
        inverse = _f32(1) / scale
        total = _f32(0)
        for k in range(STEP):
            x = w[k * LANES + n]
            value = _entry(_f32(x * inverse), grid)
            error = _f32(_f32(value * scale) - x)
            total += _f32(_f32(error * error) * weight[k])
        lanes.error[n] += total


@_compiled
def _set_products(W, weights, sums):
    """Sets the sums of weights times columns."""
    sums[:] = 0
    for start in range(0, len(weights), STEP):
        w = W[start * LANES : (start + STEP) * LANES]
        weight = weights[start : start + STEP]
        for n in range(LANES):
            total = _f32(0)
            for k in range(STEP):
                total += _f32(weight[k] * w[k * LANES + n])
            sums[n] += total


@_compiled
def _total(weights):
    total = _f32(0)
    for start in range(0, len(weights), STEP):
        step = _f32(0)
        for k in range(STEP):
            step += weights[start + k]
        total += step
    return total


# --- groups with an offset


@_compiled
def _fit_range(W, weights, grid, lanes, scale, offset):
    """Sets the best scales and offsets [LANES]: `fits.fit_range`."""
    _set_ranges(W, len(weights), grid, lanes, scale, offset)
    if len(grid.reaches) == 0:
        return
    _set_errors(W, weights, grid, scale, offset, lanes)
    for n in range(LANES):
        lanes.least[n] = lanes.error[n]
    _set_products(W, weights, lanes.wx)
    total = _total(weights)
    for reach in grid.reaches:
        for n in range(LANES):
            lanes.factor[n] = lanes.inverse[n] * reach
        _set_range_sums(W, weights, grid, lanes)
        _solve(total, grid, lanes)
        _set_errors(W, weights, grid, lanes.scale, lanes.offset, lanes)
        for n in range(LANES):
            better = lanes.error[n] < lanes.least[n] and lanes.scale[n] > 0
            scale[n] = lanes.scale[n] if better else scale[n]
            offset[n] = lanes.offset[n] if better else offset[n]
            lanes.least[n] = lanes.error[n] if better else lanes.least[n]


@_compiled
def _set_ranges(W, columns, grid, lanes, scale, offset):
    """Sets the scales and offsets that span each lane's range."""
    low = lanes.edge
    high = lanes.factor
    for n in range(LANES):
        low[n] = W[n]
        high[n] = W[n]
    for start in range(0, columns, STEP):
        w = W[start * LANES : (start + STEP) * LANES]
        for n in range(LANES):
            low[n] = min(low[n], lowest(w, n))
            high[n] = max(high[n], highest(w, n))
    for n in range(LANES):
        low[n] = _f32(low[n] + _f32(0))  # no -0
        low[n] = low[n] if grid.any_sign else min(low[n], _f32(0))
        high[n] = high[n] if grid.any_sign else max(high[n], _f32(0))
        span = _f32(high[n] - low[n]) if high[n] > low[n] else _f32(1)
        lanes.inverse[n] = _f32(1) / span
        scale[n] = span / grid.highest
        offset[n] = low[n]


@_compiled
def _set_range_sums(W, weights, grid, lanes):
    """Sets the sums over weights times codes: alone, squared, and with the columns."""
    high = grid.highest
    lanes.wc[:] = 0
    lanes.wcc[:] = 0
    lanes.wcx[:] = 0
    for start in range(0, len(weights), STEP):
        w = W[start * LANES : (start + STEP) * LANES]
        weight = weights[start : start + STEP]
        for n in range(LANES):
            low = lanes.edge[n]
            factor = lanes.factor[n]
            wc = _f32(0)
            wcc = _f32(0)
            wcx = _f32(0)
            for k in range(STEP):
                x = w[k * LANES + n]
                code = _code(_f32(_f32(x - low) * factor), _f32(0), high)
                weighted = _f32(weight[k] * code)
                wc += weighted
                wcc += _f32(weighted * code)
                wcx += _f32(weighted * x)
            lanes.wc[n] += wc
            lanes.wcc[n] += wcc
            lanes.wcx[n] += wcx


@_compiled
def _solve(total, grid, lanes):
    """Sets the candidate's scale and offset by the normal equations: `fits._least_squares`."""
    for n in range(LANES):
        wx = lanes.wx[n]
        wc = lanes.wc[n]
        wcc = lanes.wcc[n]
        wcx = lanes.wcx[n]
        determinant = _f32(_f32(total * wcc) - _f32(wc * wc))
        safe = determinant if determinant > 0 else _f32(1)
        scale = _f32(_f32(total * wcx) - _f32(wc * wx)) / safe
        offset = _f32(_f32(wcc * wx) - _f32(wc * wcx)) / safe
        alone = wcx / (wcc if wcc > 0 else _f32(1))
        above = offset > 0 and not grid.any_sign
        scale = alone if above else scale
        lanes.scale[n] = scale if determinant > 0 else _f32(0)
        lanes.offset[n] = _f32(0) if above else offset


# --- groups without an offset


@_compiled
def _fit_scale(W, weights, grid, lanes, scale, cost):
    """Sets the best scales and their costs [LANES]: `fits.fit_symmetric` or `fits.fit_table`."""
    _set_peaks(W, len(weights), grid, lanes, scale)
    if len(grid.reaches) == 0:
        return
    scale[:] = 0
    cost[:] = 0
    lanes.least[:] = np.inf
    for reach in grid.reaches:
        for n in range(LANES):
            lanes.factor[n] = lanes.inverse[n] * reach
        _set_code_sums(W, weights, grid, lanes)
        for n in range(LANES):
            squares = max(lanes.wcc[n], grid.least_squares)
            fitting = lanes.wcx[n] / squares
            error = -lanes.wcx[n] * fitting
            better = error < lanes.least[n]
            scale[n] = fitting if better else scale[n]
            cost[n] = squares if better else cost[n]
            lanes.least[n] = error if better else lanes.least[n]
    if not grid.has_table:
        _fit_again(W, weights, grid, lanes, scale, cost)


@_compiled
def _fit_again(W, weights, grid, lanes, scale, cost):
    """Fits the scales to the codes nearest to them."""
    for n in range(LANES):
        small = abs(scale[n]) < grid.least_step
        lanes.factor[n] = _f32(1) / (grid.least_step if small else scale[n])
    _set_code_sums(W, weights, grid, lanes)
    for n in range(LANES):
        cost[n] = max(lanes.wcc[n], grid.least_squares)
        scale[n] = lanes.wcx[n] / cost[n]


@_compiled
def _set_peaks(W, columns, grid, lanes, scale):
    """Sets the scales that give each lane's largest weight, its peak, the farthest code."""
    peak = lanes.edge
    for n in range(LANES):
        peak[n] = W[n]
    for k in range(1, columns):
        for n in range(LANES):
            x = W[k * LANES + n]
            peak[n] = x if abs(x) > abs(peak[n]) else peak[n]
    for n in range(LANES):
        lanes.inverse[n] = _f32(1) / (_f32(1) if peak[n] == 0 else peak[n])
        scale[n] = (peak[n] if grid.has_table else abs(peak[n])) / grid.farthest


@_compiled
def _set_code_sums(W, weights, grid, lanes):
    """Sets the sums over weights times codes or entries: squared, and with the columns."""
    lanes.wcc[:] = 0
    lanes.wcx[:] = 0
    for start in range(0, len(weights), STEP):
        w = W[start * LANES : (start + STEP) * LANES]
        weight = weights[start : start + STEP]
        if grid.has_table:
            _add_entry_sums(w, weight, grid, lanes)
        else:
            _add_code_sums(w, weight, grid, lanes)


@_compiled
def _add_code_sums(w, weight, grid, lanes):
    low = grid.lowest
    high = grid.highest
    for n in range(LANES):
        factor = lanes.factor[n]
        wcc = _f32(0)
        wcx = _f32(0)
        for k in range(STEP):
            x = w[k * LANES + n]
            code = _code(_f32(x * factor), low, high)
            wcc += _f32(weight[k] * _f32(code * code))
            wcx += _f32(_f32(weight[k] * x) * code)
        lanes.wcc[n] += wcc
        lanes.wcx[n] += wcx


@_compiled
def _add_entry_sums(w, weight, grid, lanes):
    for n in range(LANES):
        factor = lanes.factor[n]
        wcc = _f32(0)
        wcx = _f32(0)
        for k in range(STEP):
            x = w[k * LANES + n]
            entry = _entry(_f32(x * factor), grid)
            wcc += _f32(weight[k] * _f32(entry * entry))
            wcx += _f32(_f32(weight[k] * x) * entry)
        lanes.wcc[n] += wcc
        lanes.wcx[n] += wcx


# --- blocks with a header, W [columns, LANES]; numbers of their groups [groups, LANES]


@_compiled
def _set_step(values, most, step):
    """Sets the steps [LANES] of which no value is more than `most`: `find_blocks._step`."""
    for n in range(LANES):
        largest = _f32(0)
        for group in range(len(values)):
            largest = max(largest, abs(values[group, n]))
        step[n] = _half_above(_f32(largest / most))


@_compiled
def _in_steps(value, step, grid):
    return _code(_f32(value / (_f32(1) if step == 0 else step)), grid.least, grid.most)


@_compiled
def _group(W, weights, group, grid):
    """The columns of a group and their weights."""
    start = group * grid.group_size
    stop = start + grid.group_size
    return W[start * LANES : stop * LANES], weights[start:stop]


@_compiled
def _search_step(grid, block):
    """Changes the steps to those that change the scales least: `find_blocks._search_step`."""
    _set_block_peaks(block)
    block.least[:] = np.inf
    for n in range(LANES):
        block.tried[n] = block.d[n]
        block.best[n] = block.d[n]  # what stays where all errors are NaN
    for attempt in range(len(grid.step_reaches) + 1):
        if attempt > 0:
            for n in range(LANES):
                block.tried[n] = _half(_f32(block.peak[n] / grid.step_reaches[attempt - 1]))
        _set_changes(grid, block)
        for n in range(LANES):
            better = block.error[n] < block.least[n]
            block.best[n] = block.tried[n] if better else block.best[n]
            block.least[n] = block.error[n] if better else block.least[n]
    for n in range(LANES):
        block.d[n] = block.best[n]


@_compiled
def _set_changes(grid, block):
    """Sets the cost of making all scales multiples of the steps that are tried."""
    block.error[:] = 0
    for start in range(0, len(block.scales), STEP):
        for n in range(LANES):
            step = block.tried[n]
            total = _f32(0)
            for k in range(STEP):
                scale = block.scales[start + k, n]
                change = _f32(_f32(step * _in_steps(scale, step, grid)) - scale)
                total += _f32(block.costs[start + k, n] * _f32(change * change))
            block.error[n] += total


@_compiled
def _set_block_peaks(block):
    """Sets the first of the scales of largest magnitude of each lane."""
    peak = block.peak
    for n in range(LANES):
        peak[n] = block.scales[0, n]
    for group in range(1, len(block.scales)):
        for n in range(LANES):
            scale = block.scales[group, n]
            peak[n] = scale if abs(scale) > abs(peak[n]) else peak[n]


@_compiled
def _refine(w, weight, grid, lanes, block, group):
    """Moves the numbers of steps of a group by one where that lowers its error:
    `find_blocks._refine`."""
    whole = block.whole[group]
    minima = block.minima[group]
    for n in range(LANES):
        block.start[n] = whole[n]
        block.start_minima[n] = minima[n]
    block.least[:] = np.inf
    others = 3 if grid.has_offsets else 1
    for attempt in range(3 * others):
        move = _MOVES[attempt // others]
        other = _MOVES[attempt % others]
        for n in range(LANES):
            block.tried[n] = _code(_f32(block.start[n] + move), grid.least, grid.most)
            block.tried_minima[n] = _code(
                _f32(block.start_minima[n] + other), grid.least, grid.most
            )
            lanes.scale[n] = block.d[n] * block.tried[n]
            lanes.offset[n] = -_f32(block.dmin[n] * block.tried_minima[n])
        _set_errors(w, weight, grid, lanes.scale, lanes.offset, lanes)
        for n in range(LANES):
            better = lanes.error[n] < block.least[n]
            whole[n] = block.tried[n] if better else whole[n]
            minima[n] = block.tried_minima[n] if better else minima[n]
            block.least[n] = lanes.error[n] if better else block.least[n]


@_compiled
def _set_header(W, weights, grid, lanes, block):
    """Replaces the scales and offsets of groups by multiples of the steps of their block."""
    groups = len(block.scales)
    _set_step(block.scales, grid.most, block.d)
    if grid.has_offsets:
        _set_step(block.offsets, grid.most, block.dmin)
    if len(grid.step_reaches):
        _search_step(grid, block)
    for group in range(groups):
        for n in range(LANES):
            block.whole[group, n] = _in_steps(block.scales[group, n], block.d[n], grid)
            block.minima[group, n] = _in_steps(-block.offsets[group, n], block.dmin[n], grid)
        w, weight = _group(W, weights, group, grid)
        for _ in range(grid.refinements):
            _refine(w, weight, grid, lanes, block, group)
        for n in range(LANES):
            block.scales[group, n] = block.d[n] * block.whole[group, n]
            block.offsets[group, n] = -_f32(block.dmin[n] * block.minima[group, n])


@_compiled
def _store_halves(grid, block):
    """Rounds scales and offsets to float16. Integers have no scale of 0."""
    for group in range(len(block.scales)):
        for n in range(LANES):
            scale = _half(block.scales[group, n])
            block.scales[group, n] = _f32(1) if scale == 0 and not grid.has_table else scale
            block.offsets[group, n] = _half(block.offsets[group, n])


# --- rounding


# Loops over few arrays: of more, LLVM makes no vector instructions.


@_compiled
def _round_group(w, grid, block, group):
    """Rounds to codes; adds to the totals of lanes."""
    scales = block.scales[group]
    offsets = block.offsets[group]
    level = block.level
    for n in range(LANES):
        level[n] = grid.least_step if scales[n] == 0 else scales[n]
    level[_SCALE:_OFFSET] = scales
    level[_OFFSET:] = offsets
    first = group * grid.group_size // 4
    words = block.words[first : first + grid.group_size // 4]
    if grid.has_table:
        _set_places(w, grid, block)
        _round_to_table(w, block, words)
    else:
        _round_to_integers(w, grid.lowest, grid.highest, level, block.totals, words)


@_compiled
def _round_to_integers(w, low, high, level, totals, words):
    for number in range(len(words)):
        four = w[number * 4 * LANES : (number + 1) * 4 * LANES]
        line = words[number]
        for n in range(LANES):
            divisor = level[n]
            scale = level[_SCALE + n]
            offset = level[_OFFSET + n]
            a = four[n]
            b = four[LANES + n]
            c = four[2 * LANES + n]
            d = four[3 * LANES + n]
            code_a = _code(_f32(_f32(a - offset) / divisor), low, high)
            code_b = _code(_f32(_f32(b - offset) / divisor), low, high)
            code_c = _code(_f32(_f32(c - offset) / divisor), low, high)
            code_d = _code(_f32(_f32(d - offset) / divisor), low, high)
            line[n] = _word(code_a, code_b, code_c, code_d)
            value_a = _f32(_f32(code_a * scale) + offset)
            value_b = _f32(_f32(code_b * scale) + offset)
            value_c = _f32(_f32(code_c * scale) + offset)
            value_d = _f32(_f32(code_d * scale) + offset)
            _add_totals(a, b, c, d, value_a, value_b, value_c, value_d, totals, n)


@_compiled
def _round_to_table(w, block, words):
    for number in range(len(words)):
        part = slice(number * 4 * LANES, (number + 1) * 4 * LANES)
        _pack_four(block.codes[part], words[number])
        _measure(w[part], block.values[part], block.level, block.totals)


@_compiled
def _pack_four(codes, line):
    for n in range(LANES):
        line[n] = _word(codes[n], codes[LANES + n], codes[2 * LANES + n], codes[3 * LANES + n])


@_compiled
def _measure(four, entries, level, totals):
    for n in range(LANES):
        scale = level[_SCALE + n]
        a = four[n]
        b = four[LANES + n]
        c = four[2 * LANES + n]
        d = four[3 * LANES + n]
        value_a = _f32(entries[n] * scale)
        value_b = _f32(entries[LANES + n] * scale)
        value_c = _f32(entries[2 * LANES + n] * scale)
        value_d = _f32(entries[3 * LANES + n] * scale)
        _add_totals(a, b, c, d, value_a, value_b, value_c, value_d, totals, n)


@_compiled
def _word(a, b, c, d):
    """Codes of four neighbouring columns as one word, the first in its lowest byte."""
    low = _u32(_u32(np.int32(a)) & _u32(255)) | _u32(_u32(_u32(np.int32(b)) & _u32(255)) << _u32(8))
    high = _u32(_u32(_u32(np.int32(c)) & _u32(255)) << _u32(16)) | _u32(
        _u32(np.int32(d)) << _u32(24)
    )
    return _u32(_u32(low) | _u32(high))


@_compiled
def _add_totals(a, b, c, d, value_a, value_b, value_c, value_d, totals, n):
    """Four weights of lane n and what they become, in float32 as llama.cpp computes."""
    error_a = _f32(a - value_a)
    error_b = _f32(b - value_b)
    error_c = _f32(c - value_c)
    error_d = _f32(d - value_d)
    totals[n] += (error_a * error_a + error_b * error_b) + (error_c * error_c + error_d * error_d)
    totals[_NORM + n] += (a * a + b * b) + (c * c + d * d)
    peak = max(max(abs(a), abs(b)), max(abs(c), abs(d)))
    rounded_peak = max(max(abs(value_a), abs(value_b)), max(abs(value_c), abs(value_d)))
    totals[_PEAK + n] = max(totals[_PEAK + n], peak)
    totals[_ROUNDED_PEAK + n] = max(totals[_ROUNDED_PEAK + n], rounded_peak)


@_compiled
def _set_places(w, grid, block):
    """Sets the place of the nearest entry: the number of middles below."""
    block.codes[:] = 0
    for start in range(0, len(w), LANES):
        for n in range(LANES):
            block.values[start + n] = w[start + n] / block.level[n]
    for middle in grid.middles:
        for n in range(len(w)):
            block.codes[n] += _f32(1) if block.values[n] > middle else _f32(0)
    for n in range(len(w)):
        block.values[n] = grid.entries[np.int32(block.codes[n])]


@njit(nogil=True, cache=True, error_model="numpy")
def round_blocks(source, grid, importance, lanes, block, out):
    """Finds the levels of all rows of a `kernels.RowSource`, block by block, and rounds to them.

    `importance` float32 [in] is the cost of an error in each column; `lanes` and `block` are
    scratch memory.
    """
    groups = len(block.scales)
    width = groups * grid.group_size
    for first in range(0, len(out.words), LANES):
        count = min(LANES, len(out.words) - first)
        block.totals[:] = 0
        for number in range(len(importance) // width):
            start = number * width
            weights = importance[start : start + width]
            load_rows(source, first, count, start, width, block.W)
            for group in range(groups):
                w, weight = _group(block.W, weights, group, grid)
                if grid.has_offsets:
                    _fit_range(w, weight, grid, lanes, block.scales[group], block.offsets[group])
                else:
                    _fit_scale(w, weight, grid, lanes, block.scales[group], block.costs[group])
            if grid.has_header:
                _set_header(block.W, weights, grid, lanes, block)
            else:
                _store_halves(grid, block)
            block.totals[:_PEAK] = 0
            for group in range(groups):
                w, _ = _group(block.W, weights, group, grid)
                _round_group(w, grid, block, group)
            _store(block, first, count, number, out)
        for n in range(count):
            out.peaks[0, first + n] = block.totals[_PEAK + n]
            out.peaks[1, first + n] = block.totals[_ROUNDED_PEAK + n]


@_compiled
def _copy(lanes, row):
    for n in range(len(row)):
        row[n] = lanes[n]


@_compiled
def _store(block, first, count, number, out):
    """Copies the results of a block to their places."""
    groups = len(block.scales)
    words = len(block.words)
    store_words(block.words.reshape(-1), first, count, number * words, words, out.words)
    for group in range(groups):
        at = number * groups + group
        _copy(block.scales[group], out.scales[at][first : first + count])
        _copy(block.offsets[group], out.offsets[at][first : first + count])
        _copy(block.whole[group], out.whole[at][first : first + count])
        _copy(block.minima[group], out.minima[at][first : first + count])
    for n in range(count):
        out.d[number, first + n] = block.d[n]
        out.dmin[number, first + n] = block.dmin[n]
        out.sums[0] += block.totals[n]
        out.sums[1] += block.totals[_NORM + n]
