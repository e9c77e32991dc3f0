"""The statistics of a site: how its inputs weigh the errors of the matrices that read them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hessian:
    """H = sum of x x^T over `tokens` inputs, float32 [in, in]."""

    H: Tensor
    tokens: int


def accumulate(parts: Iterable[Tensor], features: int) -> Hessian:
    """The Hessian of inputs that come in parts [tokens, features]."""
    H, tokens = torch.zeros(features, features), 0
    for part in parts:
        H.addmm_(part.float().T, part.float())
        tokens += len(part)
    return Hessian(H, tokens)


def blend(routed: Hessian, everyone: Hessian, prior_tokens: float) -> Hessian:
    """An expert's Hessian with that of all tokens as a prior worth `prior_tokens` tokens.

    The prior vanishes where the expert has data and takes over where it has hardly any.
    """
    H = routed.H + everyone.H * (prior_tokens / max(everyone.tokens, 1))
    return Hessian(H, routed.tokens)
