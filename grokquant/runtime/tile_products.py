"""The products of `block_products` by AMX, whose registers are tiles of 16 rows of 64 bytes.

    tokens     32 columns of 16 tokens, a token to a row            bfloat16 [16, 32]
    weights    four dense chunks of a block, a pair to a row        bfloat16 [16, 32]
    sums       a token to a row, the 16 rows of the block beside    float32 [16, 16]

One instruction adds the product of the first two to the third.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from grokquant import amx
from grokquant.runtime.block_products import (
    COLUMNS,
    PAIRS,
    TILE,
    WEIGHTS,
    Floats,
    Levels,
    bits,
    dequantize_chunks,
    for_blocks,
    round_rows,
)
from grokquant.runtime.vectors import (
    FLOATS,
    LANES,
    MULTIPLIES_BFLOAT16,
    SHORTS,
    WORDS,
    ZEROS,
    arrays,
    rounded,
)

MULTIPLIES_TILES = MULTIPLIES_BFLOAT16 and amx.is_available()
TOKENS = amx.ROWS  # of a tile
_CHUNKS = 4  # of a tile
# Blocks that share few tokens: a register for the sums and one for the weights of each.
_HEIGHT = 3
# Blocks and tiles of many tokens that are multiplied at once: a register for each sum.
_SIDE = 2
_WEIGHTS = _SIDE * _SIDE
_INPUTS = _WEIGHTS + _SIDE
# Blocks and chunks that are dequantized at once and stay in the cache.
DENSE_BLOCKS = 4
DENSE_CHUNKS = 128
BYTE = ir.IntType(8)


@njit(nogil=True, cache=True)
def multiply(table, codes, scales, zeros, x, sums, out, start, stop):
    """As that of `block_products` in bfloat16, for `x` from `in_tiles` and any number of tokens."""
    for first in range(start, stop, TILE):
        end = min(first + TILE, stop)
        for token in range(0, len(out), TOKENS):
            _multiply(table, codes, scales, zeros, x, sums, out, first, end, token)


@njit(nogil=True, cache=True)
def multiply_many(table, codes, scales, zeros, x, dense, totals, out, start, stop):
    """As that of `block_products`, for `x` from `in_tiles`.

    It works in `dense` uint16 [DENSE_BLOCKS, DENSE_CHUNKS, 128] and `totals` float32 [tokens of
    whole tiles, DENSE_BLOCKS * LANES], from `memory`.
    """
    chunks = codes.shape[1]
    for block in range(start, stop, DENSE_BLOCKS):
        height = min(DENSE_BLOCKS, stop - block)
        totals[:] = 0
        for first in range(0, chunks, DENSE_CHUNKS):
            some = min(DENSE_CHUNKS, chunks - first)
            dequantize_chunks(table, codes, scales, zeros, dense, block, height, first, some)
            _add_dense(dense, x, totals, height, first, some)
        round_rows(totals, out, block, height)


def in_tiles(x: Tensor) -> np.ndarray:
    """The bits of x bfloat16 [tokens, in], zeros after it: [tiles, tiles of columns, 512]."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % TOKENS))
    tiles = padded.unflatten(1, (-1, _CHUNKS * COLUMNS)).unflatten(0, (-1, TOKENS))
    return bits(tiles.transpose(1, 2).flatten(2).contiguous())


