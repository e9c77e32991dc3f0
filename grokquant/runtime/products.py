"""Products of a few tokens with a matrix that stays at 4 bits, by torch's kernel for CPUs.

The kernel multiplies codes 0..15, worth (code - 8) * scale + zero, in groups of 32 to 256 columns.
Wider codes are split into two such planes, and the products of both are added:

    code + 128 of 8 bits   | high nibble   worth (high - 8) * 16 scale
                           | low nibble    worth (low - 8) * scale + what is left

The kernel's layout differs between CPUs, so it is made when a matrix is first used.
"""

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.runtime.matrix_cache import Parts
from grokquant.types import QTensor

# The kernel reads a plane again for every few tokens; from here on dequantizing the matrix once and
# multiplying is quicker (eval/bench/packed.py).
_PLANE_TOKENS = 32
# What the kernel asks for: columns of a group, rows of a matrix.
_GROUPS = (256, 128, 64, 32)
_ROWS = 16
# Rows that are converted at once: the kernel's layout has blocks of 64, and each code takes 4 bytes
# on the way.
_ROWS_AT_ONCE = 1024
# A form that takes more than this times the matrix's own bytes defeats its purpose: small groups of
# codes that need two planes have two scales and two zeros each.
_MOST_GROWTH = 1.2


def kernel_takes(scheme: Scheme, shape: tuple[int, int], stored_bytes: int) -> bool:
    """Whether the kernel can multiply with a matrix [out, in] on a CPU, in not much more memory
    than it takes in its file."""
    if scheme.row.table or shape[0] % _ROWS or _kernel_group(scheme, shape[1]) is None:
        return False
    return kernel_bytes(scheme, shape, torch.bfloat16) <= _MOST_GROWTH * stored_bytes


def kernel_is_quicker(scheme: Scheme, tokens: int) -> bool:
    """Whether it multiplies so few tokens sooner than a matrix product with dequantized tiles."""
    return tokens * _planes(scheme) < _PLANE_TOKENS


def kernel_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The bytes of what `prepare` returns for a matrix [out, in] that the kernel takes."""
    rows, columns = shape
    group_size = _kernel_group(scheme, columns)
    assert group_size is not None
    of_a_row = columns // 2 + columns // group_size * 2 * dtype.itemsize
    return _planes(scheme) * rows * of_a_row


def prepare(quantized: QTensor, dtype: torch.dtype) -> Parts:
    """The planes of a matrix that the kernel takes, for activations in `dtype`.

    Each has `codes` uint8 [out, in / 2] in the kernel's layout and `levels` [groups, out, 2], the
    scales and zeros of its groups.
    """
    scheme = quantized.scheme
    scale = quantized.scales.float() * scheme.row.unit  # (out, groups)
    center = (8 if _planes(scheme) == 1 else 136) + _lowest(scheme)
    zero = scale * (center - _zero_points(quantized))
    if quantized.offsets is not None:
        zero = zero + quantized.offsets.float()
    levels = [(scale, zero)]
    if _planes(scheme) == 2:
        levels.insert(0, (16 * scale, torch.zeros_like(zero)))
    planes: Parts = {}
    for number, codes in enumerate(_pack(quantized)):
        planes[f"codes{number}"] = codes
        planes[f"levels{number}"] = _levels(*levels[number], quantized, dtype)
    return planes


def product(x: Tensor, planes: Parts) -> Tensor:
    """x [tokens, in] times a prepared matrix: [tokens, out]."""
    of_plane = [_plane_product(x, planes, number) for number in range(len(planes) // 2)]
    return sum(of_plane[1:], start=of_plane[0])


def _plane_product(x: Tensor, planes: Parts, number: int) -> Tensor:
    codes = planes[f"codes{number}"]
    levels = planes[f"levels{number}"]
    group_size = x.shape[1] // len(levels)
    return torch._weight_int4pack_mm_for_cpu(x, codes, group_size, levels)


def _zero_points(quantized: QTensor) -> Tensor | int:
    return 0 if quantized.zero_points is None else quantized.zero_points.float()


def _kernel_group(scheme: Scheme, columns: int) -> int | None:
    """The largest group of the kernel that lies in one group of the grid."""
    own = scheme.group_size or columns
    return next((size for size in _GROUPS if own % size == 0), None)


def _planes(scheme: Scheme) -> int:
    return 1 if scheme.bits <= 4 else 2


def _lowest(scheme: Scheme) -> int:
    """The code that becomes 0. Signed codes of fewer bits lie around the middle of their plane, as
    wider ones do: the kernel loses least where its zero is small."""
    if scheme.qmin == 0:
        return 0
    return -8 if _planes(scheme) == 1 else -128


def _pack(quantized: QTensor) -> list[Tensor]:
    """uint8 [out, in / 2] for each plane, block of rows by block of rows."""
    planes: list[list[Tensor]] = [[] for _ in range(_planes(quantized.scheme))]
    for codes in quantized.codes.split(_ROWS_AT_ONCE):
        code = codes.int() - _lowest(quantized.scheme)  # (rows, in), from 0 on
        nibbles = [code] if len(planes) == 1 else [code >> 4, code & 15]
        for plane, nibble in zip(planes, nibbles, strict=True):
            packed = torch._convert_weight_to_int4pack_for_cpu(nibble.contiguous(), 1)
            plane.append(packed)
    return [torch.cat(plane) for plane in planes]


def _levels(scale: Tensor, zero: Tensor, quantized: QTensor, dtype: torch.dtype) -> Tensor:
    """[groups, out, 2] of scales and zeros [out, groups], for the groups of the kernel."""
    columns = quantized.shape[1]
    group_size = _kernel_group(quantized.scheme, columns)
    assert group_size is not None
    repeats = columns // group_size // scale.shape[1]
    both = torch.stack((scale, zero), dim=-1).repeat_interleave(repeats, dim=1)  # (out, groups, 2)
    return both.transpose(0, 1).to(dtype).contiguous()
