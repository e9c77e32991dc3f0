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

from grokquant.calibration.gram_panels import WIDTH, add_tile

_ROWS = 16  # of a register
_ROW_BYTES = 64
_TILE_BYTES = _ROWS * _ROW_BYTES
_LINE_BYTES = WIDTH * 4  # of a panel's pairs, and of its tile of the result
_LEFT, _RIGHT = 4, 6  # the first register of each factor
# Bytes 0, 16 to 31 and 48 to 55 of what LDTILECFG reads: the palette, then the bytes of a row and
# the rows of each register.
_SHAPES = np.zeros(64, np.uint8)
_SHAPES[0] = 1
_SHAPES[16:32:2] = _ROW_BYTES
_SHAPES[48:56] = _ROWS


@njit(nogil=True, cache=True)
def add_products(packed: np.ndarray, H: np.ndarray, first: int, stop: int) -> None:
    """Adds X^T X to panels of columns of H float32 [in, in], `first` to before `stop`.

    `packed` is that of `gram_panels`, with both sides. Only the upper triangle is valid afterwards.
    """
    tile = np.empty((WIDTH, WIDTH), np.float32)
    blocks = packed.shape[2] // _ROWS
    shapes = _SHAPES.copy()
    _set_shapes(shapes.ctypes.data)
    for above in range(stop):
        left = packed[above, 1].ctypes.data
        for panel in range(max(first, above), stop):
            _multiply(left, packed[panel, 0].ctypes.data, blocks, tile.ctypes.data)
            add_tile(tile, H, above, panel)
    _release()


_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_ADDRESS = _BYTE.as_pointer()


def _instruction(builder: ir.IRBuilder, name: str, arguments: list[ir.Value]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, arguments)


def _move(builder: ir.IRBuilder, name: str, register: int, address: ir.Value, stride: int) -> None:
    """Loads or stores a register whose rows are `stride` bytes apart in memory."""
    pointer = builder.inttoptr(address, _ADDRESS)
    _instruction(builder, name, [_BYTE(register), pointer, _LONG(stride)])


def _multiply_code(
    _: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Writes left^T right to a tile; the sums of all blocks of pairs stay in registers."""
    left, right, blocks, tile = arguments
    for register in range(_LEFT):
        _instruction(builder, "tilezero", [_BYTE(register)])
    with cgutils.for_range(builder, blocks) as loop:
        offset = builder.mul(loop.index, _LONG(WIDTH * _ROW_BYTES))
        _add_block(builder, builder.add(left, offset), builder.add(right, offset))
    for half in range(2):
        for side in range(2):
            corner = builder.add(tile, _LONG(half * _ROWS * _LINE_BYTES + side * _ROW_BYTES))
            _move(builder, "tilestored64", 2 * half + side, corner, _LINE_BYTES)
    return ir.Constant(_ADDRESS, None)


def _add_block(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> None:
    for half in range(2):
        above = builder.add(left, _LONG(half * _TILE_BYTES))
        _move(builder, "tileloadd64", _LEFT + half, above, _ROW_BYTES)
        beside = builder.add(right, _LONG(half * _ROW_BYTES))
        _move(builder, "tileloadd64", _RIGHT + half, beside, _LINE_BYTES)
    for half in range(2):
        for side in range(2):
            registers = (2 * half + side, _LEFT + half, _RIGHT + side)
            _instruction(builder, "tdpbf16ps", [_BYTE(register) for register in registers])


def _set_shapes_code(
    _: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    _instruction(builder, "ldtilecfg", [builder.inttoptr(arguments[0], _ADDRESS)])
    return ir.Constant(_ADDRESS, None)


def _release_code(_: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    _instruction(builder, "tilerelease", [])
    return ir.Constant(_ADDRESS, None)


def _multiply_type(_: Any, left: Any, right: Any, blocks: Any, tile: Any) -> tuple[Any, Callable]:
    """`_multiply_code` for the addresses of two panels, their blocks of pairs and a tile."""
    return types.none(types.uintp, types.uintp, types.intp, types.uintp), _multiply_code


def _set_shapes_type(_: Any, shapes: Any) -> tuple[Any, Callable]:
    """`_set_shapes_code` for the address of 64 bytes."""
    return types.none(types.uintp), _set_shapes_code


def _release_type(_: Any) -> tuple[Any, Callable]:
    """`_release_code`, without which each later switch of threads would save the registers."""
    return types.none(), _release_code


_multiply: Callable = intrinsic(_multiply_type)
_set_shapes: Callable = intrinsic(_set_shapes_type)
_release: Callable = intrinsic(_release_type)
