"""The headers of llama.cpp's blocks of 256 columns, as bytes [rows, blocks, bytes].

They hold the float16 steps `d` and `dmin` [rows, blocks, 1] and the scales and minima [rows,
blocks, groups], whole numbers. Layouts: github.com/ggml-org/ggml, src/ggml-common.h. A header is
all of a block but its codes; `formats/gguf_blocks.py` puts both together and reads them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grokquant.grids import Scheme

# Bytes of a header at which its float16 steps start: d, and dmin where the grid has minima.
_STEPS_AT = {
    "q6_k": (16,),
    "q5_k": (0, 2),
    "q4_k": (0, 2),
    "iq4_xs": (0,),
    "q3_k": (12,),
    "q2_k": (16, 18),
}


def read_steps(headers: Tensor, scheme: Scheme) -> tuple[Tensor, ...]:
    """The float32 steps of blocks, [rows, blocks, 1] each: d, and dmin where there are minima."""
    places = (slice(at, at + 2) for at in _STEPS_AT[scheme.grid])
    return tuple(headers[..., at].contiguous().view(torch.float16).float() for at in places)


def whole_limits(scheme: Scheme) -> tuple[int, int]:
    """The least and the largest whole number of steps that a scale or minimum may be."""
    bits = scheme.row.scale_bits
    if not scheme.symmetric:
        return 0, (1 << bits) - 1
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def in_steps(values: Tensor, step: Tensor, limits: tuple[int, int]) -> Tensor:
    """Values [rows, groups] as whole numbers of their block's steps, [rows, blocks, groups]."""
    blocks = values.unflatten(1, (step.shape[1], -1))
    return (blocks / torch.where(step == 0, 1.0, step)).round().clamp(*limits)


def with_levels(headers: Tensor, scheme: Scheme, scales: Tensor, offsets: Tensor) -> Tensor:
    """Headers of the same steps whose scales and offsets [rows, groups] are these multiples."""
    limits = whole_limits(scheme)
    steps = read_steps(headers, scheme)
    if scheme.symmetric:
        return SCALE_HEADERS[scheme.grid](steps[0], in_steps(scales, steps[0], limits))
    d, dmin = steps
    parts = (in_steps(scales, d, limits), in_steps(-offsets, dmin, limits))
    return MINIMA_HEADERS[scheme.grid](d, dmin, *parts)


def _header_with_six_bit_minima(d: Tensor, dmin: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Q4_K and Q5_K: eight scales s and eight minima m of 6 bits in 12 bytes.

    byte      0..3           4..7           8..11
    bits   7-6    5-0     7-6    5-0     7-4    3-0
           s4..7  s0..3   m4..7  m0..3   m4..7  s4..7
           upper          upper          lower  lower
    """
    s = scales.to(torch.uint8)
    m = minima.to(torch.uint8)
    first = s[..., :4] | ((s[..., 4:] >> 4) << 6)
    second = m[..., :4] | ((m[..., 4:] >> 4) << 6)
    last = (s[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)
    return torch.cat((_bytes(d), _bytes(dmin), first, second, last), dim=-1)


def _header_of_q2_k(d: Tensor, dmin: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Q2_K: a byte for each of 16 groups, its minimum in the upper half; then d and dmin.

    byte   0..15            16..17  18..19
           m << 4 | s       d       dmin
    """
    both = scales.to(torch.uint8) | (minima.to(torch.uint8) << 4)
    return torch.cat((both, _bytes(d), _bytes(dmin)), dim=-1)


def _header_of_q6_k(d: Tensor, scales: Tensor) -> Tensor:
    """Q6_K: sixteen int8 scales, then d."""
    return torch.cat((scales.to(torch.int8).view(torch.uint8), _bytes(d)), dim=-1)


def _header_of_q3_k(d: Tensor, scales: Tensor) -> Tensor:
    """Q3_K: sixteen scales of 6 bits, 32 added, in 12 bytes; then d.

    byte      0..7            8..11                           12..13
    bits   7-4     3-0     7-6     5-4    3-2    1-0
           s8..15  s0..7   s12..15 s8..11 s4..7  s0..3        d
           lower   lower   upper   upper  upper  upper
    """
    s = (scales + 32).to(torch.uint8)
    low = s & 15
    high = (s >> 4).unflatten(-1, (4, 4))  # (.., 4 runs, 4)
    first = low[..., :8] | (low[..., 8:] << 4)
    last = high[..., 0, :].clone()
    for run in range(1, 4):
        last |= high[..., run, :] << (2 * run)
    return torch.cat((first, last, _bytes(d)), dim=-1)


def _header_of_iq4_xs(d: Tensor, scales: Tensor) -> Tensor:
    """IQ4_XS: d, then eight scales of 6 bits, 32 added: the upper two bits of all, then the lower
    four.

    byte   0..1   2                  3                  4            ..  7
           d      s3 s2 s1 s0 upper  s7 s6 s5 s4 upper  s1 s0 lower      s7 s6 lower
    """
    s = (scales + 32).to(torch.uint8)
    high = (s >> 4).unflatten(-1, (2, 4))  # (.., 2 bytes, 4 scales)
    upper = high[..., 0].clone()
    for place in range(1, 4):
        upper |= high[..., place] << (2 * place)
    lower = (s[..., ::2] & 15) | ((s[..., 1::2] & 15) << 4)
    return torch.cat((_bytes(d), upper, lower), dim=-1)


def _bytes(step: Tensor) -> Tensor:
    """The two bytes [rows, blocks, 2] of a float16 [rows, blocks, 1]."""
    return step.to(torch.float16).view(torch.uint8)


# Of d, dmin, scales and minima.
MINIMA_HEADERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "q5_k": _header_with_six_bit_minima,
    "q4_k": _header_with_six_bit_minima,
    "q2_k": _header_of_q2_k,
}
# Of d and scales.
SCALE_HEADERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "q6_k": _header_of_q6_k,
    "iq4_xs": _header_of_iq4_xs,
    "q3_k": _header_of_q3_k,
}
