"""Our packing and the compressed-tensors package agree bit by bit, in both directions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from conftest import SCHEMES, unit_of
from safetensors.torch import load_file, save_file

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.files.atomic import write_json
from grokquant.formats.compressed_tensors import FORMAT as compressed_tensors
from grokquant.formats.words import pack_with_torch, pack_words, unpack_words
from grokquant.grids import GRIDS, Scheme
from grokquant.job import pipeline
from grokquant.methods.rtn import quantize_rtn
from grokquant.types import QTensor, Unit

NAME = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture(params=SCHEMES, ids=str)
def quantized(request) -> QTensor:
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    return quantize_rtn(W, request.param)


def theirs(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(NAME.removesuffix("weight")): t for name, t in packed.items()}


def their_scheme(scheme: Scheme):
    unit = unit_of(NAME, scheme)
    config = compressed_tensors.quantization_config([unit], ["lm_head"])
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


def test_they_read_what_we_write(quantized):
    state = theirs(compressed_tensors.pack(NAME, quantized))
    read = PackedQuantizationCompressor.decompress(state, their_scheme(quantized.scheme))
    assert torch.equal(read["weight"], quantized.dequantize())
    codes = unpack_from_int32(state["weight_packed"], quantized.scheme.bits, (64, 256))
    assert torch.equal(codes, quantized.codes)


def test_we_write_what_they_write(quantized):
    ours = theirs(compressed_tensors.pack(NAME, quantized))
    bits = quantized.scheme.bits
    assert torch.equal(ours["weight_packed"], pack_to_int32(quantized.codes, bits))
    if quantized.zero_points is not None:
        expected = pack_to_int32(quantized.zero_points, bits, packed_dim=0)
        assert torch.equal(ours["weight_zero_point"], expected)
    state = {
        "weight": QTensor(
            quantized.codes, quantized.scales.float(), quantized.scheme, quantized.zero_points
        ).dequantize(),
        "weight_scale": quantized.scales,
    }
    if quantized.zero_points is not None:
        state["weight_zero_point"] = quantized.zero_points
    written = PackedQuantizationCompressor.compress(state, their_scheme(quantized.scheme))
    assert set(written) == set(ours)
    assert all(torch.equal(written[name], ours[name]) for name in ours)


def test_unpack_inverts_pack(quantized):
    packed = compressed_tensors.pack(NAME, quantized)
    back = compressed_tensors.unpack(NAME, packed, quantized.scheme)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert (back.zero_points is None) == quantized.scheme.symmetric
    if back.zero_points is not None:
        assert torch.equal(back.zero_points, quantized.zero_points)


def test_tiles_make_the_same_as_the_whole(quantized):
    by_columns = QTensor(
        quantized.codes.T.contiguous().T,
        quantized.scales.T.contiguous().T,
        quantized.scheme,
        quantized.zero_points,
    )
    whole = compressed_tensors.pack(NAME, quantized)
    for tiled in (quantized, by_columns):
        parts = {name: torch.full_like(part, -1) for name, part in whole.items()}
        for rows in (slice(40, 64), slice(0, 8), slice(8, 40)):
            compressed_tensors.pack_into(parts, NAME, rows, tiled.rows(rows))
        assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("rows", [1, 7, 600])
@pytest.mark.parametrize("columns", [4, 24, 136])
def test_columns_are_packed_as_rows_are(rows, columns):
    codes = torch.randint(-128, 128, (columns, rows + 3), dtype=torch.int8)[:, 2:-1].T
    words = torch.empty(rows, columns // 4, dtype=torch.int32)
    pack_words(codes, 8, words)
    assert torch.equal(words, pack_to_int32(codes.contiguous(), 8))
    assert torch.equal(unpack_words(words, 8), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_devices_pack_alike(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 7), dtype=torch.int8).T
    words = torch.empty(7, 24 * bits // 32, dtype=torch.int32)
    pack_words(codes, bits, words)
    assert torch.equal(pack_with_torch(codes, bits), words)


def test_layout_is_known_before_packing(quantized):
    packed = compressed_tensors.pack(NAME, quantized)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()}
    assert found == compressed_tensors.packed_layout(NAME, (64, 256), quantized.scheme)


def test_first_code_lies_in_the_lowest_bits():
    codes = torch.arange(-8, 0, dtype=torch.int8)[None]
    packed = compressed_tensors.pack(
        "x.weight", QTensor(codes, torch.ones(1, 1).bfloat16(), Scheme(4, None))
    )
    assert packed["x.weight_packed"].item() == 0x76543210


def test_targets_separate_schemes_and_spare_the_router():
    def unit(layer: int, expert: int, part: str, scheme: Scheme) -> Unit:
        tensor = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
        return unit_of(tensor, scheme)

    int4, int8 = Scheme(4, 128), Scheme(8, None)
    units = [
        unit(layer, expert, part, int8 if (layer, expert) == (1, 2) else int4)
        for layer in range(12)
        for expert in range(4)
        for part in ("w1", "w2", "w3")
    ]
    routers = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(12)]
    config = compressed_tensors.quantization_config(units, [*routers, "lm_head"])
    groups = QuantizationConfig.model_validate(config).config_groups
    for candidate in units:
        module = candidate.tensor.removesuffix(".weight")
        hits = [g for g in groups.values() if any(match_name(module, t) for t in g.targets)]
        assert [g.weights.num_bits for g in hits] == [candidate.scheme.bits]
    for router in [*routers, "lm_head"]:
        assert not any(match_name(router, t) for g in groups.values() for t in g.targets)
        assert any(match_name(router, t) for t in config["ignore"])


def test_uniform_schemes_need_few_targets():
    units = [
        unit_of(f"model.layers.{i}.experts.{e}.w1.weight", Scheme(4, 128))
        for i in range(64)
        for e in range(8)
    ]
    config = compressed_tensors.quantization_config(units, [])
    assert len(config["config_groups"]["group_0"]["targets"]) == 2


def test_shapes_that_do_not_fill_words_are_refused():
    assert compressed_tensors.refusal(Scheme(4, None), (64, 252))
    assert compressed_tensors.refusal(Scheme(4, 32, symmetric=False), (60, 256))
    assert compressed_tensors.refusal(Scheme(4, 128), (60, 256)) is None
    assert "not int3" in compressed_tensors.refusal(Scheme(3, 32), (64, 256))
    assert "not nf4" in compressed_tensors.refusal(GRIDS["nf4"].scheme, (64, 256))


def test_one_scale_a_row_is_written_as_vllm_needs_it_before_0_29():
    """It refuses experts with one scale a row where `group_size` is null."""
    unit = unit_of("model.layers.0.mlp.experts.0.gate_proj.weight", Scheme(8, None), (64, 256))
    (group,) = compressed_tensors.quantization_config([unit], [])["config_groups"].values()
    assert group["weights"]["strategy"] == "channel" and group["weights"]["group_size"] == -1


def test_int_quantized_is_read(tiny_recipe, tmp_path):
    """The same result, stored as the package stores an int8 for every code."""
    rules = [
        {"match": "layers.1.experts.*", "method": "rtn", "bits": 8, "group": "channel"},
        {"match": "*", "method": "rtn", "bits": 8, "group": 32, "symmetric": False},
    ]
    output = pipeline.quantize(tiny_recipe(*rules))
    shutil.copytree(output, tmp_path / "int8")
    as_int_quantized(tmp_path / "int8")
    words, other = open_checkpoint(output), dict(open_checkpoint(tmp_path / "int8").units())
    for name, ref in words.units():
        assert ref.scheme == other[name].scheme is not None
        assert torch.equal(ref.read(), other[name].read())


def as_int_quantized(directory: Path) -> None:
    """Rewrites an int8 output with the package's own compressor."""
    refs = {ref.name: ref for _, ref in open_checkpoint(directory).units()}
    weight_map = {}
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for packed in [name for name in tensors if name.endswith(".weight_packed")]:
            stem = packed.removesuffix("weight_packed")
            ref = refs[f"{stem}weight"]
            quantized = ref.load()
            exact = replace(quantized, scales=quantized.scales.float()).dequantize()
            parts = {"weight": exact, "weight_scale": quantized.scales}
            if quantized.zero_points is not None:
                parts["weight_zero_point"] = quantized.zero_points
            parts = IntQuantizationCompressor.compress(parts, their_scheme(ref.scheme))
            tensors = {name: t for name, t in tensors.items() if not name.startswith(stem)}
            tensors |= {stem + name: part.contiguous() for name, part in parts.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    config = json.loads((directory / "config.json").read_text())
    described = config["quantization_config"]
    for place in (described, *described["config_groups"].values()):
        place["format"] = "int-quantized"
    write_json(directory / "config.json", config)


def test_int_quantized_is_not_written(tiny_recipe, tmp_path):
    output = {"path": str(tmp_path / "out"), "format": "int-quantized"}
    with pytest.raises(InputError, match=r"output.format: .* compressed-tensors holds the same"):
        tiny_recipe({"match": "*", "method": "rtn", "bits": 8}, output=output)
