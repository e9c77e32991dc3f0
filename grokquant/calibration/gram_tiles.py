"""X^T X of packed inputs by AMX, whose registers are tiles of 16 rows of 64 bytes.

TDPBF16PS adds the product of a tile of 16 columns of X by 16 pairs of tokens and of one of 16 pairs
by 16 columns to a tile of 16 x 16 float32. Four results, of two left and two right tiles, need all
eight registers and load each operand for two products:

                       right 6    right 7
              left 4  | sum 0  |  sum 1  |
              left 5  | sum 2  |  sum 3  |
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from grokquant import amx
from grokquant.amx import ROW_BYTES, ROWS
from grokquant.calibration.gram_panels import WIDTH, add_tile

_TILE_BYTES = ROWS * ROW_BYTES
_LINE_BYTES = WIDTH * 4  # of a panel's pairs, and of its tile of the result
_LEFT, _RIGHT = 4, 6  # the first register of each factor
_ADDRESS, _LONG = ir.IntType(8).as_pointer(), ir.IntType(64)


@njit(nogil=True, cache=True)
def add_products(packed: np.ndarray, H: np.ndarray, first: int, stop: int) -> None:
    """Adds X^T X to panels of columns of H float32 [in, in], `first` to before `stop`.

    `packed` is that of `gram_panels`, with both sides. Only the upper triangle is valid afterwards.
    """
    tile = np.empty((WIDTH, WIDTH), np.float32)
    blocks = packed.shape[2] // ROWS
    _configure()
    for above in range(stop):
        left = packed[above, 1].ctypes.data
        for panel in range(max(first, above), stop):
            _multiply(left, packed[panel, 0].ctypes.data, blocks, tile.ctypes.data)
            add_tile(tile, H, above, panel)
    _release()


def _at(builder: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    """A pointer to what is `offset` bytes after `address`."""
    return builder.inttoptr(builder.add(address, _LONG(offset)), _ADDRESS)


def _multiply_code(
    _: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Writes left^T right to a tile; the sums of all blocks of pairs stay in registers."""
    left, right, blocks, tile = arguments
    for register in range(_LEFT):
        amx.call(builder, "tilezero", register)
    with cgutils.for_range(builder, blocks) as loop:
        offset = builder.mul(loop.index, _LONG(WIDTH * ROW_BYTES))
        _add_block(builder, builder.add(left, offset), builder.add(right, offset))
    for half in range(2):
        for side in range(2):
            corner = _at(builder, tile, half * ROWS * _LINE_BYTES + side * ROW_BYTES)
            amx.store(builder, 2 * half + side, corner, _LONG(_LINE_BYTES))
    return ir.Constant(_ADDRESS, None)


def _add_block(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> None:
    for half in range(2):
        amx.load(builder, _LEFT + half, _at(builder, left, half * _TILE_BYTES))
        beside = _at(builder, right, half * ROW_BYTES)
        amx.load(builder, _RIGHT + half, beside, _LONG(_LINE_BYTES))
    for half in range(2):
        for side in range(2):
            amx.call(builder, "tdpbf16ps", 2 * half + side, _LEFT + half, _RIGHT + side)


def _configure_code(_: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    amx.configure(builder)
    return ir.Constant(_ADDRESS, None)


def _release_code(_: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    amx.release(builder)
    return ir.Constant(_ADDRESS, None)


def _multiply_type(_: Any, left: Any, right: Any, blocks: Any, tile: Any) -> tuple[Any, Callable]:
    """`_multiply_code` for the addresses of two panels, their blocks of pairs and a tile."""
    return types.none(types.uintp, types.uintp, types.intp, types.uintp), _multiply_code


def _configure_type(_: Any) -> tuple[Any, Callable]:
    """`_configure_code`."""
    return types.none(), _configure_code


def _release_type(_: Any) -> tuple[Any, Callable]:
    """`_release_code`."""
    return types.none(), _release_code


_multiply: Callable = intrinsic(_multiply_type)
_configure: Callable = intrinsic(_configure_type)
_release: Callable = intrinsic(_release_type)
