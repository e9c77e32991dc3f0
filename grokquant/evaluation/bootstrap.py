"""Standard errors and confidence intervals from a bootstrap over documents.

Tokens within a document are correlated, so whole documents, not tokens, are resampled with
replacement. A document contributes the sums over its tokens: one matrix product gives every figure
that follows from sums for thousands of resamples. Both models keep the same documents in each
resample, so differences and ratios are paired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit
from torch import Tensor

from grokquant.evaluation.report import ClusterKind, Estimate

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95  # of the confidence intervals
METHOD = "percentiles, 95 %, expanded for few clusters as by Hesterberg (2015)"
# Fewer documents say too little about other documents to be drawn from.
LEAST = 10
# Tokens in a row that are taken as independent of the next ones, where sequences are few as well.
_BLOCK = 32
# Draw counts [resamples, clusters] held at once: 32 MiB of int64.
_COUNTS_AT_ONCE = 2**22

FloatArray = NDArray[np.float64]
# Sums [..., columns] -> a figure [...]
Statistic = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Resampler:
    """Resamples of `sums` [clusters, columns], the sums over the tokens of each cluster."""

    sums: FloatArray
    resamples: int = RESAMPLES
    seed: int = SEED

    @cached_property
    def resampled(self) -> FloatArray:
        """Sums over as many clusters, drawn with replacement: [resamples, columns]."""
        draw = np.random.default_rng(self.seed)
        clusters = len(self.sums)
        even = np.full(clusters, 1 / clusters)
        at_once = max(1, _COUNTS_AT_ONCE // clusters)
        parts = []
        for start in range(0, self.resamples, at_once):
            count = min(at_once, self.resamples - start)
            parts.append(draw.multinomial(clusters, even, size=count) @ self.sums)
        return np.concatenate(parts)

    def estimate(self, statistic: Statistic, token_error: float | None = None) -> Estimate:
        """`statistic` with its expanded percentile interval (Hesterberg 2015, "What teachers should
        know about the bootstrap"): plain percentiles are too narrow for few clusters.

        `token_error` is handed on. The error of a single cluster, or of clusters that are all
        alike, is 0.
        """
        value = float(statistic(self.sums.sum(0)))
        clusters = len(self.sums)
        if clusters < 2:
            return Estimate(value=value, error=0.0, low=value, high=value, token_error=token_error)
        figures = statistic(self.resampled)
        reach = sqrt(clusters / (clusters - 1)) * stdtrit(clusters - 1, (1 + LEVEL) / 2)
        low, high = np.quantile(figures, ndtr([-reach, reach]))
        return Estimate(
            value=value,
            error=float(figures.std(ddof=1)),
            low=float(low),
            high=float(high),
            token_error=token_error,
        )


def cluster_sums(columns: list[Tensor], clusters: Tensor) -> FloatArray:
    """Sums [clusters, columns] of `columns`, each [tokens], by cluster number [tokens]."""
    table = torch.stack([column.double() for column in columns], dim=-1)  # (tokens, columns)
    sums = table.new_zeros(int(clusters.max()) + 1, len(columns))
    return sums.index_add_(0, clusters, table).numpy()


def clusters_of(documents: Tensor) -> tuple[ClusterKind, Tensor]:
    """What is drawn, and the number of its cluster for each scored token [tokens], from 0.

    `documents` [sequences, scored] holds the document number of each token.
    """
    sequences, scored = documents.shape
    numbers = documents.flatten().unique(return_inverse=True)[1]
    if numbers.max() + 1 >= LEAST:
        return "document", numbers
    sequence = torch.arange(sequences).repeat_interleave(scored)
    if sequences >= LEAST:
        return "sequence", sequence
    blocks = -(-scored // _BLOCK)  # of a sequence
    return "block", sequence * blocks + torch.arange(scored).repeat(sequences) // _BLOCK
