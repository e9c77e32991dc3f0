"""X^T X of bfloat16 inputs in float32 on CPUs that multiply pairs of bfloat16 (AVX-512 BF16).

PyTorch has no CPU product of bfloat16 matrices with a float32 result, and converting the inputs
first costs half the speed. Products of bfloat16 are exact in float32. Two tokens are interleaved
into 32-bit pairs, since the instruction adds up two products per lane.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# A tile of the result: as many accumulators as the instruction's latency needs, and in registers.
_ROWS, _LANES, _VECTORS = 8, 16, 2
WIDTH = _LANES * _VECTORS
_PAIR_BYTES = WIDTH * 4
# Bytes of a panel added up in one run: two fit the first cache, and short sums round less.
_RUN = 96 * _PAIR_BYTES
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


def available() -> bool:
    """Whether this CPU has the instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))


@njit(nogil=True, cache=True)
def pack(X: np.ndarray, packed: np.ndarray, first: int, step: int) -> None:
    """Interleaves X, bfloat16 seen as uint16 [tokens, in], into pairs of tokens.

    `packed` is uint32 [panels, pairs, WIDTH], of which every `step`-th panel from `first` on is
    filled; what X does not fill becomes zero.
    """
    tokens, features = X.shape
    for panel in range(first, packed.shape[0], step):
        start = panel * WIDTH
        width = min(WIDTH, features - start)
        for pair in range(packed.shape[1]):
            line = packed[panel, pair]
            line[:] = 0
            for lane in range(width):
                line[lane] = X[2 * pair, start + lane]
            if 2 * pair + 1 < tokens:
                for lane in range(width):
                    line[lane] |= np.uint32(X[2 * pair + 1, start + lane]) << np.uint32(16)


@njit(nogil=True, cache=True)
def add_products(packed: np.ndarray, H: np.ndarray, first: int, step: int) -> None:
    """Adds X^T X of packed inputs to every `step`-th panel of columns of H float32 [in, in].

    Begins with panel `first`. Only the upper triangle means anything afterwards. Some 1000 pairs
    at a time are best: a panel of them fits the second cache, and H is seldom visited.
    """
    tile = np.empty((WIDTH, WIDTH), np.float32)
    start, sums = packed.ctypes.data, tile.ctypes.data
    panel_bytes = packed.shape[1] * _PAIR_BYTES
    for panel in range(first, packed.shape[0], step):
        right = start + panel * panel_bytes
        for above in range(panel + 1):
            left = start + above * panel_bytes
            tile[:] = 0
            for run in range(0, panel_bytes, _RUN):
                size = min(_RUN, panel_bytes - run)
                for row in range(0, WIDTH, _ROWS):
                    at = left + run + row * 4
                    _multiply(at, right + run, size, sums + row * WIDTH * 4)
            corner = H[above * WIDTH : (above + 1) * WIDTH, panel * WIDTH : (panel + 1) * WIDTH]
            corner += tile[: corner.shape[0], : corner.shape[1]]


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


def _multiply_code(
    _: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Adds left^T right of `size` bytes of two panels to a tile, all accumulators in registers."""
    left, right, size, tile = arguments
    pairs, sums = ir.VectorType(ir.IntType(32), _LANES), ir.VectorType(ir.FloatType(), _LANES)
    halves = ir.VectorType(_BFloat(), 2 * _LANES)
    dot = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(sums, [sums, halves, halves]), _DOT
    )

    def at(address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
        moved = builder.add(address, ir.Constant(address.type, offset))
        return builder.inttoptr(moved, kind.as_pointer())

    before = builder.block
    loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    offset = builder.phi(left.type)
    offset.add_incoming(ir.Constant(left.type, 0), before)
    accumulators = [builder.phi(sums) for _ in range(_ROWS * _VECTORS)]
    for accumulator in accumulators:
        accumulator.add_incoming(ir.Constant(sums, [0.0] * _LANES), before)
    vectors = [
        builder.load(at(builder.add(right, offset), vector * _LANES * 4, halves), align=4)
        for vector in range(_VECTORS)
    ]
    for row in range(_ROWS):
        pair = builder.load(at(builder.add(left, offset), row * 4, ir.IntType(32)), align=4)
        lanes = builder.insert_element(ir.Constant(pairs, ir.Undefined), pair, ir.IntType(32)(0))
        lanes = builder.shuffle_vector(lanes, lanes, ir.Constant(pairs, [0] * _LANES))
        lanes = builder.bitcast(lanes, halves)
        for vector in range(_VECTORS):
            accumulator = accumulators[row * _VECTORS + vector]
            accumulator.add_incoming(
                builder.call(dot, [accumulator, lanes, vectors[vector]]), builder.block
            )
    following = builder.add(offset, ir.Constant(offset.type, _PAIR_BYTES))
    offset.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_unsigned("<", following, size), loop, after)
    builder.position_at_end(after)
    for index, accumulator in enumerate(accumulators):
        line = at(tile, index * _LANES * 4, sums)
        total = builder.fadd(builder.load(line, align=4), accumulator.incomings[1][0])
        builder.store(total, line, align=4)
    return ir.Constant(ir.IntType(8).as_pointer(), None)


def _multiply_type(_: Any, left: Any, right: Any, size: Any, tile: Any) -> tuple[Any, Callable]:
    """`_multiply_code` for the addresses of two panels' first pairs, their size and a tile."""
    return types.none(types.uintp, types.uintp, types.uintp, types.uintp), _multiply_code


_multiply: Callable = intrinsic(_multiply_type)
