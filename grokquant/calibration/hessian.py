"""The Hessian of the inputs to a matrix: how they weigh its rounding errors.

The error of a row w of W is (w - q) H (w - q)^T with H = X^T X, summed over the tokens (rows of X).
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grokquant.calibration import gram_kernels

# Tokens multiplied at once: bounds the float32 or packed copy of the inputs.
_TOKENS = 2048
# Columns of the result made by one product; the part of a panel below the diagonal is wasted.
_PANEL = 512
# Shares of the work for threads: more than most machines have cores, so that none waits long.
_SHARES = 32


@dataclass(frozen=True)
class Hessian:
    """H = sum of x x^T over `tokens` inputs: the float32 square blocks along its diagonal.

    A full H is one block [in, in]; a block-diagonal one is several, and the rest counts as zero.
    """

    blocks: list[Tensor]
    tokens: int

    @property
    def H(self) -> Tensor:
        """The only block of a full Hessian."""
        (H,) = self.blocks
        return H


def accumulate(parts: Iterable[Tensor], features: int, block: int | None = None) -> Hessian:
    """The Hessian of inputs that come in parts [tokens, features] of any number of tokens.

    Products of bfloat16 inputs are exact and added up in float32; only half of the symmetric result
    is computed. `block` is the number of columns in a diagonal block; None makes a full Hessian.
    The same parts give the same bits.
    """
    blocks: list[Tensor] = []
    tokens = 0
    for part in parts:
        blocks = blocks or _zeros(features, block, part.device)
        if not len(part):
            continue
        tokens += len(part)
        for X in part.split(_TOKENS):
            columns = X.split([len(H) for H in blocks], dim=1)
            for H, X_block in zip(blocks, columns, strict=True):
                _add_products(X_block, H)
    blocks = blocks or _zeros(features, block, torch.device("cpu"))
    for H in blocks:
        _mirror(H)
    return Hessian(blocks, tokens)


def blend(routed: Hessian, everyone: Hessian, prior_tokens: float) -> Hessian:
    """Adds the Hessian of all tokens to an expert's, scaled as a prior worth `prior_tokens` tokens.

    The prior counts little for an expert with much data and dominates for one with hardly any.
    Changes the blocks of `routed` in place and returns it.
    """
    for H, prior in zip(routed.blocks, everyone.blocks, strict=True):
        H.add_(prior, alpha=prior_tokens / max(everyone.tokens, 1))
    return routed


def _zeros(features: int, block: int | None, device: torch.device) -> list[Tensor]:
    sizes = [len(part) for part in torch.arange(features).split(block or features)]
    return [torch.zeros(size, size, device=device) for size in sizes]


def _add_products(X: Tensor, H: Tensor) -> None:
    """Adds X^T X to the upper triangle of H; the lower one is invalid until it is mirrored."""
    on_cpu = X.device.type == "cpu"
    bfloat16 = X.dtype == torch.bfloat16
    if on_cpu and bfloat16 and gram_kernels.available():
        return _add_bfloat16_products(X, H)
    # Only GPUs multiply bfloat16 to a float32 result in torch.
    directly = bfloat16 and not on_cpu
    X = X if directly else X.float()
    for start in range(0, len(H), _PANEL):
        stop = min(start + _PANEL, len(H))
        panel = H[:stop, start:stop]  # with all rows above it
        left = X[:, :stop].T
        right = X[:, start:stop]
        if directly:
            panel += torch.mm(left, right, out_dtype=torch.float32)
        else:
            panel.addmm_(left, right)


def _add_bfloat16_products(X: Tensor, H: Tensor) -> None:
    panels = -(-len(H) // gram_kernels.WIDTH)
    pairs = -(-len(X) // 2)
    packed = np.empty((panels, pairs, gram_kernels.WIDTH), np.uint32)
    inputs = X.view(torch.uint16).numpy()  # numpy has no bfloat16
    result = H.numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # One thread computes a whole panel, so the number of threads does not change the sums.
        for work in (
            lambda first: gram_kernels.pack(inputs, packed, first, _SHARES),
            lambda first: gram_kernels.add_products(packed, result, first, _SHARES),
        ):
            list(pool.map(work, range(_SHARES)))


def _mirror(H: Tensor) -> None:
    """Copies the upper triangle of H to the lower one."""
    for start in range(0, len(H), _PANEL):
        stop = min(start + _PANEL, len(H))
        H[start:stop, :start] = H[:start, start:stop].T
        corner = H[start:stop, start:stop].triu_()
        corner.add_(corner.triu(1).T)
