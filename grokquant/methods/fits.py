"""Scales and offsets with the least squared error for each group, before they are stored.

`groups` [rows, groups, group_size] are the weights, `weights` [1, groups, group_size] the cost of
an error in each column. Ranges are stretched in steps, as in llama.cpp (ggml-quants.c), and each
time the scale is fitted to the resulting codes.
"""

from itertools import product

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.scales import ScaleRule
from grokquant.methods.spans import divisors, nearest_values

# Levels by which the search widens or narrows the range of a group, as llama.cpp's search does.
_STRETCHES = tuple(step / 10 for step in range(-10, 11))
# The same for a table, in the units of its entries, which are 10 to 24 apart. Smaller steps than 5
# lower the error by less than 1 in 1,000.
_TABLE_STRETCHES = range(-25, 26, 5)


def fit_range(
    groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule, any_sign: bool
) -> tuple[Tensor, Tensor]:
    """Scales and offsets [rows, groups] of codes from 0 on. Offsets are at most 0, unless they may
    have `any_sign`."""
    low = groups.amin(-1)
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
    for stretch in _STRETCHES:
        inverse = ((scheme.qmax + stretch) / span).unsqueeze(-1)
        codes = ((groups - low.unsqueeze(-1)) * inverse).round().clamp(0, scheme.qmax)
        new_scale, new_offset = _least_squares(groups, weights, codes, any_sign)
        error = squared_error(groups, weights, new_scale, new_offset, scheme)
        better = (error < least) & (new_scale > 0)
        scale = torch.where(better, new_scale, scale)
        offset = torch.where(better, new_offset, offset)
        least = torch.where(better, error, least)
    return scale, offset


def fit_symmetric(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Tensor:
    """Scales [rows, groups] of codes around 0. With a negative scale, the lowest code, which
    reaches one step further, represents a positive weight."""
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # (rows, groups, 1)
    best = peak.abs().squeeze(-1) / scheme.qmax
    if rule == "absmax":
        return best
    zeros = torch.zeros_like(best)
    inverse = 1 / torch.where(peak == 0, 1.0, peak)
    least = squared_error(groups, weights, best, zeros, scheme)
    for stretch, edge in product(_STRETCHES, (scheme.qmin, scheme.qmax)):
        most = edge + stretch if edge > 0 else edge - stretch
        codes = (groups * (most * inverse)).round().clamp(scheme.qmin, scheme.qmax)
        scale = (weights * groups * codes).sum(-1) / (weights * codes**2).sum(-1).clamp(min=1e-30)
        error = squared_error(groups, weights, scale, zeros, scheme)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def fit_table(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Tensor:
    """Scales [rows, groups] of a table. The largest weight of a group is scaled to the entry with
    the largest magnitude; with `mse` to either end of the table, so the scale may be negative."""
    table = scheme.row.table
    low = min(table)
    high = max(table)
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # (rows, groups, 1)
    best = peak.squeeze(-1) / max(low, high, key=abs)
    if rule == "absmax":
        return best
    inverse = 1 / torch.where(peak == 0, 1.0, peak)
    weighted = weights * groups
    least = squared_error(groups, weights, best, torch.zeros_like(best), scheme)
    least -= (weighted * groups).sum(-1)
    for stretch, edge in product(_TABLE_STRETCHES, (low, high)):
        most = edge + stretch if edge > 0 else edge - stretch
        values = nearest_values(groups * (most * inverse), scheme)
        fitting = (weighted * values).sum(-1)
        scale = fitting / (weights * values**2).sum(-1).clamp(min=1e-30)
        error = -fitting * scale  # of these codes, without the constant sum of squared weights
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def squared_error(
    groups: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, scheme: Scheme
) -> Tensor:
    """Weighted squared error [rows, groups] of rounding to these levels."""
    wide = divisors(scale).unsqueeze(-1)
    shift = offset.unsqueeze(-1)
    values = nearest_values((groups - shift) / wide, scheme)
    return ((values * wide + shift - groups).square() * weights).sum(-1)


def _least_squares(
    groups: Tensor, weights: Tensor, codes: Tensor, any_sign: bool
) -> tuple[Tensor, Tensor]:
    """The scale and offset [rows, groups] that fit these codes best: the normal equations of
    weights * (codes * scale + offset - groups)^2."""
    w, wc, wcc, wx, wcx = (
        (weights * term).sum(-1)
        for term in (torch.ones_like(codes), codes, codes**2, groups, codes * groups)
    )
    determinant = w * wcc - wc * wc
    safe = torch.where(determinant > 0, determinant, 1.0)
    scale = (w * wcx - wc * wx) / safe
    offset = (wcc * wx - wc * wcx) / safe
    if not any_sign:
        alone = wcx / torch.where(wcc > 0, wcc, 1.0)  # the scale where the offset is 0
        scale = torch.where(offset > 0, alone, scale)
        offset = offset.clamp(max=0)
    return torch.where(determinant > 0, scale, 0.0), offset
