"""Levels of llama.cpp's blocks of 256 columns: the scales and offsets of their groups are small
integers times a float16 that the block stores once."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.block_headers import MINIMA_HEADERS, SCALE_HEADERS, in_steps, whole_limits
from grokquant.methods.fits import fit_range, fit_symmetric, fit_table, squared_error, sum_columns
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
        for _ in range(refinements(scheme)):
            whole = _refine(groups, weights, scheme, spans, whole, limits)
    scales, offsets = spans(*whole)
    headers = MINIMA_HEADERS[scheme.grid](d, dmin, *whole)
    return Spans(scales, offsets=offsets, headers=headers)


def refinements(scheme: Scheme) -> int:
    """How often a number of steps may move by one. Scales of 4 bits are coarse: the best one is
    often two away from the nearest."""
    return 2 if scheme.row.scale_bits == 4 else 1


def searches_step(scheme: Scheme) -> bool:
    """Whether the step of a block without minima is searched too. Scales of 8 bits would gain half
    a percent."""
    return scheme.symmetric and scheme.row.scale_bits < 8


def find_block_scales(groups: Tensor, weights: Tensor, scheme: Scheme, rule: ScaleRule) -> Spans:
    """Scales that are signed integers times a float16."""
    fit = fit_table if scheme.row.table else fit_symmetric
    scales, costs = fit(groups, weights, scheme, rule)
    limits = whole_limits(scheme)
    d = _step(scales, scheme, limits[1])
    if rule == "mse" and searches_step(scheme):
        d = _search_step(scales, costs, d, limits)

    def spans(parts: Tensor) -> tuple[Tensor, Tensor]:
        return (d * parts).flatten(1), torch.zeros_like(scales)

    whole: tuple[Tensor, ...] = (in_steps(scales, d, limits),)
    if rule == "mse":
        whole = _refine(groups, weights, scheme, spans, whole, limits)
    headers = SCALE_HEADERS[scheme.grid](d, *whole)
    return Spans(spans(*whole)[0], headers=headers)


def step_reaches(limits: tuple[int, int]) -> list[float]:
    """The numbers of steps that the largest scale of a block may become, in the order of trials."""
    return [float(limit + stretch) for limit, stretch in product(limits, _STEP_STRETCHES)]


def _search_step(scales: Tensor, costs: Tensor, d: Tensor, limits: tuple[int, int]) -> Tensor:
    """The step [rows, blocks, 1] that changes the best scales [rows, groups] of a block least: `d`,
    or one with which the largest of them comes near one limit or the other. `costs` is what a
    square of the change costs."""
    blocks = scales.unflatten(1, (d.shape[1], -1))
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # (rows, blocks, 1)
    best = d
    least = torch.full_like(d, torch.inf)
    tried = ((peak / reach).to(torch.float16).float() for reach in step_reaches(limits))
    for step in (d, *tried):
        changes = step * in_steps(scales, step, limits) - blocks
        error = sum_columns(costs.view_as(blocks) * changes.square()).unsqueeze(-1)
        better = error < least
        best = torch.where(better, step, best)
        least = torch.where(better, error, least)
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
        lower = error < least
        better = lower.view_as(whole[0])
        best = tuple(torch.where(better, *pair) for pair in zip(tried, best, strict=True))
        least = torch.where(lower, error, least)
    return best
