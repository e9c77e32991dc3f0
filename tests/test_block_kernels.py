"""The compiled kernels of llama.cpp's grids give the bytes of the torch reference, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from test_kernels import RULES, random_release, random_weights
from torch import Tensor

from grokquant.grids import GRIDS, Scheme
from grokquant.methods.levels import find_levels, search_levels
from grokquant.methods.method import errors_of
from grokquant.methods.rtn import RTN, ScaleSettings, quantize_rtn, quantize_with_torch
from grokquant.methods.tiles import kernel_of
from grokquant.types import QTensor

BLOCKS = {n: g.scheme for n, g in GRIDS.items() if g.ggml_type is not None and not g.is_integer}
COLUMNS = 512
blocks = pytest.mark.parametrize("scheme", BLOCKS.values(), ids=BLOCKS.keys())
rules = pytest.mark.parametrize("rule", RULES)


def check(W: Tensor | QTensor, scheme: Scheme, rule: str) -> None:
    assert kernel_of(W, scheme)
    found = quantize_rtn(W, scheme, rule)
    expected = quantize_with_torch(W, scheme, rule)
    assert torch.equal(found.codes, expected.codes)
    same_bits(found.scales, expected.scales)
    same_bits(found.offsets, expected.offsets)
    same_bits(found.headers, expected.headers)


def same_bits(found: Tensor | None, expected: Tensor | None) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def seeded(shape: tuple[int, ...]) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), generator


def heavy_tailed(rows: int) -> Tensor:
    W, _ = seeded((rows, COLUMNS))
    return W * W.abs() ** 3


def with_ties(rows: int) -> Tensor:
    """Few values, so that many weights are as large as the largest, with either sign."""
    W, _ = seeded((rows, COLUMNS))
    return (W * 2).round().clamp(-3, 3) / 8


def constant(rows: int) -> Tensor:
    """A value for each group of 32; both signs, and zeros of both signs."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e-3, -7e4, 1e-12, -1e-40])
    return values[torch.arange(rows * COLUMNS // 32) % 8].repeat_interleave(32).view(rows, COLUMNS)


def one_sided(rows: int) -> Tensor:
    W, _ = seeded((rows, COLUMNS))
    signs = torch.ones(rows, 1)
    signs[::2] = -1
    return W.abs() * signs + signs / 4


def of_any_size(rows: int) -> Tensor:
    """From below the least float16 to what its largest one holds."""
    W, _ = seeded((rows, COLUMNS))
    return W / W.abs().amax() * 10.0 ** torch.linspace(-42, 5, rows).unsqueeze(1)


def sparse(rows: int) -> Tensor:
    W, generator = seeded((rows, COLUMNS))
    return W * (torch.rand(W.shape, generator=generator) < 0.05)


@rules
@blocks
@pytest.mark.parametrize(
    "weights", [heavy_tailed, with_ties, constant, one_sided, of_any_size, sparse]
)
def test_equal_to_torch_on_awkward_blocks(weights: Callable[[int], Tensor], scheme, rule):
    check(weights(24), scheme, rule)


@blocks
def test_equal_to_torch_from_every_source(scheme):
    check(random_weights(70, COLUMNS), scheme, "mse")
    check(random_weights(65, COLUMNS).bfloat16(), scheme, "absmax")
    check(random_release(64, COLUMNS, 128), scheme, "mse")
    check(random_weights(1, 2 * COLUMNS)[:, COLUMNS:], scheme, "mse")


@blocks
def test_importance_counts_the_same(scheme):
    W = random_weights(40, COLUMNS)
    _, generator = seeded((1,))
    importance = torch.rand(2 * COLUMNS, generator=generator)[::2] ** 4
    importance[:32] = 0
    importance[64:96] *= 1e30
    found = find_levels(W, scheme, "mse", importance).spans
    expected = search_levels(W, scheme, "mse", importance).spans
    same_bits(found.scales, expected.scales)
    same_bits(found.offsets, expected.offsets)
    same_bits(found.headers, expected.headers)


@blocks
def test_errors_and_rows_of_zeros_are_measured(scheme):
    W = random_weights(70, COLUMNS)
    W[3] = 0
    W[7] = 1e-30
    quantized, found = RTN.round_tile(W, scheme, ScaleSettings("mse"))
    lost = quantized.dequantize(torch.float32).double() - W.double()
    assert found.squared_error == pytest.approx(lost.square().sum().item(), rel=1e-5)
    assert found.squared_norm == pytest.approx(W.double().square().sum().item(), rel=1e-5)
    expected = errors_of(W, quantized)
    assert found.zero_rows == expected.zero_rows == 2
    assert found.lost_rows == expected.lost_rows


@blocks
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38, 3e8])
def test_what_no_block_holds_has_no_finite_error(value, scheme):
    W = random_weights(70, COLUMNS)
    W[69] = 3e8 if value == 3e8 else 1  # a whole row, or one weight
    W[69, ::2] *= -1
    W[69, 300] = value
    errors = RTN.round_tile(W, scheme, ScaleSettings("mse"))[1]
    assert not torch.tensor(errors.squared_error + errors.squared_norm).isfinite()
