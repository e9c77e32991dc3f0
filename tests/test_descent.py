"""Coordinate descent against a naive float64 reference, and what must hold for every grid."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from grokquant.formats.gguf_blocks import pack_blocks, unpack_blocks
from grokquant.grids import GRIDS, SCALE_DTYPES, Scheme
from grokquant.methods import descent
from grokquant.methods.descent import descend
from grokquant.methods.gptq import factorize, round_gptq
from grokquant.methods.levels import find_levels
from grokquant.types import QTensor

ROWS, COLUMNS = 24, 256
INTEGERS = [Scheme(4, 32), Scheme(3, 128), Scheme(4, 64, False), Scheme(8, None), Scheme(2, 16)]
NAIVE = [
    Scheme(4, 32),
    Scheme(3, 128, scale_dtype="float16"),
    Scheme(4, 64, False),
    *(GRIDS[name].scheme for name in ("llm_int8", "nf4", "q4_1", "iq4_nl")),
]
SCHEMES = INTEGERS + [grid.scheme for grid in GRIDS.values()]
BLOCKS = [None, 4, 24]  # rows that the metric couples


def matrices(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A target [rows, columns] and the damped Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) / 50
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.rand(columns, 1, generator=generator) + 0.1
    X = spread * (mixing @ torch.randn(columns, 2 * columns, generator=generator))
    H = X @ X.T / columns
    return W, H + 0.05 * H.diagonal().mean() * torch.eye(columns)


def metric_of(size: int | None, seed: int, rows: int = ROWS) -> Tensor | None:
    """Random positive definite blocks [rows / size, size, size]."""
    if size is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(rows // size, size, size + 2, generator=generator)
    return roots @ roots.mT / size + 0.1 * torch.eye(size)


def dense(metric: Tensor | None, rows: int = ROWS) -> Tensor:
    """G [rows, rows] in float64."""
    return torch.eye(rows).double() if metric is None else torch.block_diag(*metric.double())


def values(quantized: QTensor) -> Tensor:
    """The matrix in float64."""
    wide = {"scales": quantized.scales.double()}
    if quantized.offsets is not None:
        wide["offsets"] = quantized.offsets.double()
    return replace(quantized, **wide).dequantize()


def objective(quantized: QTensor, W: Tensor, H: Tensor, G: Tensor) -> float:
    E = values(quantized) - W
    return torch.einsum("rs,sj,jk,rk->", G, E, H.double(), E).item()


def stored(level: Tensor, scheme: Scheme) -> Tensor:
    """The number nearest to a scale or offset that a file of this scheme can hold."""
    name = "float16" if scheme.row.ggml_type else scheme.scale_dtype
    return level.to(SCALE_DTYPES[name]).double()


def naive_descent(
    start: QTensor, W: Tensor, H: Tensor, G: Tensor, turns: int, sweeps: int, inner: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales; in a column `turns` rows take turns. All is computed anew at every step."""
    scheme = start.scheme
    every = torch.arange(scheme.qmin, scheme.qmax + 1)
    worth = (
        torch.tensor(scheme.row.table).double()
        if scheme.row.table
        else every.double() * scheme.row.unit
    )
    codes, scale = start.codes.long(), start.scales.double()
    zero = torch.zeros_like(scale) if start.zero_points is None else start.zero_points.double()
    offset = torch.zeros_like(scale) if start.offsets is None else start.offsets.double()
    size = W.shape[1] // scale.shape[1]
    H = H.double()

    def errors() -> Tensor:
        multiples = worth[codes - scheme.qmin] - zero.repeat_interleave(size, 1)
        return multiples * scale.repeat_interleave(size, 1) + offset.repeat_interleave(size, 1) - W

    def refit(levels: Tensor, row: int, group: int, u: Tensor) -> None:
        part, old = slice(group * size, (group + 1) * size), levels[row, group].clone()
        before = (G @ errors() @ H * errors()).sum()
        step = (G[row] @ errors() @ H)[part] @ u / (G[row, row] * (u @ H[part, part] @ u))
        levels[row, group] = stored(old - step, scheme)
        if (G @ errors() @ H * errors()).sum() >= before:
            levels[row, group] = old

    tiles = [range(first, first + turns) for first in range(0, len(W), turns)]
    for sweep, tile, left in product(range(sweeps), tiles, reversed(range(inner))):
        for group, j in product(range(scale.shape[1]), range(size)):
            for row in tile:
                column = group * size + j
                step = (G[row] @ errors() @ H[:, column]) / (G[row, row] * H[column, column])
                best = errors()[row, column] + W[row, column] - step
                levels = (worth - zero[row, group]) * scale[row, group] + offset[row, group]
                codes[row, column] = every[(levels - best).abs().argmin()]
            if j + 1 == size and left == 0 and sweep in (0, sweeps // 2):
                for row in tile:
                    multiples = worth[codes[row, column - j : column + 1] - scheme.qmin]
                    refit(scale, row, group, multiples - zero[row, group])
                for row in tile if start.offsets is not None else ():
                    refit(offset, row, group, torch.ones(size).double())
    return codes, scale


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Leaves, tiles and pieces of which a small matrix has several."""
    monkeypatch.setattr(descent, "_LEAF", 16)
    monkeypatch.setattr(descent, "_TILE_ROWS", 4)
    monkeypatch.setattr(descent, "_TURNS", 4)
    monkeypatch.setattr(descent, "_PIECE_COLUMNS", 100)


@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_objective_falls_and_codes_and_scales_stay_on_the_grid(scheme, size):
    for seed in range(2):
        W, H = matrices(seed)
        metric = metric_of(size, seed)
        start = find_levels(W, scheme, ("mse", "absmax")[seed]).nearest(W)
        losses = [objective(start, W, H, dense(metric))]
        for sweeps, inner in ((1, 1), (1, 2), (3, 2)):
            found = descend(start, W, H, metric, sweeps, inner)
            losses.append(objective(found, W, H, dense(metric)))
        assert losses == sorted(losses, reverse=True), seed
        assert found.codes.amin() >= scheme.qmin and found.codes.amax() <= scheme.qmax
        assert found.scales.dtype == start.scales.dtype
        assert torch.equal(found.scales.sign(), start.scales.sign())


@pytest.mark.parametrize(
    "grid", [grid for grid in GRIDS.values() if grid.has_header], ids=lambda grid: grid.name
)
def test_headers_hold_the_scales_and_offsets_that_were_fitted(grid):
    W, H = matrices(0)
    start = find_levels(W, grid.scheme, "absmax").nearest(W)
    found = descend(start, W, H, metric_of(4, 0), 3, 2)
    assert not torch.equal(found.headers, start.headers)
    blocks = pack_blocks(grid.name, found, grid.block_columns)
    read = unpack_blocks(grid.name, blocks, grid.scheme)
    assert torch.equal(read.dequantize(), found.dequantize())


@pytest.mark.parametrize("size", [None, 2, 8])
@pytest.mark.parametrize("scheme", NAIVE, ids=str)
def test_codes_and_scales_are_those_of_the_reference(scheme, size):
    W, H = matrices(0, 8, 128)
    metric = metric_of(size, 0, 8)
    start = find_levels(W, scheme, "mse").nearest(W)
    found = descend(start, W, H, metric, 2, 2)
    turns = min(size or 1, 4)
    codes, scales = naive_descent(start, W, H, dense(metric, 8), turns, 2, 2)
    assert torch.equal(found.codes.long(), codes)
    torch.testing.assert_close(found.scales.double(), scales, rtol=1e-6, atol=0)
    assert not torch.equal(found.codes, start.codes) and not torch.equal(found.scales, start.scales)


def test_one_sided_is_two_sided_with_an_identity():
    W, H = matrices(0)
    start = find_levels(W, Scheme(4, 32), "mse").nearest(W)
    for size in (4, 24):
        identity = torch.eye(size).repeat(ROWS // size, 1, 1)
        found = descend(start, W, H, identity, 2, 2)
        expected = descend(start, W, H, None, 2, 2)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("size", BLOCKS)
def test_any_number_of_threads_gives_the_same_bytes(size):
    W, H = matrices(0)
    metric = metric_of(size, 0)
    start = find_levels(W, Scheme(4, 32), "mse").nearest(W)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(descend(start, W, H, metric, 2, 2))
    for result in results[1:]:
        assert torch.equal(result.codes, results[0].codes)
        assert torch.equal(result.scales, results[0].scales)


@pytest.mark.parametrize("few", [0.0, 1.0])
def test_few_changes_are_fed_back_as_many_are(few, monkeypatch):
    W, H = matrices(0)
    metric = metric_of(4, 0)
    start = find_levels(W, Scheme(4, 32), "mse").nearest(W)
    expected = descend(start, W, H, metric, 2, 2)
    monkeypatch.setattr(descent, "_FEW", few)
    found = descend(start, W, H, metric, 2, 2)
    assert torch.equal(found.codes, expected.codes)


def test_it_ends_where_nothing_moves_and_changes_no_input(monkeypatch):
    W, H = matrices(0)
    start = find_levels(W, Scheme(4, 32), "mse").nearest(W)
    inputs = [start.codes.clone(), start.scales.clone(), W.clone(), H.clone()]
    sweeps = []
    sweep = descent._Tile.sweep
    monkeypatch.setattr(descent._Tile, "sweep", lambda *a: sweeps.append(0) or sweep(*a))
    descend(start, W, H, None, 50, 2)
    assert len(sweeps) < 25 * ROWS // 4  # of tiles of 4 rows
    for before, after in zip(inputs, (start.codes, start.scales, W, H), strict=True):
        assert torch.equal(before, after)


def test_zero_scales_and_dead_columns_stay():
    W, H = matrices(0)
    H[:, 5] = H[5] = 0  # no damping was added
    start = find_levels(W, Scheme(4, 32), "mse").nearest(W)
    start.scales[3, 2] = 0
    found = descend(start, W, H, metric_of(4, 0), 2, 2)
    assert torch.equal(found.codes[:, 5], start.codes[:, 5])
    assert torch.equal(found.codes[3, 64:96], start.codes[3, 64:96]) and found.scales[3, 2] == 0
    assert found.scales.isfinite().all()


def test_two_sides_beat_one_and_one_beats_gptq():
    """In the metric, from the result of GPTQ on."""
    W, H = matrices(0)
    metric = metric_of(24, 0)
    G = dense(metric)
    start = round_gptq(W, factorize(H, 1e-9, act_order=True), Scheme(3, 64)).quantized
    one = descend(start, W, H, None, 2, 2)
    two = descend(one, W, H, metric, 6, 2)
    identity = torch.eye(ROWS).double()
    assert objective(one, W, H, identity) < 0.995 * objective(start, W, H, identity)
    assert objective(two, W, H, G) < 0.9 * objective(one, W, H, G)
