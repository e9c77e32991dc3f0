"""What spans the grid of each group, whatever the grid: scales, zero points, offsets, headers.

Integers go through `scales`. Here are codebooks, whose values are looked up, and llama.cpp's
blocks, whose scales and offsets are themselves small integers times two float16 of 256 columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from grokquant.grids import CODEBOOKS, SCALE_DTYPES, Scheme
from grokquant.methods.compiled import SHRINKS, in_tiles
from grokquant.methods.scales import ScaleRule, find_scales, group_columns, round_to_grid
from grokquant.types import QTensor

# Columns of a block of llama.cpp; weights searched at once, to keep the temporaries in the cache.
BLOCK = 256
_AT_ONCE = 1 << 17
# Levels by which a search widens or narrows the range of a group, as llama.cpp's does.
_STRETCHES = tuple(step / 10 for step in range(-10, 11))


@dataclass(frozen=True)
class Levels:
    """The levels of a matrix, to be rounded to: all of a QTensor but its codes."""

    scheme: Scheme
    scales: Tensor
    zero_points: Tensor | None = None
    offsets: Tensor | None = None
    headers: Tensor | None = None

    def hold(self, codes: Tensor) -> QTensor:
        """The matrix whose int8 codes [out, in] are these."""
        spans = (self.zero_points, self.offsets, self.headers)
        return QTensor(codes, self.scales, self.scheme, *spans)

    def nearest(self, W: Tensor) -> QTensor:
        """Every weight of W [out, in] rounded to its nearest level."""
        codes = in_tiles(
            len(W), _rows_at_once(W), lambda part: self._nearest(W[part].float(), part.start)
        )
        return self.hold(torch.cat(codes))

    def _nearest(self, W: Tensor, start: int) -> Tensor:
        rows = slice(start, start + len(W))
        scales = divisors(self.scales[rows], self.scheme.unit).unsqueeze(-1)  # (rows, groups, 1)
        groups = group_columns(W, self.scheme)
        if self.offsets is not None:
            groups = groups - self.offsets[rows].float().unsqueeze(-1)
        if self.scheme.grid in CODEBOOKS:
            return nearest_in_codebook(groups / scales, self.scheme).flatten(1)
        zeros = None
        if self.zero_points is not None:
            zeros = self.zero_points[rows].float().unsqueeze(-1)
        return round_to_grid(groups, scales, zeros, self.scheme).to(torch.int8).flatten(1)


def find_levels(
    W: Tensor, scheme: Scheme, rule: ScaleRule, importance: Tensor | None = None
) -> Levels:
    """Levels for W [out, in]: of the whole range of each group (`absmax`), or of the least squared
    error that a search finds (`mse`), columns weighted by `importance` [in]."""
    if scheme.grid == "integer":
        return Levels(scheme, *find_scales(W, scheme, rule, importance))
    if importance is None or importance.sum() == 0:
        importance = torch.ones(W.shape[1], device=W.device)
    weights = group_columns(importance.float().unsqueeze(0), scheme)  # (1, groups, group_size)
    find = _FINDERS[scheme.grid]
    found = in_tiles(
        len(W),
        _rows_at_once(W),
        lambda part: find(group_columns(W[part].float(), scheme), weights, scheme, rule),
    )
    return Levels(scheme, *(_cat([getattr(f, name) for f in found]) for name in _SPANS))


def _rows_at_once(W: Tensor) -> int:
    """Few enough for the cache of a CPU, many enough for another device."""
    values = _AT_ONCE if W.device.type == "cpu" else 128 * _AT_ONCE
    return max(1, values // W.shape[1])


_SPANS = ("scales", "zero_points", "offsets", "headers")


def _cat(parts: list[Tensor | None]) -> Tensor:
    return torch.cat(parts) if parts[0] is not None else None  # type: ignore[arg-type,return-value]


def nearest_in_codebook(values: Tensor, scheme: Scheme) -> Tensor:
    """int8 places in the scheme's table of what is nearest to `values`."""
    table = torch.tensor(CODEBOOKS[scheme.grid], device=values.device)
    ordered, places = table.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    return places[torch.bucketize(values.contiguous(), middles)].to(torch.int8)


