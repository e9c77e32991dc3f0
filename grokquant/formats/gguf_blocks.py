"""The bytes of llama.cpp's blocks: what stands where in a block of each grid.

Layouts: github.com/ggml-org/ggml, src/ggml-common.h. Codes are laid out in runs: the codes of each
run fill some bits of the same bytes, those of the first run the lowest.

    codes of 4 bits, two runs of 16          codes of 2 bits, four runs of 32
    byte      0      1    ..   15            byte      0                1     ..   31
    bits   7-4 3-0                           bits   7-6 5-4 3-2 1-0
           c16 c0  c17 c1    c31 c15                c96 c64 c32 c0                 c31

In the pictures below, `codes 4 x 2 x 32` means four such pieces, each of two runs of 32 codes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from grokquant.grids import GRIDS, Scheme
from grokquant.types import QTensor


def pack_blocks(name: str, quantized: QTensor, columns: int) -> Tensor:
    """The rows of a matrix as blocks of the grid `name`, uint8 [rows, blocks, bytes]."""
    codes = quantized.codes.unflatten(1, (-1, columns))  # (rows, blocks, columns)
    return torch.cat(_BLOCKS[name].pack(codes, quantized), dim=-1)


def unpack_blocks(name: str, blocks: Tensor, scheme: Scheme) -> QTensor:
    """The inverse of `pack_blocks`, bit by bit."""
    return _BLOCKS[name].unpack(blocks, scheme)


# --- blocks of one group


def _pack_q8_0(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..1   2..33
           scale  int8 codes
    """
    return _bytes(quantized.scales), codes.view(torch.uint8)


