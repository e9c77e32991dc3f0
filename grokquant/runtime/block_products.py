"""Products of packed codes, a row of the matrix to a lane: sixteen rows are computed at once.

A block has 16 rows. A chunk has 8 of its columns, which are four pairs. First byte first:

    4 bits     | row 0 | row 1 | .. | row 15 |                uint8 [64]
               row     | c2 c0 | c6 c4 | c3 c1 | c7 c5 |      c0 in the lower half
    8 bits     | pair 0 | pair 1 | pair 2 | pair 3 |          int8 [128]
               pair 0  | c0 c1 of row 0 | c0 c1 of row 1 | .. | c0 c1 of row 15 |
    dense      as 8 bits                                      uint16 [128], the bits of bfloat16
    levels     | scales of 16 rows | their zeros, if any |    of a group
    tokens     | pair 0 of token 0 | pair 0 of token 1 | .. | pair 1 of token 0 | ..

A row of 4 bits is two words of 16 bits, one for the even columns and one for the odd. Shifted, both
are places of VPERMW, which reads the lower five bits and whose table is there twice. Integers of 8
bits are exact in bfloat16, so scales multiply the sums of groups and not each weight.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from grokquant.runtime.vectors import (
    BFLOATS,
    BYTES,
    FLOATS,
    FUSED,
    HALVES,
    INTS,
    LANES,
    SHORTS,
    WORDS,
    ZEROS,
    Array,
    arrays,
    called,
    filled,
    in_all_lanes,
    in_bfloat16,
    permuted,
    rounded,
)

PAIRS = 4  # of a chunk
COLUMNS = 2 * PAIRS
# Tokens that share what is unpacked; fewer are 4, 2 or 1.
TOKENS = 8
# Blocks that share the tokens, by the number of these: sums and weights stay in 32 registers.
_HEIGHTS = {1: 6, 2: 4, 4: 4, TOKENS: 3}
HEIGHT = _HEIGHTS[TOKENS]
# A product waits for the sum before it; so many sums at least keep the CPU busy.
_SUMS = 8
# Blocks whose codes are still in the cache when the next tokens come: a multiple of all heights.
TILE = 12
# Chunks of HEIGHT dense blocks that stay in the cache.
DENSE_CHUNKS = 256
# Bytes that are fetched before they are used: measured, an eighth of one token's time.
_AHEAD = 256
_LINE = 64  # bytes of the cache
_NIBBLE = np.uint64(0x000F000F000F000F)  # in each of four words
_WORD = np.uint64(0xFFFF)


@njit(nogil=True, cache=True)
def multiply(table, codes, scales, zeros, x, sums, out, start, stop):
    """Writes x times the transposed matrix to `out` [tokens, out], for blocks from start to stop.

    A weight is table[code] * scale + zero for `codes` uint8 [blocks, chunks, 64], and code * scale
    + zero for int8 [blocks, chunks, 128]. `table` is float32 [16]. `scales` [blocks, groups, 16]
    and `zeros`, which are as many or None, are float32, or the bits of float16 as int16 or of
    bfloat16 as uint16. `x` is from `in_pairs`: uint16 makes the products in bfloat16. `sums`
    float32 [groups, tokens] are those of x in its groups, None without zeros. `out` is float32 or
    uint16. Groups are whole chunks; tokens are `padded`.
    """
    tokens = len(out)
    whole = tokens // TOKENS * TOKENS
    rest = tokens - whole
    for first in range(start, stop, TILE):
        end = min(first + TILE, stop)
        for token in range(0, whole, TOKENS):
            _multiply(TOKENS, table, codes, scales, zeros, x, sums, out, first, end, token)
        if rest == 4:
            _multiply(4, table, codes, scales, zeros, x, sums, out, first, end, whole)
        elif rest == 2:
            _multiply(2, table, codes, scales, zeros, x, sums, out, first, end, whole)
        elif rest == 1:
            _multiply(1, table, codes, scales, zeros, x, sums, out, first, end, whole)


@njit(nogil=True, cache=True)
def multiply_many(table, codes, scales, zeros, x, dense, totals, out, start, stop):
    """The same in bfloat16 for a multiple of TOKENS tokens. Weights are dequantized and rounded
    once for all of them.

    It works in `dense` uint16 [HEIGHT, DENSE_CHUNKS, 128] and `totals` float32 [tokens, HEIGHT *
    LANES].
    """
    chunks = codes.shape[1]
    for block in range(start, stop, HEIGHT):
        height = min(HEIGHT, stop - block)
        totals[:] = 0
        for first in range(0, chunks, DENSE_CHUNKS):
            some = min(DENSE_CHUNKS, chunks - first)
            dequantize_chunks(table, codes, scales, zeros, dense, block, height, first, some)
            for token in range(0, len(totals), TOKENS):
                place = token * chunks * COLUMNS + first * COLUMNS * TOKENS
                _add_dense(dense, x, totals, height, some, token, place)
        round_rows(totals, out, block, height)


@njit(nogil=True, cache=True)
def dequantize_chunks(table, codes, scales, zeros, dense, block, height, first, chunks):
    """Fills `dense` with so many chunks, from `first` on, of `height` blocks from `block` on."""
    for row in range(height):
        for chunk in range(chunks):
            _dequantize_chunk(
                table, codes, scales, zeros, dense, block + row, first + chunk, row, chunk
            )


@njit(nogil=True, cache=True)
def round_rows(totals, out, block, height):
    """Writes the totals of `height` blocks, from `block` on, to `out`, for all its tokens."""
    for token in range(len(out)):
        for row in range(height):
            _round_totals(totals, out, token, row, block + row)


@njit(nogil=True, cache=True)
def pack_halves(codes, packed):
    """Writes codes of 4 bits, the lower halves of int8 [out, in], to `packed` uint32 [blocks,
    chunks, 16], in the order above."""
    eights = codes.view(np.uint64)  # (out, chunks)
    for block in range(len(packed)):
        for chunk in range(packed.shape[1]):
            for row in range(LANES):
                eight = eights[block * LANES + row, chunk]
                even = _word(eight & _NIBBLE)
                odd = _word((eight >> np.uint64(8)) & _NIBBLE)
                packed[block, chunk, row] = np.uint32(even | (odd << np.uint64(16)))


@njit(nogil=True, cache=True)
def _word(halves):
    """One word of the lowest halves of bytes in four."""
    pairs = halves | (halves >> np.uint64(12))
    return (pairs | (pairs >> np.uint64(24))) & _WORD


def padded(tokens: int, many: bool) -> int:
    """Tokens that `multiply`, or `multiply_many`, computes for so many."""
    rest = tokens % TOKENS
    if not rest:
        return tokens
    return tokens - rest + (TOKENS if many else 1 << (rest - 1).bit_length())


def in_pairs(x: Tensor) -> np.ndarray:
    """x [tokens, in] in the order above: float32, or the bits of bfloat16, [tokens * in]."""
    whole = len(x) // TOKENS * TOKENS
    pairs = x.unflatten(1, (-1, 2))  # (tokens, pairs, 2)
    flat = pairs[whole:].transpose(0, 1).flatten()
    if whole:
        eights = pairs[:whole].unflatten(0, (-1, TOKENS)).transpose(1, 2)
        flat = torch.cat((eights.flatten(), flat))
    return bits(flat)


def bits(values: Tensor) -> np.ndarray:
    """For Numba, which has neither dtype: the bits of float16 as int16, of bfloat16 as uint16."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy()
    return values.view(torch.int16).numpy() if values.dtype == torch.float16 else values.numpy()


