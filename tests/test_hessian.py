"""Hessians against X^T X in float64."""

import pytest
import torch
from torch import Tensor

from grokquant.calibration import gram_kernels
from grokquant.calibration.hessian import Hessian, accumulate, blend

CPUS = ["AMX", "AVX-512 BF16", "any CPU"]


@pytest.fixture(params=CPUS)
def cpu(request, monkeypatch) -> None:
    """A CPU with each of the instructions that multiply bfloat16, and one without."""
    usable = [name for name in gram_kernels.instructions() if name == request.param]
    if request.param in gram_kernels.KERNELS and not usable:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(gram_kernels, "instructions", lambda: usable)


def inputs(tokens: int, features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    spread = torch.rand(features, generator=generator) * 10
    return (torch.randn(tokens, features, generator=generator) * spread).to(dtype)


def full(X: Tensor) -> Hessian:
    return accumulate([X], X.shape[1])


def allowed(X: Tensor) -> Tensor:
    """What float32 sums may be off by: some roundings of sums of magnitudes."""
    return X.double().abs().T @ X.double().abs() * 2**-24 * 20


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3000, 70), (513, 1100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_exact_but_for_float32(shape, dtype, cpu):
    X = inputs(*shape, dtype)
    hessian = full(X)
    error = (hessian.H.double() - X.double().T @ X.double()).abs()
    assert hessian.tokens == len(X) and (error <= allowed(X)).all()
    assert torch.equal(hessian.H, hessian.H.T)


def test_products_of_small_integers_are_exact(cpu):
    X = torch.randint(-9, 10, (999, 130)).bfloat16()
    assert torch.equal(full(X).H.double(), X.double().T @ X.double())


def test_parts_add_up_and_repeat_bit_for_bit(cpu):
    X = inputs(3000, 100)
    parts = X.split([1000, 1, 1999])
    first, again = (accumulate(iter(parts), 100) for _ in range(2))
    assert first.tokens == 3000 and torch.equal(first.H, again.H)
    assert ((first.H - full(X).H).abs() <= allowed(X)).all()


def test_the_number_of_threads_changes_no_bit(cpu):
    if not gram_kernels.instructions():
        pytest.skip("PyTorch's own products may differ")
    X, threads = inputs(900, 300), torch.get_num_threads()
    one_by_threads = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        one_by_threads.append(full(X).H)
    torch.set_num_threads(threads)
    assert all(torch.equal(H, one_by_threads[0]) for H in one_by_threads)


def test_pytorch_may_use_the_same_registers_in_between(cpu):
    X = inputs(500, 100)
    first, product = full(X).H, X.T @ X
    for _ in range(3):
        assert torch.equal(X.T @ X, product)
        assert torch.equal(full(X).H, first)


@pytest.mark.parametrize("block", [50, 64, 100, 200])
def test_blocks_are_those_of_the_full_hessian(block, cpu):
    X = inputs(500, 100)
    whole, hessian = full(X).H, accumulate([X], 100, block)
    sizes = [len(part) for part in torch.arange(100).split(block)]
    assert [H.shape for H in hessian.blocks] == [(size, size) for size in sizes]
    for start, H in zip(range(0, 100, block), hessian.blocks, strict=True):
        part = slice(start, start + block)
        assert ((H - whole[part, part]).abs() <= allowed(X)[part, part]).all()


def test_no_tokens_make_a_zero_hessian():
    hessian = accumulate([], 10, 5)
    assert hessian.tokens == 0 and [H.shape for H in hessian.blocks] == [(5, 5), (5, 5)]
    assert not torch.stack(hessian.blocks).any()
    assert not full(torch.empty(0, 10).bfloat16()).H.any()


def test_non_finite_inputs_stay_visible_on_the_diagonal(cpu):
    X = inputs(50, 40)
    X[3, 4], X[5, 6] = torch.nan, torch.inf
    finite = torch.isfinite(full(X).H.diagonal())
    assert finite.logical_not().nonzero().flatten().tolist() == [4, 6]


def test_a_blend_weighs_the_prior_in_tokens():
    X, every = inputs(30, 20, torch.float32), inputs(200, 20, torch.float32)
    blended = blend(accumulate([X], 20, 10), accumulate([every], 20, 10), 50)
    expected = X.T @ X + every.T @ every * (50 / 200)
    assert blended.tokens == 30
    assert torch.allclose(blended.blocks[1], expected[10:, 10:], rtol=1e-5)
