"""The statistics of a site: how its inputs weigh the errors of the matrices that read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens multiplied at once: bounds the scaled copy of the inputs.
_CHUNK = 4096


@dataclass(frozen=True)
class Hessian:
    """H = sum of weight * x x^T over `tokens` inputs, float32 [in, in]."""

    H: Tensor
    tokens: int


def accumulate(X: Tensor, weights: Tensor | None = None) -> Hessian:
    """The Hessian of inputs X [tokens, in], each token weighted by `weights` [tokens].

    Weights are scaled to a mean of 1, so that Hessians of different experts compare.
    """
    H = torch.zeros(X.shape[1], X.shape[1])
    if weights is not None and len(X):
        weights = weights.float() / weights.float().mean()
    for start in range(0, len(X), _CHUNK):
        part = X[start : start + _CHUNK].float()
        scaled = part if weights is None else part * weights[start : start + _CHUNK, None]
        H.addmm_(part.T, scaled)
    return Hessian(H, len(X))


def blend(routed: Hessian, everyone: Hessian, prior_tokens: float) -> Hessian:
    """An expert's Hessian with that of all tokens as a prior worth `prior_tokens` tokens.

    The prior vanishes where the expert has data and takes over where it has hardly any.
    """
    H = routed.H + everyone.H * (prior_tokens / max(everyone.tokens, 1))
    return Hessian(H, routed.tokens)
