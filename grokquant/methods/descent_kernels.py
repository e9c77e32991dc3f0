"""The loops of `descent` on a CPU, compiled: codes of some columns, scales of a group, feedback.

A block is B consecutive rows that the metric G couples; a matrix that it does not couple has blocks
of one row. In a column the rows of a block take turns, then all that moved is fed back at once:

                column j                columns j + 1 ..
    row 0       code moves by d0        += (G d)[0] H[j, ..]
    row 1       sees G[1, 0] d0, d1     += (G d)[1] H[j, ..]
    row 2       sees G[2, 0] d0 + ..    += (G d)[2] H[j, ..]
"""

import numpy as np
from numba import njit

from grokquant.methods.gptq_kernels import nearest
from grokquant.methods.kernels import Grid, stored_scale

# Columns of a row of H that many rows use before they leave a first-level cache.
_CHUNK = 512
# Float32 of a line of a cache.
_LINE = 16

# A product and a sum may become one instruction; no other liberty is taken with the order of sums.
_compiled = njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
_f32 = np.float32


@_compiled
def _add(factor: float, values: np.ndarray, sums: np.ndarray) -> None:
    """sums += factor * values"""
    for place in range(len(sums)):
        sums[place] += factor * values[place]


@_compiled
def move_codes(
    start: int,
    group_size: int,
    limits: tuple[float, float],
    reach: float,
    gradient: np.ndarray,
    H: np.ndarray,
    G: np.ndarray,
    steps: np.ndarray,
    zero_points: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    codes: np.ndarray,
    moved: np.ndarray,
) -> None:
    """Moves the codes of the columns from `start` on to where each alone makes the objective least.

    Reads `gradient` float32 [rows, columns], G E H of these columns, which is overwritten; `H`
    [columns, columns] and `G` [blocks, B, B], rows = blocks * B; `steps`, `zero_points` and
    `offsets` float32 [rows, groups]; `table`, the values of a codebook, or empty; `limits`, the
    lowest and highest code; and `reach`, half of the least distance between values, in steps: what
    misses its best value by less has the nearest code. Writes `codes` int8 [rows, in] and adds the
    change of each value to `moved` float32 [rows, in]. A group whose step is 0 keeps its codes.
    """
    blocks, size, _ = G.shape
    low = _f32(limits[0])  # float64 would widen all that follows
    high = _f32(limits[1])
    near = _f32(reach)
    mixed = np.zeros(size, np.float32)
    for block in range(blocks):
        first = block * size
        for column in range(len(H)):
            place = start + column
            group = place // group_size
            pivot = H[column, column]
            any_moved = False
            mixed[:] = 0
            for r in range(size):
                row = first + r
                step = steps[row, group]
                curvature = G[block, r, r] * pivot
                slope = gradient[row, column] + pivot * mixed[r]
                # Most codes stay: this needs no division. A dead column stays, too.
                if step == 0 or not abs(slope) > near * abs(step) * curvature:
                    continue
                old = codes[row, place]
                if len(table):
                    value = table[old] * step
                    best = value - slope / curvature
                    code = _f32(nearest(table, best / step))
                    new_value = table[int(code)] * step
                else:
                    zero = zero_points[row, group]
                    offset = offsets[row, group]
                    value = (_f32(old) - zero) * step + offset
                    best = value - slope / curvature
                    code = min(max(np.rint((best - offset) / step) + zero, low), high)
                    new_value = (code - zero) * step + offset
                if abs(new_value - best) < abs(value - best):
                    change = new_value - value
                    codes[row, place] = np.int8(code)
                    moved[row, place] += change
                    any_moved = True
                    for k in range(size):
                        mixed[k] += G[block, r, k] * change
            if any_moved:
                for r in range(size):
                    _add(mixed[r], H[column, column + 1 :], gradient[first + r, column + 1 :])


@_compiled
def move_levels(
    slopes: np.ndarray,
    curvatures: np.ndarray,
    levels: np.ndarray,
    steps: np.ndarray,
    limits: tuple[float, float],
    grid: Grid,
    keeps_sign: bool,
) -> np.ndarray:
    """The changes float32 [rows] of one level, a scale or an offset, of a group of columns.

    `slopes` [rows] and `curvatures` [blocks, B, B] are the first and the second derivatives of half
    the objective by `levels` [rows]. A level becomes the number nearest to its best value that the
    file can hold, if that lowers the objective: a multiple of its `steps` [rows] within `limits`;
    where `steps` is empty, what the scale dtype of `grid` holds. With `keeps_sign` it becomes
    neither 0 nor another sign.
    """
    changes = np.zeros(len(levels), np.float32)
    low = _f32(limits[0])
    high = _f32(limits[1])
    blocks, size, _ = curvatures.shape
    for block in range(blocks):
        for r in range(size):
            row = block * size + r
            slope = slopes[row]
            for k in range(r):
                slope += curvatures[block, r, k] * changes[block * size + k]
            curvature = curvatures[block, r, r]
            if not curvature > 0:
                continue
            best = levels[row] - slope / curvature
            if len(steps):
                step = steps[row]
                new = min(max(np.rint(best / step), low), high) * step if step != 0 else _f32(0)
            else:
                new = stored_scale(best, grid) if abs(best) >= grid.least else _f32(0)
            if keeps_sign and not new * levels[row] > 0:
                continue
            change = new - levels[row]
            if change * (2 * slope + curvature * change) < 0 and abs(new) < grid.limit:
                changes[row] = change
    return changes


@_compiled
def find_moved(
    count: int, moved: np.ndarray, source: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of the `count` changes in `moved` float32 [rows, in] that are not 0.

    `source` are columns from the first to before the second; those of a cache line come together.
    """
    rows = np.empty(count, np.int64)
    columns = np.empty(count, np.int64)
    changes = np.empty(count, np.float32)
    found = 0
    for first in range(source[0], source[1], _LINE):
        last = min(first + _LINE, source[1])
        for row in range(len(moved)):
            line = moved[row, first:last]
            size = _f32(0)
            for place in range(len(line)):  # most lines hold nothing, and this takes vectors
                size = max(size, abs(line[place]))
            if size == 0:
                continue
            for place in range(len(line)):
                if line[place] != 0:
                    rows[found] = row
                    columns[found] = first + place
                    changes[found] = line[place]
                    found += 1
    return rows, columns, changes


@_compiled
def feed_back(
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    H: np.ndarray,
    sink: tuple[int, int],
    EH: np.ndarray,
) -> None:
    """EH[:, sink] += moved @ H[:, sink], where `find_moved` found what moved.

    `EH` is float32 [rows, in], H is [in, in]; `sink` are columns from the first to before the
    second.
    """
    rows, columns, changes = found
    for first in range(sink[0], sink[1], _CHUNK):
        last = min(first + _CHUNK, sink[1])
        for index in range(len(rows)):
            _add(changes[index], H[columns[index], first:last], EH[rows[index], first:last])
