"""Two models on the same items of a task: who is right, and which answers flipped."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from grokquant.evaluation.bootstrap import Resampler
from grokquant.evaluation.report import PairedAccuracy


def compare_items(reference: ArrayLike, quantized: ArrayLike) -> PairedAccuracy:
    """Accuracies of both models on the same items, from whether each answer is right (booleans
    [items]).

    Raises ValueError where the two have other shapes, or no items.
    """
    base, own = (np.asarray(right, dtype=bool) for right in (reference, quantized))
    if base.shape != own.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"items of shapes {base.shape} and {own.shape} are no pairs")
    lost = int((base & ~own).sum())
    gained = int((own & ~base).sum())
    sums = np.stack((np.ones(len(base)), own, base), axis=-1).astype(np.float64)
    return PairedAccuracy(
        items=len(base),
        reference=float(base.mean()),
        quantized=float(own.mean()),
        difference=Resampler(sums).estimate(lambda s: (s[..., 1] - s[..., 2]) / s[..., 0]),
        lost=lost,
        gained=gained,
        p_value=float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
    )
