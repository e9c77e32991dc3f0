"""GPTQ against naive float64 references of a few obvious lines."""

import math

import pytest
import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods import gptq, ldl
from grokquant.methods.gptq import UnusableHessian, factorize, round_gptq
from grokquant.methods.gptq_leaf import PlainLeaf
from grokquant.methods.rtn import quantize_rtn
from grokquant.types import QTensor

ROWS, COLUMNS = 75, 352  # no multiples of any block size
SCHEMES = [Scheme(4, 32), Scheme(4, 88), Scheme(4, None), Scheme(4, 32, False), Scheme(8, None)]
HESSIANS = [COLUMNS, 176, 100]  # columns per diagonal block


@pytest.fixture
def W() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(ROWS, 1, generator=generator)
    return torch.randn(ROWS, COLUMNS, generator=generator) * spread


@pytest.fixture
def X() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    spread = torch.rand(COLUMNS, generator=generator) + 0.1
    return torch.randn(700, COLUMNS, generator=generator) @ mixing * spread


def squares(X: Tensor, block: int = COLUMNS) -> list[Tensor]:
    return [part.T @ part for part in X.split(block, dim=1)]


def widened(quantized: QTensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, float64 [out, in]."""
    scales, zeros = quantized.scales.double(), quantized.zero_points
    zeros = torch.zeros_like(scales) if zeros is None else zeros.double()
    repeats = quantized.codes.shape[1] // scales.shape[1]
    return scales.repeat_interleave(repeats, 1), zeros.repeat_interleave(repeats, 1)


def values(quantized: QTensor) -> Tensor:
    scales, zeros = widened(quantized)
    return (quantized.codes - zeros) * scales


def naive_gptq(
    W: Tensor, H: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, shift: float, order: Tensor
) -> Tensor:
    """The paper's algorithm 1 without blocks: inverse Hessian, error spread to later columns."""
    H = H.double() + shift * torch.eye(len(H))
    W, codes = W.double().clone(), torch.zeros(W.shape)
    upper = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    for i, k in enumerate(order.tolist()):
        code = torch.round(W[:, k] / scales[:, k]) + zeros[:, k]
        codes[:, k] = code.clamp(scheme.qmin, scheme.qmax)
        error = (W[:, k] - (codes[:, k] - zeros[:, k]) * scales[:, k]) / upper[i, i]
        W[:, order[i:]] -= error[:, None] * upper[i, i:]
    return codes


@pytest.mark.parametrize("slab", [4096, 32])
@pytest.mark.parametrize("block", HESSIANS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_integers_are_those_of_the_paper(W, X, scheme, act_order, block, slab, monkeypatch):
    monkeypatch.setattr(gptq, "_PIECE_ROWS", slab)
    quantized = round_gptq(W, factorize(squares(X, block), 0.01, act_order), scheme, "absmax")
    quantized = quantized.quantized
    shift = 0.01 * X.square().sum().item() / COLUMNS
    expected = []
    grids = [M.split(block, 1) for M in (W, *widened(quantized))]
    for H, *grid in zip(squares(X, block), *grids, strict=True):
        order = torch.arange(len(H))
        if act_order:
            order = H.diagonal().argsort(descending=True, stable=True)
        expected.append(naive_gptq(grid[0], H, *grid[1:], scheme, shift, order))
    wrong = quantized.codes != torch.cat(expected, 1)
    assert wrong.sum() <= 2  # ties of float32 may fall to the other side


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compiled_and_plain_loops_agree(W, X, scheme, monkeypatch):
    feedback = factorize(squares(X), 0.01, True)
    compiled = round_gptq(W, feedback, scheme)
    monkeypatch.setattr(gptq, "leaf_of", lambda device: PlainLeaf)
    plain = round_gptq(W, feedback, scheme)
    assert (plain.quantized.codes != compiled.quantized.codes).sum() <= 2
    assert plain.output_error == pytest.approx(compiled.output_error, rel=1e-3)


@pytest.mark.parametrize("block", HESSIANS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_output_error_is_that_of_the_outputs(W, X, scheme, block):
    rounded = round_gptq(W, factorize(squares(X, block), 0.01, True), scheme)
    error = W.double() - values(rounded.quantized)
    lost, total = 0.0, 0.0
    for x, e, w in zip(*(M.double().split(block, 1) for M in (X, error, W)), strict=True):
        lost, total = lost + (x @ e.T).square().sum(), total + (x @ w.T).square().sum()
    assert rounded.output_error == pytest.approx(math.sqrt(lost / total), rel=1e-3)


def test_output_error_of_many_rows_is_close(X):
    W = torch.randn(1500, COLUMNS, generator=torch.Generator().manual_seed(2))
    rounded = round_gptq(W, factorize(squares(X), 0.01, True), Scheme(4, 32))
    error = W.double() - values(rounded.quantized)
    exact = (error @ X.T.double()).norm() / (W.double() @ X.T.double()).norm()
    assert rounded.output_error == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 88, False), Scheme(4, None)], ids=str)
