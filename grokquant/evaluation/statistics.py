"""Means, errors and quantiles of per-token figures, with the names and formulas of llama.cpp."""

from dataclasses import dataclass
from math import exp, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenFigures:
    """Figures of every scored token, each float64 [tokens].

    `nll` and `nll_reference` are the negative log-likelihoods of the true token in nats, `kld` is
    KL(reference || quantized) of the next-token distributions, `delta_p` the probability of the
    true token, quantized minus reference; `same_top` tells whether both rank one token first.
    """

    nll: Tensor
    nll_reference: Tensor
    kld: Tensor
    delta_p: Tensor
    same_top: Tensor

    @staticmethod
    def cat(parts: list["TokenFigures"]) -> "TokenFigures":
        return TokenFigures(
            *(torch.cat(column) for column in zip(*map(_fields, parts), strict=True))
        )


def _fields(figures: TokenFigures) -> tuple[Tensor, ...]:
    return (
        figures.nll,
        figures.nll_reference,
        figures.kld,
        figures.delta_p,
        figures.same_top,
    )


def compare_logits(logits: Tensor, reference: Tensor, targets: Tensor) -> TokenFigures:
    """Figures of [tokens, vocabulary] logits of both models at the true next tokens [tokens]."""
    log_q, log_p = (F.log_softmax(x.double(), dim=-1) for x in (logits, reference))
    nll, nll_reference = (-x.gather(1, targets[:, None]).squeeze(1) for x in (log_q, log_p))
    return TokenFigures(
        nll=nll,
        nll_reference=nll_reference,
        kld=(log_p.exp() * (log_p - log_q)).sum(-1),
        delta_p=(-nll).exp() - (-nll_reference).exp(),
        same_top=(log_q.argmax(-1) == log_p.argmax(-1)).double(),
    )


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """Mean of x [tokens] and its standard error, tokens taken as independent."""
    if len(x) < 2:
        return x.mean().item(), 0.0
    variance = x.square().mean() - x.mean().square()
    return x.mean().item(), sqrt(max(variance.item(), 0.0) / (len(x) - 1))


def rms_and_error(x: Tensor) -> tuple[float, float]:
    """Root mean square of x [tokens] and its error to first order."""
    mean, error = mean_and_error(x.square())
    return sqrt(mean), error / (2 * sqrt(mean)) if mean > 0 else 0.0


def perplexity(nll: Tensor) -> tuple[float, float]:
    """exp of the mean negative log-likelihood, and its error."""
    mean, error = mean_and_error(nll)
    return exp(mean), exp(mean) * error


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two [tokens] figures; 1 where they are the same."""
    if torch.equal(x, y):
        return 1.0
    return torch.corrcoef(torch.stack((x, y)))[0, 1].item()


def quantile(x: Tensor, share: float) -> float:
    """The value below which `share` of x [tokens] lies, interpolated linearly.

    Sorted by hand: torch.quantile refuses more than 16 million values.
    """
    ordered = x.sort().values
    position = share * (len(x) - 1)
    low = int(position)
    high = min(low + 1, len(x) - 1)
    return (ordered[low] + (ordered[high] - ordered[low]) * (position - low)).item()
