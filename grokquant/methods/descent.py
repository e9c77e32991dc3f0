"""Coordinate descent on a rounded matrix, in the metrics of its inputs and of its outputs.

Lowers tr(G E H E^T), E = What - W*: H [in, in] is the Hessian of the inputs, and G [out, out],
here block-diagonal, says what an error of each output costs. G = I is the objective of GPTQ, whose
result is the usual start: GPTQ with feedback between rows, too, starts lower, but the end is the
same. Everything else fixed, the best value in row r and column j is

    What[r, j] - (G E H)[r, j] / (G[r, r] H[j, j])

and its code becomes the one nearest to that. QuantEase (arXiv 2309.01885) does this with G = I. The
best scale of a group, its codes fixed, follows from the same gradient. Rows of one block see each
other's errors as a shift of their own, which is what two-sided rounding is about (YAQA, arXiv
2505.22988); rows of different blocks do not see each other.

A tile of rows is worked on at once, its columns by recursive halving, so that what changes mean for
other columns is a matrix product, or a few additions if little has changed:

    | left half | right half |      1. descend in the left half (halved again, down to 64 columns)
    |   moved --> @ H ------>|      2. feed its changes back to E H of the right half
    |<------ H @ <-- moved   |      3. the same from the right half to the left
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from grokquant.methods.block_headers import read_steps, whole_limits, with_levels
from grokquant.methods.compiled import grid_numbers
from grokquant.methods.descent_kernels import feed_back, find_moved, move_codes, move_levels
from grokquant.methods.kernels import Grid
from grokquant.threads import Workers, alone, in_order, slices
from grokquant.types import QTensor

P = TypeVar("P")
T = TypeVar("T")
# Columns whose codes move one by one; the feedback between more of them is a matrix product.
_LEAF = 64
# Rows of a tile of small blocks: fewer make slower products, more leave threads idle.
_TILE_ROWS = 256
# Rows of a tile of a larger block. In a column they take turns, at a cost that grows with them.
_TURNS = 128
# Columns of a product that one thread computes.
_PIECE_COLUMNS = 1024
# Share of changed values up to which adding them one by one is faster than a product: at a fifth
# both take the same time.
_FEW = 1 / 8


class Map(Protocol):
    """Computes pieces of work, in threads or in order; see `Workers.map`."""

    def __call__(self, work: Callable[[P], T], pieces: Iterable[P]) -> list[T]: ...


def descend(
    quantized: QTensor,
    target: Tensor,
    H: Tensor,
    metric: Tensor | None,
    sweeps: int,
    inner: int,
) -> QTensor:
    """Lowers tr(G E H E^T), E = What - W*, by moving codes and refitting scales; never raises it.

    `target` is W* float32 [out, in]; `H` float32 [in, in], its damping added. `metric` float32
    [blocks, size, size] holds the diagonal blocks of G for consecutive rows, out = blocks * size,
    their damping added; None is G = I. Each of `sweeps` passes over all codes `inner` times. In the
    last pass of the first and of the middle sweep, the scale of each group, and its offset, is
    fitted once the codes of the group have moved. A sweep in which nothing moves is the last.

    Codes stay on the grid, and scales and offsets are numbers that the file can hold; scales keep
    their signs. Zero points stay, and so do the float16 steps in the headers of blocks.

    Computes on the CPU; the bytes do not depend on the number of threads. A pass that moves many
    codes costs R K^2 multiplications, one that moves few a small part of that; blocks of more than
    128 rows cost R^2 K more in a sweep. Takes the memory of at most seven float32 tiles [256, in]
    for each thread; for such large blocks of a float32 [out, in] and seven tiles [128, in].
    """
    size = 1 if metric is None else metric.shape[1]
    assert len(target) % size == 0, "the blocks of the metric cover the rows"
    device = quantized.device
    matrix = _Matrix.of(quantized.to(torch.device("cpu")), target.cpu(), H.float().cpu())
    G = torch.ones(len(target), 1, 1) if metric is None else metric.float().cpu().contiguous()
    workers = Workers()
    if size <= _TURNS:
        _descend_apart(matrix, G, sweeps, inner, workers)
    else:
        alone(lambda: _descend_in_turn(matrix, G, sweeps, inner, workers))
    return matrix.quantized(quantized).to(device)


def _descend_apart(matrix: "_Matrix", G: Tensor, sweeps: int, inner: int, workers: Workers) -> None:
    """Small blocks: tiles of whole blocks, each a piece of work that no other one needs."""
    size = G.shape[1]

    def work(blocks: slice) -> None:
        rows = slice(blocks.start * size, blocks.stop * size)
        tile = _Tile(matrix.rows(rows), G[blocks], matrix.errors(rows) @ matrix.H, None, in_order)
        for sweep in range(sweeps):
            if not tile.sweep(inner, _refits(sweep, sweeps)):
                break

    workers.map(work, slices(0, len(G), max(_TILE_ROWS // size, 1)))


def _descend_in_turn(
    matrix: "_Matrix", G: Tensor, sweeps: int, inner: int, workers: Workers
) -> None:
    """Large blocks: tiles of a block one after the other, the products of a tile in pieces."""
    size = G.shape[1]
    EH = torch.empty(matrix.codes.shape)

    def multiply(rows: slice) -> None:
        torch.mm(matrix.errors(rows), matrix.H, out=EH[rows])

    workers.map(multiply, slices(0, len(EH), _TILE_ROWS))
    for sweep in range(sweeps):
        moved = False
        refit = _refits(sweep, sweeps)
        for block, first in enumerate(range(0, len(EH), size)):
            around = EH[first : first + size]
            for part in slices(0, size, _TURNS):
                rows = slice(first + part.start, first + part.stop)
                coupling = G[block, part, part].contiguous()
                others = G[block, part].clone()
                others[:, part] = 0
                outside = _product(others, around, workers.map)
                tile = _Tile(
                    matrix.rows(rows), coupling.unsqueeze(0), EH[rows], outside, workers.map
                )
                moved |= tile.sweep(inner, refit)
        if not moved:
            break


def _refits(sweep: int, sweeps: int) -> bool:
    """Whether scales are fitted in this sweep: in the first and the middle one. A scale moves all
    values of its group, so that a sweep takes full products. Fitting them in all sweeps costs four
    times as much and lowers the objective by another .2 percent."""
    return sweep in (0, sweeps // 2)


def _product(A: Tensor, B: Tensor, run: Map) -> Tensor:
    """A @ B, some columns a piece."""
    product = torch.empty(len(A), B.shape[1])

    def multiply(part: slice) -> None:
        product[:, part] = A @ B[:, part]

    run(multiply, slices(0, B.shape[1], _PIECE_COLUMNS))
    return product


@dataclass(frozen=True)
class _Matrix:
    """A rounded matrix whose codes, scales and offsets change in place, or some rows of it.

    `scales`, `zero_points` and `offsets` are float32 [rows, groups], zeros where a grid has none.
    `scale_steps` and `offset_steps` [rows, groups] are those that the header of a block holds; both
    are empty, [rows, 0], where groups hold their own scale.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    offsets: Tensor
    scale_steps: Tensor
    offset_steps: Tensor
    target: Tensor
    H: Tensor
    levels: "_Levels"

    @staticmethod
    def of(quantized: QTensor, target: Tensor, H: Tensor) -> "_Matrix":
        scales = quantized.scales.float().clone().contiguous()

        def wide(values: Tensor | None) -> Tensor:
            if values is None:
                return torch.zeros_like(scales)
            return values.float().clone().contiguous()

        return _Matrix(
            quantized.codes.clone().contiguous(),
            scales,
            wide(quantized.zero_points),
            wide(quantized.offsets),
            *_steps(quantized),
            target,
            H.contiguous(),
            _Levels.of(quantized),
        )

    def rows(self, part: slice) -> "_Matrix":
        """A view of some rows."""
        return replace(
            self,
            codes=self.codes[part],
            scales=self.scales[part],
            zero_points=self.zero_points[part],
            offsets=self.offsets[part],
            scale_steps=self.scale_steps[part],
            offset_steps=self.offset_steps[part],
            target=self.target[part],
        )

    def multiples(self, group: int) -> Tensor:
        """What the scale of a group is multiplied by, float32 [rows, group_size]."""
        columns = self.columns(group)
        codes = self.codes[:, columns]
        if len(self.levels.table):
            return self.levels.table[codes.long()]
        return (codes - self.zero_points[:, group : group + 1]) * self.levels.unit

    def columns(self, group: int) -> slice:
        group_size = self.codes.shape[1] // self.scales.shape[1]
        return slice(group * group_size, (group + 1) * group_size)

    def errors(self, part: slice) -> Tensor:
        """What - W* of some rows, float32 [rows, in]."""
        rows = self.rows(part)
        errors = rows.target.float().neg()
        for group in range(self.scales.shape[1]):
            values = rows.multiples(group) * rows.scales[:, group : group + 1]
            errors[:, self.columns(group)] += values + rows.offsets[:, group : group + 1]
        return errors

    def quantized(self, before: QTensor) -> QTensor:
        """The matrix in the dtypes of what it was before."""
        offsets = before.offsets
        headers = before.headers
        if headers is not None:
            headers = with_levels(headers, before.scheme, self.scales, self.offsets)
        return replace(
            before,
            codes=self.codes,
            scales=self.scales.to(before.scales.dtype),
            offsets=None if offsets is None else self.offsets.to(offsets.dtype),
            headers=headers,
        )


