"""From the figures of tokens to those of a report: means, errors, intervals, quantiles."""

from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from grokquant.evaluation import bootstrap, statistics
from grokquant.evaluation import report as parts
from grokquant.evaluation.bootstrap import Array, Bootstrap, Figure
from grokquant.evaluation.measure import Comparison
from grokquant.evaluation.statistics import TokenFigures

_QUANTILES = ("99.9%", "99.0%", "95.0%", "90.0%", "10.0%", "5.0%", "1.0%", "0.1%")
# Columns of the sums that are drawn again.
_COUNT, _NLL, _NLL_REFERENCE, _KLD, _DELTA, _SQUARE, _TOP = range(7)


def figures_of(figures: TokenFigures, documents: Tensor) -> dict:
    """The figures of the tokens of a text under the names of the report.

    `documents` [windows, scored] tells the document of each scored token.
    """
    unit, clusters = bootstrap.clusters_of(documents)
    columns = [torch.ones_like(figures.kld), figures.nll, figures.nll_reference, figures.kld]
    columns += [figures.delta_p, figures.delta_p.square(), figures.same_top]
    drawn = Bootstrap(bootstrap.cluster_sums(columns, clusters))
    return {
        "bootstrap": parts.Bootstrap(
            unit=unit,
            clusters=len(drawn.sums),
            resamples=drawn.resamples,
            seed=drawn.seed,
            method=bootstrap.METHOD,
        ),
        "perplexity": _perplexity(figures, drawn),
        "kld": parts.Divergence(
            mean=_mean(drawn, _KLD, figures.kld), **_spread(figures.kld, _QUANTILES)
        ),
        "delta_p": _delta_p(figures.delta_p, drawn),
        "same_top_p": _mean(drawn, _TOP, figures.same_top),
        "documents": _documents(drawn.sums),
    }


def noise_floor(noise: TokenFigures) -> parts.NoiseFloor:
    """What the reference against itself, `noise`, reads."""
    return parts.NoiseFloor(
        mean_kld=noise.kld.mean().item(),
        perplexity_ratio=(noise.nll - noise.nll_reference).mean().exp().item(),
        same_top_p=noise.same_top.mean().item(),
        how="the reference against itself, the same windows in another batch order",
    )


def routing(comparison: Comparison) -> parts.Routing | None:
    """The KLD of tokens with and without a change of routing; None for a dense model."""
    kld, first = comparison.figures.kld, comparison.first_change
    if first is None:
        return None
    routed = [layer.layer for layer in comparison.layers if layer.tokens_per_expert]
    return parts.Routing(
        unchanged=parts.TokenGroup(**_group(kld, first < 0)),
        changed=parts.TokenGroup(**_group(kld, first >= 0)),
        first_change=tuple(
            parts.FirstChange(layer=layer, **_group(kld, first == layer)) for layer in routed
        ),
    )


def _group(kld: Tensor, members: Tensor) -> dict:
    tokens, total = int(members.sum()), kld.sum().item()
    part = kld[members].sum().item()
    return {
        "tokens": tokens,
        "mean_kld": part / tokens if tokens else None,
        "share_of_kld": part / total if total else None,
    }


def _delta_p(delta_p: Tensor, drawn: Bootstrap) -> parts.DeltaP:
    _, token_error = statistics.rms_and_error(delta_p)
    return parts.DeltaP(
        mean=_mean(drawn, _DELTA, delta_p),
        rms=_estimate(drawn, lambda sums: np.sqrt(_mean_of(sums, _SQUARE)), token_error),
        **_spread(delta_p, (*_QUANTILES, "75.0%", "25.0%")),
    )


def _perplexity(figures: TokenFigures, drawn: Bootstrap) -> parts.Perplexity:
    """Both perplexities and how they compare, token by token (paired); errors by token are those
    of llama.cpp."""
    _, ln_error = statistics.mean_and_error(figures.nll - figures.nll_reference)
    (own, own_error), (base, base_error) = (
        statistics.perplexity(nll) for nll in (figures.nll, figures.nll_reference)
    )
    log_variances = (own_error / own) ** 2 + (base_error / base) ** 2
    covariance = own * base * (log_variances - ln_error**2)  # twice that of the two perplexities
    variance = own_error**2 + base_error**2 - covariance

    def ppl(sums: Array) -> Array:
        return np.exp(_mean_of(sums, _NLL))

    def ppl_reference(sums: Array) -> Array:
        return np.exp(_mean_of(sums, _NLL_REFERENCE))

    def ln_ratio(sums: Array) -> Array:
        return _mean_of(sums, _NLL) - _mean_of(sums, _NLL_REFERENCE)

    return parts.Perplexity(
        reference=_estimate(drawn, ppl_reference, base_error),
        quantized=_estimate(drawn, ppl, own_error),
        ratio=_estimate(drawn, lambda s: np.exp(ln_ratio(s)), own / base * ln_error),
        ln_ratio=_estimate(drawn, ln_ratio, ln_error),
        difference=_estimate(drawn, lambda s: ppl(s) - ppl_reference(s), max(variance, 0.0) ** 0.5),
        correlation=statistics.correlation(figures.nll, figures.nll_reference),
    )


def _mean_of(sums: Array, column: int) -> Array:
    return sums[..., column] / sums[..., _COUNT]


def _mean(drawn: Bootstrap, column: int, x: Tensor) -> parts.Estimate:
    _, token_error = statistics.mean_and_error(x)
    return _estimate(drawn, lambda sums: _mean_of(sums, column), token_error)


def _estimate(drawn: Bootstrap, figure: Figure, token_error: float) -> parts.Estimate:
    return parts.Estimate(**asdict(drawn.interval(figure)), token_error=token_error)


def _documents(sums: Array) -> parts.Documents:
    columns = sums.T.tolist()
    return parts.Documents(
        tokens=columns[_COUNT],
        nll=columns[_NLL],
        nll_reference=columns[_NLL_REFERENCE],
        kld=columns[_KLD],
        same_top=columns[_TOP],
    )


def _spread(x: Tensor, quantiles: tuple[str, ...]) -> dict:
    """Maximum, quantiles, median and minimum of per-token figures x [tokens]."""
    named = {name: statistics.quantile(x, float(name[:-1]) / 100) for name in quantiles}
    return {
        "maximum": x.max().item(),
        "median": statistics.quantile(x, 0.5),
        "minimum": x.min().item(),
    } | named
