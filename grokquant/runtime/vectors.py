"""Products of packed codes and look-ups of sixteen of them at a time, in LLVM's own words.

A loop in Python cannot say that a table of sixteen values is one register. Here sixteen look-ups
are sixteen extractions, of which LLVM makes one instruction where the CPU has it (AVX-512: VPERMPS,
VPERMW). Products of bfloat16 are named outright: they are in CPUs with AVX512-BF16 only.

A chunk holds the codes of 32 columns. In memory, first byte first:

    4 bits   | c16 c0 | c17 c1 | .. | c31 c15 |           uint8, c0 in the lower half
    8 bits   | c0 | c1 | .. | c15 | c16 | .. | c31 |      int8

A byte of two codes, spread over two words, has both as places of VPERMW, which reads the lower five
bits and whose table is there twice. The products are of columns in this order:

    lanes    | c0 c16 | c1 c17 | .. | c15 c31 |           bfloat16
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

LANES = 16  # float32 numbers in a register of 512 bits
COLUMNS = 2 * LANES  # of a chunk
# Rows and tokens that share what is loaded: 16 sums and their factors stay in registers. One token
# needs more rows, as each product waits for the sum before it.
FEW_ROWS = 4
ROWS = 8
TOKENS = 4
MULTIPLIES_BFLOAT16 = bool(binding.get_host_cpu_features().get("avx512bf16"))

_FLOAT = ir.FloatType()
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_ZEROS = ir.Constant(_FLOATS, [0.0] * LANES)
_WORDS = ir.VectorType(ir.IntType(16), COLUMNS)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_BFLOATS = ir.VectorType(_BFloat16(), COLUMNS)
_FUSED = ("contract",)  # a product need not be rounded before it is added


@njit(nogil=True, cache=True)
def multiply(table, codes, scales, zeros, x, out):
    """Writes x [tokens, in] times the transposed matrix of some codes to `out` [rows, tokens].

    A weight is table[code] * scale + zero for `codes` uint8 [rows, in / 2], and code * scale + zero
    for int8 [rows, in], in chunks as above. All else is float32: `table` [16], `scales` [rows,
    groups] and `zeros`, which are as many or None. Rows are a multiple of FEW_ROWS, and groups
    are whole chunks. If `x` is uint16, from `bfloat16_lanes`, weights are rounded to bfloat16.
    """
    tokens = len(x)
    whole = tokens // TOKENS * TOKENS
    rest = tokens - whole
    for row in range(0, len(codes), FEW_ROWS):
        for token in range(0, whole, TOKENS):
            _multiply_rows(FEW_ROWS, TOKENS, table, codes, scales, zeros, x, out, row, token)
        if rest >= 2:
            _multiply_rows(FEW_ROWS, 2, table, codes, scales, zeros, x, out, row, whole)
        if rest % 2 and row % ROWS == 0:
            if row + ROWS <= len(codes):
                _multiply_rows(ROWS, 1, table, codes, scales, zeros, x, out, row, tokens - 1)
            else:
                _multiply_rows(FEW_ROWS, 1, table, codes, scales, zeros, x, out, row, tokens - 1)


def bfloat16_lanes(x: Tensor, in_halves: bool) -> np.ndarray:
    """The bits of x [tokens, in] for `multiply`, in the order of a table's lanes if the codes are
    in halves of bytes. uint16 [tokens, in]"""
    if in_halves:
        x = x.unflatten(1, (-1, 2, LANES)).transpose(2, 3).flatten(1)
    return x.detach().contiguous().view(torch.int16).numpy().view(np.uint16)


@njit(nogil=True, cache=True)
def look_up(values, points, scales, offsets, codes, bits):
    """Writes the weights of codes int8 [rows, in] to `bits` uint16 [rows, in], as bfloat16.

    The lower halves of codes are places in `values` float32 [16]; a weight is (value - point) *
    scale + offset, all float32 [rows, groups]. `points` and `offsets` may be None. Groups are a
    multiple of LANES.
    """
    for row in range(len(codes)):
        for group in range(scales.shape[1]):
            _look_up_group(values, points, scales, offsets, codes, bits, row, group)


def _look_up_type(_, values, points, scales, offsets, codes, bits, row, group):
    """As `look_up`, for one group."""
    kinds = (values, points, scales, offsets, codes, bits, types.intp, types.intp)
    return types.none(*kinds), _weights_of_group


_look_up_group: Callable = intrinsic(_look_up_type)


def _weights_of_group(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_look_up_group`: all values are computed once, in one register."""
    values, points, scales, offsets, codes, bits = _arrays(context, builder, signature, arguments)
    row, group = arguments[-2:]
    weights = values.load(_FLOATS, row.type(0))
    if points:
        weights = builder.fsub(weights, points.splat(row, group))
    weights = builder.fmul(weights, scales.splat(row, group))
    if offsets:
        weights = builder.fadd(weights, offsets.splat(row, group))
    rounded = _bfloat16(builder, weights)
    size = builder.udiv(codes.size(1), scales.size(1))
    first = builder.mul(group, size)
    with cgutils.for_range(builder, builder.udiv(size, row.type(LANES))) as vector:
        column = builder.add(first, builder.mul(vector.index, row.type(LANES)))
        places = _lower_half(builder, builder.zext(codes.load(_BYTES, row, column), _SHORTS))
        found = _permuted(builder, rounded, places)
        builder.store(found, bits.at(_SHORTS, row, column), align=1)
    return context.get_dummy_value()