def _steps(quantized: QTensor) -> tuple[Tensor, Tensor]:
    """The steps of scales and offsets, float32 [rows, groups], or [rows, 0] without headers."""
    if quantized.headers is None:
        none = torch.empty(len(quantized.codes), 0)
        return none, none
    steps = read_steps(quantized.headers, quantized.scheme)
    groups = quantized.scales.shape[1] // steps[0].shape[1]
    d, *minima = (step.squeeze(-1).repeat_interleave(groups, 1) for step in steps)
    return d, -minima[0] if minima else torch.zeros_like(d)


@dataclass(frozen=True)
class _Levels:
    """What a scheme is in numbers: how codes become values and which scales a file can hold.

    `table` float32 [codes] is empty where codes are integers, worth `unit` scales. Scales are
    numbers that `stored` holds, or steps of a block's header times whole numbers within `whole`.
    """

    limits: tuple[float, float]
    reach: float
    table: Tensor
    unit: float
    stored: Grid
    whole: tuple[float, float]
    has_offsets: bool

    @staticmethod
    def of(quantized: QTensor) -> "_Levels":
        scheme = quantized.scheme
        row = scheme.row
        in_float16 = row.ggml_type is not None  # llama.cpp's scales, float32 in a QTensor or not
        held = replace(scheme, scale_dtype="float16") if in_float16 else scheme
        whole = whole_limits(scheme) if row.has_header else (0, 0)
        return _Levels(
            (float(scheme.qmin), float(scheme.qmax)),
            _reach(row.table),
            torch.tensor(row.table, dtype=torch.float32),
            row.unit,
            grid_numbers(held),
            (float(whole[0]), float(whole[1])),
            quantized.offsets is not None,
        )


