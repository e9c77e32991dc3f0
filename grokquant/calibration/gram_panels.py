"""Inputs packed as the kernels of X^T X read them, and the tile of the result that they write.

Instructions that multiply bfloat16 take the products of two tokens at once, so two tokens are
interleaved into 32-bit pairs. A panel is 32 columns of X:

                          column 0  column 1
    pair 0 of a panel    | t1 t0  | t1 t0  | ..     t0: token 0, bfloat16 in the low half
    pair 1               | t3 t2  | t3 t2  | ..     t1: token 1, in the high half

`packed` [panels, sides, pairs, 32] uint32. That is side 0. A second one, for a kernel that reads
the left factor by rows of X^T, has every 16 pairs transposed, [pairs / 16, 32, 16] in memory.
"""

import numpy as np
from numba import njit

from grokquant.methods.kernels import STEP, transpose

WIDTH = 32  # columns of a panel
BLOCK = 16  # pairs that are transposed together


@njit(nogil=True, cache=True)
def pack(X: np.ndarray, packed: np.ndarray, first: int, stop: int) -> None:
    """Fills the panels of X, bfloat16 seen as uint16 [tokens, in], from `first` to before `stop`.

    Pads X with zeros. Two sides need a multiple of BLOCK pairs.
    """
    for panel in range(first, stop):
        _interleave(X, panel * WIDTH, packed[panel, 0])
        if packed.shape[1] == 2:
            _transpose_blocks(packed[panel, 0].ravel(), packed[panel, 1].ravel())


@njit(nogil=True, cache=True)
def add_tile(tile: np.ndarray, H: np.ndarray, above: int, panel: int) -> None:
    """Adds a tile [WIDTH, WIDTH] to H where the rows of panel `above` cross columns of `panel`."""
    start = panel * WIDTH
    stop = min(start + WIDTH, len(H))
    for row in range(min(WIDTH, len(H) - above * WIDTH)):
        line = H[above * WIDTH + row][start:stop]
        for column in range(stop - start):
            line[column] += tile[row, column]


@njit(nogil=True, cache=True)
def _interleave(X: np.ndarray, start: int, pairs: np.ndarray) -> None:
    tokens, features = X.shape
    width = min(WIDTH, features - start)
    for pair in range(len(pairs)):
        line = pairs[pair]
        line[:] = 0
        if 2 * pair < tokens:
            low = X[2 * pair][start : start + width]
            for lane in range(width):
                line[lane] = low[lane]
        if 2 * pair + 1 < tokens:
            high = X[2 * pair + 1][start : start + width]
            for lane in range(width):
                line[lane] |= np.uint32(high[lane]) << np.uint32(16)


@njit(nogil=True, cache=True)
def _transpose_blocks(pairs: np.ndarray, turned: np.ndarray) -> None:
    for block in range(0, len(pairs), BLOCK * WIDTH):
        for pair in range(0, BLOCK, STEP):
            for lane in range(0, WIDTH, STEP):
                at = block + pair * WIDTH + lane
                to = block + lane * BLOCK + pair
                transpose(pairs, at, WIDTH, turned, to, BLOCK)  # type: ignore[call-arg]
