"""GPTQ with coupled rows against a naive float64 version."""

import pytest
import torch
from test_descent import INTEGERS, ROWS, dense, matrices, metric_of, objective
from torch import Tensor

from grokquant.grids import GRIDS, Scheme
from grokquant.methods import coupled
from grokquant.methods.coupled import round_coupled
from grokquant.methods.gptq import Feedback, factorize, round_gptq
from grokquant.methods.method import UnusableHessian
from grokquant.types import QTensor

SIZES = [1, 4, 24]  # rows that the metric couples


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Leaves, tiles and pieces of which a small matrix has several."""
    monkeypatch.setattr("grokquant.methods.gptq._LEAF", 16)
    monkeypatch.setattr(coupled, "_TILE_ROWS", 8)
    monkeypatch.setattr(coupled, "_PIECE_COLUMNS", 40)


def feedback_of(H: Tensor) -> Feedback:
    return factorize(H, 1e-9, act_order=True)


def upper_factor(A: Tensor) -> Tensor:
    """U, unit upper triangular, of A = U diag U^T, float64."""
    R = torch.linalg.cholesky(A.double().flip(0, 1)).flip(0, 1)
    return R / R.diagonal()


def naive_codes(W: Tensor, feedback: Feedback, G: Tensor, H: Tensor, given: QTensor) -> Tensor:
    """Codes on the scales of `given`, each the nearest to what makes its term of the loss 0."""
    order = feedback.factors[0].columns
    F = upper_factor(H[order][:, order])
    U = upper_factor(G)
    W = W.double()[:, order]
    scales = given.scales.double().repeat_interleave(W.shape[1] // given.scales.shape[1], 1)
    scales = scales[:, order]
    E = torch.zeros_like(W)
    codes = torch.zeros_like(W)
    for j in range(W.shape[1]):
        for i in range(len(W)):
            E[i, j] = W[i, j]  # as if its value were 0
            wanted = U[:, i] @ E @ F[:, j]
            codes[i, j] = (wanted / scales[i, j]).round()
            codes[i, j].clamp_(given.scheme.qmin, given.scheme.qmax)
            E[i, j] -= codes[i, j] * scales[i, j]
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural.to(torch.int8)


@pytest.mark.parametrize("size", SIZES)
def test_codes_are_those_of_the_reference(size):
    W, H = matrices(0, columns=64)
    feedback = feedback_of(H)
    metric = metric_of(size, 0)
    found = round_coupled(W, feedback, metric, Scheme(3, 32), "absmax")
    assert torch.equal(found.codes, naive_codes(W, feedback, dense(metric), H, found))


def test_without_coupling_it_is_gptq():
    W, H = matrices(1)
    feedback = feedback_of(H)
    for scheme in [*INTEGERS, *(GRIDS[name].scheme for name in ("nf4", "q4_1", "q4_k"))]:
        metric = torch.eye(4).expand(ROWS // 4, 4, 4)
        found = round_coupled(W, feedback, metric, scheme, "mse")
        expected = round_gptq(W, feedback, scheme, "mse").quantized
        assert (found.codes != expected.codes).float().mean() < 1e-3  # sums in another order
        assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("size", SIZES[1:])
def test_coupled_rows_have_a_lower_loss(size):
    W, H = matrices(2)
    metric = metric_of(size, 2)
    G = dense(metric)
    apart = round_gptq(W, feedback_of(H), Scheme(3, 64)).quantized
    found = round_coupled(W, feedback_of(H), metric, Scheme(3, 64), "mse")
    assert objective(found, W, H, G) < 0.95 * objective(apart, W, H, G)


@pytest.mark.parametrize("size", SIZES[1:])
def test_any_number_of_threads_gives_the_same_bytes(size):
    W, H = matrices(3)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        feedback = feedback_of(H)
        results.append(round_coupled(W, feedback, metric_of(size, 3), Scheme(4, 32), "mse"))
    for result in results[1:]:
        assert torch.equal(result.codes, results[0].codes)
        assert torch.equal(result.scales, results[0].scales)


def test_a_metric_that_is_not_positive_definite_is_refused():
    W, H = matrices(4)
    with pytest.raises(UnusableHessian, match="not positive definite"):
        round_coupled(W, feedback_of(H), -metric_of(4, 4), Scheme(4, 32), "mse")
