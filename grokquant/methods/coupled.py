"""GPTQ whose rows are coupled, too: errors are fed back to later columns and to later rows.

It lowers tr(G E H E^T), E = W - Q, one code after the other. With H = F D F^T and G = U C U^T,
where F and U are unit upper triangular, D and C diagonal, that is

    sum over rows i and columns j of  C_i D_j (U^T E F)[i, j]^2

and each code is the nearest to what makes its own term 0. The term sees no later row or column
(YAQA, arXiv 2505.22988). U^T E of a row stands where GPTQ has its error. Many rows are worked on in
tiles, and the errors of all tiles before are taken off the targets of a tile:

    tile 0   | round, rows in turn in a column |
    tile 1   | W - U[0, 1]^T E[0], then round  |
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.gptq import Factor, Feedback, Slab
from grokquant.methods.gptq_kernels import round_coupled_columns
from grokquant.methods.gptq_leaf import Columns
from grokquant.methods.levels import find_levels
from grokquant.methods.method import UnusableHessian
from grokquant.methods.scales import ScaleRule
from grokquant.threads import Workers, alone, in_order, slices
from grokquant.types import QTensor

# Rows of a tile: fewer make slower products, in a column more take turns at a growing cost.
_TILE_ROWS = 256
# Columns that one thread feeds errors back to.
_PIECE_COLUMNS = 1024

Run = Callable[[Callable[[slice], None], list[slice]], object]


def round_coupled(
    W: Tensor, feedback: Feedback, metric: Tensor, scheme: Scheme, rule: ScaleRule
) -> QTensor:
    """Rounds W float32 [out, in] with feedback through its rows and columns.

    `metric` float32 [blocks, size, size] holds the diagonal blocks of G for consecutive rows, out =
    blocks * size, damped. `feedback` is of one full Hessian. Computes on the CPU; the bytes do not
    depend on the number of threads. Takes the memory of five float32 tiles [256, in] for each
    thread; for blocks of more than 256 rows, of W again and of five tiles. Raises UnusableHessian
    where G is not positive definite.
    """
    (factor,) = feedback.factors
    factor = Factor(factor.columns.cpu(), factor.F.cpu(), factor.D.cpu(), factor.shift)
    round_tile = partial(
        _round_tile,
        factor=factor,
        importance=feedback.importance.cpu(),
        scheme=scheme,
        rule=rule,
    )
    roots = alone(lambda: _upper_roots(metric.cpu()))
    workers = Workers()
    if metric.shape[1] <= _TILE_ROWS:
        tiles = _round_apart(W.cpu(), roots, round_tile, workers)
    else:
        tiles = alone(lambda: _round_in_turn(W.cpu(), roots, round_tile, workers))
    return QTensor.cat(tiles).to(W.device)


def _round_apart(
    W: Tensor, roots: Tensor, round_tile: Callable[..., QTensor], workers: Workers
) -> list[QTensor]:
    """Small blocks: tiles of whole blocks, none of which needs another."""
    size = roots.shape[1]

    def work(blocks: slice) -> QTensor:
        rows = slice(blocks.start * size, blocks.stop * size)
        return round_tile(W[rows], roots[blocks], run=in_order)

    return workers.map(work, slices(0, len(roots), _TILE_ROWS // size))


def _round_in_turn(
    W: Tensor, roots: Tensor, round_tile: Callable[..., QTensor], workers: Workers
) -> list[QTensor]:
    """Large blocks: tiles of a block one after the other, their products in pieces."""
    tiles = []
    for R, block in zip(roots, W.split(roots.shape[1]), strict=True):
        E = torch.empty_like(block)  # Q - W of the rows that are rounded
        for tile in slices(0, len(block), _TILE_ROWS):
            corner = R[tile, tile]
            before = R[: tile.start, tile]
            U = torch.linalg.solve_triangular(corner, before, upper=True, left=False)
            wanted = _without(block[tile], U, E[: tile.start], workers)
            tiles.append(round_tile(wanted, corner.unsqueeze(0), run=workers.map))
            E[tile] = tiles[-1].dequantize().float() - block[tile]
    return tiles


def _without(W: Tensor, U: Tensor, E: Tensor, workers: Workers) -> Tensor:
    """W [rows, in] less U^T E of the rows before, U [before, rows] and E [before, in]."""
    wanted = torch.empty_like(W)

    def take_off(columns: slice) -> None:
        wanted[:, columns] = W[:, columns] - U.T @ E[:, columns]

    workers.map(take_off, slices(0, W.shape[1], _PIECE_COLUMNS))
    return wanted


def _round_tile(
    W: Tensor,
    roots: Tensor,
    run: Run,
    factor: Factor,
    importance: Tensor,
    scheme: Scheme,
    rule: ScaleRule,
) -> QTensor:
    """Rounds some rows, whose metric has the `roots` [blocks, B, B]; `run` shares out products."""
    codes = torch.empty(W.shape, dtype=torch.int8)
    weights = importance if rule == "mse" else None
    quantized = find_levels(W, scheme, rule, weights).hold(codes)
    _CoupledSlab(W, quantized, factor, roots, run).round(codes)
    return quantized


def _upper_roots(G: Tensor) -> Tensor:
    """R [blocks, B, B], upper triangular, of G = R R^T."""
    L, failed = torch.linalg.cholesky_ex(G.float().flip(-1, -2))
    if failed.any():
        raise UnusableHessian("the metric of its outputs is not positive definite")
    return L.flip(-1, -2)


class _CoupledSlab(Slab):
    """All rows of a tile; the `errors` of its columns become U^T (W - Q)."""

    def __init__(
        self, W: Tensor, quantized: QTensor, factor: Factor, roots: Tensor, run: Run
    ) -> None:
        super().__init__(W, quantized, slice(0, len(W)), factor)
        U = roots / roots.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        self.leaf = _CoupledLeaf(self.columns, U)
        self.run = run

    def _feed_back(self, source: slice, sink: slice) -> None:
        columns = self.columns
        errors = columns.errors[source]

        def multiply(part: slice) -> None:
            columns.targets[part].addmm_(columns.F[source, part].T, errors)

        self.run(multiply, slices(sink.start, sink.stop, _PIECE_COLUMNS))


class _CoupledLeaf:
    """A leaf of GPTQ whose rows are coupled by `U` [blocks, B, B]."""

    def __init__(self, columns: Columns, U: Tensor) -> None:
        self._columns = columns
        self._coupling = U.contiguous().numpy()
        self._levels = (columns.scales, columns.zero_points, columns.offsets, columns.table)

    def round(self, part: slice) -> None:
        c = self._columns
        of_part = [M[part] for M in (c.errors, c.targets, c.codes, c.groups)]
        F = c.F[part, part].contiguous()
        arguments = [M.numpy() for M in (*of_part, F, *self._levels)]
        round_coupled_columns(c.limits, self._coupling, *arguments)

    def loss(self) -> float:
        """Nobody asks for the loss in the metric of both sides."""
        return 0.0
