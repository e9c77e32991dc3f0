"""Instructions of AMX in compiled kernels. Its registers are tiles of 16 rows of 64 bytes."""

from functools import cache

import torch
from llvmlite import binding, ir
from numba.core import cgutils

ROWS = 16
ROW_BYTES = 64
_REGISTERS = 8
_BYTE = ir.IntType(8)
_ADDRESS = _BYTE.as_pointer()
_CLOSE = ir.Constant(ir.IntType(64), ROW_BYTES)  # from one row in memory to the next


@cache
def is_available() -> bool:
    """Whether the CPU has it. Linux lends the registers to a process that asks, which torch does
    here."""
    has_tiles = binding.get_host_cpu_features().get("amx-bf16")
    return bool(has_tiles and torch.cpu._init_amx())


def configure(builder: ir.IRBuilder) -> None:
    """Gives all registers their rows: Intel's palette 1, then the bytes of a row, of 16 bits each,
    from the sixteenth byte on, then the numbers of rows from the 48th on."""
    widths = [ROW_BYTES, 0] * _REGISTERS
    shape = bytes([1, *[0] * 15, *widths, *[0] * 16, *[ROWS] * _REGISTERS, *[0] * 8])
    constant = cgutils.global_constant(
        builder, "shape_of_tiles", ir.Constant(ir.ArrayType(_BYTE, len(shape)), bytearray(shape))
    )
    call(builder, "ldtilecfg", builder.bitcast(constant, _ADDRESS))


def release(builder: ir.IRBuilder) -> None:
    """Gives the registers back: each later switch of threads would save them."""
    call(builder, "tilerelease")


def load(
    builder: ir.IRBuilder, register: int, address: ir.Value, stride: ir.Value = _CLOSE
) -> None:
    """Fills a register; its rows are `stride` bytes apart in memory."""
    call(builder, "tileloadd64", register, address, stride)


def store(
    builder: ir.IRBuilder, register: int, address: ir.Value, stride: ir.Value = _CLOSE
) -> None:
    call(builder, "tilestored64", register, address, stride)


def call(builder: ir.IRBuilder, name: str, *arguments: int | ir.Value) -> None:
    """An instruction; integers are numbers of registers."""
    values = [_BYTE(one) if isinstance(one, int) else one for one in arguments]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, values)
