"""Tiles that are read, rounded and packed in one pass make the same file as whole matrices."""

import pytest
import torch
from conftest import SCHEMES, unit_of
from test_kernels import random_release, random_weights

from grokquant.errors import InputError
from grokquant.formats.compressed_tensors import FORMAT
from grokquant.grids import Scheme
from grokquant.job.fused import round_and_pack
from grokquant.methods import compiled
from grokquant.methods.copy import copy_quantized
from grokquant.methods.method import Errors
from grokquant.methods.rtn import ScaleSettings, quantize_rtn
from grokquant.methods.scales import ScaleRule
from grokquant.types import QTensor

NAME = "experts.3.w1.weight"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last one short, of small matrices."""
    monkeypatch.setattr(compiled, "_TILE", 64 * 384)
    monkeypatch.setattr("grokquant.methods.copy._COPY_ROWS", 64)


def packed(
    stored: torch.Tensor | QTensor,
    scheme: Scheme,
    scale: ScaleRule = "mse",
    method: str = "rtn",
    parts: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], Errors]:
    """A matrix of 384 columns, rounded and packed in one pass."""
    rows = len(stored.codes if isinstance(stored, QTensor) else stored)
    settings = ScaleSettings(scale) if method == "rtn" else None
    return round_and_pack(
        unit_of(NAME, scheme, (rows, 384), method, settings), stored, FORMAT, parts
    )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rtn_packs_what_quantize_rtn_makes(scheme):
    for stored in (random_release(200, 384, 128), random_weights(200, 384)):
        quantized = quantize_rtn(stored, scheme, "absmax")
        parts, errors = packed(stored, scheme, "absmax")
        assert_same(parts, FORMAT.pack(NAME, quantized))
        W = (stored.dequantize() if isinstance(stored, QTensor) else stored).float()
        relative = (W - quantized.dequantize().float()).norm() / W.norm()
        assert errors.relative == pytest.approx(relative.item(), rel=1e-5)
        assert errors.zero_rows == (W == 0).all(1).sum()


def test_odd_groups_take_the_way_through_torch():
    stored, scheme = random_weights(200, 384), Scheme(4, 12)
    parts, errors = packed(stored, scheme)
    quantized = quantize_rtn(stored, scheme, "mse")
    assert_same(parts, FORMAT.pack(NAME, quantized))
    relative = (stored - quantized.dequantize().float()).norm() / stored.norm()
    assert errors.relative == pytest.approx(relative.item(), rel=1e-5)
    assert errors.zero_rows == 1


@pytest.mark.parametrize("group", [128, 64, 32])
def test_copy_packs_the_stored_integers(group):
    stored, scheme = random_release(200, 384, 128), Scheme(8, group)
    parts, errors = packed(stored, scheme, method="copy")
    assert_same(parts, FORMAT.pack(NAME, copy_quantized(stored, scheme)))
    back = FORMAT.unpack(NAME, parts, scheme)
    assert torch.equal(back.codes, stored.codes)
    assert torch.equal(back.dequantize(), stored.dequantize())
    assert errors.relative == 0


def test_threads_and_given_parts_change_nothing():
    stored, scheme = random_release(200, 384, 128), Scheme(4, 128, symmetric=False)
    parts, errors = packed(stored, scheme)
    given = {name: torch.full_like(part, 3) for name, part in parts.items()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        again, again_errors = packed(stored, scheme, parts=given)
    finally:
        torch.set_num_threads(threads)
    assert all(again[name] is given[name] for name in given)
    assert_same(again, parts)
    assert again_errors == errors


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group", [32, 12])
def test_weights_that_are_not_finite_are_counted(bad, group):
    W = random_weights(200, 384)
    W[70, 5] = W[170, 383] = bad
    message = rf"{NAME}: 2 non-finite weights, the first at \[70, 5\]"
    with pytest.raises(InputError, match=message):
        packed(W, Scheme(4, group))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["rtn", "copy"])
def test_scales_that_are_not_finite_are_found(bad, method):
    stored = random_release(200, 384, 128)
    stored.scales[70, 1] = bad
    with pytest.raises(InputError, match=r"128 non-finite weights, the first at \[70, 128\]"):
        packed(stored, Scheme(8, 128), "absmax", method)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 12])
def test_weights_too_large_for_float16(symmetric, group):
    scheme = Scheme(4, group, symmetric, "float16")
    W = random_weights(64, 384)
    W[7, 0] = 60000.0
    packed(W, scheme, "absmax")
    W[7, 0] = 70000.0
    with pytest.raises(InputError, match="float16 cannot hold weights as large as 70000"):
        packed(W, scheme, "absmax")
    W[7, 0] = 1e6
    with pytest.raises(InputError, match=r"as large as 1e\+06"):
        packed(W, scheme, "absmax")
