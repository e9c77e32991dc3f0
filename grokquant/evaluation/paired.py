"""Two models on the same items of a task: who is right, and what flipped."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from grokquant.evaluation.bootstrap import Bootstrap, Interval


@dataclass(frozen=True)
class Flips:
    """Accuracies of both models over `items`, and how they differ.

    `lost` counts what only the reference gets right, `gained` what only the quantized model does.
    `p_value` is McNemar's, exact and two-sided: of at least so one-sided flips by chance.
    """

    items: int
    reference: float
    quantized: float
    difference: Interval
    lost: int
    gained: int
    p_value: float


def compare_items(reference: ArrayLike, quantized: ArrayLike) -> Flips:
    """Which of the same items [items] each model answers rightly (booleans), compared in pairs."""
    base, own = (np.asarray(right, dtype=bool) for right in (reference, quantized))
    if base.shape != own.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"items of shapes {base.shape} and {own.shape} are no pairs")
    lost, gained = int((base & ~own).sum()), int((own & ~base).sum())
    sums = np.stack((np.ones(len(base)), own, base), axis=-1).astype(np.float64)
    return Flips(
        items=len(base),
        reference=float(base.mean()),
        quantized=float(own.mean()),
        difference=Bootstrap(sums).interval(lambda s: (s[..., 1] - s[..., 2]) / s[..., 0]),
        lost=lost,
        gained=gained,
        p_value=float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
    )
