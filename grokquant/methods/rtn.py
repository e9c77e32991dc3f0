"""Round to nearest: no data needed."""

from torch import Tensor

from grokquant.methods.scales import ScaleRule, find_scales, quantize_nearest
from grokquant.types import QTensor, Scheme


def quantize_rtn(
    W: Tensor, scheme: Scheme, rule: ScaleRule = "mse", importance: Tensor | None = None
) -> QTensor:
    """Rounds W [out, in] to the nearest codes of the scales that `rule` finds."""
    scales, zero_points = find_scales(W, scheme, rule, importance)
    return quantize_nearest(W, scales, zero_points, scheme)
