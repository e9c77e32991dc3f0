"""Round to nearest: no data needed."""

from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods import compiled
from grokquant.methods.levels import find_levels
from grokquant.methods.scales import ScaleRule, quantize_nearest, search_scales
from grokquant.types import QTensor


def quantize_rtn(W: Tensor | QTensor, scheme: Scheme, rule: ScaleRule = "mse") -> QTensor:
    """Rounds W [out, in] to the nearest codes of the scales that `rule` finds."""
    if compiled.can_round(W, scheme):
        return compiled.quantize(W, scheme, rule == "mse")
    return quantize_with_torch(W, scheme, rule)


def quantize_with_torch(W: Tensor | QTensor, scheme: Scheme, rule: ScaleRule = "mse") -> QTensor:
    """`quantize_rtn` on any device and for any group size; the kernels' reference."""
    dense = W.dequantize() if isinstance(W, QTensor) else W
    if scheme.is_integer:
        return quantize_nearest(dense, *search_scales(dense, scheme, rule), scheme)
    return find_levels(dense, scheme, rule).nearest(dense)
