"""torch's products with codes of 4 bits, for CPUs and for CUDA.

That for CUDA has never run: no GPU was at hand.

Both multiply codes 0..15, worth (code - 8) * scale + zero, in groups of 32 to 256 columns. Their
layouts differ, on CPUs also between machines, so they are made when a matrix is first used. Before
that, CUDA's packs pairs of columns:

    byte   | c0 c1 | c2 c3 | ..        c0 in the upper half
"""

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.runtime.matrix_cache import Parts
from grokquant.types import QTensor

# What the kernels ask for: columns of a group, rows of a matrix.
_GROUPS = (256, 128, 64, 32)
_ROWS = 16
# Rows that are converted at once: the layout for CPUs has blocks of 64, and each code takes 4 bytes
# on the way.
_ROWS_AT_ONCE = 1024
# CUDA's layout has tiles of 16 columns, of which 8, 4 or 2 are together.
_TILE_COLUMNS = 16
_TILES_TOGETHER = (8, 4, 2)


def takes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the kernel for CPUs can multiply with a matrix [out, in]."""
    rows, columns = shape
    linear = scheme.bits <= 4 and not scheme.row.table
    return linear and rows % _ROWS == 0 and _kernel_group(scheme, columns) is not None


def takes_on_cuda(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """The same of the kernel for CUDA, which multiplies bfloat16 only."""
    return dtype == torch.bfloat16 and takes(scheme, shape, dtype)


def held_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The bytes of what `prepare` and `prepare_for_cuda` return."""
    rows, columns = shape
    group_size = _kernel_group(scheme, columns)
    assert group_size is not None
    levels = columns // group_size * 2
    return rows * (columns // 2 + levels * dtype.itemsize)


def prepare(quantized: QTensor, dtype: torch.dtype) -> Parts:
    """`codes` uint8 [out, in / 2] in the layout for this CPU and `levels` [groups, out, 2], the
    scales and zeros of groups in `dtype`."""
    lowest = _lowest(quantized.scheme)
    packed = []
    for some in quantized.codes.split(_ROWS_AT_ONCE):
        codes = some.int() - lowest  # (rows, in), from 0 on
        packed.append(torch._convert_weight_to_int4pack_for_cpu(codes, 1))
    return {"codes": torch.cat(packed), "levels": _levels(quantized, dtype)}


def product(x: Tensor, held: Parts) -> Tensor:
    """x [tokens, in] times a prepared matrix: [tokens, out]."""
    group_size = x.shape[1] // len(held["levels"])
    return torch._weight_int4pack_mm_for_cpu(x, held["codes"], group_size, held["levels"])


def prepare_for_cuda(quantized: QTensor, dtype: torch.dtype) -> Parts:
    """As `prepare`, in CUDA's layout: `codes` int32 [out / 8, in / 16 / tiles, 32, tiles / 2]."""
    codes = (quantized.codes - _lowest(quantized.scheme)).view(torch.uint8)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    columns = codes.shape[1]
    tiles = next(count for count in _TILES_TOGETHER if columns % (count * _TILE_COLUMNS) == 0)
    packed = torch._convert_weight_to_int4pack(pairs, tiles)
    return {"codes": packed, "levels": _levels(quantized, dtype)}


def product_on_cuda(x: Tensor, held: Parts) -> Tensor:
    """x [tokens, in] times a matrix prepared for CUDA: [tokens, out]."""
    group_size = x.shape[1] // len(held["levels"])
    return torch._weight_int4pack_mm(x, held["codes"], group_size, held["levels"])


def _kernel_group(scheme: Scheme, columns: int) -> int | None:
    """The largest group of the kernels that lies in one group of the grid."""
    own = scheme.group_size or columns
    return next((size for size in _GROUPS if own % size == 0), None)


def _lowest(scheme: Scheme) -> int:
    """The code that becomes 0. Signed codes of fewer bits lie around the middle, as those of 4 bits
    do: the kernels lose least where their zero is small."""
    return 0 if scheme.qmin == 0 else -8


def _levels(quantized: QTensor, dtype: torch.dtype) -> Tensor:
    """[groups, out, 2] of scales and zeros in `dtype`, for the groups of the kernels."""
    scheme = quantized.scheme
    scale = quantized.scales.float() * scheme.row.unit  # (out, groups)
    points = 0 if quantized.zero_points is None else quantized.zero_points.float()
    zero = scale * (8 + _lowest(scheme) - points)
    if quantized.offsets is not None:
        zero = zero + quantized.offsets.float()
    columns = quantized.shape[1]
    group_size = _kernel_group(scheme, columns)
    assert group_size is not None
    repeats = columns // group_size // scale.shape[1]
    both = torch.stack((scale, zero), dim=-1).repeat_interleave(repeats, dim=1)  # (out, groups, 2)
    return both.transpose(0, 1).to(dtype).contiguous()
