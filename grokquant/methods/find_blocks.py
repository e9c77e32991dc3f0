"""Levels of llama.cpp's blocks of 256 columns: the scales and offsets of their groups are small
integers times a float16 that the block stores once."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.block_headers import MINIMA_HEADERS, SCALE_HEADERS, in_steps, whole_limits
from grokquant.methods.fits import fit_range, fit_symmetric, fit_table, squared_error
from grokquant.methods.scales import ScaleRule
from grokquant.methods.spans import Spans

# Steps by which the largest scale of a block may miss the limit. More of them gain nothing.
_STEP_STRETCHES = (-4, -2, 0, 2, 4)


def find_block_minima(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Spans:
    """Scales and offsets that are unsigned integers times two float16; offsets are subtracted."""
    scales, offsets = fit_range(groups, weights, scheme, rule, any_sign=False)
    limits = whole_limits(scheme)
    most = limits[1]
    d = _step(scales, scheme, most)
    dmin = _step(offsets, scheme, most)

    def spans(scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor]:
        return (d * scales).flatten(1), -(dmin * minima).flatten(1)

    whole: tuple[Tensor, ...] = (
        in_steps(scales, d, limits),
        in_steps(-offsets, dmin, limits),
    )
    if rule == "mse":
        # Scales of 4 bits are coarse: the best one is often two away from the nearest.
        for _ in range(2 if scheme.row.scale_bits == 4 else 1):
            whole = _refine(groups, weights, scheme, spans, whole, limits)
    scales, offsets = spans(*whole)
    headers = MINIMA_HEADERS[scheme.grid](d, dmin, *whole)
    return Spans(scales, offsets=offsets, headers=headers)


def find_block_scales(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Spans:
    """Scales that are signed integers times a float16."""
    fit = fit_table if scheme.row.table else fit_symmetric
    scales = fit(groups, weights, scheme, rule)
    limits = whole_limits(scheme)
    d = _step(scales, scheme, limits[1])
    if rule == "mse" and scheme.row.scale_bits < 8:  # 8 bits would gain half a percent
        d = _search_step(groups, weights, scheme, scales, d, limits)

    def spans(parts: Tensor) -> tuple[Tensor, Tensor]:
        return (d * parts).flatten(1), torch.zeros_like(scales)

    whole: tuple[Tensor, ...] = (in_steps(scales, d, limits),)
    if rule == "mse":
        whole = _refine(groups, weights, scheme, spans, whole, limits)
    headers = SCALE_HEADERS[scheme.grid](d, *whole)
    return Spans(spans(*whole)[0], headers=headers)


def _search_step(
    groups: Tensor,
    weights: Tensor,
    scheme: Scheme,
    scales: Tensor,
    d: Tensor,
    limits: tuple[int, int],
) -> Tensor:
    """The step [rows, blocks, 1] with the least error of a block: `d`, or one with which the
    largest of its scales [rows, groups] comes near one limit or the other."""
    blocks = scales.unflatten(1, (d.shape[1], -1))
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # (rows, blocks, 1)
    zeros = torch.zeros_like(scales)
    best = d
    least = torch.full_like(d, torch.inf)
    near = [limit + stretch for limit, stretch in product(limits, _STEP_STRETCHES)]
    for step in (d, *((peak / reached).to(torch.float16).float() for reached in near)):
        rounded = (step * in_steps(scales, step, limits)).flatten(1)
        errors = squared_error(groups, weights, rounded, zeros, scheme)
        error = errors.view_as(blocks).sum(-1, keepdim=True)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def _step(values: Tensor, scheme: Scheme, most: int) -> Tensor:
    """The float16 step of each block, as float32 [rows, blocks, 1], such that every value [rows,
    groups] is at most `most` steps. It is rounded up: below float16's normal numbers, rounding down
    would clip large values."""
    assert scheme.group_size is not None
    groups = scheme.row.block_columns // scheme.group_size
    largest = values.unflatten(1, (-1, groups)).abs().amax(-1, keepdim=True) / most
    step = largest.to(torch.float16)
    following = (step.view(torch.int16) + 1).view(torch.float16)
    return torch.where(step.float() < largest, following, step).float()


def _refine(
    groups: Tensor,
    weights: Tensor,
    scheme: Scheme,
    spans: Callable[..., tuple[Tensor, Tensor]],
    whole: tuple[Tensor, ...],
    limits: tuple[int, int],
) -> tuple[Tensor, ...]:
    """The numbers in `whole`, each moved by one up or down if that lowers the error of the scales
    and offsets that `spans` computes from them."""
    best = whole
    least = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    for moves in product((0, -1, 1), repeat=len(whole)):
        tried = [(part + move).clamp(*limits) for part, move in zip(whole, moves, strict=True)]
        error = squared_error(groups, weights, *spans(*tried), scheme)
        better = (error < least).view_as(whole[0])
        best = tuple(torch.where(better, *pair) for pair in zip(tried, best, strict=True))
        least = torch.minimum(error, least)
    return best
