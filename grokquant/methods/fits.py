"""Scales and offsets with the least squared error for each group, before they are stored.

`groups` [rows, groups, group_size] are the weights, `weights` [1, groups, group_size] the cost of
an error in each column. Ranges are stretched in steps, as in llama.cpp (ggml-quants.c), and each
time the scale is fitted to the resulting codes.

`block_kernels` does the same on CPUs, much faster; this is its reference, and runs on any device.
The order of sums and products counts: the kernels have the same, so that both choose the same.
"""

from collections.abc import Callable
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.scales import ScaleRule
from grokquant.methods.spans import nearest_values

# Levels by which the search widens or narrows the range of a group, as llama.cpp's search does.
_STRETCHES = tuple(step / 10 for step in range(-10, 11))
# The same for a table, in the units of its entries, which are 10 to 24 apart. Smaller steps than 5
# lower the error by less than 1 in 1,000.
_TABLE_STRETCHES = range(-25, 26, 5)
# To what the largest weight of a group is scaled, in shares of the lowest code, by bits; below 0 it
# gets the sign of that code. Many fine scales fit about equally well, so trying more of them helps;
# few coarse ones do, but where columns differ in weight, the largest one may be far outside.
_SHARES = {
    6: (*(-0.75 - 0.0175 * step for step in range(17)), 1.0, 1.15),
    3: (*(-0.75 - 0.1 * step for step in range(6)), -1.5, -1.8, 1.0, 1.3),
}
# The reciprocal of a smaller float32 may be infinite.
LEAST_STEP = torch.finfo(torch.float32).tiny
# Columns whose terms are added up one after the other, before the next ones are.
STEP = 8
# Keeps the sum of squares of codes that are all 0 from being a divisor.
LEAST_SQUARES = 1e-30


def reaches(scheme: Scheme) -> list[float]:
    """The codes or table entries to which a search scales the far end of a group, in the order in
    which it tries them."""
    if not scheme.symmetric:
        return [scheme.qmax + stretch for stretch in _STRETCHES]
    if not scheme.row.table:
        return [-scheme.qmin * share for share in _SHARES[scheme.bits]]
    tried = product(_TABLE_STRETCHES, (min(scheme.row.table), max(scheme.row.table)))
    return [edge + stretch if edge > 0 else edge - stretch for stretch, edge in tried]


def fit_range(
    groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule, any_sign: bool
) -> tuple[Tensor, Tensor]:
    """Scales and offsets [rows, groups] of codes from 0 on. Offsets are at most 0, unless they may
    have `any_sign`."""
    low = groups.amin(-1) + 0.0  # no -0, which is as low as 0
    high = groups.amax(-1)
    if not any_sign:
        low = low.clamp(max=0)
        high = high.clamp(min=0)
    span = torch.where(high > low, high - low, 1.0)
    scale = span / scheme.qmax
    offset = low
    if rule == "absmax":
        return scale, offset
    least = squared_error(groups, weights, scale, offset, scheme)
    above = groups - low.unsqueeze(-1)
    per_span = 1 / span
    for reach in reaches(scheme):
        codes = (above * (per_span * reach).unsqueeze(-1)).round().clamp(0, scheme.qmax)
        new_scale, new_offset = _least_squares(groups, weights, codes, any_sign)
        error = squared_error(groups, weights, new_scale, new_offset, scheme)
        better = (error < least) & (new_scale > 0)
        scale = torch.where(better, new_scale, scale)
        offset = torch.where(better, new_offset, offset)
        least = torch.where(better, error, least)
    return scale, offset


def fit_symmetric(
    groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule
) -> tuple[Tensor, Tensor]:
    """Scales [rows, groups] of codes around 0, and what a square of their error costs. With a
    negative scale, the lowest code, which reaches one step further, represents a positive weight.
    """
    peak = _peaks(groups)
    if rule == "absmax":
        return peak.abs() / scheme.qmax, torch.zeros_like(peak)

    def nearest(factor: Tensor) -> Tensor:
        return (groups * factor.unsqueeze(-1)).round().clamp(scheme.qmin, scheme.qmax)

    scale, _ = _best_scale(groups, weights, peak, reaches(scheme), nearest)
    small = scale.abs() < LEAST_STEP
    codes = nearest(1 / torch.where(small, LEAST_STEP, scale))
    _, squares, scale = _fitted(groups, weights, codes)
    return scale, squares


