"""GPTQ with feedback between rows, too: rounding in the metrics of inputs and outputs at once.

With H = F D F^T and G = U C U^T, both F and U unit upper triangular, the loss of E = Q - W is

    tr(G E H E^T) = sum over r, j of  C[r] D[j] (U^T E F)[r, j]^2

so that rows, as columns, are rounded one after the other. For row r, (U^T E)[r] is its own error
and the errors of the rows before it, U[:r, r] E[:r]: GPTQ rounds it with its target moved by them.
This is LDLQ on both sides (YAQA, arXiv 2505.22988), for a G of diagonal blocks:

    block     0    1    2   ..          turn 0: the first row of all blocks, by GPTQ
              row  row  row             turn 1: the second row of all blocks, moved by the
              row  row  row                     errors of the first row of its block
"""

from dataclasses import replace

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.gptq import Feedback, round_gptq
from grokquant.methods.method import UnusableHessian
from grokquant.methods.scales import ScaleRule
from grokquant.threads import in_order, in_pieces, slices
from grokquant.types import QTensor

# Blocks rounded at once, a row of each: as many rows as a thread of GPTQ rounds.
_BLOCKS = 256
# Rows of a block at most. A turn takes a row of each block, and few rows make slow products.
_ROWS = 64


def round_two_sided(
    W: Tensor, feedback: Feedback, metric: Tensor, scheme: Scheme, rule: ScaleRule = "mse"
) -> QTensor:
    """Rounds W [out, in] row by row in each block of the metric, strongest rows first.

    `metric` float32 [blocks, size, size] holds the diagonal blocks of G for consecutive rows, their
    damping added; blocks of more than 64 rows are cut into blocks of 64 at most. Levels are found
    for each row as it is moved. Raises UnusableHessian for a metric that is not positive definite.
    Besides what `round_gptq` takes, this takes two float32 [256 * size, in] for each thread.
    """
    metric = _cut(metric.float())
    size = metric.shape[1]

    def work(part: slice) -> QTensor:
        rows = W[part.start * size : part.stop * size].float()
        return _round_blocks(rows.unflatten(0, (-1, size)), feedback, metric[part], scheme, rule)

    run = in_pieces if W.device.type == "cpu" else in_order
    return QTensor.cat(run(work, slices(0, len(metric), _BLOCKS)))


def _cut(metric: Tensor) -> Tensor:
    """The same blocks, or smaller ones along their diagonals."""
    size = metric.shape[1]
    part = max(rows for rows in range(1, _ROWS + 1) if size % rows == 0)
    if part == size:
        return metric
    pieces = [metric[:, rows, rows] for rows in slices(0, size, part)]
    return torch.stack(pieces, 1).flatten(0, 1)


def _round_blocks(
    W: Tensor, feedback: Feedback, metric: Tensor, scheme: Scheme, rule: ScaleRule
) -> QTensor:
    """Rounds W [blocks, size, in]; the rows of the result are in natural order."""
    blocks, size, _ = W.shape
    order = metric.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)
    every = torch.arange(blocks, device=W.device).unsqueeze(1)
    W = W[every, order]
    U = _upper_factor(metric[every.unsqueeze(2), order.unsqueeze(2), order.unsqueeze(1)])
    errors = torch.zeros_like(W)
    turns = []
    for turn in range(size):
        before = U[:, :turn, turn].unsqueeze(1)  # (blocks, 1, turn)
        shift = torch.bmm(before, errors[:, :turn]).squeeze(1)
        rounded = round_gptq(W[:, turn] - shift, feedback, scheme, rule).quantized
        errors[:, turn] = _values(rounded) - W[:, turn]
        turns.append(rounded)
    # Row `order[block, turn]` of a block is now row `turn * blocks + block`.
    places = order.argsort(1) * blocks + every
    return QTensor.cat(turns).rows(places.flatten())


def _upper_factor(G: Tensor) -> Tensor:
    """The unit upper triangular U [blocks, size, size] of G = U C U^T."""
    L, failed = torch.linalg.cholesky_ex(G.flip(1, 2))
    if failed.any():
        raise UnusableHessian("the metric of the outputs is not positive definite")
    upper = L.flip(1, 2)
    return upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(1)


def _values(quantized: QTensor) -> Tensor:
    """The matrix in float32, in which GPTQ computes whatever the scale dtype."""
    offsets = quantized.offsets
    wide = None if offsets is None else offsets.float()
    return replace(quantized, scales=quantized.scales.float(), offsets=wide).dequantize()