def _unpack_q8_0(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = blocks[..., 2:].contiguous().view(torch.int8)
    return QTensor(codes.flatten(1), _float16(blocks, 0), scheme)


def _pack_q4_0(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..1   2..17
           scale  codes 2 x 16, 8 added
    """
    unsigned = (codes + 8).view(torch.uint8)
    return _bytes(quantized.scales), _pack_runs(unsigned.unflatten(-1, (2, 16)), 4)


def _unpack_q4_0(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unpack_runs(blocks[..., 2:], 2, 4).view(torch.int8) - 8
    return QTensor(codes.flatten(1), _float16(blocks, 0), scheme)


def _pack_q4_1(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..1   2..3    4..19
           scale  offset  codes 2 x 16
    """
    assert quantized.offsets is not None
    packed = _pack_runs(codes.view(torch.uint8).unflatten(-1, (2, 16)), 4)
    return _bytes(quantized.scales), _bytes(quantized.offsets), packed


def _unpack_q4_1(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unpack_runs(blocks[..., 4:], 2, 4).view(torch.int8)
    return QTensor(codes.flatten(1), _float16(blocks, 0), scheme, offsets=_float16(blocks, 2))


def _pack_iq4_nl(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..1   2..17
           scale  codes 2 x 16, places in the table
    """
    packed = _pack_runs(codes.view(torch.uint8).unflatten(-1, (2, 16)), 4)
    return _bytes(quantized.scales.to(torch.float16)), packed


def _unpack_iq4_nl(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unpack_runs(blocks[..., 2:], 2, 4).view(torch.int8)
    return QTensor(codes.flatten(1), _float16(blocks, 0).float(), scheme)


# --- blocks of 256 columns, headers as in methods/block_headers.py


def _pack_q6_k(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..127                     128..191                    192..209
           lower 4 bits, 2 x 2 x 64   upper 2 bits, 2 x 4 x 32    header: 16 scales, d
           of codes with 32 added
    """
    unsigned = (codes + 32).view(torch.uint8).unflatten(-1, (2, 4, 32))
    low = _pack_runs((unsigned & 15).unflatten(-2, (2, 2)).flatten(-2), 4)  # (.., 2, 64)
    high = _pack_runs(unsigned >> 4, 2)  # (.., 2, 32)
    return low.flatten(-2), high.flatten(-2), _header(quantized)


def _unpack_q6_k(blocks: Tensor, scheme: Scheme) -> QTensor:
    low = _unpack_runs(blocks[..., :128].unflatten(-1, (2, 64)), 2, 4)  # (.., 2, 2, 64)
    high = _unpack_runs(blocks[..., 128:192].unflatten(-1, (2, 32)), 4, 2)  # (.., 2, 4, 32)
    unsigned = low.flatten(-3) | (high.flatten(-3) << 4)
    header = blocks[..., 192:].contiguous()
    scales = header[..., :16].contiguous().view(torch.int8).float()
    return _with_scales(unsigned.view(torch.int8) - 32, _step(header, 16), scales, header, scheme)


def _pack_q5_k(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..15   16..47                   48..175
           header  fifth bits, 8 x 32       lower 4 bits, 4 x 2 x 32
    """
    unsigned = codes.view(torch.uint8).unflatten(-1, (8, 32))
    low = _pack_runs((unsigned & 15).unflatten(-2, (4, 2)), 4)  # (.., 4, 32)
    return _header(quantized), _pack_runs(unsigned >> 4, 1), low.flatten(-2)


def _unpack_q5_k(blocks: Tensor, scheme: Scheme) -> QTensor:
    low = _unpack_runs(blocks[..., 48:].unflatten(-1, (4, 32)), 2, 4)  # (.., 4, 2, 32)
    high = _unpack_runs(blocks[..., 16:48], 8, 1)  # (.., 8, 32)
    codes = low.flatten(-3) | (high.flatten(-2) << 4)
    return _with_six_bit_minima(codes, blocks, scheme)


def _pack_q4_k(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..15   16..143
           header  codes 4 x 2 x 32
    """
    packed = _pack_runs(codes.view(torch.uint8).unflatten(-1, (4, 2, 32)), 4)
    return _header(quantized), packed.flatten(-2)


def _unpack_q4_k(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unpack_runs(blocks[..., 16:].unflatten(-1, (4, 32)), 2, 4)
    return _with_six_bit_minima(codes.flatten(-3), blocks, scheme)


def _pack_iq4_xs(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..7    8..135
           header  codes 8 x 2 x 16, places in the table
    """
    packed = _pack_runs(codes.view(torch.uint8).unflatten(-1, (8, 2, 16)), 4)
    return _header(quantized), packed.flatten(-2)


def _unpack_iq4_xs(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unpack_runs(blocks[..., 8:].unflatten(-1, (8, 16)), 2, 4)  # (.., 8, 2, 16)
    header = blocks[..., :8].contiguous()
    high = header[..., 2:4].unsqueeze(-1) >> _shifts(4, 2, blocks)  # (.., 2 bytes, 4 scales)
    low = header[..., 4:].unsqueeze(-1) >> _shifts(2, 4, blocks)  # (.., 4 bytes, 2 scales)
    scales = (low & 15).flatten(-2) | ((high & 3).flatten(-2) << 4)
    signed_scales = scales.float() - 32
    signed_codes = codes.flatten(-3).view(torch.int8)
    return _with_scales(signed_codes, _step(header, 0), signed_scales, header, scheme)


def _pack_q3_k(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..31                    32..95                       96..109
           third bits, 8 x 32       lower 2 bits, 2 x 4 x 32     header
           of codes with 4 added
    """
    unsigned = (codes + 4).view(torch.uint8).unflatten(-1, (8, 32))
    high = _pack_runs(unsigned >> 2, 1)  # (.., 32)
    low = _pack_runs((unsigned & 3).unflatten(-2, (2, 4)), 2)  # (.., 2, 32)
    return high, low.flatten(-2), _header(quantized)


def _unpack_q3_k(blocks: Tensor, scheme: Scheme) -> QTensor:
    high = _unpack_runs(blocks[..., :32], 8, 1)  # (.., 8, 32)
    low = _unpack_runs(blocks[..., 32:96].unflatten(-1, (2, 32)), 4, 2)  # (.., 2, 4, 32)
    unsigned = low.flatten(-3) | (high.flatten(-2) << 2)
    header = blocks[..., 96:].contiguous()
    lower = _unpack_runs(header[..., :8], 2, 4)  # (.., 2, 8)
    upper = _unpack_runs(header[..., 8:12], 4, 2)  # (.., 4, 4)
    scales = (lower.flatten(-2) | (upper.flatten(-2) << 4)).float() - 32
    return _with_scales(unsigned.view(torch.int8) - 4, _step(header, 12), scales, header, scheme)


def _pack_q2_k(codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """
    byte   0..15               16..79              80..83
           scales and minima   codes 2 x 4 x 32    d, dmin: the end of the header
    """
    packed = _pack_runs(codes.view(torch.uint8).unflatten(-1, (2, 4, 32)), 2)  # (.., 2, 32)
    header = _header(quantized)
    return header[..., :16], packed.flatten(-2), header[..., 16:]


def _unpack_q2_k(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unpack_runs(blocks[..., 16:80].unflatten(-1, (2, 32)), 4, 2).flatten(-3)
    header = torch.cat((blocks[..., :16], blocks[..., 80:]), dim=-1)
    scales = header[..., :16] & 15
    minima = header[..., :16] >> 4
    steps = (_step(header, 16), _step(header, 18))
    return _with_minima(codes, steps, scales.float(), minima.float(), header, scheme)


# --- what several share


def _with_six_bit_minima(codes: Tensor, blocks: Tensor, scheme: Scheme) -> QTensor:
    """The matrix of Q4_K or Q5_K with these codes uint8 [rows, blocks, 256]."""
    header = blocks[..., :16].contiguous()
    first, second, last = header[..., 4:].split(4, dim=-1)
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), dim=-1)
    minima = torch.cat((second & 63, (last >> 4) | ((second >> 6) << 4)), dim=-1)
    steps = (_step(header, 0), _step(header, 2))
    return _with_minima(codes, steps, scales.float(), minima.float(), header, scheme)


def _with_minima(
    codes: Tensor,
    steps: tuple[Tensor, Tensor],
    scales: Tensor,
    minima: Tensor,
    header: Tensor,
    scheme: Scheme,
) -> QTensor:
    """A matrix of codes [rows, blocks, 256], two steps [rows, blocks, 1], and whole numbers of them
    [rows, blocks, groups]."""
    d, dmin = steps
    signed = codes.flatten(1).contiguous().view(torch.int8)
    offsets = -(dmin * minima).flatten(1)
    return QTensor(signed, (d * scales).flatten(1), scheme, offsets=offsets, headers=header)


def _with_scales(
    codes: Tensor, d: Tensor, scales: Tensor, header: Tensor, scheme: Scheme
) -> QTensor:
    """A matrix of codes [rows, blocks, 256], a step and whole numbers of it."""
    return QTensor(codes.flatten(1), (d * scales).flatten(1), scheme, headers=header)


def _pack_runs(codes: Tensor, bits: int) -> Tensor:
    """Bytes [.., n] of codes uint8 [.., runs, n]: each run is `bits` further up."""
    packed = codes[..., 0, :].clone()
    for run in range(1, codes.shape[-2]):
        packed |= codes[..., run, :] << (bits * run)
    return packed


def _unpack_runs(packed: Tensor, runs: int, bits: int) -> Tensor:
    """Codes [.., runs, n] of bytes [.., n], the inverse of `_pack_runs`."""
    mask = (1 << bits) - 1
    if packed.device.type == "cpu":
        codes = torch.empty(*packed.shape[:-1], runs, packed.shape[-1], dtype=torch.uint8)
        _split_runs(packed.flatten(0, -2).numpy(), bits, codes.flatten(0, -3).numpy())
        return codes
    packed = packed.contiguous()  # read once for each run
    return torch.stack([(packed >> (bits * run)) & mask for run in range(runs)], dim=-2)


@njit(nogil=True, cache=True)
def _split_runs(packed, bits, codes):
    """Bytes [rows, n] to the codes [rows, runs, n] in them, in one pass."""
    mask = np.uint8((1 << bits) - 1)
    for row in range(len(packed)):
        for run in range(codes.shape[1]):
            shift = np.uint8(bits * run)
            for i in range(packed.shape[1]):
                codes[row, run, i] = np.uint8(packed[row, i] >> shift) & mask


def _shifts(count: int, bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * bits, bits, dtype=torch.uint8, device=like.device)


def _header(quantized: QTensor) -> Tensor:
    assert quantized.headers is not None
    return quantized.headers


def _bytes(values: Tensor) -> Tensor:
    """float16 [rows, blocks] as bytes [rows, blocks, 2]."""
    return values.contiguous().unsqueeze(-1).view(torch.uint8)


def _float16(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block [rows, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _step(header: Tensor, at: int) -> Tensor:
    """The same as float32 [rows, blocks, 1]."""
    return _float16(header, at).float().unsqueeze(-1)


@dataclass(frozen=True)
class _Block:
    """How a grid is laid out: `pack` gives the fields of blocks, whose codes are [rows, blocks,
    columns], one after the other; `unpack` reads blocks uint8 [rows, blocks, bytes]."""

    pack: Callable[[Tensor, QTensor], tuple[Tensor, ...]]
    unpack: Callable[[Tensor, Scheme], QTensor]


_BLOCKS = {
    "q8_0": _Block(_pack_q8_0, _unpack_q8_0),
    "q4_0": _Block(_pack_q4_0, _unpack_q4_0),
    "q4_1": _Block(_pack_q4_1, _unpack_q4_1),
    "iq4_nl": _Block(_pack_iq4_nl, _unpack_iq4_nl),
    "q6_k": _Block(_pack_q6_k, _unpack_q6_k),
    "q5_k": _Block(_pack_q5_k, _unpack_q5_k),
    "q4_k": _Block(_pack_q4_k, _unpack_q4_k),
    "iq4_xs": _Block(_pack_iq4_xs, _unpack_iq4_xs),
    "q3_k": _Block(_pack_q3_k, _unpack_q3_k),
    "q2_k": _Block(_pack_q2_k, _unpack_q2_k),
}
# A grid without its functions would pass the plan and fail in the middle of a run.
_PACKED = {name for name, grid in GRIDS.items() if grid.ggml_type is not None}
if _BLOCKS.keys() != _PACKED:
    raise TypeError(f"gguf_blocks: grids without functions: {sorted(_PACKED ^ _BLOCKS.keys())}")