def memory(tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """What `multiply_many` works in, for so many tiles of tokens."""
    dense = np.empty((DENSE_BLOCKS, DENSE_CHUNKS, COLUMNS * LANES), np.uint16)
    return dense, np.empty((tiles * TOKENS, DENSE_BLOCKS * LANES), np.float32)


def _multiply_type(_, table, codes, scales, zeros, x, sums, out, start, stop, token):
    """As `multiply`, for the tile of tokens from `token` on."""
    places = (types.intp,) * 3
    return types.none(table, codes, scales, zeros, x, sums, out, *places), _product


_multiply: Callable = intrinsic(_multiply_type)


def _product(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_multiply`. The registers are sums and weights of blocks, and tokens."""
    table, codes, scales, zeros, x, sums, out = arrays(context, builder, signature, arguments)
    start, stop, first = arguments[-3:]
    number = first.type
    weights = WEIGHTS[codes.kind.dtype, x.kind.dtype](codes, table)
    levels = Levels(scales, zeros, sums)
    groups = scales.size(1)
    steps = builder.udiv(builder.udiv(codes.size(1), groups), number(_CHUNKS))
    tile = builder.udiv(first, number(TOKENS))
    left = builder.sub(out.size(0), first)
    few = builder.icmp_unsigned("<", left, number(TOKENS))
    tokens = builder.select(few, left, number(TOKENS))

    def multiply_blocks(blocks: list[ir.Value]) -> None:
        dense = [_Memory(builder, WORDS) for _ in blocks]
        of_group = [_Memory(builder, FLOATS) for _ in blocks]
        totals = [_Memory(builder, FLOATS) for _ in blocks]
        for total in totals:
            total.clear()
        with cgutils.for_range(builder, groups) as group:
            for row in range(len(blocks)):
                amx.call(builder, "tilezero", row)
            with cgutils.for_range(builder, steps) as step:
                place = builder.add(builder.mul(group.index, steps), step.index)
                _unpack(builder, weights, blocks, place, dense)
                amx.load(builder, 2 * _HEIGHT, x.at(BYTE, tile, place, number(0)))
                for row, memory in enumerate(dense):
                    amx.load(builder, _HEIGHT + row, memory.at())
                    amx.call(builder, "tdpbf16ps", row, 2 * _HEIGHT, _HEIGHT + row)
            for row, memory in enumerate(of_group):
                amx.store(builder, row, memory.at())
            with cgutils.for_range(builder, tokens) as token:
                added, old = (
                    [[[memory.vector(token.index)]] for memory in memories]
                    for memories in (of_group, totals)
                )
                place = builder.add(first, token.index)
                levels.add_scaled(added, old, blocks, group.index, place)
        with cgutils.for_range(builder, tokens) as token:
            for block, total in zip(blocks, totals, strict=True):
                value = builder.load(total.vector(token.index))
                row = builder.mul(block, number(LANES))
                address = out.at(SHORTS, builder.add(first, token.index), row)
                builder.store(rounded(builder, value), address, align=1)

    amx.configure(builder)
    for_blocks(builder, start, stop, _HEIGHT, multiply_blocks)
    amx.release(builder)
    return context.get_dummy_value()


def _unpack(
    builder: ir.IRBuilder,
    weights: Floats,
    blocks: list[ir.Value],
    tile: ir.Value,
    dense: list["_Memory"],
) -> None:
    """Writes a tile of each block's codes, or of what their table has for them, to memory."""
    for number in range(_CHUNKS):
        chunk = builder.add(builder.mul(tile, tile.type(_CHUNKS)), tile.type(number))
        for block, memory in zip(blocks, dense, strict=True):
            held = weights.chunk(block, chunk)
            weights.fetch(block, chunk)
            for pair in range(PAIRS):
                words = builder.bitcast(weights.pair(held, pair), WORDS)
                builder.store(words, memory.vector(tile.type(number * PAIRS + pair)))


def _add_dense_type(_, dense, x, totals, height, first, chunks):
    """Adds to `totals` the products of so many blocks and `chunks` of `dense` with all tokens,
    whose columns begin with those of the chunk `first`."""
    return types.none(dense, x, totals, *(types.intp,) * 3), _dense_product


_add_dense: Callable = intrinsic(_add_dense_type)


def _dense_product(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_add_dense`. The registers are sums, then weights, then tokens."""
    dense, x, totals = arrays(context, builder, signature, arguments)
    height, first, chunks = arguments[-3:]
    number = height.type
    zero = number(0)
    steps = builder.udiv(chunks, number(_CHUNKS))
    begin = builder.udiv(first, number(_CHUNKS))
    stride = builder.mul(totals.size(1), number(torch.float32.itemsize))

    def multiply_tiles(blocks: list[ir.Value], tiles: list[ir.Value]) -> None:
        sums = {
            _SIDE * row + column: totals.at(
                BYTE, builder.mul(tile, number(TOKENS)), builder.mul(block, number(LANES))
            )
            for row, block in enumerate(blocks)
            for column, tile in enumerate(tiles)
        }
        for register, address in sums.items():
            amx.load(builder, register, address, stride)
        with cgutils.for_range(builder, steps) as step:
            chunk = builder.mul(step.index, number(_CHUNKS))
            for row, block in enumerate(blocks):
                amx.load(builder, _WEIGHTS + row, dense.at(BYTE, block, chunk, zero))
            for column, tile in enumerate(tiles):
                place = builder.add(begin, step.index)
                amx.load(builder, _INPUTS + column, x.at(BYTE, tile, place, zero))
                for row in range(len(blocks)):
                    product = (_SIDE * row + column, _INPUTS + column, _WEIGHTS + row)
                    amx.call(builder, "tdpbf16ps", *product)
        for register, address in sums.items():
            amx.store(builder, register, address, stride)

    def multiply_blocks(blocks: list[ir.Value]) -> None:
        for_blocks(builder, zero, x.size(0), _SIDE, lambda tiles: multiply_tiles(blocks, tiles))

    amx.configure(builder)
    for_blocks(builder, zero, height, _SIDE, multiply_blocks)
    amx.release(builder)
    return context.get_dummy_value()


class _Memory:
    """Sixteen vectors on the stack: what a tile is loaded from or stored to."""

    def __init__(self, builder: ir.IRBuilder, kind: ir.VectorType) -> None:
        self.builder = builder
        self.vectors = cgutils.alloca_once(builder, ir.ArrayType(kind, LANES))
        self.kind = kind

    def at(self) -> ir.Value:
        return self.builder.bitcast(self.vectors, BYTE.as_pointer())

    def vector(self, place: ir.Value) -> ir.Value:
        """The pointer to one of them."""
        return self.builder.gep(self.vectors, [place.type(0), place], inbounds=True)

    def clear(self) -> None:
        for place in range(LANES):
            self.builder.store(ZEROS, self.vector(ir.IntType(64)(place)))
