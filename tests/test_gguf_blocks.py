"""llama.cpp's blocks: the gguf package finds the values we mean, and we read every bit back."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from conftest import unit_of
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from make_release import random_leaves, write_random_release

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.formats.gguf import FORMAT as gguf
from grokquant.grids import GRIDS, Scheme
from grokquant.job import pipeline
from grokquant.job.fused import round_and_pack
from grokquant.job.unit import stored_bits
from grokquant.methods.gptq import factorize, round_gptq
from grokquant.methods.rtn import ScaleSettings, quantize_rtn
from grokquant.toy.release_writer import write_release
from grokquant.types import QTensor

SCHEMES = {name: grid.scheme for name, grid in GRIDS.items() if grid.ggml_type is not None}
RULES = ("absmax", "mse")


def theirs(quantized: QTensor, name: str) -> torch.Tensor:
    """The values [out, in] that llama.cpp's own package finds in what we pack."""
    packed = gguf.pack("x.weight", quantized)["x.weight_blocks"]
    return torch.from_numpy(quants.dequantize(packed.numpy(), GGMLQuantizationType[name.upper()]))


def values(quantized: QTensor) -> torch.Tensor:
    """codes, or entries of the table, * scales + offsets in float32 [out, in]."""
    found = quantized.codes.float()
    if table := quantized.scheme.row.table:
        found = torch.tensor(table)[quantized.codes.long()]
    found = found.unflatten(1, (quantized.scales.shape[1], -1))
    found = found * quantized.scales.float().unsqueeze(-1)
    if quantized.offsets is not None:
        found = found + quantized.offsets.float().unsqueeze(-1)
    return found.flatten(1)


def check(quantized: QTensor, name: str) -> None:
    same = {"rtol": 0, "atol": 0, "equal_nan": True}  # weights beyond float16 are refused later
    torch.testing.assert_close(theirs(quantized, name), values(quantized), **same)
    packed = gguf.pack("x.weight", quantized)
    again = gguf.unpack("x.weight", packed, quantized.scheme)
    for field in fields(QTensor):
        found, wanted = (getattr(q, field.name) for q in (again, quantized))
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted, **same, msg=field.name)
        else:
            assert found == wanted
    bits = sum(part.nbytes for part in packed.values()) * 8
    assert bits == stored_bits(quantized.scheme, tuple(quantized.codes.shape))


@st.composite
def matrices(draw, columns: int) -> torch.Tensor:
    """Rows of very different sizes and kinds, of whole blocks of `columns`."""
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    W = torch.randn(rows, blocks * columns, generator=generator)
    for row in W:
        kind = draw(st.sampled_from(["normal", "zero", "constant", "positive", "spike", "part"]))
        row *= 10.0 ** draw(st.integers(-7, 3))
        if kind == "zero":
            row.zero_()
        elif kind == "constant":
            row.fill_(row[0].item())
        elif kind == "positive":
            row.abs_()
        elif kind == "spike":
            row[draw(st.integers(0, len(row) - 1))] *= 1000
        elif kind == "part":
            row[: columns // 2] = 0
    return W


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_gguf_package_finds_our_values(name, data):
    W = data.draw(matrices(GRIDS[name].block_columns))
    check(quantize_rtn(W, SCHEMES[name], data.draw(st.sampled_from(RULES))), name)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_gptq_rounds_is_packed_alike(name):
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(24, 512, generator=generator), torch.randn(512, 600, generator=generator)
    check(round_gptq(W, factorize(X @ X.T, 0.01, True), SCHEMES[name]).quantized, name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-3, 1e-4])
