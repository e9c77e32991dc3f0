"""Means, errors and quantiles of per-token figures, with the names and formulas of llama.cpp."""

from dataclasses import dataclass
from math import exp, sqrt

import torch
from torch import Tensor

# Tokens and part of the vocabulary of whose logits there are copies in float64 at a time.
_TOKENS, _VOCABULARY = 64, 2048


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
    """Figures of [tokens, vocabulary] logits of both models at the true next tokens [tokens].

    All of the vocabulary counts, in float64, but only a piece of it is there at a time.
    """
    pieces = (t.split(_TOKENS) for t in (logits, reference, targets))
    return TokenFigures.cat([_compare(*piece) for piece in zip(*pieces, strict=True)])


def _compare(logits: Tensor, reference: Tensor, targets: Tensor) -> TokenFigures:
    own, base = Normalizer(len(logits)), Normalizer(len(logits))
    moved = torch.zeros(len(logits), dtype=torch.float64)  # sum of exp(b - top of b) * (b - a)
    for a, b in zip(logits.split(_VOCABULARY, 1), reference.split(_VOCABULARY, 1), strict=True):
        a, b = a.double(), b.double()  # (tokens, piece of the vocabulary)
        own.add(a)
        weights, shrunk = base.add(b)
        moved = moved * shrunk + (weights * (b - a)).sum(1)
    nll, nll_reference = (
        norm.log - x.gather(1, targets[:, None]).squeeze(1).double()
        for norm, x in ((own, logits), (base, reference))
    )
    return TokenFigures(
        nll=nll,
        nll_reference=nll_reference,
        kld=moved / base.total - (base.log - own.log),
        delta_p=(-nll).exp() - (-nll_reference).exp(),
        same_top=(own.first == base.first).double(),
    )


class Normalizer:
    """log sum exp of logits that come piece by piece (Milakov and Gimelshein, 2018), and where
    the largest was: `top`, `total` = sum of exp(x - top) and `first`, each [tokens]."""

    def __init__(self, tokens: int) -> None:
        self.top = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(tokens, dtype=torch.float64)
        self.first = torch.zeros(tokens, dtype=torch.long)
        self._seen = 0

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the next logits [tokens, piece]. Returns exp(x - top) of them [tokens, piece] and
        by what all sums of such so far are to be multiplied [tokens]."""
        largest, where = x.max(1)
        higher = largest > self.top
        self.first = torch.where(higher, where + self._seen, self.first)
        self._seen += x.shape[1]
        top = torch.maximum(self.top, largest)
        shrunk = (self.top - top).exp()
        weights = (x - top[:, None]).exp_()
        self.total = self.total * shrunk + weights.sum(1)
        self.top = top
        return weights, shrunk

    @property
    def log(self) -> Tensor:
        """log sum exp, [tokens]."""
        return self.top + self.total.log()


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
