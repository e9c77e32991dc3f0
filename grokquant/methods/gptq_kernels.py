"""The column loop of GPTQ on a CPU, compiled: rows are independent, so they fill the vector lanes.

Everything is transposed, [columns, rows], so that neighbours in memory are neighbouring rows.
"""

import numpy as np
from numba import njit

# Rows per tile: four 512-bit vectors, and 64 columns of them fill half of a first-level cache.
_LANES = 64


@njit(nogil=True, cache=True)
def _nearest(table: np.ndarray, value: float) -> int:
    """The place in `table` of what is nearest to `value`."""
    best = 0
    for place in range(1, len(table)):
        if abs(table[place] - value) < abs(table[best] - value):
            best = place
    return best


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
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
    """Rounds a block of columns of W for the rows from `rows[0]` to `rows[1]`.

    `errors` float32 [block, rows] comes in as the weights and goes out as W - Q, `codes` int8
    [block, rows] goes out; `targets` float32 [block, rows] are the weights with the feedback of all
    columns before; `F` [block, block] and `D` [block] are the unit upper factor and its pivots;
    `scales`, `zero_points` and `offsets` are float32 [groups, rows], `groups` [block] names each
    column's; `limits` are the ends of the grid. `table` has the values of a codebook, or none.
    Returns the sum of D (target - Q)^2.
    """
    block = targets.shape[0]
    tile = np.zeros((block, _LANES), np.float32)
    error = np.zeros(_LANES, np.float32)
    lost = np.zeros(_LANES, np.float32)
    low, high = np.float32(limits[0]), np.float32(limits[1])
    loss = 0.0
    for start in range(rows[0], rows[1], _LANES):
        lanes = min(_LANES, rows[1] - start)
        lost[:] = 0
        for column in range(block):
            for lane in range(lanes):
                tile[column, lane] = targets[column, start + lane]
        for column in range(block):
            group, pivot = groups[column], D[column]
            for lane in range(lanes):
                row = start + lane
                scale, zero = scales[group, row], zero_points[group, row]
                offset = offsets[group, row]
                code = np.rint((tile[column, lane] - offset) / scale) + zero
                code = min(max(code, low), high)
                value = (code - zero) * scale + offset
                if len(table):
                    code = np.float32(_nearest(table, tile[column, lane] / scale))
                    value = table[int(code)] * scale
                miss = tile[column, lane] - value
                lost[lane] += pivot * miss * miss
                error[lane] = errors[column, row] - value
                errors[column, row] = error[lane]
                codes[column, row] = np.int8(code)
            for later in range(column + 1, block):
                factor = F[column, later]
                for lane in range(_LANES):  # a fixed count, which the compiler unrolls
                    tile[later, lane] += factor * error[lane]
        for lane in range(lanes):
            loss += lost[lane]
    return loss