def fit_table(
    groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule
) -> tuple[Tensor, Tensor]:
    """The same for a table. The largest weight of a group is scaled to the entry with the largest
    magnitude; with `mse` to either end of the table, so the scale may be negative."""
    peak = _peaks(groups)
    if rule == "absmax":
        return peak / max(scheme.row.table, key=abs), torch.zeros_like(peak)

    def nearest(factor: Tensor) -> Tensor:
        return nearest_values(groups * factor.unsqueeze(-1), scheme)

    return _best_scale(groups, weights, peak, reaches(scheme), nearest)


def _peaks(groups: Tensor) -> Tensor:
    """The first weight of largest magnitude of each group [rows, groups]."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _best_scale(
    groups: Tensor,
    weights: Tensor,
    peak: Tensor,
    reaches: list[float],
    nearest: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The best of the scales that fit the codes `nearest` to the weights times a factor, which
    takes the peak to each of `reaches`."""
    inverse = 1 / torch.where(peak == 0, 1.0, peak)
    best = torch.zeros_like(peak)
    cost = torch.zeros_like(peak)
    least = torch.full_like(peak, torch.inf)
    for reach in reaches:
        fitting, squares, scale = _fitted(groups, weights, nearest(inverse * reach))
        error = -fitting * scale  # of these codes, without the constant sum of squared weights
        better = error < least
        best = torch.where(better, scale, best)
        cost = torch.where(better, squares, cost)
        least = torch.where(better, error, least)
    return best, cost


def _fitted(groups: Tensor, weights: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [rows, groups] of codes times weights and of squared codes, and the scale that fits."""
    fitting = sum_columns(weights * groups * codes)
    squares = sum_columns(weights * codes.square()).clamp(min=LEAST_SQUARES)
    return fitting, squares, fitting / squares


def squared_error(
    groups: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, scheme: Scheme
) -> Tensor:
    """Weighted squared error [rows, groups] of rounding to these levels.

    It multiplies by 1 / scale, which is faster than a division and may round a tie to the other
    side.
    """
    wide = torch.where(scale.abs() < LEAST_STEP, LEAST_STEP, scale).unsqueeze(-1)
    shift = offset.unsqueeze(-1)
    values = nearest_values((groups - shift) * (1 / wide), scheme)
    return sum_columns((values * wide + shift - groups).square() * weights)


def sum_columns(terms: Tensor) -> Tensor:
    """Sums [rows, groups, group_size] over the last dimension, in the order of the kernels: those
    of STEP columns one by one, then one such sum after the other."""
    steps = terms.unflatten(-1, (-1, STEP))
    sums = reduce(torch.add, steps.unbind(-1))  # (rows, groups, steps)
    return reduce(torch.add, sums.unbind(-1)) + 0.0  # not -0: sums of kernels start from 0


def _least_squares(
    groups: Tensor, weights: Tensor, codes: Tensor, any_sign: bool
) -> tuple[Tensor, Tensor]:
    """The scale and offset [rows, groups] that fit these codes best: the normal equations of
    weights * (codes * scale + offset - groups)^2."""
    weighted = weights * codes
    w = sum_columns(weights)
    wx = sum_columns(weights * groups)
    wc = sum_columns(weighted)
    wcc = sum_columns(weighted * codes)
    wcx = sum_columns(weighted * groups)
    determinant = w * wcc - wc * wc
    safe = torch.where(determinant > 0, determinant, 1.0)
    scale = (w * wcx - wc * wx) / safe
    offset = (wcc * wx - wc * wcx) / safe
    if not any_sign:
        alone = wcx / torch.where(wcc > 0, wcc, 1.0)  # the scale where the offset is 0
        scale = torch.where(offset > 0, alone, scale)
        offset = offset.clamp(max=0)
    return torch.where(determinant > 0, scale, 0.0), offset
