"""Rounding methods against naive references of a few obvious lines."""

import numpy as np
import pytest
import torch
from conftest import SCHEMES

from grokquant.grids import GRIDS, Scheme
from grokquant.methods.copy import InexactScale, can_copy, copy_quantized
from grokquant.methods.levels import find_levels
from grokquant.methods.rtn import quantize_rtn
from grokquant.types import QTensor


@pytest.fixture
def W() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 256, generator=generator) * torch.rand(48, 1, generator=generator)


def naive_rtn(W: np.ndarray, scheme: Scheme) -> np.ndarray:
    """absmax scales, nearest code, weight by weight; returns the values."""
    values = np.empty_like(W)
    size = scheme.group_size or W.shape[1]
    to_stored = getattr(torch, scheme.scale_dtype)
    for row in range(W.shape[0]):
        for start in range(0, W.shape[1], size):
            group = W[row, start : start + size]
            if scheme.symmetric:
                scale, zero = np.abs(group).max() / scheme.qmax, 0.0
            else:
                low, high = min(group.min(), 0), max(group.max(), 0)
                scale = (high - low) / (2**scheme.bits - 1)
            scale = torch.tensor(scale, dtype=torch.float32).to(to_stored).item()
            if not scheme.symmetric:
                zero = np.clip(np.rint(np.float32(scheme.qmin - low / scale)), -128, 127)
                zero = np.clip(zero, scheme.qmin, scheme.qmax)
            codes = np.clip(np.rint(group / np.float32(scale)) + zero, scheme.qmin, scheme.qmax)
            values[row, start : start + size] = (codes - zero) * scale
    return values


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rtn_absmax_equals_the_naive_reference(W, scheme):
    quantized = quantize_rtn(W, scheme, "absmax")
    wide = QTensor(
        quantized.codes, quantized.scales.float(), scheme, quantized.zero_points
    ).dequantize()
    assert np.allclose(wide.numpy(), naive_rtn(W.numpy(), scheme), atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searched_scales_are_never_worse_than_absmax(W, scheme):
    errors = [
        (W - quantize_rtn(W, scheme, rule).dequantize().float()).square().sum().item()
        for rule in ("absmax", "mse")
    ]
    assert errors[1] <= errors[0] * (1 + 1e-3)
    if scheme.bits == 4:
        assert errors[1] < errors[0]


def test_importance_moves_the_search(W):
    importance = torch.ones(256)
    importance[:8] = 1e4
    plain = find_levels(W, Scheme(4, 128), "mse").spans.scales
    weighted = find_levels(W, Scheme(4, 128), "mse", importance).spans.scales
    assert not torch.equal(plain, weighted)


def test_all_zero_rows_stay_zero_and_finite():
    W = torch.zeros(4, 128)
    for scheme in (Scheme(4, 32), Scheme(4, 32, symmetric=False)):
        quantized = quantize_rtn(W, scheme)
        assert torch.isfinite(quantized.scales).all()
        assert (quantized.dequantize() == 0).all()


def test_copy_repeats_scales_and_changes_no_value():
    codes = torch.randint(-127, 128, (6, 256), dtype=torch.int8)
    stored = QTensor(codes, torch.rand(6, 2).bfloat16(), Scheme(8, 128))
    for group in (128, 64, 32):
        copied = copy_quantized(stored, Scheme(8, group))
        assert copied.codes is stored.codes
        assert torch.equal(copied.dequantize(), stored.dequantize())


def test_copy_is_refused_where_it_would_lose():
    assert can_copy(Scheme(8, 128), Scheme(8, 32), 256)
    assert can_copy(Scheme(8, None), Scheme(8, 128), 256)
    assert not can_copy(Scheme(8, 32), Scheme(8, 128), 256)
    assert not can_copy(Scheme(8, 128), Scheme(4, 128), 256)
    assert not can_copy(Scheme(4, 32, False, "float16"), GRIDS["q4_1"].scheme, 256)


@pytest.mark.parametrize("scale", [2.0**-17 * 1.9921875, 65280.0, 0.0078125])
def test_copy_to_another_scale_dtype_keeps_every_value(scale):
    stored = QTensor(
        torch.tensor([[-128, 127]], dtype=torch.int8),
        torch.tensor([[scale]]).bfloat16(),
        Scheme(8, 2),
    )
    copied = copy_quantized(stored, Scheme(8, 1, True, "float16"))
    assert copied.scales.dtype == torch.float16 and copied.scales.shape == (1, 2)
    assert copied.codes is stored.codes and (copied.scales.double() == scale).all()


@pytest.mark.parametrize("scale", [2.0**-20 * 1.9921875, 65536.0])
def test_a_scale_that_the_dtype_has_not_is_refused(scale):
    stored = QTensor(
        torch.ones(1, 2, dtype=torch.int8), torch.tensor([[scale]]).bfloat16(), Scheme(8, 2)
    )
    with pytest.raises(InexactScale, match=f"float16 cannot hold the scale {scale:g}"):
        copy_quantized(stored, Scheme(8, 2, True, "float16"))


@pytest.mark.parametrize("name", ["q4_1", "q4_k", "q6_k", "asymmetric"])
def test_copy_takes_offsets_and_headers_along(W, name):
    stored = quantize_rtn(W, GRIDS[name].scheme if name in GRIDS else Scheme(4, 64, False))
    copied = copy_quantized(stored, stored.scheme)
    assert torch.equal(copied.dequantize(), stored.dequantize())
    assert (copied.headers is None) == (stored.headers is None)