@pytest.mark.parametrize("name", SCHEMES)
def test_no_grid_errs_more_than_its_step(name, size, rule):
    """Whatever the size of weights: float16 has normal numbers only from 6e-5 on."""
    W = size * torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    limit = {2: 0.4, 3: 0.2, 4: 0.12, 5: 0.06, 6: 0.03, 8: 0.01}[SCHEMES[name].bits]
    quantized = quantize_rtn(W, SCHEMES[name], rule)
    assert (values(quantized) - W).norm() < limit * W.norm()


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name):
    quantized = quantize_rtn(torch.zeros(3, 512), SCHEMES[name])
    check(quantized, name)
    assert (values(quantized) == 0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_too_large_for_float16_scales_are_refused_by_name(name, rule):
    W = torch.ones(4, 512) * torch.tensor([1.0, 1.0, 3e8, 1.0]).unsqueeze(1)
    W[:, ::2] *= -1
    held = "float16" if SCHEMES[name].grid == "integer" else name
    scale = ScaleSettings(rule)
    with pytest.raises(InputError, match=rf"w\.weight: {held} cannot hold .* as large as 3e\+08"):
        round_and_pack(unit_of("w.weight", SCHEMES[name], (4, 512), settings=scale), W, gguf)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_we_err_no_more_than_their_quantizer(name):
    W = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) / 50
    packed = quants.quantize(W.numpy(), GGMLQuantizationType[name.upper()])
    found = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType[name.upper()]))
    assert (values(quantize_rtn(W, SCHEMES[name])) - W).norm() < (found - W).norm()


def test_refusals_name_the_reason():
    assert gguf.refusal(SCHEMES["q4_k"], (8, 512)) is None
    wanted = "384 input features are not a multiple of its blocks of 256"
    assert wanted in gguf.refusal(SCHEMES["q4_k"], (8, 384))
    assert "none of int4 g128 sym with float16" in gguf.refusal(
        Scheme(4, 128, True, "float16"), (8, 512)
    )


COPY = {"match": "*", "method": "copy"}


def copied_to_gguf(tiny_recipe, directory, scale: float):
    """A recipe that copies a small release; its experts' scales are times `scale`, and some codes
    -128, as in Grok-1."""
    write_random_release(directory, hidden=256, ffn=256, heads=4, kv_heads=1, head_dim=64)
    sizes = dict(V=128, D=256, E=4, F=256, Q=256, K=64)
    leaves = dict(random_leaves(2, sizes, 8, seed=0))
    for name, leaf in leaves.items():
        if isinstance(leaf, tuple):
            leaf[0].view(-1)[::97] = -128
            leaf[1].mul_(scale if "moe" in name else 1.0)
    config = json.loads((directory / "config.json").read_text())
    shutil.rmtree(directory)
    write_release(directory, config, leaves.items())
    output = {"path": str(directory.with_name("out")), "format": "gguf", "tokenizer": "none"}
    return tiny_recipe(COPY, model={"path": str(directory)}, output=output)


def test_the_release_is_copied_to_q8_0(tiny_recipe, tmp_path):
    """Integers and scales as they are; groups of a row become blocks of 32."""
    recipe = copied_to_gguf(tiny_recipe, tmp_path / "in", 1.0)
    found = dict(open_checkpoint(pipeline.quantize(recipe)).units())
    for name, ref in open_checkpoint(tmp_path / "in").units():
        stored, copied = ref.read_quantized(), found[name].read_quantized()
        assert copied.scheme == SCHEMES["q8_0"] and torch.equal(copied.codes, stored.codes)
        assert (copied.codes == -128).any()
        assert torch.equal(values(copied), values(stored))
        assert torch.equal(theirs(copied, "q8_0"), values(stored))


def test_a_scale_that_float16_has_not_refuses_the_copy(tiny_recipe, tmp_path):
    recipe = copied_to_gguf(tiny_recipe, tmp_path / "in", 2.0**-11)
    named = (
        r"experts.0.w1.weight: copy would not be lossless: float16 cannot hold the scale \d\S+e-0"
    )
    with pytest.raises(InputError, match=named):
        pipeline.quantize(recipe)
    assert not (tmp_path / "out").exists()
