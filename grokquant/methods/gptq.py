"""GPTQ: rounding with error feedback through the input Hessian (Frantar et al., arXiv 2210.17323).

Written in its equivalent LDLQ form (Chee et al., arXiv 2307.13304, theorem 6): with H = F D F^T and
F unit upper triangular, column k is rounded at w_k + (W - Q)[:, :k] F[:k, k]. F comes from one
Cholesky factorisation; no inverse is taken. Everything is float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grokquant.methods.scales import ScaleRule, find_scales, round_to_grid
from grokquant.types import QTensor, Scheme

_BLOCK = 128
# Damping is raised this often, tenfold each time, before a Hessian counts as unusable.
_RETRIES = 3


class UnusableHessian(ValueError):
    """No damping that was tried made the Hessian positive definite, or it is zero or not finite."""


@dataclass(frozen=True)
class Feedback:
    """What rounding needs of a Hessian; gate and up share one.

    `order` is the order in which columns are visited, `F` [in, in] the unit upper factor in that
    order, `importance` [in] the Hessian's diagonal in natural order, `damping` the share used.
    """

    order: Tensor
    F: Tensor
    importance: Tensor
    damping: float


def factorize(H: Tensor, damping: float, act_order: bool) -> Feedback:
    """Factor of H [in, in] + damping * mean(diag H) * I. Raises UnusableHessian."""
    diagonal = H.diagonal().clone()
    mean = diagonal.mean().item()
    if not torch.isfinite(H).all():
        raise UnusableHessian("the Hessian is not finite")
    if mean <= 0:
        raise UnusableHessian("the Hessian is zero")
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(H))
    backwards = order.flip(0)
    H = H[backwards][:, backwards]
    for attempt in range(_RETRIES + 1):
        share = damping * 10**attempt
        damped = H.clone()
        damped.diagonal().add_(share * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            # H = R R^T with R = J L J upper triangular; its columns over its diagonal give F.
            F = L.div_(L.diagonal().clone()).flip(0, 1)
            return Feedback(order, F, diagonal, share)
    raise UnusableHessian(f"the Hessian is not positive definite at damping {share:g}")


def quantize_gptq(
    W: Tensor, feedback: Feedback, scheme: Scheme, rule: ScaleRule = "mse"
) -> QTensor:
    """Rounds W [out, in] column by column, each time with the feedback of the errors so far.

    Scales are found before, in natural column order (static groups), so that the result needs no
    group index whatever the order of the columns.
    """
    importance = feedback.importance if rule == "mse" else None
    scales, zero_points = find_scales(W, scheme, rule, importance)
    order = feedback.order
    group_of = order // (W.shape[1] // scales.shape[1])  # the group of each visited column
    column_scales = scales.float()[:, group_of]  # (out, in), in visiting order
    column_zeros = None if zero_points is None else zero_points.float()[:, group_of]
    codes = _round_with_feedback(
        W.float()[:, order], feedback.F, column_scales, column_zeros, scheme
    )
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return QTensor(natural, scales, scheme, zero_points)


def _round_with_feedback(
    W: Tensor, F: Tensor, scales: Tensor, zero_points: Tensor | None, scheme: Scheme
) -> Tensor:
    """Codes int8 [out, in] of W, all arguments in visiting order."""
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    errors = torch.zeros_like(W)  # W - Q of the columns already rounded
    for start in range(0, W.shape[1], _BLOCK):
        stop = min(start + _BLOCK, W.shape[1])
        targets = W[:, start:stop] + errors[:, :start] @ F[:start, start:stop]
        for column in range(start, stop):
            target = targets[:, column - start]
            zeros = None if zero_points is None else zero_points[:, column]
            code = round_to_grid(target, scales[:, column], zeros, scheme)
            codes[:, column] = code.to(torch.int8)
            value = (code if zeros is None else code - zeros) * scales[:, column]
            errors[:, column] = W[:, column] - value
            later = slice(column + 1, stop)
            targets[:, column + 1 - start :] += errors[:, column, None] * F[column, later]
    return codes