def _reach(table: tuple[float, ...]) -> float:
    """Half of the least distance between the values of a grid, in steps."""
    values = sorted(set(table)) if table else [0.0, 1.0]
    return min(above - below for below, above in pairwise(values)) / 2


class _Tile:
    """Some rows of a matrix while their codes and scales move.

    `G` [blocks, B, B] couples the rows; `EH` float32 [rows, in] is E H of them, kept up to date;
    `outside` [rows, in] is what rows outside the tile add to G E H, None for nothing. `moved` holds
    the changes of the values in this pass.
    """

    def __init__(
        self, matrix: _Matrix, G: Tensor, EH: Tensor, outside: Tensor | None, run: Map
    ) -> None:
        self.matrix = matrix
        self.G = G
        self.EH = EH
        self.outside = outside
        self.run = run
        self.moved = torch.zeros_like(EH)
        self.group_size = EH.shape[1] // matrix.scales.shape[1]

    def sweep(self, inner: int, refit: bool) -> bool:
        """Passes `inner` times over all codes, in the last over scales if they `refit`; whether any
        moved."""
        any_moved = False
        for left in reversed(range(inner)):
            self.moved.zero_()
            self._descend(0, self.EH.shape[1], refit and left == 0)
            any_moved |= bool(self.moved.any())
        return any_moved

    def _descend(self, start: int, stop: int, refit: bool) -> None:
        if stop - start <= _LEAF:
            self._move_codes(slice(start, stop))
        else:
            middle = self._middle(start, stop)
            self._descend(start, middle, refit)
            self._feed_back(slice(start, middle), slice(middle, stop))
            self._descend(middle, stop, refit)
            self._feed_back(slice(middle, stop), slice(start, middle))
        if refit and self._holds_groups(start, stop):
            for group in range(start // self.group_size, stop // self.group_size):
                self._refit(group, slice(start, stop))

    def _middle(self, start: int, stop: int) -> int:
        """Where columns are halved: between groups, if there are several."""
        size = self.group_size if stop - start > self.group_size else 1
        return start + (stop - start) // size // 2 * size

    def _holds_groups(self, start: int, stop: int) -> bool:
        """Whether these columns are one group, or a leaf of whole ones."""
        if stop - start > _LEAF:
            return stop - start == self.group_size
        return (stop - start) % self.group_size == 0

    def _gradient(self, part: slice) -> Tensor:
        """G E H of some columns, float32 [rows, columns]."""
        blocks, size, _ = self.G.shape
        EH = self.EH[:, part]
        product = torch.bmm(self.G, EH.unflatten(0, (blocks, size))).flatten(0, 1)
        return product if self.outside is None else product + self.outside[:, part]

    def _move_codes(self, part: slice) -> None:
        matrix = self.matrix
        levels = matrix.levels
        H = matrix.H[part, part]
        move_codes(
            part.start,
            self.group_size,
            levels.limits,
            levels.reach,
            self._gradient(part).numpy(),
            H.contiguous().numpy(),
            self.G.numpy(),
            (matrix.scales * levels.unit).numpy(),
            matrix.zero_points.numpy(),
            matrix.offsets.numpy(),
            levels.table.numpy(),
            matrix.codes.numpy(),
            self.moved.numpy(),
        )
        self.EH[:, part].addmm_(self.moved[:, part], H)

    def _refit(self, group: int, node: slice) -> None:
        """Moves the scales of a group, then its offsets; `node` are the columns to tell of it."""
        matrix = self.matrix
        multiples = matrix.multiples(group)
        steps = matrix.scale_steps[:, group : group + 1]
        self._move_levels(matrix.scales, steps, multiples, group, node, keeps_sign=True)
        if matrix.levels.has_offsets:
            ones = torch.ones_like(multiples)
            steps = matrix.offset_steps[:, group : group + 1]
            self._move_levels(matrix.offsets, steps, ones, group, node, keeps_sign=False)

    def _move_levels(
        self,
        levels: Tensor,
        steps: Tensor,
        U: Tensor,
        group: int,
        node: slice,
        keeps_sign: bool,
    ) -> None:
        """Moves levels [rows, groups] of a group, each of which adds level * U to the values.

        U is [rows, group_size]; `steps` are those of the group's levels.
        """
        matrix = self.matrix
        blocks, size, _ = self.G.shape
        columns = matrix.columns(group)
        within = slice(columns.start - node.start, columns.stop - node.start)
        UH = U @ matrix.H[columns, node]  # (rows, node)
        slopes = (U * self._gradient(columns)).sum(1)
        in_blocks = U.unflatten(0, (blocks, size))
        UHU = torch.bmm(UH[:, within].unflatten(0, (blocks, size)), in_blocks.mT)
        changes = move_levels(
            slopes.numpy(),
            (self.G * UHU).numpy(),
            levels[:, group].contiguous().numpy(),
            steps.flatten().numpy(),
            matrix.levels.whole,
            matrix.levels.stored,
            keeps_sign,
        )
        change = torch.from_numpy(changes).unsqueeze(1)
        levels[:, group : group + 1] += change
        self.moved[:, columns] += change * U
        self.EH[:, node] += change * UH

    def _feed_back(self, source: slice, sink: slice) -> None:
        """Adds to E H of the columns `sink` what this pass has changed in those of `source`."""
        moved = self.moved[:, source]
        count = int(torch.count_nonzero(moved))
        if count == 0:
            return
        H = self.matrix.H
        found = None
        if count < _FEW * moved.numel():
            found = find_moved(count, self.moved.numpy(), (source.start, source.stop))

        def multiply(part: slice) -> None:
            if found is None:
                self.EH[:, part].addmm_(moved, H[source, part])
            else:
                feed_back(found, H.numpy(), (part.start, part.stop), self.EH.numpy())

        self.run(multiply, slices(sink.start, sink.stop, _PIECE_COLUMNS))
