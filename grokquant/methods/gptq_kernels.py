"""The column loop of GPTQ on a CPU, compiled: rows are independent, so they fill the vector lanes.

Everything is transposed, [columns, rows], so that neighbours in memory are neighbouring rows:

               row 0   row 1   ..  row 63        one tile
    column 0   round ->->->->->->->->           1. a column is rounded for 64 rows at once,
    column 1   += F[0, 1] * error                2. then its errors are fed back to the columns
    column 2   += F[0, 2] * error                   below it, before the next one is rounded
"""

import numpy as np
from numba import njit

# Rows per tile: four 512-bit vectors, and 64 columns of them fill half of a first-level cache.
_LANES = 64


# A product and a sum may become one instruction; no other liberty is taken with the order of sums.
_compiled = njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")


@_compiled
def nearest(table: np.ndarray, value: float) -> int:
    """The index of the entry of `table` nearest to `value`, the first of equals."""
    best = 0
    for index in range(1, len(table)):
        if abs(table[index] - value) < abs(table[best] - value):
            best = index
    return best


@_compiled
def _load(targets: np.ndarray, start: int, lanes: int, tile: np.ndarray) -> None:
    for column in range(len(tile)):
        for lane in range(lanes):
            tile[column, lane] = targets[column, start + lane]


@_compiled
def _feed_back(tile: np.ndarray, F: np.ndarray, column: int, error: np.ndarray) -> None:
    """Adds the errors of `column` to the targets of all columns after it."""
    for later in range(column + 1, len(tile)):
        factor = F[column, later]
        for lane in range(_LANES):  # a fixed count, which the compiler unrolls
            tile[later, lane] += factor * error[lane]


@_compiled
def round_columns(
    limits: tuple[float, float],
    rows: tuple[int, int],
    errors: np.ndarray,
    targets: np.ndarray,
    codes: np.ndarray,
    groups: np.ndarray,
    D: np.ndarray,
    F: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
) -> float:
    """Rounds a block of columns of W for the rows from `rows[0]` to before `rows[1]`.

    Reads `targets` float32 [block, rows], the weights with the feedback of all columns before the
    block; `limits`, the lowest and highest code; `F` [block, block] and `D` [block], the unit upper
    factor and its pivots; `scales`, `zero_points` and `offsets` float32 [groups, rows], where
    `groups` [block] is the group of each column; and `table`, the values of a codebook, or empty.
    Writes `codes` int8 [block, rows]. `errors` float32 [block, rows] holds W before and W - Q
    after. Returns the sum of D (target - Q)^2.
    """
    block = targets.shape[0]
    tile = np.zeros((block, _LANES), np.float32)
    error = np.zeros(_LANES, np.float32)
    lost = np.zeros(_LANES, np.float32)
    low = np.float32(limits[0])  # float64 would widen all that follows
    high = np.float32(limits[1])
    loss = 0.0
    for start in range(rows[0], rows[1], _LANES):
        lanes = min(_LANES, rows[1] - start)
        lost[:] = 0
        _load(targets, start, lanes, tile)
        for column in range(block):
            group = groups[column]
            pivot = D[column]
            # In one piece: LLVM does not vectorize it with the rounding in a function of its own.
            for lane in range(lanes):
                row = start + lane
                target = tile[column, lane]
                scale = scales[group, row]
                zero = zero_points[group, row]
                offset = offsets[group, row]
                code = np.rint((target - offset) / scale) + zero
                code = min(max(code, low), high)
                value = (code - zero) * scale + offset
                if len(table):
                    code = np.float32(nearest(table, target / scale))
                    value = table[int(code)] * scale
                miss = target - value
                lost[lane] += pivot * miss * miss
                error[lane] = errors[column, row] - value
                errors[column, row] = error[lane]
                codes[column, row] = np.int8(code)
            _feed_back(tile, F, column, error)
        for lane in range(lanes):  # in float64, as the sums of many rows
            loss += lost[lane]
    return loss


@_compiled
def round_coupled_columns(
    limits: tuple[float, float],
    coupling: np.ndarray,
    errors: np.ndarray,
    targets: np.ndarray,
    codes: np.ndarray,
    groups: np.ndarray,
    F: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
) -> None:
    """The same where rows of W are coupled, so that in a column they are rounded one by one.

    `coupling` [blocks, B, B] are unit upper factors U of the metric of consecutive rows, rows =
    blocks * B. `errors` holds W before and U^T (W - Q) after.
    """
    blocks, size, _ = coupling.shape
    low = np.float32(limits[0])  # float64 would widen all that follows
    high = np.float32(limits[1])
    mixed = np.zeros(size, np.float32)
    for column in range(len(targets)):
        group = groups[column]
        for block in range(blocks):
            mixed[:] = 0
            for r in range(size):
                row = block * size + r
                target = targets[column, row] + mixed[r]
                scale = scales[group, row]
                if len(table):
                    code = np.float32(nearest(table, target / scale))
                    value = table[int(code)] * scale
                else:
                    zero = zero_points[group, row]
                    offset = offsets[group, row]
                    code = np.rint((target - offset) / scale) + zero
                    code = min(max(code, low), high)
                    value = (code - zero) * scale + offset
                miss = errors[column, row] - value
                errors[column, row] = miss + mixed[r]
                codes[column, row] = np.int8(code)
                for k in range(r + 1, size):
                    mixed[k] += coupling[block, r, k] * miss
        for later in range(column + 1, len(targets)):
            factor = F[column, later]
            for row in range(targets.shape[1]):
                targets[later, row] += factor * errors[column, row]
