"""The compiled kernels give the integers of the torch reference, bit for bit."""

import pytest
import torch
from conftest import SCHEMES

from grokquant.grids import Scheme
from grokquant.methods import compiled
from grokquant.methods.levels import find_levels
from grokquant.methods.method import errors_of
from grokquant.methods.rtn import RTN, ScaleSettings, quantize_rtn, quantize_with_torch
from grokquant.methods.scales import search_scales
from grokquant.methods.tiles import kernel_of
from grokquant.types import QTensor

RULES = ("absmax", "mse")


def random_weights(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different size; one is zero, and so is a part of another."""
    generator = torch.Generator().manual_seed(rows + columns)
    W = torch.randn(rows, columns, generator=generator) * 2 ** torch.linspace(-20, 4, rows)[:, None]
    W[rows // 2] = 0
    W[-1, : columns // 2] = 0
    return W


def random_release(rows: int, columns: int, group_size: int | None) -> QTensor:
    """As Grok-1's files hold matrices: by columns, all 256 codes, -128 among them."""
    generator = torch.Generator().manual_seed(rows)
    scheme = Scheme(8, group_size)
    codes = torch.randint(-128, 128, (columns, rows), dtype=torch.int8, generator=generator)
    scales = torch.rand(scheme.groups(columns), rows, generator=generator).bfloat16() / 64
    return QTensor(codes.T, scales.T, scheme)


def check(W: torch.Tensor | QTensor, scheme: Scheme, rule: str) -> None:
    assert kernel_of(W, scheme)
    found, expected = quantize_rtn(W, scheme, rule), quantize_with_torch(W, scheme, rule)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.codes, expected.codes)
    assert found.scales.dtype == expected.scales.dtype
    if not scheme.symmetric:
        assert torch.equal(found.zero_points, expected.zero_points)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 128, scale_dtype="float32")], ids=str)
def test_equal_to_torch_on_every_grid(scheme, rule):
    check(random_weights(70, 384), scheme, rule)
    check(random_weights(70, 384).bfloat16(), scheme, rule)
    check(random_release(70, 384, 128), scheme, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
def test_any_number_of_rows_and_columns(rows, rule):
    for scheme in (Scheme(4, None), Scheme(4, 8, symmetric=False), Scheme(8, 41 * 8)):
        check(random_weights(rows, 328), scheme, rule)
        check(random_release(rows, 328, None), scheme, rule)


@pytest.mark.parametrize("stored_group", [32, 96, 384, None])
def test_groups_of_the_source_need_not_be_those_of_the_result(stored_group):
    for group in (32, 128, None):
        check(random_release(66, 384, stored_group), Scheme(4, group), "mse")


def test_other_sources_are_read_as_they_are():
    release = random_release(40, 256, 64)
    by_rows = QTensor(release.codes.contiguous(), release.scales.contiguous(), release.scheme)
    half = QTensor(release.codes, release.scales.half(), Scheme(8, 64, True, "float16"))
    shifted = quantize_rtn(random_weights(40, 256), Scheme(8, 64, symmetric=False))
    for source in (by_rows, half, shifted, release.dequantize().T.contiguous().T):
        check(source, Scheme(4, 64), "mse")
    check(random_weights(40, 256)[:, 64:192].half(), Scheme(4, 64), "absmax")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [4, 8])
def test_ties_go_to_even(bits, rule):
    """Weights in the middle of two codes of a scale that is a power of two."""
    scheme = Scheme(bits, 32)
    steps = torch.arange(-scheme.qmax, scheme.qmax) + 0.5
    W = steps[torch.arange(64 * 256) % len(steps)].view(64, 256) / 16
    W[:, ::32] = scheme.qmax / 16
    check(W, scheme, rule)
    if rule == "absmax":
        codes = quantize_rtn(W, scheme, rule).codes
        assert (codes[scheme.qmax / 16 != W] % 2 == 0).all()


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_smallest_and_largest_scales(scale_dtype):
    """Around the smallest normal scale and the smallest of all, and beyond the largest."""
    smallest = torch.finfo(getattr(torch, scale_dtype)).tiny
    sizes = smallest * (1 + torch.arange(-20, 20) * 2.0**-13)
    least = compiled.least_scale(getattr(torch, scale_dtype)) * torch.arange(1, 40) / 16
    W = [7 * sizes, 7 * least, torch.tensor([1e-45, 4e5, 7 * 65519.0, 7 * 65520.0, 3e38])]
    W = torch.cat(W)
    for rule in RULES:
        for symmetric in (True, False):
            check(W[:, None].repeat(1, 8), Scheme(4, 8, symmetric, scale_dtype), rule)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 2e-5])
def test_small_weights_have_small_scales(size):
    """float16 has numbers down to 6e-8; 8-bit codes need them for weights below 0.008."""
    W = size * torch.linspace(-1, 1, 64).view(1, 64)
    for scheme in (Scheme(8, 32, True, "float16"), Scheme(4, 64, False, "float16")):
        check(W, scheme, "mse")
        error = W - quantize_rtn(W, scheme, "mse").dequantize().float()
        assert error.norm() < 0.1 * W.norm()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, None), Scheme(8, 64, False)], ids=str)
def test_importance_counts_the_same(scheme):
    W = random_weights(50, 256)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(0))[::2] ** 4
    found = find_levels(W, scheme, "mse", importance).spans
    expected = search_scales(W, scheme, "mse", importance)
    assert torch.equal(found.scales, expected[0])
    assert scheme.symmetric or torch.equal(found.zero_points, expected[1])
    unweighted = find_levels(W, scheme, "mse", torch.zeros(256)).spans.scales
    assert torch.equal(unweighted, find_levels(W, scheme, "mse").spans.scales)


def test_other_group_sizes_go_to_torch():
    scheme = Scheme(4, 12)
    assert not kernel_of(random_weights(8, 96), scheme)
    assert quantize_rtn(random_weights(8, 96), scheme).scales.shape == (8, 8)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_that_became_zero_are_counted(scheme):
    """Weights too small for the scale dtype, beside rows that were zero and rows of ones."""
    W = random_weights(70, 384)
    W[:2] = 0
    W[2:5] = 1e-40
    W[2:5, 7] = -1e-40
    W[5] = float(scheme.qmax)  # its scales are 1 as well
    quantized, (_, _, zero_rows) = compiled.round_tile(W, scheme, search=False)
    zeros = (quantized.dequantize() == 0).all(1)
    assert compiled.rows_of_zeros(quantized) == zeros.sum()
    lost = zeros & (W != 0).any(1)
    found = RTN.round_tile(W, scheme, ScaleSettings("absmax"))[1]
    assert found.lost_rows == lost.sum() and found.zero_rows == zero_rows
    assert lost.sum() == 3
    assert errors_of(W, quantized).lost_rows == 3


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sums_of_squares(scheme):
    W = random_weights(70, 384)
    W[3] = 0
    quantized, (lost, norm, zero_rows) = compiled.round_tile(W, scheme, search=False)
    error = W.double() - quantized.dequantize().double()
    assert lost == pytest.approx(error.square().sum().item(), rel=1e-5)
    assert norm == pytest.approx(W.double().square().sum().item(), rel=1e-5)
    assert zero_rows == 2
