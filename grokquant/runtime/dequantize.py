"""Products of many tokens with a matrix that is dequantized tile by tile of rows.

A thread unpacks, dequantizes and multiplies a tile that stays in the cache. Its next tile takes the
same memory, since the first use of a page takes longer than dequantizing what it holds.
"""

from collections.abc import Callable
from threading import get_ident

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
_inlined = njit(nogil=True, cache=True, inline="always")
# Rows of a tile: on fewer, rearranging the activations for each product takes longer.
_TILE_ROWS = 512
# Tiles begin at a multiple of these.
_ROWS_TOGETHER = 32
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


# Makes some rows of a matrix, which may lie in the memory [rows or more, in] that it is given.
Rows = Callable[[slice, Tensor | None], Tensor]


def product_with_rows(x: Tensor, shape: tuple[int, int], rows: Rows) -> Tensor:
    """x [tokens, in] times a matrix [out, in] of which `rows` makes a tile at a time.
    [tokens, out]

    Computed as W X^T: of two factors, libraries rearrange the second one.
    """
    at_once = _rows_at_once(x, shape)
    kept = torch.is_grad_enabled() and x.requires_grad  # a gradient needs all tiles again
    memory: dict[int, Tensor] = {}  # by thread

    def product(part: slice) -> Tensor:
        thread = get_ident()
        if thread not in memory and not kept:
            memory[thread] = x.new_empty(at_once, shape[1])
        return rows(part, memory.get(thread)) @ x.T  # (rows, tokens)

    products = in_pieces(product, slices(0, shape[0], at_once), x.device)
    return torch.cat([product.T for product in products], dim=-1)


def _rows_at_once(x: Tensor, shape: tuple[int, int]) -> int:
    """Rows of a tile; small matrices are shared among all threads of a CPU."""
    if x.device.type == "cpu":
        rows = min(_TILE_ROWS, -(-shape[0] // torch.get_num_threads()))
    else:
        rows = ROW_BLOCK_BYTES // (shape[1] * x.element_size())
    return max(1, -(-rows // _ROWS_TOGETHER)) * _ROWS_TOGETHER


def dequantize(quantized: QTensor, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
    """The matrix in `dtype`, perhaps in `memory` of at least as many rows. [out, in]

    On CPUs a value is rounded once, from float32 to bfloat16; `QTensor.dequantize` rounds to the
    dtype of its scales first.
    """
    if dtype != torch.bfloat16 or quantized.device.type != "cpu":
        return quantized.dequantize().to(dtype)
    codes = quantized.codes.contiguous().numpy()
    levels = _levels(quantized)
    table = np.array(quantized.scheme.row.table, _f32)
    if memory is None:
        memory = torch.empty(quantized.shape, dtype=torch.bfloat16)
    dense = memory[: len(codes)]
    bits = dense.view(torch.int16).numpy().view(_u16)

    def work(tile: slice) -> None:
        if len(table):
            _look_up(codes[tile], levels[tile], table, bits[tile])
        else:
            _dequantize(codes[tile], levels[tile], bits[tile])

    in_pieces(work, slices(0, len(codes), _TILE_ROWS))
    return dense


def _levels(quantized: QTensor) -> np.ndarray:
    """float32 [rows, groups, 3]: zero point, scale and offset of each group."""
    levels = torch.zeros(*quantized.scales.shape, 3)
    if quantized.zero_points is not None:
        levels[..., 0] = quantized.zero_points
    levels[..., 1] = quantized.scales.float() * quantized.scheme.row.unit
    if quantized.offsets is not None:
        levels[..., 2] = quantized.offsets
    return levels.numpy()


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


@_inlined
def _of_four(code, value0, value1, value2, value3):
    """That of the lowest two bits of a code, by selections: a CPU makes those of many codes at
    once, unlike reads from different places."""
    low = value1 if code & 1 else value0
    high = value3 if code & 1 else value2
    return high if code & 2 else low


@_compiled
def _look_up(codes, levels, table, bits):
    """The same of codes 0 to 15, places in a table of values."""
    rows, groups, _ = levels.shape
    size = codes.shape[1] // groups
    v = np.empty(16, _u16)
    for row in range(rows):
        for group in range(groups):
            for code in range(16):
                v[code] = _bfloat16(_f32(table[code] * levels[row, group, 1]))
            a, b, c, d, e, f, g, h = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]
            j, k, m, n, p, q, r, s = v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]
            of_group = codes[row, group * size : (group + 1) * size]
            out = bits[row, group * size : (group + 1) * size]
            for i in range(size):
                code = of_group[i]
                first = _of_four(code, a, b, c, d)
                second = _of_four(code, e, f, g, h)
                third = _of_four(code, j, k, m, n)
                fourth = _of_four(code, p, q, r, s)
                out[i] = _of_four(code >> 2, first, second, third, fourth)