def _find_absmax(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Levels:
    """Of grids whose scale is what the largest weight of a group is stored as."""
    W, absmax = groups.flatten(1), groups.abs().amax(-1)  # (rows, in), (rows, groups)
    best = scales = torch.where(absmax == 0, 1.0, absmax)
    if rule == "mse":
        least = torch.full_like(scales, torch.inf)
        for shrink in SHRINKS.tolist():
            tried = Levels(scheme, scales * shrink)
            error = (tried.nearest(W).dequantize() - W).view_as(groups)
            squared = (error.square() * weights).sum(-1)
            best = torch.where(squared < least, tried.scales, best)
            least = torch.minimum(squared, least)
    return Levels(scheme, best.to(SCALE_DTYPES[scheme.scale_dtype]))


def _find_q4_1(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Levels:
    scales, offsets = _fit_range(groups, weights, scheme, rule, any_sign=True)
    scales, offsets = (value.to(torch.float16) for value in (scales, offsets))
    return Levels(scheme, torch.where(scales == 0, 1.0, scales), offsets=offsets)


def _find_with_minima(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Levels:
    """Blocks of eight groups, whose scales and minima are 6-bit parts of two float16."""
    scales, offsets = _fit_range(groups, weights, scheme, rule, any_sign=False)
    d, dmin = _unit(scales, 8, 63), _unit(offsets, 8, 63)

    def spans(scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor]:
        return (d * scales).flatten(1), -(dmin * minima).flatten(1)

    whole: tuple[Tensor, ...] = _whole(scales, d, 0, 63), _whole(-offsets, dmin, 0, 63)
    if rule == "mse":
        whole = _refine(groups, weights, scheme, spans, whole, (0, 63))
    headers = torch.cat((_bytes(d), _bytes(dmin), _pack_six_bits(*whole)), dim=-1)
    scales, offsets = spans(*whole)
    return Levels(scheme, scales, offsets=offsets, headers=headers)


def _find_q6_k(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Levels:
    """Blocks of sixteen groups, whose scales are 8-bit parts of a float16."""
    scales = _fit_symmetric(groups, weights, scheme, rule)
    d = _unit(scales, 16, 127)

    def spans(parts: Tensor) -> tuple[Tensor, Tensor]:
        return (d * parts).flatten(1), torch.zeros_like(scales)

    whole: tuple[Tensor, ...] = (_whole(scales, d, -128, 127),)
    if rule == "mse":
        whole = _refine(groups, weights, scheme, spans, whole, (-128, 127))
    headers = torch.cat((whole[0].to(torch.int8).view(torch.uint8), _bytes(d)), dim=-1)
    return Levels(scheme, spans(*whole)[0], headers=headers)


_Finder = Callable[[Tensor, Tensor, Scheme, ScaleRule], Levels]
_FINDERS: dict[str, _Finder] = {
    "nf4": _find_absmax,
    "fp4": _find_absmax,
    "llm_int8": _find_absmax,
    "q4_1": _find_q4_1,
    "q4_k": _find_with_minima,
    "q5_k": _find_with_minima,
    "q6_k": _find_q6_k,
}


def divisors(scales: Tensor, unit: float = 1.0) -> Tensor:
    """Steps from code to code, float32, to divide by: a group whose scale is 0 holds nothing but
    its offset."""
    steps = scales.float() * unit
    return torch.where(scales == 0, torch.finfo(torch.float32).tiny, steps)


def _fit_range(
    groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule, any_sign: bool
) -> tuple[Tensor, Tensor]:
    """Scales and offsets [rows, groups] of codes from 0 on; no offset is above 0 but by leave.

    The range is stretched in steps and each time fitted to the codes it gives, by least squares.
    """
    low, high, levels = groups.amin(-1), groups.amax(-1), scheme.qmax
    if not any_sign:
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = torch.where(high > low, high - low, 1.0)
    best = span / levels, low
    if rule == "absmax":
        return best
    least = _error(groups, weights, *best, scheme)
    for stretch in _STRETCHES:
        inverse = ((levels + stretch) / span).unsqueeze(-1)
        codes = ((groups - low.unsqueeze(-1)) * inverse).round().clamp(0, levels)
        found = _least_squares(groups, weights, codes, any_sign)
        error = _error(groups, weights, *found, scheme)
        better = (error < least) & (found[0] > 0)
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
        least = torch.where(better, error, least)
    return best


def _fit_symmetric(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Tensor:
    """Scales [rows, groups] of codes around 0, found as those of a range are. One below 0 lets the
    lowest code, which is one further out, meet a weight above 0."""
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # (rows, groups, 1)
    best = peak.abs().squeeze(-1) / scheme.qmax
    if rule == "absmax":
        return best
    zeros, inverse = torch.zeros_like(best), 1 / torch.where(peak == 0, 1.0, peak)
    least = _error(groups, weights, best, zeros, scheme)
    for stretch, edge in product(_STRETCHES, (scheme.qmin, scheme.qmax)):
        most = edge + stretch if edge > 0 else edge - stretch
        codes = (groups * (most * inverse)).round().clamp(scheme.qmin, scheme.qmax)
        found = (weights * groups * codes).sum(-1) / (weights * codes**2).sum(-1).clamp(min=1e-30)
        error = _error(groups, weights, found, zeros, scheme)
        best = torch.where(error < least, found, best)
        least = torch.minimum(error, least)
    return best


def _least_squares(
    groups: Tensor, weights: Tensor, codes: Tensor, any_sign: bool
) -> tuple[Tensor, Tensor]:
    """The scale and offset [rows, groups] that fit these codes best."""
    w, wc, wcc, wx, wcx = (
        (weights * term).sum(-1)
        for term in (torch.ones_like(codes), codes, codes**2, groups, codes * groups)
    )
    determinant = w * wcc - wc * wc
    safe = torch.where(determinant > 0, determinant, 1.0)
    scale, offset = (w * wcx - wc * wx) / safe, (wcc * wx - wc * wcx) / safe
    if not any_sign:
        alone = wcx / torch.where(wcc > 0, wcc, 1.0)
        scale = torch.where(offset > 0, alone, scale)
        offset = offset.clamp(max=0)
    return torch.where(determinant > 0, scale, 0.0), offset


def _error(
    groups: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, scheme: Scheme
) -> Tensor:
    """Weighted squared error [rows, groups] of rounding to these levels."""
    wide = divisors(scale).unsqueeze(-1)
    shift = offset.unsqueeze(-1)
    codes = ((groups - shift) / wide).round().clamp(scheme.qmin, scheme.qmax)
    return ((codes * wide + shift - groups).square() * weights).sum(-1)


def _unit(values: Tensor, groups: int, most: int) -> Tensor:
    """The float16 (as float32 [rows, blocks, 1]) of which no value [rows, groups] of its block is
    more than `most`. It is often below the normal numbers, where rounding it down would cut off."""
    largest = values.unflatten(1, (-1, groups)).abs().amax(-1, keepdim=True) / most
    unit = largest.to(torch.float16)
    following = (unit.view(torch.int16) + 1).view(torch.float16)
    return torch.where(unit.float() < largest, following, unit).float()


def _whole(values: Tensor, unit: Tensor, least: int, most: int) -> Tensor:
    """Values [rows, groups] as whole parts [rows, blocks, groups] of the units of their blocks."""
    blocks = values.unflatten(1, (unit.shape[1], -1))
    return (blocks / torch.where(unit == 0, 1.0, unit)).round().clamp(least, most)


def _refine(
    groups: Tensor,
    weights: Tensor,
    scheme: Scheme,
    spans: Callable[..., tuple[Tensor, Tensor]],
    whole: tuple[Tensor, ...],
    limits: tuple[int, int],
) -> tuple[Tensor, ...]:
    """Whole parts, one up or down where the scales and offsets that `spans` makes of them err less
    now that they are rounded."""
    best, least = whole, torch.full(groups.shape[:2], torch.inf, device=groups.device)
    for steps in product((0, -1, 1), repeat=len(whole)):
        tried = [(part + step).clamp(*limits) for part, step in zip(whole, steps, strict=True)]
        error = _error(groups, weights, *spans(*tried), scheme)
        better = (error < least).view_as(whole[0])
        best = tuple(torch.where(better, *pair) for pair in zip(tried, best, strict=True))
        least = torch.minimum(error, least)
    return best


def _bytes(unit: Tensor) -> Tensor:
    """The two bytes [rows, blocks, 2] of a float16 [rows, blocks, 1]."""
    return unit.to(torch.float16).view(torch.uint8)


def _pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes [rows, blocks, 12], as llama.cpp has
    them: the upper two bits of the later four lie above the earlier four."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first = s[..., :4] | ((s[..., 4:] >> 4) << 6)
    second = m[..., :4] | ((m[..., 4:] >> 4) << 6)
    last = (s[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)
    return torch.cat((first, second, last), dim=-1)
