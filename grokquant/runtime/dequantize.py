"""Products of many tokens with a matrix that is dequantized block by block of rows."""

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from grokquant.threads import in_pieces, slices
from grokquant.types import ROW_BLOCK_BYTES, QTensor

_f32 = np.float32
_u16 = np.uint16
_u32 = np.uint32
_compiled = njit(nogil=True, cache=True)
# Rows that one thread dequantizes at a time.
_ROWS = 64
# A bfloat16 number is the upper half of the float32 one; ties go to even.
_HALF = np.uint32(0x7FFF)
_HALF_BITS = np.uint32(16)
_LAST_BIT = np.uint32(1)


@_compiled
def _bfloat16(value):
    """The bits of a finite float32 in bfloat16."""
    word = _f32(value).view(_u32)
    carry = _u32(_HALF + ((word >> _HALF_BITS) & _LAST_BIT))
    return _u16(_u32(word + carry) >> _HALF_BITS)


def product_with_rows(x: Tensor, shape: tuple[int, int], rows: Callable[[slice], Tensor]) -> Tensor:
    """x [tokens, in] times a matrix [out, in] of which `rows` makes a part at a time.
    [tokens, out]"""
    at_once = max(1, ROW_BLOCK_BYTES // (shape[1] * x.element_size()))
    parts = [slice(start, start + at_once) for start in range(0, shape[0], at_once)]
    return torch.cat([torch.nn.functional.linear(x, rows(part)) for part in parts], dim=-1)


def dequantize_rows(quantized: QTensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of a matrix in `dtype`. [rows, in]

    On CPUs a value is rounded once, from float32 to bfloat16; `QTensor.dequantize` rounds to the
    dtype of its scales first.
    """
    taken = quantized.rows(part)
    if dtype != torch.bfloat16 or taken.device.type != "cpu":
        return taken.dequantize().to(dtype)
    codes = taken.codes.contiguous().numpy()
    levels = _levels(taken)
    table = np.array(taken.scheme.row.table, _f32)
    dense = torch.empty(taken.shape, dtype=torch.bfloat16)
    bits = dense.view(torch.int16).numpy().view(_u16)

    def work(tile: slice) -> None:
        if len(table):
            _look_up(codes[tile], levels[tile], table, bits[tile])
        else:
            _dequantize(codes[tile], levels[tile], bits[tile])

    in_pieces(work, slices(0, len(codes), _ROWS))
    return dense


def _levels(quantized: QTensor) -> np.ndarray:
    """float32 [rows, groups, 3]: zero point, scale and offset of each group."""
    scales = quantized.scales.float()
    nothing = torch.zeros(1).expand_as(scales)
    zeros = nothing if quantized.zero_points is None else quantized.zero_points.float()
    offsets = nothing if quantized.offsets is None else quantized.offsets.float()
    return torch.stack((zeros, scales * quantized.scheme.row.unit, offsets), dim=-1).numpy()


@_compiled
def _dequantize(codes, levels, bits):
    """int8 codes [rows, in] to bits of bfloat16."""
    rows, groups, _ = levels.shape
    size = codes.shape[1] // groups
    for row in range(rows):
        for group in range(groups):
            zero, scale, offset = levels[row, group]
            of_group = codes[row, group * size : (group + 1) * size]
            out = bits[row, group * size : (group + 1) * size]
            for i in range(size):
                value = _f32((_f32(of_group[i]) - zero) * scale + offset)
                out[i] = _bfloat16(value)


@_compiled
def _look_up(codes, levels, table, bits):
    """The same of codes that are places in a table of values."""
    rows, groups, _ = levels.shape
    size = codes.shape[1] // groups
    values = np.empty(len(table), _u16)
    for row in range(rows):
        for group in range(groups):
            for code in range(len(table)):
                values[code] = _bfloat16(_f32(table[code] * levels[row, group, 1]))
            for i in range(group * size, (group + 1) * size):
                bits[row, i] = values[codes[row, i]]
