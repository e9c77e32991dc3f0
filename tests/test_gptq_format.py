"""The layout of AutoGPTQ: round trips bit by bit, and checkpoints that other tools wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_grids import same

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.formats.gptq import FORMAT as gptq
from grokquant.grids import Scheme
from grokquant.job import pipeline
from grokquant.runtime.matrix_cache import MatrixCache
from grokquant.runtime.packed import PackedMatrix
from grokquant.types import QTensor

NAME = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
STEM = NAME.removesuffix(".weight")


def naive_pack(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int
) -> dict[str, torch.Tensor]:
    """What AutoGPTQ writes of unsigned codes [out, in] whose columns belong to the groups `g_idx`,
    with zero points and scales [out, groups]: streams of bits, zero points less one."""

    def stream(numbers: np.ndarray) -> np.ndarray:
        """Numbers [n, columns] as a stream of `bits` each down the columns, in words of 32."""
        flags = (numbers[:, None, :] >> np.arange(bits)[None, :, None]) & 1
        flags = flags.reshape(-1, 32, numbers.shape[1]).astype(np.uint64)
        words = (flags << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
        return words.astype(np.uint32).view(np.int32)

    return {
        f"{STEM}.qweight": torch.from_numpy(stream(codes.T)),
        f"{STEM}.qzeros": torch.from_numpy(stream(zeros - 1).T.copy()),
        f"{STEM}.scales": torch.from_numpy(scales.T.copy()).half(),
        f"{STEM}.g_idx": torch.from_numpy(g_idx).int(),
    }


def random_codes(bits: int, rows: int, columns: int, groups: int, seed: int = 0):
    """Unsigned codes, zero points of at least 1, scales that float16 has."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 2**bits, (rows, columns))
    zeros = draw.integers(1, 2**bits, (rows, groups))
    return codes, zeros, draw.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data()
)
def test_round_trips_are_bit_by_bit(bits, height, width, channel, data):
    rows, columns = 32 * height, 32 * width
    scheme = Scheme(bits, None if channel else 32, True, "float16")
    groups = scheme.groups(columns)
    codes, _, scales = random_codes(bits, rows, columns, groups, data.draw(st.integers(0, 999)))
    signed = torch.from_numpy(codes - 2 ** (bits - 1)).to(torch.int8)
    quantized = QTensor(signed, torch.from_numpy(scales), scheme)
    packed = gptq.pack(NAME, quantized)
    layout = gptq.packed_layout(NAME, (rows, columns), scheme)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == layout
    g_idx = np.arange(columns) * groups // columns
    expected = naive_pack(codes, np.full((rows, groups), 2 ** (bits - 1)), scales, g_idx, bits)
    for name, tensor in expected.items():
        assert torch.equal(packed[name], tensor), name
    again = gptq.unpack(NAME, packed, scheme)
    assert torch.equal(again.codes, signed) and torch.equal(again.scales, quantized.scales)


@pytest.fixture
def released(tiny_recipe, tmp_path):
    """A tiny Grok as AutoGPTQ would have written it: its config, tensors and true values are to be
    changed by a test. All experts are int4 g32."""
    rules = {"match": "layers.*.experts.*", "method": "rtn", "bits": 4, "group": 32}
    recipe = tiny_recipe(rules, output={"path": str(tmp_path / "out"), "format": "gptq"})
    return pipeline.quantize(recipe)


def rewrite(output: Path, changes: dict[str, torch.Tensor], config: dict) -> None:
    """Puts tensors and keys of the config in the place of what is there."""
    for file in output.glob("*.safetensors"):
        tensors = load_file(file)
        if changed := changes.keys() & tensors.keys():
            tensors |= {name: changes[name].contiguous() for name in changed}
            save_file(tensors, file, metadata={"format": "pt"})
    path = output / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= config
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_what_others_wrote_is_read(released, version, shuffled):
    """Zero points that differ, and act-order that spreads groups over the columns."""
    rows, columns, groups = 128, 256, 8  # of an expert's down matrix
    codes, zeros, scales = random_codes(4, rows, columns, groups)
    g_idx = np.arange(columns) // 32
    if shuffled:
        g_idx = np.random.default_rng(1).permutation(g_idx)
    packed = naive_pack(codes, zeros + (version == "gptq_v2"), scales, g_idx, 4)
    every = {
        name: torch.zeros_like(tensor)
        for file in released.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith((".qzeros", ".qweight"))
    }
    rewrite(
        released,
        every | packed,
        {"sym": False, "desc_act": shuffled, "checkpoint_format": version},
    )
    wanted = (codes - zeros[:, g_idx]) * scales[:, g_idx].astype(np.float32)
    ref = open_checkpoint(released).source.tensors[NAME]
    assert torch.equal(ref.read(), torch.from_numpy(wanted).half())
    if not shuffled:
        some = slice(32, 96)
        assert same(ref.quantized_rows()(some), ref.read_quantized().rows(some))


def test_asymmetric_matrices_stay_themselves_in_packed_modules(released):
    codes, zeros, scales = random_codes(4, 128, 256, 8)
    rewrite(released, naive_pack(codes, zeros, scales, np.arange(256) // 32, 4), {"sym": False})
    ref = open_checkpoint(released).source.tensors[NAME]
    module = PackedMatrix(ref, gptq, torch.float16, MatrixCache())
    module.open(torch.device("cpu"))
    assert torch.equal(module.dense(torch.float16), ref.read())


def test_symmetric_codes_with_other_zero_points_are_refused(released):
    codes, zeros, scales = random_codes(4, 128, 256, 8)
    rewrite(released, naive_pack(codes, zeros, scales, np.arange(256) // 32, 4), {})
    with pytest.raises(
        InputError, match=rf"{STEM}.qzeros: sym is true, but not all zero points are 7"
    ):
        open_checkpoint(released).source.tensors[NAME].read()


def test_quantize_config_json_says_what_config_json_does(released):
    config = json.loads((released / "config.json").read_text())["quantization_config"]
    beside = json.loads((released / "quantize_config.json").read_text())
    assert beside == config
    known = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}
    assert known.items() <= beside.items() and beside["checkpoint_format"] == "gptq"


def test_our_reader_runs_grok(released, tmp_path):
    """No other package knows Grok: the same integers through our own container."""
    logits = grokquant.load(released, dtype=torch.float32)[0](torch.arange(3, 40)[None]).logits
    dense = {name: ref.read() for name, ref in open_checkpoint(released).source.tensors.items()}
    model, _ = grokquant.load(released, dtype=torch.float32)
    W = model.model.layers[0].block_sparse_moe.experts.down_proj[3]
    assert torch.equal(W, dense[NAME].float()) or torch.equal(W, dense[NAME].float().T)
    assert torch.isfinite(logits).all()


def test_mixed_grids_are_told_apart(tiny_recipe, tmp_path):
    rules = [
        {"match": "*.down", "method": "rtn", "bits": 3, "group": 64},
        {"match": "layers.0.experts.*", "method": "rtn", "bits": 8, "group": "channel"},
        {"match": "*", "method": "rtn", "bits": 2, "group": 32},
    ]
    recipe = tiny_recipe(*rules, output={"path": str(tmp_path / "out"), "format": "gptq"})
    units = dict(open_checkpoint(pipeline.quantize(recipe)).units())
    assert units["layers.1.experts.2.down"].scheme == Scheme(3, 64, True, "float16")
    assert units["layers.0.experts.2.up"].scheme == Scheme(8, None, True, "float16")
    assert units["layers.1.attention.q"].scheme == Scheme(2, 32, True, "float16")