def test_less_of_the_output_is_lost_than_by_rtn(W, X, scheme):
    def lost(quantized: QTensor) -> float:
        return ((W - quantized.dequantize().float()) @ X.T).square().sum().item()

    rounded = round_gptq(W, factorize(squares(X), 0.01, True), scheme)
    assert lost(rounded.quantized) < 0.75 * lost(quantize_rtn(W, scheme))


def test_bfloat16_weights_are_taken(W, X):
    feedback = factorize(squares(X), 0.01, True)
    half, full = (round_gptq(M, feedback, Scheme(4, 32)) for M in (W.bfloat16(), W))
    assert torch.equal(
        half.quantized.codes,
        round_gptq(W.bfloat16().float(), feedback, Scheme(4, 32)).quantized.codes,
    )
    assert half.output_error == pytest.approx(full.output_error, rel=0.05)


def test_blocks_are_consumed_and_a_tensor_is_not(X):
    blocks, H = squares(X, 176), X.T @ X
    memory = blocks[0].data_ptr()
    assert factorize(blocks, 0.01, True).factors[0].F.data_ptr() == memory
    assert blocks == []
    before = H.clone()
    factorize(H, 0.01, True)
    assert torch.equal(H, before)


@pytest.mark.parametrize("panel", [512, 100, 7])
def test_factorization_in_place_equals_that_of_torch(X, panel, monkeypatch):
    monkeypatch.setattr(ldl, "_PANEL", panel)
    H = X.T @ X
    F = H.clone()
    D = ldl.factorize_(F, 1.0)
    lower = torch.linalg.cholesky((H.double() + torch.eye(COLUMNS)).flip(0, 1))
    R = lower.flip(0, 1)
    pivots = R.diagonal()
    assert D is not None and torch.allclose(D.double(), pivots.square(), rtol=1e-4)
    assert torch.allclose(F.triu(1).double(), (R / pivots).triu(1), atol=1e-4)


@pytest.mark.parametrize("panel", [512, 100, 7])
def test_a_failed_factorization_restores_the_matrix(X, panel, monkeypatch):
    monkeypatch.setattr(ldl, "_PANEL", panel)
    H = X.T @ X
    H = (H + H.T) / 2
    H[5, 5] = -1e4
    before = H.clone()
    assert ldl.factorize_(H, 1.0) is None
    assert torch.equal(H, before)


def test_permutation_in_place():
    H = torch.randn(301, 301)
    order = torch.randperm(301)
    expected = H[order][:, order]
    ldl.permute_(H, order)
    assert torch.equal(H, expected)


@pytest.mark.parametrize("act_order", [False, True])
def test_damping_rises_until_it_helps(X, act_order):
    H = X[:40].T @ X[:40]  # singular, and its smallest eigenvalue is pushed below zero
    H.diagonal().sub_(0.05 * H.diagonal().mean())
    raised = factorize([H.clone()], 0.01, act_order)
    assert raised.damping == pytest.approx(0.1)
    once = factorize([H.clone()], 0.1, act_order)
    assert torch.equal(raised.factors[0].F.triu(1), once.factors[0].F.triu(1))


def test_dead_columns_do_no_harm(W, X):
    X[:, ::3] = 0
    rounded = round_gptq(W, factorize(squares(X), 0.01, True), Scheme(4, 32), "absmax")
    assert torch.isfinite(rounded.quantized.scales).all() and math.isfinite(rounded.output_error)
    nearest = quantize_rtn(W, Scheme(4, 32), "absmax").codes
    assert torch.equal(rounded.quantized.codes[:, ::3], nearest[:, ::3])


def test_unusable_hessians_say_why():
    hopeless = -torch.eye(256)
    hopeless[0, 0] = 1000.0
    for H, reason in (
        (torch.zeros(8, 8), "zero"),
        (torch.full((8, 8), torch.nan), "not finite"),
        (torch.diag(torch.tensor([1.0, torch.inf])), "not finite"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "positive definite"),
        (hopeless, "positive definite"),
    ):
        with pytest.raises(UnusableHessian, match=reason):
            factorize([H], 1e-9, False)