def _multiply_type(_, height, tokens, table, codes, scales, zeros, x, out, row, token):
    """As `multiply`, for literal numbers of rows from `row` on and of tokens from `token` on."""
    kinds = (height, tokens, table, codes, scales, zeros, x, out, types.intp, types.intp)
    return types.none(*kinds), _product_of_rows


_multiply_rows: Callable = intrinsic(prefer_literal=True)(_multiply_type)


def _product_of_rows(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    """Instructions of `_multiply_rows`. The sums stay in registers."""
    table, codes, scales, zeros, x, out = _arrays(context, builder, signature, arguments)
    row, token = arguments[-2:]
    height, width = (kind.literal_value for kind in signature.args[:2])
    rows = [builder.add(row, row.type(r)) for r in range(height)]
    tokens = [builder.add(token, row.type(t)) for t in range(width)]
    in_bfloat16 = x.kind.dtype == types.uint16
    unpacker_kind, load, add_products = _BFLOAT16 if in_bfloat16 else _FLOAT32
    sums = [[cgutils.alloca_once_value(builder, _ZEROS) for _ in tokens] for _ in rows]
    groups = scales.size(1)
    chunks = builder.udiv(x.size(1), builder.mul(groups, row.type(COLUMNS)))  # of a group
    with cgutils.for_range(builder, groups) as group:
        unpackers = [unpacker_kind(table, codes, scales, zeros, r, group.index) for r in rows]
        with cgutils.for_range(builder, chunks) as in_group:
            chunk = builder.add(builder.mul(group.index, chunks), in_group.index)
            weights = [unpacker.weights(chunk) for unpacker in unpackers]
            for t, place in enumerate(tokens):
                inputs = load(x, place, chunk)
                for r in range(height):
                    add_products(builder, weights[r], inputs, sums[r][t])
    for r, of_row in zip(rows, sums, strict=True):
        for t, total in zip(tokens, of_row, strict=True):
            builder.store(_added(builder, builder.load(total)), out.at(_FLOAT, r, t))
    return context.get_dummy_value()


class _Unpacker:
    """Makes weights of the codes in a row's group."""

    def __init__(
        self, table: Any, codes: Any, scales: Any, zeros: Any, row: ir.Value, group: ir.Value
    ) -> None:
        self.builder = scales.builder
        self.codes = codes
        self.row = row
        self.scale = scales.splat(row, group)
        self.zero = zeros.splat(row, group) if zeros else None
        self.in_halves = codes.kind.dtype == types.uint8
        if self.in_halves:
            self.values = self._table(table)

    def weights(self, chunk: ir.Value) -> Any:
        """Those of a chunk, as `add_products` takes them."""
        if not self.in_halves:
            codes = self.codes.chunk(_BYTES, self.row, chunk)
            wide = (self.builder.sext(half, _INTS) for half in codes)
            return self._whole([self._scaled(self.builder.sitofp(half, _FLOATS)) for half in wide])
        byte = self.builder.mul(chunk, chunk.type(LANES))
        return self._looked_up(self.builder.zext(self.codes.load(_BYTES, self.row, byte), _INTS))

    def _table(self, table: Any) -> ir.Value:
        return self._scaled(table.load(_FLOATS, self.row.type(0)))

    def _looked_up(self, pairs: ir.Value) -> Any:
        """Two vectors of a chunk."""
        upper = self.builder.lshr(pairs, _ints(4))
        halves = (_lower_half(self.builder, pairs), upper)
        return [_permuted(self.builder, self.values, half) for half in halves]

    def _whole(self, weights: list[ir.Value]) -> Any:
        return weights

    def _scaled(self, values: ir.Value) -> ir.Value:
        product = self.builder.fmul(values, self.scale, flags=_FUSED)
        return product if self.zero is None else self.builder.fadd(product, self.zero, flags=_FUSED)


class _BFloat16Unpacker(_Unpacker):
    """The same in bfloat16."""

    def _table(self, table: Any) -> ir.Value:
        values = super()._table(table)
        return self.builder.bitcast(_in_bfloat16(self.builder, values, values), _WORDS)

    def _looked_up(self, pairs: ir.Value) -> ir.Value:
        """One vector of a chunk, in the order of lanes."""
        upper = self.builder.shl(pairs, _ints(12))
        places = self.builder.bitcast(self.builder.or_(pairs, upper), _WORDS)
        name = "llvm.x86.avx512.permvar.hi.512"
        return self.builder.bitcast(
            _called(self.builder, name, _WORDS, self.values, places), _BFLOATS
        )

    def _whole(self, weights: list[ir.Value]) -> ir.Value:
        return _in_bfloat16(self.builder, *weights)


class _Array:
    """Instructions that load from an array of Numba."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> None:
        self.context = context
        self.builder = builder
        self.kind = kind
        self.array = context.make_array(kind)(context, builder, value)

    def size(self, axis: int) -> ir.Value:
        return cgutils.unpack_tuple(self.builder, self.array.shape, self.kind.ndim)[axis]

    def at(self, kind: ir.Type, *places: ir.Value) -> ir.Value:
        """The pointer to a `kind` that begins with an element."""
        pointer = cgutils.get_item_pointer(
            self.context, self.builder, self.kind, self.array, places
        )
        return self.builder.bitcast(pointer, kind.as_pointer())

    def load(self, kind: ir.Type, *places: ir.Value) -> ir.Value:
        return self.builder.load(self.at(kind, *places), align=1)

    def chunk(self, kind: ir.Type, row: ir.Value, chunk: ir.Value) -> list[ir.Value]:
        """Both vectors of a row's chunk."""
        column = self.builder.mul(chunk, chunk.type(COLUMNS))
        columns = (column, self.builder.add(column, column.type(LANES)))
        return [self.load(kind, row, column) for column in columns]

    def splat(self, *places: ir.Value) -> ir.Value:
        """One float32 in all lanes."""
        one = self.builder.insert_element(_ZEROS, self.load(_FLOAT, *places), _lane(0))
        return self.builder.shuffle_vector(one, one, _ints(0))


def _arrays(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> list[Any]:
    """Those among the arguments, None for None."""
    return [
        None if kind == types.none else _Array(context, builder, kind, value)
        for kind, value in zip(signature.args, arguments, strict=True)
        if not isinstance(kind, types.Integer | types.IntegerLiteral)
    ]


def _add_products(
    builder: ir.IRBuilder, weights: list[ir.Value], inputs: list[ir.Value], total: ir.Value
) -> None:
    """Adds weights * inputs to the vector that `total` points to."""
    added = builder.load(total)
    for w, value in zip(weights, inputs, strict=True):
        added = builder.fadd(added, builder.fmul(w, value, flags=_FUSED), flags=_FUSED)
    builder.store(added, total)


def _add_bfloat16_products(
    builder: ir.IRBuilder, weights: ir.Value, inputs: ir.Value, total: ir.Value
) -> None:
    """The same of vectors of bfloat16, two products to a lane."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    added = _called(builder, name, _FLOATS, builder.load(total), weights, inputs)
    builder.store(added, total)


def _loaded(x: Any, token: ir.Value, chunk: ir.Value) -> list[ir.Value]:
    return x.chunk(_FLOATS, token, chunk)


def _loaded_bfloat16(x: Any, token: ir.Value, chunk: ir.Value) -> ir.Value:
    column = x.builder.mul(chunk, chunk.type(COLUMNS))
    return x.load(_BFLOATS, token, column)


# How a chunk's weights are made, its inputs loaded and both multiplied.
_FLOAT32 = (_Unpacker, _loaded, _add_products)
_BFLOAT16 = (_BFloat16Unpacker, _loaded_bfloat16, _add_bfloat16_products)


def _in_bfloat16(builder: ir.IRBuilder, lower: ir.Value, upper: ir.Value) -> ir.Value:
    """32 bfloat16 numbers of two vectors."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return _called(builder, name, _BFLOATS, upper, lower)


def _called(builder: ir.IRBuilder, name: str, returned: ir.Type, *arguments: ir.Value) -> ir.Value:
    """What one of LLVM's functions for a CPU returns."""
    kind = ir.FunctionType(returned, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _bfloat16(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """The bits of finite float32 in bfloat16, their upper half; ties go to even."""
    words = builder.bitcast(values, _INTS)
    upper = builder.lshr(words, _ints(16))
    carry = builder.add(_ints(0x7FFF), builder.and_(upper, _ints(1)))
    rounded = builder.lshr(builder.add(words, carry), _ints(16))
    return builder.trunc(rounded, _SHORTS)


def _lower_half(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    return builder.and_(codes, ir.Constant(codes.type, [15] * LANES))


def _permuted(builder: ir.IRBuilder, values: ir.Value, places: ir.Value) -> ir.Value:
    """values[places] of two vectors, the form of which LLVM recognizes."""
    found = ir.Constant(values.type, ir.Undefined)
    for lane in range(LANES):
        value = builder.extract_element(values, builder.extract_element(places, _lane(lane)))
        found = builder.insert_element(found, value, _lane(lane))
    return found


def _added(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of all lanes, pairs of neighbours first."""
    parts = [builder.extract_element(vector, _lane(lane)) for lane in range(LANES)]
    while len(parts) > 1:
        parts = [builder.fadd(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _ints(number: int) -> ir.Constant:
    return ir.Constant(_INTS, [number] * LANES)


def _lane(number: int) -> ir.Constant:
    return ir.Constant(ir.IntType(32), number)
