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

from grokquant.grids import Scheme
from grokquant.runtime.vectors import LANES, look_up
from grokquant.threads import in_pieces, slices
from grokquant.types import ROW_BLOCK_BYTES, QTensor

_f32 = np.float32
_u16 = np.uint16
_u32 = np.uint32
_compiled = njit(nogil=True, cache=True)
# Rows of a tile: on fewer, rearranging the activations for each product takes longer.
_TILE_ROWS = 1024
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
    [tokens, out]"""
    at_once = _rows_at_once(x, shape)
    kept = torch.is_grad_enabled() and x.requires_grad  # a gradient needs all tiles again
    reused = not kept and x.dtype == torch.bfloat16 and x.device.type == "cpu"  # see `dequantize`
    memory: dict[int, Tensor] = {}  # by thread

    def product(part: slice) -> Tensor:
        thread = get_ident()
        if reused and thread not in memory:
            memory[thread] = x.new_empty(at_once, shape[1])
        return x @ rows(part, memory.get(thread)).T  # (tokens, rows)

    return torch.cat(in_pieces(product, slices(0, shape[0], at_once), x.device), dim=-1)


def _rows_at_once(x: Tensor, shape: tuple[int, int]) -> int:
    """Rows of a tile; small matrices are shared among all threads of a CPU."""
    if x.device.type == "cpu":
        rows = min(_TILE_ROWS, -(-shape[0] // torch.get_num_threads()))
    else:
        rows = ROW_BLOCK_BYTES // (shape[1] * x.element_size())
    return max(1, -(-rows // _ROWS_TOGETHER)) * _ROWS_TOGETHER


def dequantize(
    quantized: QTensor, computed: torch.dtype, dtype: torch.dtype, memory: Tensor | None = None
) -> Tensor:
    """The matrix, computed in one dtype and rounded to `dtype`, perhaps in `memory` of at least as
    many rows. [out, in]

    bfloat16 on CPUs is rounded once instead, from float32.
    """
    if dtype != torch.bfloat16 or quantized.device.type != "cpu":
        return quantized.dequantize(computed).to(dtype)
    group_size = quantized.shape[1] // quantized.scales.shape[1]
    if quantized.scheme.row.table and group_size % LANES:
        return quantized.dequantize(torch.float32).to(dtype)
    if memory is None:
        memory = torch.empty(quantized.shape, dtype=torch.bfloat16)
    dense = memory[: len(quantized.codes)]
    bits = dense.view(torch.int16).numpy().view(_u16)
    codes = quantized.codes.contiguous().numpy()
    scales = (quantized.scales.float() * quantized.scheme.row.unit).numpy()
    points = None if quantized.zero_points is None else quantized.zero_points.float().numpy()
    offsets = None if quantized.offsets is None else quantized.offsets.float().numpy()
    values = _values(quantized.scheme, group_size)

    def work(tile: slice) -> None:
        point = None if points is None else points[tile]
        offset = None if offsets is None else offsets[tile]
        if values is None:
            _dequantize(point, scales[tile], offset, codes[tile], bits[tile])
        else:
            look_up(values, point, scales[tile], offset, codes[tile], bits[tile])

    in_pieces(work, slices(0, len(codes), _TILE_ROWS))
    return dense


def _values(scheme: Scheme, group_size: int) -> np.ndarray | None:
    """What codes of up to 4 bits are worth, float32 [16] by their lower four bits: negative ones
    come last. None for wider codes, and for groups that `look_up` does not take."""
    if scheme.row.table:
        return np.array(scheme.row.table, _f32)
    if scheme.bits > 4 or group_size % LANES:
        return None
    places = np.arange(16, dtype=_f32)
    return places if scheme.qmin == 0 else np.where(places < 8, places, places - _f32(16))


@_compiled
def _dequantize(points, scales, offsets, codes, bits):
    """As `look_up`, of codes int8 [rows, in] that are numbers: (code - point) * scale + offset."""
    rows, groups = scales.shape
    size = codes.shape[1] // groups
    for row in range(rows):
        for group in range(groups):
            scale = scales[row, group]
            point = _f32(0) if points is None else points[row, group]
            offset = _f32(0) if offsets is None else offsets[row, group]
            of_group = codes[row, group * size : (group + 1) * size]
            out = bits[row, group * size : (group + 1) * size]
            for i in range(size):
                value = _f32((_f32(of_group[i]) - point) * scale + offset)
                out[i] = _bfloat16(value)
