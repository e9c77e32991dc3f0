"""Per-token figures of two models, and their means, errors and quantiles, with the names and
formulas of llama.cpp."""

from dataclasses import dataclass
from math import exp, sqrt

import torch
from torch import Tensor

# Chunk sizes (tokens, vocabulary) for the float64 copies of logits: 1 MiB each.
_TOKENS = 64
_VOCABULARY = 2048


@dataclass(frozen=True)
class TokenFigures:
    """Figures of every scored token, each float64 [tokens].

    `nll` and `nll_reference` are the negative log-likelihoods of the true token in nats, `kld` is
    KL(reference || quantized) of the next-token distributions in nats, `delta_p` the probability of
    the true token, quantized minus reference; `same_top` is 1 where both rank the same token first,
    else 0.
    """

    nll: Tensor
    nll_reference: Tensor
    kld: Tensor
    delta_p: Tensor
    same_top: Tensor

    @staticmethod
    def cat(parts: list["TokenFigures"]) -> "TokenFigures":
        """The tokens of all parts, in their order."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return TokenFigures(*map(torch.cat, columns))


def compare_logits(logits: Tensor, reference: Tensor, targets: Tensor) -> TokenFigures:
    """Figures from both models' logits [tokens, vocabulary] and the true next tokens [tokens].

    In float64 over the whole vocabulary, with copies of one chunk at a time.
    """
    pieces = (t.split(_TOKENS) for t in (logits, reference, targets))
    return TokenFigures.cat([_compare(*piece) for piece in zip(*pieces, strict=True)])


def _compare(logits: Tensor, reference: Tensor, targets: Tensor) -> TokenFigures:
    """With p, q the probabilities of reference and quantized model, and b, a their logits:

    KL(p || q) = sum p (b - a) - (log sum exp b - log sum exp a)
    """
    own = Normalizer(len(logits))
    base = Normalizer(len(logits))
    moved = torch.zeros(len(logits), dtype=torch.float64)  # sum of exp(b - top of b) * (b - a)
    for a, b in zip(logits.split(_VOCABULARY, 1), reference.split(_VOCABULARY, 1), strict=True):
        a = a.double()  # (tokens, chunk of the vocabulary)
        b = b.double()
        own.add(a)
        weights, rescale = base.add(b)
        moved = moved * rescale + (weights * (b - a)).sum(1)
    nll = own.log - _of_targets(logits, targets)
    nll_reference = base.log - _of_targets(reference, targets)
    return TokenFigures(
        nll=nll,
        nll_reference=nll_reference,
        kld=moved / base.total - (base.log - own.log),
        delta_p=(-nll).exp() - (-nll_reference).exp(),
        same_top=(own.first == base.first).double(),
    )


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits of the true tokens, float64 [tokens]."""
    return logits.gather(1, targets[:, None]).squeeze(1).double()


class Normalizer:
    """log sum exp of logits that come chunk by chunk (Milakov and Gimelshein, 2018), and where the
    largest was: `top`, `total` = sum of exp(x - top) and `first`, each [tokens]."""

    def __init__(self, tokens: int) -> None:
        self.top = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(tokens, dtype=torch.float64)
        self.first = torch.zeros(tokens, dtype=torch.long)
        self._seen = 0

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the next logits x [tokens, chunk].

        Returns exp(x - top) [tokens, chunk], and the factor [tokens] that rescales earlier sums of
        such terms to the new top.
        """
        largest, where = x.max(1)
        higher = largest > self.top
        self.first = torch.where(higher, where + self._seen, self.first)
        self._seen += x.shape[1]
        top = torch.maximum(self.top, largest)
        rescale = (self.top - top).exp()
        weights = (x - top[:, None]).exp_()
        self.total = self.total * rescale + weights.sum(1)
        self.top = top
        return weights, rescale

    @property
    def log(self) -> Tensor:
        """log sum exp, [tokens]."""
        return self.top + self.total.log()


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """Mean of x [tokens] and its standard error, with tokens taken as independent."""
    if len(x) < 2:
        return x.mean().item(), 0.0
    variance = x.square().mean() - x.mean().square()
    return x.mean().item(), sqrt(max(variance.item(), 0.0) / (len(x) - 1))


def rms_and_error(x: Tensor) -> tuple[float, float]:
    """Root mean square of x [tokens] and its error to first order."""
    mean, error = mean_and_error(x.square())
    return sqrt(mean), error / (2 * sqrt(mean)) if mean > 0 else 0.0


def perplexity(nll: Tensor) -> tuple[float, float]:
    """exp of the mean negative log-likelihood [tokens], and its error to first order."""
    mean, error = mean_and_error(nll)
    return exp(mean), exp(mean) * error


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of two figures [tokens]; 1 where they are the same."""
    if torch.equal(x, y):
        return 1.0
    return torch.corrcoef(torch.stack((x, y)))[0, 1].item()


def quantile(x: Tensor, share: float) -> float:
    """The value below which `share` of x [tokens] lies, interpolated linearly.

    torch.quantile refuses more than 16 million values, so x is sorted here.
    """
    ordered = x.sort().values
    position = share * (len(x) - 1)
    low = int(position)
    high = min(low + 1, len(x) - 1)
    return (ordered[low] + (ordered[high] - ordered[low]) * (position - low)).item()
