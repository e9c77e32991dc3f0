"""The statistics of a site: how its inputs weigh the errors of the matrices that read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens multiplied at once: bounds the float32 copy of the inputs.
_CHUNK = 4096


@dataclass(frozen=True)
class Hessian:
    """H = sum of x x^T over `tokens` inputs, float32 [in, in]."""

    H: Tensor
    tokens: int


def accumulate(X: Tensor) -> Hessian:
    """The Hessian of inputs X [tokens, in]."""
    H = torch.zeros(X.shape[1], X.shape[1])
    for part in X.split(_CHUNK):
        H.addmm_(part.float().T, part.float())
    return Hessian(H, len(X))


def blend(routed: Hessian, everyone: Hessian, prior_tokens: float) -> Hessian:
    """An expert's Hessian with that of all tokens as a prior worth `prior_tokens` tokens.

    The prior vanishes where the expert has data and takes over where it has hardly any.
    """
    H = routed.H + everyone.H * (prior_tokens / max(everyone.tokens, 1))
    return Hessian(H, routed.tokens)
