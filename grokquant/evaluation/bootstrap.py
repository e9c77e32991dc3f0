"""Errors and intervals of what a text shows: its documents are drawn again, with replacement.

Tokens of one document are alike, so documents, not tokens, are what another text would have others
of. A document counts with the sums over its tokens; whatever follows from sums is found for
thousands of resamples by one product of matrices. Both models keep their documents in each draw,
so differences and ratios are paired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit
from torch import Tensor

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
METHOD = "percentiles, 95 %, expanded for few clusters as by Hesterberg (2015)"
# Fewer documents than this say too little about other documents.
LEAST = 10
_BLOCK = 32
_CELLS = 2**22

Unit = Literal["document", "window", "block"]
Array = NDArray[np.float64]
# Sums [..., columns] -> a figure [...]
Figure = Callable[[Array], Array]


@dataclass(frozen=True)
class Interval:
    """A figure, its standard error and the ends of its 95 % interval."""

    value: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of `sums` [clusters, columns]: what each cluster of observations adds up to."""

    sums: Array
    resamples: int = RESAMPLES
    seed: int = SEED

    @cached_property
    def resampled(self) -> Array:
        """The sums of as many clusters, drawn with replacement: [resamples, columns]."""
        draw, clusters = np.random.default_rng(self.seed), len(self.sums)
        even, parts = np.full(clusters, 1 / clusters), []
        at_once = max(1, _CELLS // clusters)
        for start in range(0, self.resamples, at_once):
            count = min(at_once, self.resamples - start)
            parts.append(draw.multinomial(clusters, even, size=count) @ self.sums)
        return np.concatenate(parts)

    def interval(self, figure: Figure) -> Interval:
        """`figure` with the expanded percentile interval of Hesterberg (2015), "What teachers
        should know about the bootstrap": plain percentiles are too narrow for few clusters.

        A single cluster, or clusters that are all alike, leave nothing open.
        """
        value, clusters = float(figure(self.sums.sum(0))), len(self.sums)
        if clusters < 2:
            return Interval(value, 0.0, value, value)
        found = figure(self.resampled)
        reach = sqrt(clusters / (clusters - 1)) * stdtrit(clusters - 1, (1 + LEVEL) / 2)
        low, high = np.quantile(found, ndtr([-reach, reach]))
        return Interval(value, float(found.std(ddof=1)), float(low), float(high))


def cluster_sums(columns: list[Tensor], clusters: Tensor) -> Array:
    """Sums of per-token `columns`, each [tokens], by number in `clusters` [tokens]."""
    table = torch.stack([column.double() for column in columns], dim=-1)  # (tokens, columns)
    sums = table.new_zeros(int(clusters.max()) + 1, len(columns))
    return sums.index_add_(0, clusters, table).numpy()


def clusters_of(documents: Tensor) -> tuple[Unit, Tensor]:
    """What is drawn, and its number for each scored token [tokens], counted from 0.

    `documents` [windows, scored] tells the document of each token.
    """
    windows, scored = documents.shape
    numbers = documents.flatten().unique(return_inverse=True)[1]
    if numbers.max() + 1 >= LEAST:
        return "document", numbers
    window = torch.arange(windows).repeat_interleave(scored)
    if windows >= LEAST:
        return "window", window
    blocks = -(-scored // _BLOCK)
    return "block", window * blocks + torch.arange(scored).repeat(windows) // _BLOCK
