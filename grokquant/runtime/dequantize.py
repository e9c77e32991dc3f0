"""Dequantizes rows for products of many tokens: on CPUs compiled where that gives the same bits."""

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from grokquant.methods.compiled import in_tiles
from grokquant.types import ROW_BLOCK_BYTES, QTensor

_f32 = np.float32
_u16 = np.uint16
_u32 = np.uint32
# Rows that one thread dequantizes at a time.
_ROWS = 64
# A bfloat16 number is the upper half of the float32 one; ties go to even.
_HALF = np.uint32(0x7FFF)
_HALF_BITS = np.uint32(16)
_LAST_BIT = np.uint32(1)


def product_with_rows(
    x: Tensor, shape: tuple[int, int], rows: Callable[[slice], Tensor]
) -> Tensor:
    """x [tokens, in] times a matrix [out, in] of which `rows` makes a part at a time.
    [tokens, out]"""
    at_once = max(1, ROW_BLOCK_BYTES // (shape[1] * x.element_size()))
    parts = [slice(start, start + at_once) for start in range(0, shape[0], at_once)]
    return torch.cat([torch.nn.functional.linear(x, rows(part)) for part in parts], dim=-1)


def dequantize_rows(quantized: QTensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of a matrix in `dtype`, the same bits as `QTensor.dequantize`. [rows, in]"""
    taken = quantized.rows(part)
    if not _is_compiled(taken, dtype):
        return taken.dequantize().to(dtype)
    codes = taken.codes.contiguous().numpy()
    scales = taken.scales.float().numpy()
    no_zeros = torch.zeros(taken.scales.shape, dtype=torch.int8)
    zeros = (no_zeros if taken.zero_points is None else taken.zero_points).contiguous().numpy()
    dense = torch.empty(taken.shape, dtype=torch.bfloat16)
    bits = dense.view(torch.int16).numpy().view(_u16)

    def work(tile: slice) -> None:
        _dequantize(codes[tile], scales[tile], zeros[tile], bits[tile])

    in_tiles(len(codes), _ROWS, work)
    return dense


def _is_compiled(quantized: QTensor, dtype: torch.dtype) -> bool:
    """(code - zero) * scale has 17 bits at most: float32 holds it exactly, so it is rounded once
    here as in bfloat16 arithmetic."""
    in_bfloat16 = quantized.scales.dtype == dtype == torch.bfloat16
    return in_bfloat16 and quantized.scheme.is_integer and quantized.device.type == "cpu"


@njit(nogil=True, cache=True)
def _dequantize(codes, scales, zeros, bits):
    """int8 [rows, in] with float32 scales and int8 zeros [rows, groups] to bits of bfloat16."""
    rows, groups = scales.shape
    size = codes.shape[1] // groups
    for row in range(rows):
        for group in range(groups):
            scale = scales[row, group]
            zero = _f32(zeros[row, group])
            of_group = codes[row, group * size : (group + 1) * size]
            out = bits[row, group * size : (group + 1) * size]
            for i in range(size):
                value = _f32((_f32(of_group[i]) - zero) * scale)
                word = value.view(_u32)
                carry = _u32(_HALF + ((word >> _HALF_BITS) & _LAST_BIT))
                out[i] = _u16(_u32(word + carry) >> _HALF_BITS)
