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
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from grokquant.grids import GRIDS, Scheme
from grokquant.types import QTensor

_INT32 = ir.IntType(32)
_SIXTEEN = ir.VectorType(ir.IntType(8), 16)  # bytes


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
    codes = _unpack_runs(blocks[..., 2:], 2, 4, -8).view(torch.int8)
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
    flat = header.flatten(0, 1).cpu()
    steps = flat[:, :4].contiguous().view(torch.float16).float()  # (all blocks, 2)
    levels = torch.empty(2, len(flat), 8)
    _six_bit_levels(flat.numpy(), steps.numpy(), levels.numpy())
    scales, offsets = levels.to(blocks.device).view(2, len(blocks), -1)
    return QTensor(codes.flatten(1).view(torch.int8), scales, scheme, None, offsets, header)


@njit(nogil=True, cache=True)
def _six_bit_levels(header, steps, levels):
    """Scales and offsets float32 [2, blocks, 8] of headers uint8 [blocks, 16] and their steps
    float32 [blocks, 2].

    bits        7 6          5 .. 0
    byte 4+i    scale 4+i    scale i       i = 0 .. 3
    byte 8+i    minimum 4+i  minimum i     upper two bits of 4+i
    byte 12+i   minimum 4+i in the upper half, scale 4+i in the lower one: their lower four bits
    """
    scales, offsets = levels
    for block in range(len(header)):
        d, dmin = steps[block]
        for i in range(4):
            of_scales = header[block, 4 + i]
            of_minima = header[block, 8 + i]
            lower = header[block, 12 + i]
            scales[block, i] = d * np.float32(of_scales & 63)
            scales[block, 4 + i] = d * np.float32((lower & 15) | (of_scales >> 6 << 4))
            offsets[block, i] = -(dmin * np.float32(of_minima & 63))
            offsets[block, 4 + i] = -(dmin * np.float32((lower >> 4) | (of_minima >> 6 << 4)))


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
    if codes.device.type == "cpu":
        joined = torch.empty(*codes.shape[:-2], codes.shape[-1], dtype=torch.uint8)
        pieces = (codes.flatten(0, -3), joined.flatten(0, -2))
        of_eight, joined_of_eight = (piece.numpy().view(np.uint64) for piece in pieces)
        _join_runs(of_eight, bits, joined_of_eight)
        return joined
    packed = codes[..., 0, :].clone()
    for run in range(1, codes.shape[-2]):
        packed |= codes[..., run, :] << (bits * run)
    return packed


def _unpack_runs(packed: Tensor, runs: int, bits: int, lowest: int = 0) -> Tensor:
    """Codes [.., runs, n] of bytes [rows, blocks, .., n], the inverse of `_pack_runs`; `lowest` is
    what the code 0 stands for."""
    mask = (1 << bits) - 1
    if packed.device.type == "cpu":
        codes = torch.empty(*packed.shape[:-1], runs, packed.shape[-1], dtype=torch.uint8)
        blocks = packed.flatten(0, 1)  # a view: blocks are equally far apart
        extent = (len(blocks) - 1) * blocks.stride(0) + blocks[0].numel()
        flat = blocks.as_strided((extent,), (1,)).numpy()
        pieces = (len(blocks), blocks[0].numel() // packed.shape[-1], runs, packed.shape[-1])
        _split_runs(flat, blocks.stride(0), pieces, bits, lowest, codes.view(-1).numpy())
        return codes
    packed = packed.contiguous()  # read once for each run
    split = torch.stack([(packed >> (bits * run)) & mask for run in range(runs)], dim=-2)
    return (split.view(torch.int8) + lowest).view(torch.uint8)


@njit(nogil=True, cache=True)
def _join_runs(codes, bits, packed):
    """Codes [rows, runs, n] to the bytes [rows, n] that hold them, in one pass.

    Both are seen as uint64, eight bytes each: codes are small, and none reaches the next byte.
    """
    for row in range(len(packed)):
        for i in range(packed.shape[1]):
            joined = codes[row, 0, i]
            for run in range(1, codes.shape[1]):
                joined |= codes[row, run, i] << np.uint64(bits * run)
            packed[row, i] = joined


@njit(nogil=True, cache=True)
def _split_runs(packed, step, sizes, bits, lowest, codes):
    """Bytes to the codes in them, of `sizes` [blocks, pieces, runs, n], in one pass. Blocks begin
    `step` bytes after one another, and the pieces of one touch."""
    mask = np.uint8((1 << bits) - 1)
    least = np.uint8(lowest)
    blocks, pieces, runs, n = sizes
    whole = n // 16 * 16
    to = 0
    for block in range(blocks):
        for piece in range(pieces):
            at = block * step + piece * n
            for run in range(runs):
                shift = np.uint8(bits * run)
                for i in range(0, whole, 16):
                    _split_sixteen(packed, at + i, shift, mask, least, codes, to + i)
                for i in range(whole, n):
                    codes[to + i] = np.uint8((packed[at + i] >> shift) & mask) + least
                to += n


def _split_type(_, packed, at, shift, mask, least, codes, to):
    """codes[to : to + 16] = ((packed[at : at + 16] >> shift) & mask) + least, all uint8.

    In LLVM's own words: a compiled loop takes three times as long for so few bytes.
    """
    kinds = (packed, types.intp, shift, mask, least, codes, types.intp)
    return types.none(*kinds), _split_code


_split_sixteen: Callable = intrinsic(_split_type)


def _split_code(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]
) -> ir.Value:
    def pointer(array: int) -> ir.Value:
        kind = signature.args[array]
        held = context.make_array(kind)(context, builder, arguments[array])
        place = cgutils.get_item_pointer(context, builder, kind, held, [arguments[array + 1]])
        return builder.bitcast(place, _SIXTEEN.as_pointer())

    def sixteen(number: ir.Value) -> ir.Value:
        one = builder.insert_element(ir.Constant(_SIXTEEN, ir.Undefined), number, _INT32(0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT32, 16), [0] * 16))

    shift, mask, least = (sixteen(number) for number in arguments[2:5])
    shifted = builder.lshr(builder.load(pointer(0), align=1), shift)
    found = builder.add(builder.and_(shifted, mask), least)
    builder.store(found, pointer(5), align=1)
    return context.get_dummy_value()


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
    if blocks.storage_offset() % 2 or blocks.shape[-1] % 2:
        return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)
    return blocks.view(torch.float16)[..., at // 2].contiguous()


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
