"""X^T X of packed inputs by VDPBF16PS, which adds two products to each of 16 float32 lanes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from grokquant.calibration.gram_panels import WIDTH, add_tile

_LANES = 16  # float32 numbers in a register of 512 bits
# A tile of the result, 8 rows by 2 vectors: 16 accumulators hide the latency of the instruction
# and leave registers for its operands, of 32.
_ROWS = 8
_VECTORS = 2
_PAIR_BYTES = WIDTH * 4
# Bytes of a panel added up in one run, 12 KB: two panels fit the first cache, and short sums round
# less.
_RUN = 96 * _PAIR_BYTES
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


@njit(nogil=True, cache=True)
def add_products(packed: np.ndarray, H: np.ndarray, first: int, stop: int) -> None:
    """Adds X^T X to panels of columns of H float32 [in, in], `first` to before `stop`.

    `packed` is that of `gram_kernels`, with one side. Only the upper triangle is valid afterwards.
    """
    tile = np.empty((WIDTH, WIDTH), np.float32)
    panel_bytes = packed[0].size * 4
    for above in range(stop):
        left = packed[above].ctypes.data
        for panel in range(max(first, above), stop):
            right = packed[panel].ctypes.data
            tile[:] = 0
            for run in range(0, panel_bytes, _RUN):
                size = min(_RUN, panel_bytes - run)
                for row in range(0, WIDTH, _ROWS):
                    at = left + run + row * 4
                    _multiply(at, right + run, size, tile.ctypes.data + row * WIDTH * 4)
            add_tile(tile, H, above, panel)


class _BFloat(ir.Type):
    """LLVM's type bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


# One pair of tokens in each lane, as loaded and as the instruction takes it; then its results.
_PAIRS = ir.VectorType(ir.IntType(32), _LANES)
_HALVES = ir.VectorType(_BFloat(), 2 * _LANES)
_SUMS = ir.VectorType(ir.FloatType(), _LANES)


def _multiply_code(
    _: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Adds left^T right of `size` bytes of two panels to a tile.

    The loop passes over the pairs of tokens; its accumulators stay in registers.
    """
    left, right, size, tile = arguments
    before = builder.block
    loop = builder.append_basic_block("loop")
    after = builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    offset = builder.phi(left.type)
    offset.add_incoming(ir.Constant(left.type, 0), before)
    accumulators = [builder.phi(_SUMS) for _ in range(_ROWS * _VECTORS)]
    sums = _add_pair(builder, builder.add(left, offset), builder.add(right, offset), accumulators)
    for accumulator, total in zip(accumulators, sums, strict=True):
        accumulator.add_incoming(ir.Constant(_SUMS, [0.0] * _LANES), before)
        accumulator.add_incoming(total, builder.block)
    following = builder.add(offset, ir.Constant(offset.type, _PAIR_BYTES))
    offset.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_unsigned("<", following, size), loop, after)
    builder.position_at_end(after)
    for index, total in enumerate(sums):
        line = _at(builder, tile, index * _LANES * 4, _SUMS)
        builder.store(builder.fadd(builder.load(line, align=4), total), line, align=4)
    return ir.Constant(ir.IntType(8).as_pointer(), None)


def _add_pair(
    builder: ir.IRBuilder, left: ir.Value, right: ir.Value, accumulators: list[ir.Value]
) -> list[ir.Value]:
    """The accumulators [rows x vectors] after one pair of tokens.

    `left` and `right` are its addresses in the two panels. The pair in each column of `left` is
    copied to all lanes and multiplied by the vectors of `right`.
    """
    kind = ir.FunctionType(_SUMS, [_SUMS, _HALVES, _HALVES])
    dot = cgutils.get_or_insert_function(builder.module, kind, _DOT)
    vectors = [
        builder.load(_at(builder, right, vector * _LANES * 4, _HALVES), align=4)
        for vector in range(_VECTORS)
    ]
    sums = []
    for row in range(_ROWS):
        pair = builder.load(_at(builder, left, row * 4, ir.IntType(32)), align=4)
        first = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, ir.IntType(32)(0))
        copies = builder.shuffle_vector(first, first, ir.Constant(_PAIRS, [0] * _LANES))
        lanes = builder.bitcast(copies, _HALVES)
        for vector in range(_VECTORS):
            accumulator = accumulators[row * _VECTORS + vector]
            sums.append(builder.call(dot, [accumulator, lanes, vectors[vector]]))
    return sums


def _at(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """A pointer to a `kind`, `offset` bytes after `address`."""
    moved = builder.add(address, ir.Constant(address.type, offset))
    return builder.inttoptr(moved, kind.as_pointer())


def _multiply_type(_: Any, left: Any, right: Any, size: Any, tile: Any) -> tuple[Any, Callable]:
    """`_multiply_code` for the addresses of two panels' first pairs, their size and a tile."""
    return types.none(types.uintp, types.uintp, types.uintp, types.uintp), _multiply_code


_multiply: Callable = intrinsic(_multiply_type)
