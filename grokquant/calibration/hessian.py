"""The Hessian of the inputs to a matrix: how they weigh its rounding errors.

The error of a row w of W is (w - q) H (w - q)^T with H = X^T X, summed over the tokens (rows of X).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grokquant.calibration import gram_kernels
from grokquant.threads import in_pieces, slices

# Tokens multiplied at once: bounds the float32 or packed copy of the inputs.
_TOKENS = 2048
# Columns of the result made by one product, and rows on a CPU, where one thread makes it; the part
# of it below the diagonal is wasted.
_PANEL = 512


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
    The same parts give the same bits, whatever the number of threads.
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
    alpha = prior_tokens / max(everyone.tokens, 1)
    for H, prior in zip(routed.blocks, everyone.blocks, strict=True):
        pieces = zip(H.split(_PANEL), prior.split(_PANEL), strict=True)
        in_pieces(lambda rows: rows[0].add_(rows[1], alpha=alpha), pieces)
    return routed


def _zeros(features: int, block: int | None, device: torch.device) -> list[Tensor]:
    sizes = [len(part) for part in torch.arange(features).split(block or features)]
    return [torch.zeros(size, size, dtype=torch.float32, device=device) for size in sizes]


def _add_products(X: Tensor, H: Tensor) -> None:
    """Adds X^T X to the upper triangle of H; the lower one is invalid until it is mirrored."""
    if X.device.type != "cpu":
        return _add_on_gpu(X, H)
    if X.dtype == torch.bfloat16 and (usable := gram_kernels.instructions()):
        return gram_kernels.add_products(X, H, gram_kernels.KERNELS[usable[0]])
    X = X.float()

    def add(corner: tuple[slice, slice]) -> None:
        rows, columns = corner
        H[corner].addmm_(X[:, rows].T, X[:, columns])

    panels = slices(0, len(H), _PANEL)
    in_pieces(
        add,
        [(rows, columns) for columns in panels for rows in panels if rows.start <= columns.start],
    )


def _add_on_gpu(X: Tensor, H: Tensor) -> None:
    # Only GPUs multiply bfloat16 to a float32 result in torch.
    directly = X.dtype == torch.bfloat16
    X = X if directly else X.float()
    for columns in slices(0, len(H), _PANEL):
        panel = H[: columns.stop, columns]  # with all rows above it
        left = X[:, : columns.stop].T
        right = X[:, columns]
        if directly:
            panel += torch.mm(left, right, out_dtype=torch.float32)
        else:
            panel.addmm_(left, right)


def _mirror(H: Tensor) -> None:
    """Copies the upper triangle of H to the lower one."""
    for start in range(0, len(H), _PANEL):
        stop = min(start + _PANEL, len(H))
        H[start:stop, :start] = H[:start, start:stop].T
        corner = H[start:stop, start:stop].triu_()
        corner.add_(corner.triu(1).T)
