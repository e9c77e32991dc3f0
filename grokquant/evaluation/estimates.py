"""From per-token figures to those of a report: means, errors, intervals, quantiles."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from grokquant.evaluation import bootstrap, statistics
from grokquant.evaluation.bootstrap import FloatArray, Resampler
from grokquant.evaluation.measure import Comparison
from grokquant.evaluation.report import (
    Bootstrap,
    DeltaP,
    Divergence,
    Documents,
    Estimate,
    FirstChange,
    NoiseFloor,
    Perplexity,
    Protocol,
    Routing,
    Spread,
    TextFigures,
    TokenGroup,
)
from grokquant.evaluation.statistics import TokenFigures

# The share of the mean KLD up to which a noise floor changes no conclusion: both models have one.
_SMALL_FLOOR = 0.1
_HIGH_FLOOR = (
    "The noise floor is more than a tenth of the mean KLD: products in bfloat16 are too coarse for "
    "a difference this small. Evaluate with the dtype float32."
)
# Means over tokens by column, each [...] -> a figure [...]
Figure = Callable[[dict[str, FloatArray]], FloatArray]


class _Sample:
    """The scored tokens of a text: `columns` of per-token figures [tokens] by name, and the sums of
    each column over the tokens of each cluster, which are resampled."""

    def __init__(self, figures: TokenFigures, documents: Tensor) -> None:
        self.columns = {
            "tokens": torch.ones_like(figures.kld),
            **vars(figures),
            "delta_p_squared": figures.delta_p.square(),
        }
        self.drawn, clusters = bootstrap.clusters_of(documents)
        sums = bootstrap.cluster_sums(list(self.columns.values()), clusters)
        self.resampler = Resampler(sums)

    def estimate(self, figure: Figure, token_error: float) -> Estimate:
        return self.resampler.estimate(lambda sums: figure(self._means(sums)), token_error)

    def mean(self, column: str) -> Estimate:
        _, token_error = statistics.mean_and_error(self.columns[column])
        return self.estimate(lambda means: means[column], token_error)

    def spread(self, kind: type[Spread], column: str) -> dict[str, float]:
        """The order statistics of a column that `kind` has fields for."""
        x = self.columns[column]
        return {
            "maximum": x.max().item(),
            "median": statistics.quantile(x, 0.5),
            "minimum": x.min().item(),
        } | {name: statistics.quantile(x, share) for name, share in kind.quantiles().items()}

    def sums(self) -> dict[str, list[float]]:
        """The sums of each column over the tokens of each cluster."""
        return dict(zip(self.columns, self.resampler.sums.T.tolist(), strict=True))

    def _means(self, sums: FloatArray) -> dict[str, FloatArray]:
        """`sums` [..., columns] over the number of tokens, by column."""
        return {name: sums[..., i] / sums[..., 0] for i, name in enumerate(self.columns)}


def text_figures(protocol: Protocol, figures: TokenFigures, documents: Tensor) -> TextFigures:
    """All that a report says of a text.

    `documents` [sequences, scored] holds the document number of each scored token.
    """
    sample = _Sample(figures, documents)
    return TextFigures(
        protocol=protocol,
        bootstrap=_bootstrap(sample),
        perplexity=_perplexity(figures, sample),
        kld=Divergence(mean=sample.mean("kld"), **sample.spread(Divergence, "kld")),
        delta_p=_delta_p(figures, sample),
        same_top_p=sample.mean("same_top"),
        documents=_documents(sample),
    )


def noise_floor(noise: TokenFigures, kld: float, products: torch.dtype) -> NoiseFloor:
    """The figures of `noise`, the reference against itself; `kld` is the mean KL divergence of the
    evaluation, and `products` the dtype of the products of its experts."""
    how = "the reference against itself, the same sequences in another batch order"
    note = None
    if products != torch.float32:
        how = (
            f"the reference against itself, {len(noise.kld):,} tokens with all products in float32"
        )
        if noise.kld.mean().item() > _SMALL_FLOOR * kld:
            note = _HIGH_FLOOR
    return NoiseFloor(
        mean_kld=noise.kld.mean().item(),
        perplexity_ratio=(noise.nll - noise.nll_reference).mean().exp().item(),
        same_top_p=noise.same_top.mean().item(),
        how=how,
        note=note,
    )


def routing(comparison: Comparison) -> Routing | None:
    """The KLD of tokens with and without a change of routing; None for a dense model."""
    kld = comparison.figures.kld
    first = comparison.first_change
    if first is None:
        return None
    routed = [layer.layer for layer in comparison.layers if layer.tokens_per_expert]
    return Routing(
        unchanged=_group(kld, first < 0),
        changed=_group(kld, first >= 0),
        first_change=tuple(
            FirstChange(layer=layer, **dict(_group(kld, first == layer))) for layer in routed
        ),
    )


def _group(kld: Tensor, members: Tensor) -> TokenGroup:
    """The tokens that are `members` (booleans [tokens])."""
    tokens = int(members.sum())
    total = kld.sum().item()
    part = kld[members].sum().item()
    return TokenGroup(
        tokens=tokens,
        mean_kld=part / tokens if tokens else None,
        share_of_kld=part / total if total else None,
    )


def _bootstrap(sample: _Sample) -> Bootstrap:
    resampler = sample.resampler
    return Bootstrap(
        unit=sample.drawn,
        clusters=len(resampler.sums),
        resamples=resampler.resamples,
        seed=resampler.seed,
        method=bootstrap.METHOD,
    )


def _delta_p(figures: TokenFigures, sample: _Sample) -> DeltaP:
    _, rms_error = statistics.rms_and_error(figures.delta_p)
    return DeltaP(
        mean=sample.mean("delta_p"),
        rms=sample.estimate(lambda means: np.sqrt(means["delta_p_squared"]), rms_error),
        **sample.spread(DeltaP, "delta_p"),
    )


def _perplexity(figures: TokenFigures, sample: _Sample) -> Perplexity:
    """Both perplexities, and their ratio and difference token by token (paired).

    Errors by token are llama.cpp's: first order, with the covariance of both models.
    """
    _, ln_error = statistics.mean_and_error(figures.nll - figures.nll_reference)
    own, own_error = statistics.perplexity(figures.nll)
    base, base_error = statistics.perplexity(figures.nll_reference)
    # Var(a - b) = Var(a) + Var(b) - 2 Cov(a, b), and the same of the logarithms.
    log_variances = (own_error / own) ** 2 + (base_error / base) ** 2
    twice_covariance = own * base * (log_variances - ln_error**2)
    variance = own_error**2 + base_error**2 - twice_covariance

    def ppl(means: dict[str, FloatArray]) -> FloatArray:
        return np.exp(means["nll"])

    def ppl_reference(means: dict[str, FloatArray]) -> FloatArray:
        return np.exp(means["nll_reference"])

    def ln_ratio(means: dict[str, FloatArray]) -> FloatArray:
        return means["nll"] - means["nll_reference"]

    return Perplexity(
        reference=sample.estimate(ppl_reference, base_error),
        quantized=sample.estimate(ppl, own_error),
        ratio=sample.estimate(lambda m: np.exp(ln_ratio(m)), own / base * ln_error),
        ln_ratio=sample.estimate(ln_ratio, ln_error),
        difference=sample.estimate(lambda m: ppl(m) - ppl_reference(m), max(variance, 0.0) ** 0.5),
        correlation=statistics.correlation(figures.nll, figures.nll_reference),
    )


def _documents(sample: _Sample) -> Documents:
    sums = sample.sums()
    return Documents.model_validate({name: sums[name] for name in Documents.model_fields})
