"""The bitsandbytes package reads what we wrote, bit for bit, and we read what it writes."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from conftest import unit_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import BitsAndBytesConfig

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.formats.bitsandbytes import FORMAT as bitsandbytes
from grokquant.grids import GRIDS, Scheme
from grokquant.job import pipeline
from grokquant.job.convert import conversion_recipe
from grokquant.job.fused import round_and_pack
from grokquant.methods.gptq import factorize, round_gptq
from grokquant.methods.rtn import quantize_rtn
from grokquant.recipe import parse_recipe
from grokquant.types import QTensor

ROWS, COLUMNS = 96, 256
BLOCKS = [GRIDS[grid].scheme for grid in ("nf4", "fp4")]
BLOCKS += [
    Scheme(4, block, True, "float32", grid) for grid in ("nf4", "fp4") for block in (32, 128)
]
SCHEMES = [*BLOCKS, GRIDS["llm_int8"].scheme]
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def W() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(ROWS, 1, generator=generator)
    W = torch.randn(ROWS, COLUMNS, generator=generator) * spread
    W[3] = 0
    return W.bfloat16()


def multiplied_out(parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """By bitsandbytes, of the named tensors of its own modules."""
    if "SCB" in parts:
        assert parts["weight_format"] == 0  # rows as they are
        return int8_vectorwise_dequant(parts["weight"], parts["SCB"]).to(dtype)
    state = {name: part for name, part in parts.items() if name != "weight"}
    state = QuantState.from_dict(state, torch.device("cpu"))
    assert state.dtype == torch.bfloat16 and not state.nested
    state.dtype = dtype
    return dequantize_4bit(parts["weight"], state)


def of_module(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    stem = NAME.removesuffix("weight")
    assert all(name.startswith(stem) for name in parts)
    return {name.removeprefix(stem): part for name, part in parts.items()}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", ["absmax", "mse", "gptq"])
def test_bitsandbytes_reads_the_same_values(W, scheme, method):
    if method == "gptq":
        X = torch.randn(600, COLUMNS, generator=torch.Generator().manual_seed(1))
        quantized = round_gptq(W, factorize(X.T @ X, 0.01, True), scheme).quantized
    else:
        quantized = quantize_rtn(W, scheme, method)
    assert quantized.scheme == scheme
    parts = of_module(bitsandbytes.pack(NAME, quantized))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = multiplied_out(parts, dtype)
        assert torch.equal(found, quantized.dequantize().to(dtype))
    error = (quantized.dequantize() - W.float()).norm() / W.float().norm()
    assert error < (0.01 if scheme.bits == 8 else 0.2)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_trip_bit_by_bit(W, scheme):
    quantized = quantize_rtn(W, scheme)
    parts = bitsandbytes.pack(NAME, quantized)
    layout = bitsandbytes.packed_layout(NAME, (ROWS, COLUMNS), scheme)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout
    again = bitsandbytes.unpack(NAME, parts, scheme)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.scales, quantized.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tiles_make_the_same_parts(W, scheme, monkeypatch):
    monkeypatch.setattr("grokquant.methods.compiled.tile_rows", lambda columns: 20)
    tiled, errors = round_and_pack(unit_of(NAME, scheme, (ROWS, COLUMNS)), W, bitsandbytes)
    whole = bitsandbytes.pack(NAME, quantize_rtn(W, scheme))
    assert tiled.keys() == whole.keys()
    assert all(torch.equal(tiled[name], part) for name, part in whole.items())
    assert errors.zero_rows == 1


@pytest.mark.parametrize("scheme", BLOCKS, ids=str)
def test_absmax_gives_the_codes_of_linear4bit(W, scheme):
    """Names, dtypes, shapes, and all codes but ties, of what bitsandbytes itself would store."""
    linear = bnb.nn.Linear4bit(COLUMNS, ROWS, bias=False, quant_type=scheme.grid)
    linear.weight = bnb.nn.Params4bit(
        W, blocksize=scheme.group_size, compress_statistics=False, quant_type=scheme.grid
    )
    theirs = linear.to("cpu").state_dict()
    ours = of_module(bitsandbytes.pack(NAME, quantize_rtn(W, scheme, "absmax")))
    state = f"weight.quant_state.bitsandbytes__{scheme.grid}"
    said = [json.loads(bytes(part.pop(state).tolist())) for part in (theirs, ours)]
    assert said[0] == said[1]
    assert theirs.keys() == ours.keys()
    for name, part in theirs.items():
        assert (part.dtype, part.shape) == (ours[name].dtype, ours[name].shape), name
    assert torch.equal(theirs["weight.quant_map"], ours["weight.quant_map"])
    zero = theirs["weight.absmax"] == 0  # where we store 1, which changes nothing
    assert torch.equal(theirs["weight.absmax"][~zero], ours["weight.absmax"][~zero])
    assert (theirs["weight"] != ours["weight"]).float().mean() < 0.002


def test_absmax_gives_the_codes_of_linear8bitlt(W):
    linear = bnb.nn.Linear8bitLt(COLUMNS, ROWS, bias=False, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(W.half(), requires_grad=False, has_fp16_weights=False)
    theirs = linear.to("cpu").state_dict()
    if theirs["weight"].dtype != torch.int8:  # older ones only round on GPUs
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(W.half())
        theirs = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0).byte()}
    scheme = GRIDS["llm_int8"].scheme
    ours = of_module(bitsandbytes.pack(NAME, quantize_rtn(W.half(), scheme, "absmax")))
    assert theirs.keys() == ours.keys()
    for name, part in theirs.items():
        assert (part.dtype, part.shape) == (ours[name].dtype, ours[name].shape), name
    used = theirs["SCB"] != 0
    assert torch.equal(theirs["SCB"][used], ours["SCB"][used])
    assert (theirs["weight"][used] != ours["weight"][used]).float().mean() < 0.002


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        (Scheme(8, None), 256, "holds the grids nf4, fp4 and llm_int8, not int8 channel sym"),
        (Scheme(4, None, True, "float32", "nf4"), 256, "its blocks hold 32, 64"),
        (Scheme(4, 48, True, "float32", "nf4"), 96, "its blocks hold 32, 64"),
        (GRIDS["nf4"].scheme, 96, "blocks of 64 weights do not divide rows of 96"),
    ],
)
def test_what_it_cannot_hold_is_refused(scheme, columns, reason):
    assert reason in (bitsandbytes.refusal(scheme, (64, columns)) or "")


def experts(grid: str, **keys: object) -> dict:
    return {"match": "layers.*.experts.*", "method": "rtn", "grid": grid} | keys


@pytest.fixture(params=["nf4", "fp4", "llm_int8"])
def grok(request, tiny_recipe, tmp_path) -> Path:
    rules = experts(request.param), {"match": "*", "method": "keep"}
    output = {"path": str(tmp_path / "grok"), "format": "bitsandbytes", "shard": "200KB"}
    return pipeline.quantize(tiny_recipe(*rules, output=output))


def stored_in(output: Path) -> dict[str, Tensor]:
    files = [load_file(file) for file in sorted(output.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def test_every_expert_of_a_file_is_read_by_bitsandbytes(grok):
    stored = stored_in(grok)
    units = dict(open_checkpoint(grok).units())
    packed = {ref.name: ref for name, ref in units.items() if ".experts." in name}
    for name, ref in packed.items():
        stem = name.removesuffix("weight")
        parts = {n.removeprefix(stem): part for n, part in stored.items() if n.startswith(stem)}
        assert torch.equal(multiplied_out(parts, torch.float32), ref.read())
    config = json.loads((grok / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("grokquant", "bitsandbytes")


def test_convert_keeps_the_codes_or_refuses(grok, tmp_path):
    again = pipeline.quantize(conversion_recipe(grok, "bitsandbytes", tmp_path / "again"))
    found, wanted = stored_in(again), stored_in(grok)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], part) for name, part in wanted.items())
    for other in ("compressed-tensors", "gptq", "gguf"):
        with pytest.raises(InputError, match="cannot hold it: it h"):
            pipeline.quantize(conversion_recipe(grok, other, tmp_path / "no"))


def test_integers_do_not_become_bitsandbytes(tiny_recipe, tmp_path):
    made = pipeline.quantize(tiny_recipe())
    with pytest.raises(InputError, match="is not lossless|it holds the grids nf4"):
        pipeline.quantize(conversion_recipe(made, "bitsandbytes", tmp_path / "no"))


@pytest.mark.parametrize("grid", ["nf4", "llm_int8"])
def test_a_run_that_was_stopped_goes_on(grid, tiny_recipe, tmp_path, monkeypatch):
    """Matrices that are committed are read back from their file in the middle of a layer."""
    rules = experts(grid, scale="absmax") | {"method": "gptq"}, {"match": "*", "method": "keep"}
    output = {"path": str(tmp_path / "whole"), "format": "bitsandbytes", "shard": "100KB"}
    whole = stored_in(pipeline.quantize(tiny_recipe(*rules, output=output, max_fallbacks=1)))
    recipe = tiny_recipe(*rules, output=output | {"path": str(tmp_path / "x")}, max_fallbacks=1)
    emit, done = pipeline.Run.emit, []

    def stop_at_last(run, parts, report):
        done.append(report.name)
        if len(done) == 14:
            raise KeyboardInterrupt
        emit(run, parts, report)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.Run, "emit", stop_at_last)
        pipeline.quantize(recipe)
    again = stored_in(pipeline.quantize(recipe))
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], part) for name, part in whole.items())


@pytest.fixture
def llama(tmp_path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def quantized(source: Path, output: Path, *rules: dict) -> Path:
    sections = {"path": str(output), "format": "bitsandbytes"}
    recipe = {"model": {"path": str(source)}, "quantize": list(rules), "output": sections}
    return pipeline.quantize(parse_recipe(recipe))


ALL = {"match": "*", "method": "rtn"}


@pytest.mark.parametrize("grid", ["nf4", "fp4", "llm_int8"])
def test_a_dense_model_says_bitsandbytes_itself(llama, tmp_path, grid):
    units = [name for name, _ in open_checkpoint(llama).units()]
    kept = {"match": units[-1], "method": "keep"}
    output = quantized(llama, tmp_path / "out", kept, ALL | {"grid": grid})
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    known = AutoQuantizationConfig.from_dict(config)
    assert isinstance(known, BitsAndBytesConfig)
    assert known.quantization_method() == grid
    assert known.llm_int8_skip_modules == ["lm_head", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("grid", ["nf4", "fp4", "llm_int8"])
@torch.no_grad()
def test_transformers_loads_a_dense_model_with_bitsandbytes(llama, tmp_path, grid):
    pytest.importorskip("accelerate")
    output = quantized(llama, tmp_path / "out", ALL | {"grid": grid})
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    kind = bnb.nn.Linear8bitLt if grid == "llm_int8" else bnb.nn.Linear4bit
    assert isinstance(model.model.layers[1].mlp.down_proj, kind)
    tokens = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    wanted = grokquant.load(output)[0](tokens).logits
    error = (model(tokens).logits.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 0.02  # inputs of int8 layers are rounded, too


def test_grids_that_its_loader_would_not_read_together_are_ours(llama, tmp_path):
    rules = {"match": "layers.0.*", "method": "rtn", "grid": "nf4"}, ALL | {"grid": "llm_int8"}
    output = quantized(llama, tmp_path / "out", *rules)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "grokquant"
    assert set(config["config_groups"]) == {"nf4 g64", "llm_int8 channel"}


def damaged(output: Path, change) -> Path:
    tensors = {name: tensor.clone() for name, tensor in stored_in(output).items()}
    change(tensors)
    save_file(tensors, output / "model.safetensors")
    return output


@pytest.fixture
def one_file(llama, tmp_path) -> Path:
    rules = {"match": "layers.0.*", "method": "rtn", "grid": "nf4"}, ALL | {"grid": "llm_int8"}
    made = quantized(llama, tmp_path / "made", *rules)
    tensors = stored_in(made)
    for file in made.glob("model*"):
        file.unlink()
    save_file(tensors, made / "model.safetensors")
    return made


STATE = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"


def as_state(**keys: object) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    return torch.tensor(list(json.dumps(state | keys).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        (STATE, torch.tensor([123], dtype=torch.uint8), "bitsandbytes__nf4: Expecting property"),
        (STATE, as_state(nested_blocksize=256), "q_proj.weight.nested_absmax is missing"),
        (STATE, as_state(nested_blocksize=0), "nested_blocksize Input should be greater"),
        (STATE, as_state(nested_offset="x"), "nested_offset Input should be a valid number"),
        (STATE, as_state(padding="x" * 10_000), "larger than 10000 bytes, not the JSON of a mat"),
        (STATE, as_state(nested=[[[[]]]] * 2, shape=[-1, 64]), "shape.0 Input should be greater"),
        (STATE, as_state(blocksize=48), "its blocks hold 32, 64"),
        (STATE, as_state(shape=[128, 32]), "blocks of 64 weights do not divide rows of 32"),
        (STATE, as_state(shape=[64, 128]), "q_proj.weight is torch.uint8"),
        (STATE, as_state(shape=[64]), "bitsandbytes__nf4: 1 validation error"),
        (STATE.replace("quant_state.bitsandbytes__nf4", "absmax"), None, "absmax is missing"),
        ("model.layers.1.self_attn.q_proj.weight_format", None, "weight_format is missing"),
    ],
)
def test_damaged_parts_are_named(one_file, name, value, complaint):
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]
        if value is not None:
            tensors[name] = value

    with pytest.raises(InputError, match=complaint):
        open_checkpoint(damaged(one_file, change))


def test_a_foreign_table_is_refused(one_file):
    name = STATE.replace("quant_state.bitsandbytes__nf4", "quant_map")
    output = damaged(one_file, lambda tensors: tensors[name].mul_(0.5))
    with pytest.raises(InputError, match="q_proj.weight.quant_map does not hold the values of nf4"):
        dict(open_checkpoint(output).units())["layers.0.attention.q"].read()


def test_quantized_tensor_of_int8_is_multiplied_out_as_bitsandbytes_does():
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(50, 1)
    scales = torch.rand(50, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    found = QTensor(codes, scales, GRIDS["llm_int8"].scheme).dequantize()
    assert torch.equal(found, int8_vectorwise_dequant(codes, scales.squeeze(1)))


# --- As transformers saves it

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "nested fp4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "llm_int8": {"load_in_8bit": True},
}


def dense_weight(module: bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) -> Tensor:
    """By bitsandbytes, of a module that transformers has made."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        return int8_vectorwise_dequant(weight.data, weight.SCB)
    return dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("nested nf4", torch.bfloat16)],
)
def test_what_transformers_saves_is_read(llama, tmp_path, kind, dtype):
    """In float32, before bitsandbytes rounds it to the dtype of the model."""
    config = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    checkpoint = open_checkpoint(tmp_path / "saved")
    found = checkpoint.source.tensors
    assert {str(ref.scheme).split()[0] for _, ref in checkpoint.units()} == {kind.split()[-1]}
    for _, ref in checkpoint.units():
        module = model.get_submodule(ref.name.removesuffix(".weight"))
        dense = dense_weight(module)
        assert torch.equal(found[ref.name].read().to(dense.dtype), dense)


def test_many_nested_blocks(W, tmp_path):
    """96 * 256 / 32 scales in blocks of 256."""
    from grokquant.formats.bitsandbytes import unpacked
    from grokquant.sources.safetensors_directory import open_source

    packed, state = bnb.functional.quantize_4bit(
        W.float(), blocksize=32, compress_statistics=True, quant_type="nf4"
    )
    assert len(state.state2.absmax) == 3
    parts = {f"{NAME}.{name}": part for name, part in state.as_dict(packed=True).items()}
    save_file(parts | {NAME: packed}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {}}))
    ref = unpacked(open_source(tmp_path)).tensors[NAME]
    assert torch.equal(ref.read(), dequantize_4bit(packed, state))