def _multiply_type(_, width, table, codes, scales, zeros, x, sums, out, start, stop, token):
    """As `multiply`, for a literal number of tokens from `token` on."""
    places = (types.intp,) * 3
    return types.none(width, table, codes, scales, zeros, x, sums, out, *places), _product


_multiply: Callable = intrinsic(prefer_literal=True)(_multiply_type)


def _product(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_multiply`."""
    table, codes, scales, zeros, x, sums, out = arrays(context, builder, signature, arguments)
    start, stop, token = arguments[-3:]
    width = signature.args[0].literal_value
    weights = WEIGHTS[codes.kind.dtype, x.kind.dtype](codes, table)
    columns = builder.mul(codes.size(1), token.type(COLUMNS))
    tokens = _Tokens(x, builder.mul(token, columns), width)
    levels = Levels(scales, zeros, sums)

    def multiply_blocks(blocks: list[ir.Value]) -> None:
        totals = _sums(builder, len(blocks), width, 1)
        chains = min(PAIRS, max(1, _SUMS // (len(blocks) * width)))
        of_group = _sums(builder, len(blocks), width, chains)
        _clear(builder, totals)
        groups = scales.size(1)
        chunks = builder.udiv(codes.size(1), groups)
        with cgutils.for_range(builder, groups) as group:
            _clear(builder, of_group)
            first = builder.mul(group.index, chunks)
            _add_chunks(builder, weights, tokens, blocks, first, chunks, of_group)
            levels.add_scaled(of_group, totals, blocks, group.index, token)
        rounds = out.kind.dtype == types.uint16
        stored = SHORTS if rounds else FLOATS
        for address, (total,) in _places(builder, out.at, stored, totals, blocks, token):
            value = builder.load(total)
            builder.store(rounded(builder, value) if rounds else value, address, align=1)

    for_blocks(builder, start, stop, _HEIGHTS[width], multiply_blocks)
    return context.get_dummy_value()


def _add_dense_type(_, dense, x, totals, height, chunks, token, place):
    """Adds to `totals` the products of so many blocks and `chunks` of `dense` with TOKENS tokens,
    `x` from `place` on."""
    places = (types.intp,) * 4
    return types.none(dense, x, totals, *places), _dense_product


_add_dense: Callable = intrinsic(_add_dense_type)


def _dense_product(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_add_dense`."""
    dense, x, totals = arrays(context, builder, signature, arguments)
    height, chunks, token, place = arguments[-4:]
    zero = height.type(0)
    weights = _Dense(dense, None)
    tokens = _Tokens(x, place, TOKENS)

    def multiply_blocks(blocks: list[ir.Value]) -> None:
        sums = _sums(builder, len(blocks), TOKENS, 1)
        for address, (total,) in _places(builder, totals.at, FLOATS, sums, blocks, token):
            builder.store(builder.load(address, align=1), total)
        _add_chunks(builder, weights, tokens, blocks, zero, chunks, sums)
        for address, (total,) in _places(builder, totals.at, FLOATS, sums, blocks, token):
            builder.store(builder.load(total), address, align=1)

    for_blocks(builder, zero, height, HEIGHT, multiply_blocks)
    return context.get_dummy_value()


def _round_type(_, totals, out, token, row, block):
    """Writes a token's totals of a block to its place in `out`, rounded to bfloat16."""
    return types.none(totals, out, *(types.intp,) * 3), _rounded


_round_totals: Callable = intrinsic(_round_type)


def _rounded(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_round_totals`."""
    totals, out = arrays(context, builder, signature, arguments)
    token, row, block = arguments[-3:]
    lanes = row.type(LANES)
    values = totals.load(FLOATS, token, builder.mul(row, lanes))
    address = out.at(SHORTS, token, builder.mul(block, lanes))
    builder.store(rounded(builder, values), address, align=1)
    return context.get_dummy_value()


def _dequantize_type(_, table, codes, scales, zeros, dense, block, chunk, row, place):
    """Writes a chunk of a block to those places of `dense`, rounded to bfloat16."""
    places = (types.intp,) * 4
    return types.none(table, codes, scales, zeros, dense, *places), _dequantized


_dequantize_chunk: Callable = intrinsic(_dequantize_type)


def _dequantized(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_dequantize_chunk`."""
    table, codes, scales, zeros, dense = arrays(context, builder, signature, arguments)
    block, chunk, row, place = arguments[-4:]
    weights = _DEQUANTIZED[codes.kind.dtype](codes, table)
    group = builder.udiv(chunk, builder.udiv(codes.size(1), scales.size(1)))
    scale, zero = Levels(scales, zeros, None).of_group(block, group)
    factors = weights.lanes(scale)
    added = None if zero is None else weights.lanes(zero)
    held = weights.chunk(block, chunk)
    for pair in range(PAIRS):
        both = []
        for number, values in enumerate(weights.pair(held, pair)):
            value = builder.fmul(values, factors[number], flags=FUSED)
            both.append(value if added is None else builder.fadd(value, added[number], flags=FUSED))
        words = builder.bitcast(in_bfloat16(builder, *both), WORDS)
        address = dense.at(WORDS, row, place, place.type(pair * 2 * LANES))
        builder.store(weights.in_order(words), address, align=1)
    return context.get_dummy_value()


# Each of the first eight lanes twice, and each of the others.
_TWICE = [
    ir.Constant(INTS, [first + lane // 2 for lane in range(LANES)]) for first in (0, LANES // 2)
]
# Words of one row beside each other, of those of all even columns before those of all odd ones.
_INTERLEAVED = ir.Constant(
    ir.VectorType(ir.IntType(32), 2 * LANES),
    [half * LANES + row for row in range(LANES) for half in range(2)],
)
# The pointers to sums of a block and a token, between which products alternate.
_Sums = list[list[list[ir.Value]]]


class Floats:
    """Pairs of columns of a chunk, as two vectors of float32, from codes of 4 bits."""

    lines = 1  # of a chunk, to be fetched ahead

    def __init__(self, codes: Array, table: Array | None) -> None:
        self.codes = codes
        self.builder = codes.builder
        self.table = self._values(table) if table else None

    def chunk(self, block: ir.Value, chunk: ir.Value) -> Any:
        """What `pair` takes."""
        return self.codes.load(INTS, block, chunk, chunk.type(0))

    def fetch(self, block: ir.Value, chunk: ir.Value) -> None:
        """Those that will be used soon."""
        for line in range(self.lines):
            later = self.builder.add(chunk, chunk.type(_AHEAD // (self.lines * _LINE)))
            self.codes.prefetch(block, later, chunk.type(line * _LINE))

    def _loaded(
        self, kind: ir.Type, block: ir.Value, chunk: ir.Value, step: int, count: int
    ) -> list[ir.Value]:
        """Vectors of a chunk, `step` codes apart."""
        places = range(0, count * step, step)
        return [self.codes.load(kind, block, chunk, chunk.type(place)) for place in places]

    def pair(self, held: Any, pair: int) -> Any:
        """The codes of two columns, or what a table has for them."""
        return [self._looked_up(held, 4 * pair + 16 * half) for half in range(2)]

    def lanes(self, levels: ir.Value) -> list[ir.Value]:
        """Those of 16 rows, for the numbers in both vectors of `pair`."""
        return [levels, levels]

    def in_order(self, words: ir.Value) -> ir.Value:
        """Both vectors of a pair as a dense chunk has them."""
        return self.builder.shuffle_vector(words, words, _INTERLEAVED)

    def _values(self, table: Array) -> ir.Value:
        return table.load(FLOATS, ir.Constant(ir.IntType(64), 0))

    def _looked_up(self, held: ir.Value, bit: int) -> ir.Value:
        shifted = self.builder.lshr(held, filled(INTS, bit))
        return permuted(self.builder, self.table, self.builder.and_(shifted, filled(INTS, 15)))


class _FloatsOfBytes(Floats):
    """From codes of 8 bits."""

    lines = 2

    def chunk(self, block: ir.Value, chunk: ir.Value) -> list[ir.Value]:
        return self._loaded(SHORTS, block, chunk, 2 * LANES, PAIRS)

    def pair(self, held: list[ir.Value], pair: int) -> list[ir.Value]:
        byte = filled(SHORTS, 8)
        even = self.builder.ashr(self.builder.shl(held[pair], byte), byte)
        odd = self.builder.ashr(held[pair], byte)
        return [self._converted(codes) for codes in (even, odd)]

    def _converted(self, codes: ir.Value) -> ir.Value:
        return self.builder.sitofp(self.builder.sext(codes, INTS), FLOATS)


class _BFloats(Floats):
    """One vector of bfloat16 for both columns."""

    def pair(self, held: ir.Value, pair: int) -> ir.Value:
        words = self.builder.bitcast(held, WORDS)
        places = self.builder.lshr(words, filled(WORDS, 4 * pair))
        name = "llvm.x86.avx512.permvar.hi.512"
        return self.builder.bitcast(called(self.builder, name, WORDS, self.table, places), BFLOATS)

    def _values(self, table: Array) -> ir.Value:
        values = super()._values(table)
        return self.builder.bitcast(in_bfloat16(self.builder, values, values), WORDS)


class _BFloatsOfBytes(_FloatsOfBytes):
    """One vector of bfloat16 for both columns, which are beside each other already."""

    def chunk(self, block: ir.Value, chunk: ir.Value) -> list[ir.Value]:
        return self._loaded(BYTES, block, chunk, LANES, 2 * PAIRS)

    def pair(self, held: list[ir.Value], pair: int) -> ir.Value:
        halves = held[2 * pair : 2 * pair + 2]
        return in_bfloat16(self.builder, *(self._converted(half) for half in halves))


class _BytesInOrder(_BFloatsOfBytes):
    """Two vectors of float32 in the order of a dense chunk: each has both columns of eight rows."""

    def pair(self, held: list[ir.Value], pair: int) -> list[ir.Value]:
        return [self._converted(half) for half in held[2 * pair : 2 * pair + 2]]

    def lanes(self, levels: ir.Value) -> list[ir.Value]:
        return [self.builder.shuffle_vector(levels, levels, half) for half in _TWICE]

    def in_order(self, words: ir.Value) -> ir.Value:
        return words


class _Dense(Floats):
    """Those of a dense chunk, which is in the cache."""

    lines = 0

    def chunk(self, block: ir.Value, chunk: ir.Value) -> list[ir.Value]:
        return self._loaded(BFLOATS, block, chunk, 2 * LANES, PAIRS)

    def pair(self, held: list[ir.Value], pair: int) -> ir.Value:
        return held[pair]


# By the dtypes of codes and tokens.
WEIGHTS: dict[tuple[Any, Any], type[Floats]] = {
    (types.uint8, types.float32): Floats,
    (types.int8, types.float32): _FloatsOfBytes,
    (types.uint8, types.uint16): _BFloats,
    (types.int8, types.uint16): _BFloatsOfBytes,
}


_DEQUANTIZED: dict[Any, type[Floats]] = {types.uint8: Floats, types.int8: _BytesInOrder}


class _Tokens:
    """`width` tokens of `x`, which begin at `first`."""

    def __init__(self, x: Array, first: ir.Value, width: int) -> None:
        self.x = x
        self.builder = x.builder
        self.first = first
        self.width = width
        self.in_bfloat16 = x.kind.dtype == types.uint16

    def add_products(
        self, weights: list[Any], chunk: ir.Value, pair: int, sums: list[list[ir.Value]]
    ) -> None:
        """Adds the products of a pair of columns to the sums of each block and token."""
        size = chunk.type(COLUMNS * self.width)
        first = self.builder.add(self.first, self.builder.mul(chunk, size))
        for token in range(self.width):
            place = self.builder.add(first, chunk.type(2 * (pair * self.width + token)))
            inputs = self._bfloats(place) if self.in_bfloat16 else self._floats(place)
            for of_block, of_tokens in zip(weights, sums, strict=True):
                self._add(of_block, inputs, of_tokens[token])

    def _floats(self, place: ir.Value) -> list[ir.Value]:
        return [self.x.splat(place), self.x.splat(self.builder.add(place, place.type(1)))]

    def _bfloats(self, place: ir.Value) -> ir.Value:
        both = self.x.load(ir.IntType(32), place)
        return self.builder.bitcast(in_all_lanes(self.builder, both), BFLOATS)

    def _add(self, weights: Any, inputs: Any, total: ir.Value) -> None:
        added = self.builder.load(total)
        if self.in_bfloat16:
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            added = called(self.builder, name, FLOATS, added, weights, inputs)
        else:
            for of_column, value in zip(weights, inputs, strict=True):
                product = self.builder.fmul(of_column, value, flags=FUSED)
                added = self.builder.fadd(added, product, flags=FUSED)
        self.builder.store(added, total)


class Levels:
    """Scales of blocks' groups and what their zeros add."""

    def __init__(self, scales: Array, zeros: Array | None, sums: Array | None) -> None:
        self.scales = scales
        self.zeros = zeros
        self.sums = sums
        self.builder = scales.builder

    def of_group(self, block: ir.Value, group: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """(scales, zeros) of 16 rows."""
        zeros = self._floats(self.zeros, block, group) if self.zeros else None
        return self._floats(self.scales, block, group), zeros

    def add_scaled(
        self, sums: _Sums, totals: _Sums, blocks: list[ir.Value], group: ir.Value, token: ir.Value
    ) -> None:
        """Adds the sums of a group, scaled, to the totals."""
        for block, of_blocks, totals_of_block in zip(blocks, sums, totals, strict=True):
            scale, zero = self.of_group(block, group)
            for number, (chains, (total,)) in enumerate(
                zip(of_blocks, totals_of_block, strict=True)
            ):
                value = self.builder.load(chains[0])
                for chain in chains[1:]:
                    value = self.builder.fadd(value, self.builder.load(chain))
                self._add(value, scale, total)
                if zero is not None and self.sums is not None:
                    place = self.builder.add(token, token.type(number))
                    self._add(self.sums.splat(group, place), zero, total)

    def _add(self, value: ir.Value, factor: ir.Value, total: ir.Value) -> None:
        product = self.builder.fmul(value, factor, flags=FUSED)
        added = self.builder.fadd(self.builder.load(total), product, flags=FUSED)
        self.builder.store(added, total)

    def _floats(self, levels: Array, block: ir.Value, group: ir.Value) -> ir.Value:
        lane = block.type(0)
        if levels.kind.dtype == types.float32:
            return levels.load(FLOATS, block, group, lane)
        if levels.kind.dtype == types.int16:
            return self.builder.fpext(levels.load(HALVES, block, group, lane), FLOATS)
        upper = self.builder.zext(levels.load(SHORTS, block, group, lane), INTS)
        return self.builder.bitcast(self.builder.shl(upper, filled(INTS, 16)), FLOATS)


def _add_chunks(
    builder: ir.IRBuilder,
    weights: Floats,
    tokens: _Tokens,
    blocks: list[ir.Value],
    first: ir.Value,
    count: ir.Value,
    sums: _Sums,
) -> None:
    """Adds the products of some chunks from the first on; pairs of columns take turns in the sums
    of a block and a token."""
    chains = len(sums[0][0])
    with cgutils.for_range(builder, count) as loop:
        chunk = builder.add(first, loop.index)
        held = [weights.chunk(block, chunk) for block in blocks]
        for block in blocks:
            weights.fetch(block, chunk)
        for pair in range(PAIRS):
            of_pair = [weights.pair(one, pair) for one in held]
            turn = [[chain[pair % chains] for chain in of_block] for of_block in sums]
            tokens.add_products(of_pair, chunk, pair, turn)


def for_blocks(
    builder: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    height: int,
    work: Callable[[list[ir.Value]], None],
) -> None:
    """Instructions that do `work` for so many blocks at a time, at last for one."""
    size = start.type(height)
    whole = builder.mul(builder.udiv(builder.sub(stop, start), size), size)
    middle = builder.add(start, whole)
    for begin, end, step in ((start, middle, height), (middle, stop, 1)):
        with cgutils.for_range_slice(builder, begin, end, start.type(step)) as (block, _):
            work([builder.add(block, block.type(number)) for number in range(step)])


def _sums(builder: ir.IRBuilder, height: int, width: int, chains: int) -> _Sums:
    return [
        [[cgutils.alloca_once(builder, FLOATS) for _ in range(chains)] for _ in range(width)]
        for _ in range(height)
    ]


def _clear(builder: ir.IRBuilder, sums: _Sums) -> None:
    for of_block in sums:
        for chains in of_block:
            for chain in chains:
                builder.store(ZEROS, chain)


def _places(
    builder: ir.IRBuilder,
    at: Callable[..., ir.Value],
    kind: ir.Type,
    sums: _Sums,
    blocks: list[ir.Value],
    token: ir.Value,
) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """(the pointer to a `kind` in [tokens, out], sums) of each block and each token from `token`
    on."""
    for block, of_block in zip(blocks, sums, strict=True):
        row = builder.mul(block, block.type(LANES))
        for number, chains in enumerate(of_block):
            yield at(kind, builder.add(token, token.type(number)), row), chains
