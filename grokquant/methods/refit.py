"""Fits matrices that stay in floating point to the inputs of the quantized model.

Routers and projections that are not quantized read the states x of the quantized model, not x_f of
the original. What they give is brought back to W x_f by ridge regression,

    W' = W + W sum (x_f - x) x^T (H + ridge)^-1        H = sum of x x^T over tokens

which minimizes sum of |W x_f - W' x|^2 + ridge |W' - W|^2, at no bit and no time more.
"""

from collections.abc import Sequence

from torch import Tensor

from grokquant.methods.gptq import Factor, factorize
from grokquant.methods.method import Site
from grokquant.methods.targets import moved_inputs, solve_, times

# Added to the diagonal of H, as a share of its mean.
_RIDGE = 0.01


def refit(matrices: Sequence[Tensor], site: Site) -> list[Tensor]:
    """W' of matrices W [out, in] that read the site, in their dtypes; its aim has x_f.

    Raises UnusableHessian.
    """
    assert site.aim is not None
    factor = factorize(site.hessian(None), _RIDGE, act_order=True).factors[0]
    moved = moved_inputs(site, site.aim)
    return [_refit(W, moved, factor) for W in matrices]


def _refit(W: Tensor, moved: Tensor, factor: Factor) -> Tensor:
    change = solve_(times(W.float(), moved), factor)
    return change.add_(W).to(W.dtype)
