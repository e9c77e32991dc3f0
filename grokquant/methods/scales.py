"""How the scale and zero point of a group are found, and rounding onto the grid they span.

`kernels` does the same on CPUs, much faster; this is its reference, and runs on any device.
"""

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.methods import compiled, kernels
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor

ScaleRule = Literal["absmax", "mse"]

# Rows searched at once on a CPU: keeps the temporaries inside the cache.
_ROWS_AT_ONCE = 256
# Weights searched at once on a GPU: launches are few, and temporaries take a few hundred MB.
_WEIGHTS_AT_ONCE = 1 << 24


def group_columns(W: Tensor, scheme: Scheme) -> Tensor:
    """A view of W [out, in] as [out, groups, group_size]."""
    return W.unflatten(1, (scheme.groups(W.shape[1]), -1))


def search_scales(
    W: Tensor, scheme: Scheme, rule: ScaleRule, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales [out, groups] in the scale dtype and zero points int8 (None if symmetric) for W.

    The rule `absmax` spans the whole range of each group. `mse` shrinks that range in 21 steps and
    keeps the step with the least squared error, each column weighted by `importance` [in] (the
    Hessian's diagonal), but the whole range where that is better in the scale dtype. It may make a
    symmetric scale negative: the lowest code, -2^(bits-1), then stands for the largest weight,
    whatever its sign.
    """
    if importance is None:
        importance = torch.ones(W.shape[1], device=W.device)
    groups = group_columns(importance.unsqueeze(0), scheme)  # (1, groups, group_size)

    def find(part: slice) -> tuple[Tensor, Tensor | None]:
        rows = group_columns(W[part].float(), scheme)
        return _find_in_rows(rows, groups.float(), scheme, rule)

    found = in_pieces(find, slices(0, len(W), _rows_at_once(W)), W.device)
    scales = torch.cat([scale for scale, _ in found])
    zero_points = [zero_point for _, zero_point in found if zero_point is not None]
    return scales, torch.cat(zero_points) if zero_points else None


def _rows_at_once(W: Tensor) -> int:
    if W.device.type == "cpu":
        return _ROWS_AT_ONCE
    return max(1, _WEIGHTS_AT_ONCE // W.shape[1])


def round_to_grid(W: Tensor, scales: Tensor, zero_points: Tensor | None, scheme: Scheme) -> Tensor:
    """The codes nearest to W on the grid, ties to even. Broadcasts; returns W's dtype."""
    codes = torch.round(W / scales)
    if zero_points is not None:
        codes = codes + zero_points
    return codes.clamp(scheme.qmin, scheme.qmax)


def quantize_nearest(
    W: Tensor, scales: Tensor, zero_points: Tensor | None, scheme: Scheme
) -> QTensor:
    """Rounds every weight of W [out, in] to its nearest code.

    `scales` and `zero_points` are [out, groups].
    """
    wide = scales.float().unsqueeze(-1)  # (out, groups, 1)
    zeros = None if zero_points is None else zero_points.float().unsqueeze(-1)
    codes = round_to_grid(group_columns(W.float(), scheme), wide, zeros, scheme)
    return QTensor(codes.to(torch.int8).flatten(1), scales, scheme, zero_points)


def _find_in_rows(
    groups: Tensor, importance: Tensor, scheme: Scheme, rule: ScaleRule
) -> tuple[Tensor, Tensor | None]:
    """`search_scales` for [rows, groups, group_size]; scales and zero points [rows, groups]."""
    candidates = _candidates(groups, scheme, rule)
    if len(candidates) == 1:
        return candidates[0]
    shape = groups.shape[:2]
    best_error = torch.full(shape, torch.inf, dtype=torch.float64, device=groups.device)
    best_scale, best_zero = candidates[0]
    for scale, zero_point in candidates:
        error = _squared_error(groups, importance, scale, zero_point, scheme)  # (rows, groups)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero_point is not None and best_zero is not None:
            best_zero = torch.where(better, zero_point, best_zero)
    whole_scale, whole_zero = candidates[0]
    worse = _is_worse(groups, importance, (best_scale, best_zero), candidates[0], scheme)
    scale = torch.where(worse, whole_scale, best_scale)
    if best_zero is None or whole_zero is None:
        return scale, None
    return scale, torch.where(worse, whole_zero, best_zero)


def _candidates(
    groups: Tensor, scheme: Scheme, rule: ScaleRule
) -> list[tuple[Tensor, Tensor | None]]:
    """The (scale, zero point) [rows, groups] that the rule tries, in the order of `kernels`."""
    shrinks = compiled.SHRINKS.tolist()
    # The grid always has a code for 0, so the range includes it.
    low = groups.amin(-1).clamp(max=0)  # (rows, groups)
    high = groups.amax(-1).clamp(min=0)
    if not scheme.symmetric:
        tried = shrinks if rule == "mse" else shrinks[:1]
        return [_asymmetric(low * f, high * f, scheme) for f in tried]
    absmax = torch.maximum(high, -low)
    if rule == "absmax":
        return [(_stored(absmax / scheme.qmax, scheme), None)]
    sign = torch.where(high >= -low, -1.0, 1.0)  # gives the lowest code the sign of the peak
    step = absmax * sign / -scheme.qmin
    at_highest = [absmax * f / scheme.qmax for f in shrinks]
    at_lowest = [step * f for f in shrinks]
    return [(_stored(scale, scheme), None) for scale in at_highest + at_lowest]


def _asymmetric(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    scale = _stored((high - low) / (scheme.qmax - scheme.qmin), scheme)
    zero_point = torch.round(scheme.qmin - low / scale.float())
    return scale, zero_point.clamp(scheme.qmin, scheme.qmax).to(torch.int8)


def _stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """The scale in its stored dtype; a group of zeros gets 1, so that nothing divides by 0."""
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    stored = scale.to(dtype)
    too_small = stored.abs() < compiled.least_scale(dtype)
    return torch.where(too_small, torch.ones_like(stored), stored)


def _squared_error(
    groups: Tensor,
    importance: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
) -> Tensor:
    """Weighted squared errors [rows, groups] of one candidate."""
    wide = scale.float().unsqueeze(-1)  # (rows, groups, 1)
    # Codes less the zero point; multiplied by 1 / scale, as the kernels do for speed.
    codes = torch.round(groups * (1 / wide))
    if zero_point is None:
        codes = codes.clamp(scheme.qmin, scheme.qmax)
    else:
        zeros = zero_point.float().unsqueeze(-1)
        codes = codes.clamp(scheme.qmin - zeros, scheme.qmax - zeros)
    return _sum_columns((codes * wide - groups).square() * importance)


def _is_worse(
    groups: Tensor,
    importance: Tensor,
    found: tuple[Tensor, Tensor | None],
    other: tuple[Tensor, Tensor | None],
    scheme: Scheme,
) -> Tensor:
    """Where [rows, groups] `found` loses more than `other` in values of the scale dtype, as engines
    have them. 8-bit codes times a bfloat16 scale are rounded by up to half a step."""
    lost = []
    for scale, zero_point in (found, other):
        wide = scale.float().unsqueeze(-1)  # (rows, groups, 1)
        zeros = torch.zeros_like(wide)
        if zero_point is not None:
            zeros = zero_point.float().unsqueeze(-1)
        codes = torch.round(groups / wide).clamp(scheme.qmin - zeros, scheme.qmax - zeros)
        values = (codes * wide).to(SCALE_DTYPES[scheme.scale_dtype]).float()
        lost.append(_sum_columns((values - groups).square() * importance))
    return lost[1] < lost[0]


def _sum_columns(terms: Tensor) -> Tensor:
    """Sums [rows, groups, group_size] over the last dimension.

    On a CPU in the order of the kernels, float32 within 128 columns and float64 beyond, so that
    both choose the same candidate. On a GPU that order would take a launch for each sum.
    """
    if terms.shape[-1] % kernels.STEP or terms.device.type != "cpu":
        return terms.sum(-1, dtype=torch.float64)
    total = torch.zeros(terms.shape[:2], dtype=torch.float64, device=terms.device)
    for block in terms.split(kernels.BLOCK, dim=-1):
        sums = block.unflatten(-1, (-1, kernels.STEP))  # (rows, groups, steps, 8)
        while sums.shape[-1] > 1:
            sums = sums[..., ::2] + sums[..., 1::2]
        total += reduce(torch.add, sums.squeeze(-1).unbind(-1))
    return total
