"""Levels of grids whose groups store their own scale, and their own offset if they have one."""

import torch
from torch import Tensor

from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.methods.compiled import SHRINKS
from grokquant.methods.fits import fit_range, fit_table
from grokquant.methods.scales import ScaleRule
from grokquant.methods.spans import Spans, divisors, nearest_in_codebook


def find_absmax(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Spans:
    """Scales equal to the largest weight of each group, or to that times one of SHRINKS."""
    absmax = groups.abs().amax(-1)  # (rows, groups)
    scales = torch.where(absmax == 0, 1.0, absmax)
    best = scales
    if rule == "mse":
        least = torch.full_like(scales, torch.inf)
        for shrink in SHRINKS.tolist():
            shrunk = scales * shrink
            error = _rounded(groups, shrunk, scheme) - groups
            squared = (error.square() * weights).sum(-1)
            best = torch.where(squared < least, shrunk, best)
            least = torch.minimum(squared, least)
    return Spans(best.to(SCALE_DTYPES[scheme.scale_dtype]))


def _rounded(groups: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """The values of these groups after rounding, in the order of operations of bitsandbytes."""
    unit = scheme.row.unit
    table = scheme.row.table
    in_steps = groups / divisors(scales, unit).unsqueeze(-1)
    if not table:
        codes = in_steps.round().clamp(scheme.qmin, scheme.qmax)
        return codes * scales.unsqueeze(-1) * unit
    codes = nearest_in_codebook(in_steps, scheme)
    return torch.tensor(table, device=groups.device)[codes.long()] * scales.unsqueeze(-1)


def find_range(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Spans:
    """A scale and an offset of any sign for each group."""
    scales, offsets = fit_range(groups, weights, scheme, rule, any_sign=True)
    stored = scales.to(torch.float16)
    return Spans(torch.where(stored == 0, 1.0, stored), offsets=offsets.to(torch.float16))


def find_table(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Spans:
    """A scale for each group: a float16 held as float32, so that values equal llama.cpp's."""
    scales, _ = fit_table(groups, weights, scheme, rule)
    return Spans(scales.to(torch.float16).float())
