"""Vectors of sixteen numbers in LLVM's own words, and look-ups of sixteen codes at a time.

A loop in Python cannot say that a table of sixteen values is one register. Here sixteen look-ups
are sixteen extractions, of which LLVM makes one instruction where the CPU has it (AVX-512: VPERMPS,
VPERMW). Conversions to bfloat16 are named outright: they are in CPUs with AVX512-BF16 only.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # float32 numbers in a register of 512 bits
MULTIPLIES_BFLOAT16 = bool(binding.get_host_cpu_features().get("avx512bf16"))

_FLOAT = ir.FloatType()
BYTES = ir.VectorType(ir.IntType(8), LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
FLOATS = ir.VectorType(_FLOAT, LANES)
ZEROS = ir.Constant(FLOATS, [0.0] * LANES)
WORDS = ir.VectorType(ir.IntType(16), 2 * LANES)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


BFLOATS = ir.VectorType(_BFloat16(), 2 * LANES)
_HALF_BFLOATS = ir.VectorType(_BFloat16(), LANES)
FUSED = ("contract",)  # a product need not be rounded before it is added


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
    values, points, scales, offsets, codes, bits = arrays(context, builder, signature, arguments)
    row, group = arguments[-2:]
    weights = values.load(FLOATS, row.type(0))
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
        places = _lower_half(builder, builder.zext(codes.load(BYTES, row, column), SHORTS))
        found = permuted(builder, rounded, places)
        builder.store(found, bits.at(SHORTS, row, column), align=1)
    return context.get_dummy_value()


class Array:
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

    def prefetch(self, *places: ir.Value) -> None:
        """Has the CPU fetch the line of the cache with an element, which need not exist."""
        number = ir.IntType(32)
        address = self.at(ir.IntType(8), *places)
        name = "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [address.type] + [number] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        read, keep, data = number(0), number(3), number(1)
        self.builder.call(function, [address, read, keep, data])

    def splat(self, *places: ir.Value) -> ir.Value:
        """One float32 in all lanes."""
        return in_all_lanes(self.builder, self.load(_FLOAT, *places))


def arrays(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> list[Any]:
    """Those among the arguments, None for None."""
    return [
        None if kind == types.none else Array(context, builder, kind, value)
        for kind, value in zip(signature.args, arguments, strict=True)
        if not isinstance(kind, types.Integer | types.IntegerLiteral)
    ]


def in_all_lanes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, value, _lane(0))
    return builder.shuffle_vector(one, one, filled(INTS, 0))


def in_bfloat16(builder: ir.IRBuilder, lower: ir.Value, upper: ir.Value) -> ir.Value:
    """32 bfloat16 numbers of two vectors."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return called(builder, name, BFLOATS, upper, lower)


def rounded(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """The bits of float32 numbers in bfloat16."""
    return builder.bitcast(
        called(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _HALF_BFLOATS, values), SHORTS
    )


def called(builder: ir.IRBuilder, name: str, returned: ir.Type, *arguments: ir.Value) -> ir.Value:
    """What one of LLVM's functions for a CPU returns."""
    kind = ir.FunctionType(returned, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _bfloat16(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """The bits of finite float32 in bfloat16, their upper half; ties go to even."""
    words = builder.bitcast(values, INTS)
    upper = builder.lshr(words, filled(INTS, 16))
    carry = builder.add(filled(INTS, 0x7FFF), builder.and_(upper, filled(INTS, 1)))
    rounded = builder.lshr(builder.add(words, carry), filled(INTS, 16))
    return builder.trunc(rounded, SHORTS)


def _lower_half(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    return builder.and_(codes, filled(codes.type, 15))


def permuted(builder: ir.IRBuilder, values: ir.Value, places: ir.Value) -> ir.Value:
    """values[places] of two vectors, the form of which LLVM recognizes."""
    found = ir.Constant(values.type, ir.Undefined)
    for lane in range(LANES):
        value = builder.extract_element(values, builder.extract_element(places, _lane(lane)))
        found = builder.insert_element(found, value, _lane(lane))
    return found


def filled(kind: ir.VectorType, number: int) -> ir.Constant:
    """A vector of one integer."""
    return ir.Constant(kind, [number] * kind.count)


def _lane(number: int) -> ir.Constant:
    return ir.Constant(ir.IntType(32), number)
