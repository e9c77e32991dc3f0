"""Checkpoints that others have quantized: read right, or refused by name.

What is written here is packed weight by weight, as the formats' own descriptions have it.
"""

import json
import shutil
from collections.abc import Callable
from os.path import relpath
from pathlib import Path

import pytest
import torch
from reader_envs import READERS, run_reader
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.formats.reading import WAY_OUT
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.runtime.load import load
from grokquant.runtime.packed import PackedMatrix
from grokquant.toy import TOY_PATH

Tensors = dict[str, Tensor]
# (name without .weight, W [out, in]) -> (what the file holds, what it stands for [out, in])
Encode = Callable[[str, Tensor], tuple[Tensors, Tensor]]
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 96, "head_dim": 16},
    "gpt_oss": {"intermediate_size": 96, "num_local_experts": 2, "head_dim": 16},
}
QUERY = "model.layers.0.self_attn.q_proj"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model of a family in bf16, as transformers saves it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **SIZES | MODELS[family])
            made[family] = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
                made[family]
            )
            shutil.copyfile(TOY_PATH / "tokenizer.model", made[family] / "tokenizer.model")
        return made[family]

    return make


@pytest.fixture
def quantized(saved, tmp_path):
    """Writes a model whose matrices `encode` packs: (directory, what all tensors stand for)."""

    def write(family: str, encode: Encode, config: dict | None) -> tuple[Path, Tensors]:
        path = shutil.copytree(saved(family), tmp_path / "source")
        units = {ref.name for _, ref in open_checkpoint(path).units()}
        tensors = load_file(path / FILE)
        written: Tensors = {}
        for name, value in tensors.items():
            if name in units:
                parts, tensors[name] = encode(name.removesuffix(".weight"), value.float())
                written |= parts
            else:
                written[name] = value
        save_file({n: t.contiguous() for n, t in written.items()}, path / FILE)
        if config is not None:
            edit_json(path / "config.json", quantization_config=config)
        return path, tensors

    return write


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        for ref in open_checkpoint(path).source.tensors.values():
            ref.read()
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    return message


def check_read(path: Path, expected: Tensors) -> None:
    tensors = open_checkpoint(path).source.tensors
    assert tensors.keys() == expected.keys()
    for name, ref in tensors.items():
        assert torch.equal(ref.read().float(), expected[name].float()), name
        for first, rows in ref.row_blocks():
            assert torch.equal(rows.float(), expected[name][first : first + len(rows)].float())


def check_whole_way(path: Path, text_file: Path, output: Path) -> None:
    """Quantized once more, compared with itself and loaded."""
    rule = {"match": "layers.*", "method": "rtn", "bits": 8, "group": 32}
    recipe = {
        "model": {"path": str(path)},
        "quantize": [rule],
        "output": {"path": str(output)},
        "eval": {"samples": 1, "length": 32},
    }
    pipeline.quantize(parse_recipe(recipe))
    assert 0 < grokquant.evaluate(output, path, text=relpath(text_file)).kld.mean.value < 0.02
    assert load(output)[0](torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def grid(W: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [out, in], float16 scales and zeros [out, groups] of consecutive columns."""
    parts = W.unflatten(1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    top = 2**bits - 1
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(1, top)
    if symmetric:
        scales = (parts.abs().amax(-1) / 2 ** (bits - 1)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    codes = (parts / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return codes.clamp(0, top).flatten(1).long(), scales, zeros.long()


def stand_for(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    """(code - zero) * scale, in float16 as engines do."""
    return (codes - zeros[:, group_of]).half() * scales[:, group_of]


def in_words(codes: list[int], bits: int) -> list[int]:
    """A stream of bits cut into int32 words, the first code in the lowest bits."""
    stream = sum(code << (bits * number) for number, code in enumerate(codes))
    words = [stream >> 32 * n & 0xFFFFFFFF for n in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def rows_in_words(codes: Tensor, bits: int) -> Tensor:
    """[rows, columns] to int32 [rows, columns * bits / 32]."""
    return torch.tensor([in_words(row, bits) for row in codes.tolist()], dtype=torch.int32)


# --- GPTQ


def gptq(
    bits: int, symmetric: bool, act_order: bool = False, version: int = 1, group: int = 32
) -> Encode:
    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        columns = W.shape[1]
        order = torch.arange(columns)
        if act_order:
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        codes, scales, zeros = grid(W[:, order], bits, group, symmetric)
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = (torch.arange(columns) // group).int()
        codes = codes[:, order.argsort()]
        stored_zeros = zeros - 1 if version == 1 else zeros
        parts = {
            f"{stem}.qweight": rows_in_words(codes, bits).T,
            f"{stem}.qzeros": rows_in_words(stored_zeros.T, bits),
            f"{stem}.scales": scales.T,
            f"{stem}.g_idx": g_idx,
        }
        return parts, stand_for(codes, scales, zeros, g_idx.long())

    return encode


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(quantized, family, bits, symmetric):
    config = GPTQ | {"bits": bits, "sym": symmetric}
    check_read(*quantized(family, gptq(bits, symmetric), config))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_in_the_order_of_activations(quantized, symmetric, version):
    config = GPTQ | {"sym": symmetric, "desc_act": True}
    config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    check_read(*quantized("mixtral", gptq(4, symmetric, True, version), config))


def test_gptq_version_2_by_its_other_key(quantized):
    """As transformers 5 names it."""
    config = GPTQ | {"sym": False, "format": "gptq_v2"}
    check_read(*quantized("mixtral", gptq(4, False, version=2), config))


def test_gptq_of_8_bits_version_2_with_any_zero_point(quantized):
    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        parts, _ = gptq(8, False, version=2)(stem, W)
        codes, scales, zeros = grid(W, 8, 32, False)
        zeros[0], zeros[1] = 0, 255
        parts[f"{stem}.qzeros"] = rows_in_words(zeros.T, 8)
        return parts, stand_for(codes, scales, zeros, torch.arange(W.shape[1]) // 32)

    config = GPTQ | {"bits": 8, "sym": False, "checkpoint_format": "gptq_v2"}
    check_read(*quantized("mixtral", encode, config))


def test_gptq_as_autogptq_left_it(quantized, text_file, tmp_path):
    """A file of another name, and a quantize_config.json of few fields beside it alone."""
    path, expected = quantized("mixtral", gptq(4, True), None)
    (path / FILE).rename(path / "gptq_model-4bit-32g.safetensors")
    older = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    edit_json(path / "quantize_config.json", **older | {"true_sequential": True})
    check_read(path, expected)
    check_whole_way(path, text_file, tmp_path / "out")


def test_names_of_experts_that_were_fused(quantized):
    """As gptqmodel and llm-compressor call them where transformers has them fused."""
    path, expected = quantized("mixtral", gptq(4, True), GPTQ)
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            stem, w, part = name.replace("block_sparse_moe", "mlp").rsplit(".", 2)
            tensors[f"{stem}.{names[w]}.{part}"] = tensors.pop(name)

    edit(path, rename)
    check_read(path, expected)


def test_biases_that_autogptq_has_made_up(quantized):
    """Zeros beside every matrix, of models without any bias."""
    path, expected = quantized("mixtral", gptq(4, True), GPTQ)

    def add_biases(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            zeros = torch.zeros(tensors[name].shape[1]).half()
            tensors[name.replace(".scales", ".bias")] = zeros

    edit(path, add_biases)
    check_read(path, expected)
    edit(path, lambda t: t[QUERY + ".bias"][-1:].fill_(0.5))
    assert f"{QUERY}.bias is not zero, but the model has no such bias" in refusal(path)


def test_gptq_rules_for_some_modules(quantized):
    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        if stem == QUERY:
            return gptq(8, True, group=64)(stem, W)
        return gptq(4, True, act_order="k_proj" in stem)(stem, W)

    rules = {
        r"-:.*o_proj": {},
        r"+:.*\.q_proj$": {"bits": 8, "group_size": 64},
        r".*\.k_proj": {"desc_act": True},
    }
    check_read(*quantized("qwen3_moe", encode, GPTQ | {"dynamic": rules}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bits": 5}, "quantization_config.bits: Input should be 2, 3, 4 or 8, not 5"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: Input should be 'gptq' or 'gptq_v2'"),
        ({"is_marlin_format": True}, "quantization_config.is_marlin_format"),
        ({"group_size": 64}, "scales has 2 groups, which does not match int4 g64 sym"),
        ({"group_size": 0}, "scales has 2 groups, which does not match int4 channel sym"),
        ({"dynamic": {"+:(": {}}}, "dynamic: not a regular expression"),
        ({"dynamic": {"+:.*": {"bits": "x"}}}, "quantization_config.dynamic"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "int8 g32 sym needs torch.int32"),
        ({"quant_method": "spqr"}, "'spqr' cannot be read (compressed-tensors, "),
        ({"quant_method": "spqr"}, "; it is SpQR, codes with outliers beside them"),
        ({"quant_method": "quark"}, "quantization_config.export: Field required"),
        ({"quant_method": None}, "quant_method: None cannot be read"),
    ],
)
def test_configs_that_gptq_cannot_have(quantized, changes, complaint):
    path, _ = quantized("mixtral", gptq(4, True), GPTQ | changes)
    assert complaint in refusal(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(QUERY + ".g_idx"), f"{QUERY}.g_idx is missing"),
        (lambda t: t.update({QUERY + ".g_idx": torch.tensor(1)}), f"{QUERY}.scales has 0 groups"),
        (lambda t: t[QUERY + ".g_idx"].add_(1), "refers to groups that do not exist"),
        (lambda t: t[QUERY + ".g_idx"].view(-1)[:1].fill_(1), "reorders columns, but desc_act"),
        (lambda t: t.pop(QUERY + ".qweight"), f"tensor {QUERY}.weight is missing"),
        (
            lambda t: t.update({"model.norm.scales": torch.ones(2)}),
            "unexpected tensor model.norm.scales: mixtral has no such parameter",
        ),
    ],
)
def test_damaged_gptq(quantized, change, complaint):
    path, _ = quantized("mixtral", gptq(4, True), GPTQ)
    edit(path, change)
    assert complaint in refusal(path)


# --- AWQ

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def awq(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
    codes, scales, zeros = grid(W, 4, 32, False)

    def shuffled(rows: Tensor) -> Tensor:
        """Every eight codes of a row in the order 0 2 4 6 1 3 5 7."""
        mixed = rows.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return rows_in_words(mixed.flatten(1), 4)

    parts = {
        f"{stem}.qweight": shuffled(codes.T),
        f"{stem}.qzeros": shuffled(zeros.T),
        f"{stem}.scales": scales.T,
    }
    return parts, stand_for(codes, scales, zeros, torch.arange(W.shape[1]) // 32)


def test_awq(quantized, text_file, tmp_path):
    path, expected = quantized("mixtral", awq, AWQ)
    check_read(path, expected)
    assert {str(ref.scheme) for _, ref in open_checkpoint(path).units()} == {"int4 g32 asym"}
    check_whole_way(path, text_file, tmp_path / "out")


def test_awq_as_autoawq_left_it(quantized):
    path, expected = quantized("qwen3_moe", awq, None)
    older = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    edit_json(path / "quant_config.json", **older)
    check_read(path, expected)


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_the_order_of_awq_by_its_other_keys(quantized, key):
    config = {name: value for name, value in AWQ.items() if name != "version"}
    path, expected = quantized("mixtral", awq, config | {key: "gemm"})
    check_read(path, expected)
    edit_json(path / "config.json", quantization_config=config | {key: "gemv"})
    assert f"quantization_config.{key}: Input should be 'gemm'" in refusal(path)


@torch.no_grad()
def test_awq_stays_in_codes_where_packed_is_asked_for(quantized):
    path, _ = quantized("mixtral", awq, AWQ)
    packed, dense = load(path, packed=True)[0], load(path)[0]
    assert any(isinstance(module, PackedMatrix) for module in packed.modules())
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(packed(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"version": "gemv"},
            "quantization_config.version: Input should be 'gemm', not 'gemv'; other variants are "
            f"not supported, {WAY_OUT}",
        ),
        ({"bits": 8}, "quantization_config.bits: Input should be 4, not 8"),
        ({"zero_point": False}, "quantization_config.zero_point"),
        (
            {"group_size": 64},
            "qzeros is torch.int32 [2, 12], int4 g64 asym needs torch.int32 [1, 12]",
        ),
    ],
)
def test_other_awq_is_refused(quantized, changes, complaint):
    path, _ = quantized("mixtral", awq, AWQ | changes)
    assert complaint in refusal(path)


# --- auto-round

AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
}


def without_order(encode: Encode) -> Encode:
    """auto-round writes no g_idx."""

    def shorter(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        parts, dense = encode(stem, W)
        del parts[f"{stem}.g_idx"]
        return parts, dense

    return shorter


@pytest.mark.parametrize(
    ("packing", "version"),
    [("auto_round:auto_gptq", 1), ("auto_round:gptq", 1), ("auto_round", 2)],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_round(quantized, packing, version, symmetric, bits):
    encode = without_order(gptq(bits, symmetric, version=version))
    config = AUTO_ROUND | {"packing_format": packing, "sym": symmetric, "bits": bits}
    check_read(*quantized("mixtral", encode, config))


def test_auto_round_with_an_order_and_on_its_whole_way(quantized, text_file, tmp_path):
    path, expected = quantized("qwen3_moe", gptq(4, True), AUTO_ROUND)
    check_read(path, expected)
    check_whole_way(path, text_file, tmp_path / "out")


def test_auto_round_in_words_of_awq(quantized):
    config = AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "sym": False}
    check_read(*quantized("mixtral", awq, config))


def test_grids_of_some_modules_of_auto_round(quantized):
    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        if stem == QUERY:
            return without_order(gptq(8, True, group=64))(stem, W)
        return without_order(gptq(4, "k_proj" not in stem))(stem, W)

    extra = {
        "model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"},
        r".*self_attn\.q_.*": {"bits": 2},  # a name of its own comes first
        QUERY: {"bits": 8, "group_size": 64},
        "k_proj": {"sym": False},
    }
    check_read(*quantized("qwen3_moe", encode, AUTO_ROUND | {"extra_config": extra}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "quantization_config.packing_format"),
        ({"data_type": "mx_fp"}, "quantization_config.data_type: Input should be 'int'"),
        ({"act_bits": 8}, "quantization_config.act_bits"),
        ({"bits": 5}, "quantization_config.bits"),
        ({"rotation_config": {"a": 1}}, "quantization_config.rotation_config"),
        ({"extra_config": {"(": {}}}, "extra_config: not a regular expression"),
        ({"group_size": 64}, "scales has 2 groups, which does not match int4 g64 sym"),
    ],
)
def test_other_auto_round_is_refused(quantized, changes, complaint):
    path, _ = quantized("mixtral", without_order(gptq(4, True)), AUTO_ROUND | changes)
    assert complaint in refusal(path)


# --- 8-bit floats

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 40], "activation_scheme": "dynamic"}


def block_fp8(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
    """Blocks of 32 x 40, which do not divide the columns."""
    scales = torch.empty(-(-W.shape[0] // 32), -(-W.shape[1] // 40))
    codes, dense = torch.empty(W.shape, dtype=torch.float8_e4m3fn), torch.empty(W.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(32 * i, 32 * i + 32), slice(40 * j, 40 * j + 40)
            scales[i, j] = W[part].abs().max() / 448
            codes[part] = (W[part] / scales[i, j]).to(torch.float8_e4m3fn)
            dense[part] = codes[part].float() * scales[i, j]
    return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scales}, dense.bfloat16()


def test_block_fp8(quantized, text_file, tmp_path):
    path, expected = quantized("qwen3_moe", block_fp8, FP8)
    check_read(path, expected)
    stored = {ref.stored_as for _, ref in open_checkpoint(path).units()}
    assert stored == {"fp8 32x40"}
    check_whole_way(path, text_file, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weight_block_size": None}, "quantization_config.weight_block_size names no block"),
        ({"weight_block_size": [128, 0]}, "quantization_config.weight_block_size.1"),
        ({"weight_block_size": [64, 40]}, "weight_scale_inv is torch.float32 [2, 3], blocks of"),
        ({"fmt": "e5m2"}, "quantization_config.fmt: Input should be 'e4m3', not 'e5m2'"),
        ({"activation_scheme": "often"}, "quantization_config.activation_scheme"),
    ],
)
def test_other_fp8_is_refused(quantized, changes, complaint):
    path, _ = quantized("qwen3_moe", block_fp8, FP8 | changes)
    assert complaint in refusal(path)


SCALE = QUERY + ".weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(SCALE), f"{SCALE} is missing"),
        (
            lambda t: t.update({QUERY + ".weight": t[QUERY + ".weight"].bfloat16()}),
            f"unexpected tensor {SCALE}: qwen3-moe has no such parameter",
        ),
        (lambda t: t[SCALE].fill_(3e38), f"{QUERY}.weight times {SCALE} is not finite"),
        (
            lambda t: t.update({"model.norm.inner.input_scale": torch.ones(1)}),
            "unexpected tensor model.norm.inner.input_scale",
        ),
    ],
)
def test_damaged_fp8(quantized, change, complaint):
    path, _ = quantized("qwen3_moe", block_fp8, FP8)
    edit(path, change)
    assert complaint in refusal(path)


def one_scale_fp8(ending: str, scale_shape: Callable[[int], tuple[int, ...]]) -> Encode:
    """A scale for the matrix or for each of its rows, multiplied out by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        shape = scale_shape(len(W))
        by_row = len(W) in shape
        scale = (W.abs().amax(1, keepdim=True) if by_row else W.abs().max()) / 448
        codes = (W / scale).to(torch.float8_e4m3fn)
        grid_of_scales = scale.reshape(-1, 1)
        dense = Fp8Dequantize(None)._dequantize_one(codes, grid_of_scales, torch.bfloat16)
        return {f"{stem}.weight": codes, f"{stem}.{ending}": scale.reshape(shape)}, dense

    return encode


@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize(
    "scale_shape",
    [lambda rows: (), lambda rows: (1,), lambda rows: (rows,), lambda rows: (rows, 1)],
)
def test_fp8_per_tensor_and_per_row(quantized, ending, scale_shape):
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    check_read(*quantized("mixtral", one_scale_fp8(ending, scale_shape), config))


def test_fp8_of_fbgemm(quantized):
    """By the product with which transformers runs it: of a unit matrix, so of the weights."""

    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        parts, _ = one_scale_fp8("weight_scale", lambda rows: (rows, 1))(stem, W)
        codes, scale = parts.values()
        unit = torch.eye(W.shape[1]).to(torch.float8_e4m3fn)
        ones = torch.ones(W.shape[1], 1)
        kinds = {"scale_a": ones, "scale_b": scale.T.contiguous(), "out_dtype": torch.bfloat16}
        return parts, torch._scaled_mm(unit, codes.T, **kinds).T

    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    check_read(*quantized("mixtral", encode, config))


def test_scales_of_powers_of_two(quantized):
    """As DeepSeek-V3.1 and MXFP8 have them: exponents in a byte, by two names of their dtype."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        largest = W.unflatten(1, (-1, 32)).abs().amax(-1)
        exponents = (largest / 448).log2().ceil().int() + 127
        powers = 2.0 ** (exponents - 127)
        codes = (W / powers.repeat_interleave(32, 1)).to(torch.float8_e4m3fn)
        stored = exponents.to(torch.uint8)
        dense = Fp8Dequantize(None)._dequantize_one(codes, stored, torch.bfloat16)
        if "q_proj" in stem:
            stored = stored.view(torch.float8_e8m0fnu)
        return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": stored}, dense

    check_read(*quantized("mixtral", encode, FP8 | {"weight_block_size": [1, 32]}))


def notes_of(path: Path) -> str:
    (note,) = open_checkpoint(path).source.notes
    assert str(path) in note and "only the weights are read" in note
    return note.partition("left out: ")[2]


def test_scales_of_activations_and_caches_are_named_and_left_out(quantized):
    encode = one_scale_fp8("weight_scale", lambda rows: (1,))
    path, expected = quantized("qwen3_moe", encode, FP8 | STATIC)
    names = [f"{QUERY}.input_scale", "model.layers.0.self_attn.k_scale"]
    names += ["model.layers.0.self_attn.v_proj.output_scale"]
    names += ["model.layers.0.mlp.experts.1.down_proj.input_scale"]
    edit(path, lambda t: t.update({name: torch.ones(1) for name in names}))
    check_read(path, expected)
    found = "inputs of matrices (8-bit float, static), 2 input_scale, 1 k_scale, 1 output_scale"
    assert notes_of(path) == found


STATIC = {"weight_block_size": None, "activation_scheme": "static"}


def test_fp8_of_which_the_config_says_nothing_is_refused(quantized):
    path, _ = quantized("qwen3_moe", block_fp8, None)
    assert "is torch.float8_e4m3fn, but config.json describes no scales for it" in refusal(path)


# --- MXFP4


@pytest.fixture
def mxfp4(saved, tmp_path) -> tuple[Path, Tensors]:
    """gpt-oss as released, of random bits: (directory, what transformers makes of the experts)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = shutil.copytree(saved("gpt_oss"), tmp_path / "source")
    expected, draw = {}, torch.Generator().manual_seed(0)

    def pack(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=draw).to(torch.uint8)
            scales = torch.randint(118, 124, shape, generator=draw).to(torch.uint8)
            tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
            expected[name] = convert_moe_packed_tensors(blocks, scales)  # (experts, in, out)

    edit(path, pack)
    edit_json(path / "config.json", quantization_config={"quant_method": "mxfp4"})
    return path, expected


def test_mxfp4(mxfp4, text_file, tmp_path):
    path, expected = mxfp4
    tensors = open_checkpoint(path).source.tensors
    for expert in range(2):
        prefix = "model.layers.0.mlp.experts"
        gate_up, down = (
            expected[f"{prefix}.{part}"][expert].T for part in ("gate_up_proj", "down_proj")
        )
        for part, wanted in (("gate", gate_up[::2]), ("up", gate_up[1::2]), ("down", down)):
            assert torch.equal(tensors[f"{prefix}.{expert}.{part}_proj.weight"].read(), wanted)
    check_whole_way(path, text_file, tmp_path / "out")


def test_one_expert_of_mxfp4_is_read_alone(mxfp4, monkeypatch):
    from grokquant.formats import mxfp4 as module

    sizes = []
    dense = module._dense
    monkeypatch.setattr(module, "_dense", lambda b, s: sizes.append(b.shape[0]) or dense(b, s))
    for name, ref in open_checkpoint(mxfp4[0]).source.tensors.items():
        if "experts.1." in name and "bias" not in name:
            ref.read()
    assert sizes == [1, 1, 1]


BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = "model.layers.0.mlp.experts.down_proj_scales"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(SCALES), f"{SCALES} is missing"),
        (lambda t: t.pop(BLOCKS), "down_proj.weight is missing"),
        (lambda t: t.update({BLOCKS: t[BLOCKS][:, :, :1].contiguous()}), f"{BLOCKS} has shape"),
        (lambda t: t.update({SCALES: t[SCALES].int()}), "and its scales must be uint8"),
        (lambda t: t[SCALES].view(-1)[-1:].fill_(255), f"{SCALES} holds non-finite values"),
        (lambda t: t.update({"model.x_scales": torch.ones(1)}), "unexpected tensor model.x_scales"),
    ],
)
def test_damaged_mxfp4(mxfp4, change, complaint):
    edit(mxfp4[0], change)
    assert complaint in refusal(mxfp4[0])


# --- compressed-tensors of others


def packed(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
    """By the package that defines the format."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32, actorder="weight")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    scales = (W.unflatten(1, (-1, 32)).abs().amax(-1) / 7).bfloat16()
    state = {"weight": W.bfloat16(), "weight_scale": scales}
    parts = PackedQuantizationCompressor.compress(dict(state), scheme)
    dense = PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]
    return {f"{stem}.{name}": value for name, value in parts.items()}, dense


def spans(W: Tensor, args) -> Tensor:
    """[.., values of a block] of a matrix, one row of values for each of its scales."""
    rows, columns = W.shape
    if args.strategy == "tensor":
        return W.reshape(1, -1)
    if args.strategy == "channel":
        return W.unsqueeze(1)
    if args.strategy == "block":
        high, wide = args.block_structure
        whole = torch.nn.functional.pad(W, (0, -columns % wide, 0, -rows % high))
        return whole.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
    return W.unflatten(1, (-1, args.group_size))


def compressed(storage: str, dtype: torch.dtype, **weights) -> Encode:
    """By the package that defines the format, which finds the scales, too."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    compressor = BaseCompressor.get_value_from_registry(storage)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))

    def encode(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
        values = spans(W, scheme.weights)
        shared = generate_gparam(W.min(), W.max()) if "nvfp4" in storage else None
        low, high = values.amin(-1), values.amax(-1)
        scale, zero = calculate_qparams(low, high, scheme.weights, global_scale=shared)
        if storage.startswith("mx"):
            scale = 2.0 ** (high.maximum(-low) / 4).log2().floor()
        scale = scale.to(dtype)
        state = {"weight": W.to(dtype), "weight_scale": scale, "weight_zero_point": zero}
        if shared is not None:
            state["weight_global_scale"] = shared
        parts = compressor.compress(state, scheme)
        dense = compressor.decompress(dict(parts), scheme)["weight"]
        return {f"{stem}.{name}": value.contiguous() for name, value in parts.items()}, dense

    return encode


FLOAT8 = {"num_bits": 8, "type": "float"}
INT8 = {"num_bits": 8, "type": "int"}
MICRO = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
NVIDIA = {"type": "float", "strategy": "tensor_group", "group_size": 16}
NVIDIA |= {"num_bits": 4, "scale_dtype": torch.float8_e4m3fn}
STORAGES = [
    ("float-quantized", torch.bfloat16, FLOAT8 | {"strategy": "tensor"}, "fp8 tensor"),
    ("float-quantized", torch.float32, FLOAT8 | {"strategy": "tensor"}, "fp8 tensor"),
    ("float-quantized", torch.bfloat16, FLOAT8 | {"strategy": "channel"}, "fp8 channel"),
    ("float-quantized", torch.float16, FLOAT8 | {"strategy": "channel"}, "fp8 channel"),
    (
        "float-quantized",
        torch.bfloat16,
        FLOAT8 | {"strategy": "group", "group_size": 32},
        "fp8 g32",
    ),
    (
        "float-quantized",
        torch.bfloat16,
        FLOAT8 | {"strategy": "block", "block_structure": [32, 40]},
        "fp8 32x40",
    ),
    ("naive-quantized", torch.bfloat16, FLOAT8 | {"strategy": "channel"}, "fp8 channel"),
    ("naive-quantized", torch.bfloat16, INT8 | {"strategy": "channel"}, "int8 channel sym"),
    ("int-quantized", torch.bfloat16, INT8 | {"strategy": "channel"}, "int8 channel sym"),
    ("int-quantized", torch.float32, INT8 | {"strategy": "tensor"}, "int8 channel sym"),
    (
        "int-quantized",
        torch.float32,
        INT8 | {"strategy": "tensor", "symmetric": False},
        "int8 channel asym",
    ),
    (
        "int-quantized",
        torch.bfloat16,
        INT8 | {"strategy": "group", "group_size": 16},
        "int8 g16 sym",
    ),
    ("mxfp8-quantized", torch.bfloat16, MICRO | {"num_bits": 8}, "mxfp8 g32"),
    ("mxfp4-pack-quantized", torch.bfloat16, MICRO | {"num_bits": 4}, "mxfp4 g32"),
    ("nvfp4-pack-quantized", torch.bfloat16, NVIDIA, "nvfp4 g16"),
]
DYNAMIC = {"strategy": "token", "dynamic": True}


def config_of(storage: str, weights: dict, inputs: dict | None) -> dict:
    """As the package writes it."""
    from compressed_tensors.quantization import QuantizationConfig

    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=storage,
        quantization_status="compressed",
        ignore=["lm_head", "re:.*mlp.gate$"],
    )
    return json.loads(config.model_dump_json())


@pytest.mark.parametrize(("storage", "dtype", "weights", "stored"), STORAGES)
def test_compressed_tensors_multiplied_out_by_its_package(
    quantized, storage, dtype, weights, stored
):
    config = config_of(storage, weights, None)
    path, expected = quantized("qwen3_moe", compressed(storage, dtype, **weights), config)
    check_read(path, expected)
    assert {ref.stored_as for _, ref in open_checkpoint(path).units()} == {stored}


@pytest.mark.parametrize(
    ("storage", "dtype", "weights", "stored", "inputs", "note"),
    [
        (*STORAGES[2], FLOAT8 | DYNAMIC, "8-bit float, dynamic"),
        (*STORAGES[8], INT8 | {"strategy": "tensor"}, "8-bit int, static"),
    ],
    ids=["fp8", "w8a8"],
)
def test_quantized_activations_are_named(
    quantized, text_file, tmp_path, storage, dtype, weights, stored, inputs, note
):
    config = config_of(storage, weights, inputs)
    path, expected = quantized("qwen3_moe", compressed(storage, dtype, **weights), config)
    assert notes_of(path) == f"inputs of matrices ({note})"
    check_read(path, expected)
    check_whole_way(path, text_file, tmp_path / "out")


def test_a_cache_of_8_bits_is_named(quantized):
    storage, dtype, weights, _ = STORAGES[0]
    config = config_of(storage, weights, None)
    config["kv_cache_scheme"] = FLOAT8 | {"strategy": "tensor", "dynamic": False}
    path, expected = quantized("qwen3_moe", compressed(storage, dtype, **weights), config)
    names = [f"model.layers.0.self_attn.{name}_scale" for name in "kv"]
    edit(path, lambda t: t.update({name: torch.ones(1) for name in names}))
    assert notes_of(path) == "cache of keys and values (8-bit float, static), 1 k_scale, 1 v_scale"
    check_read(path, expected)


NV_QUERY = f"{QUERY}.weight_global_scale"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(NV_QUERY), f"{NV_QUERY} is missing"),
        (lambda t: t.update({NV_QUERY: torch.ones(2)}), "torch.float32 [2], not torch.float32 [1]"),
        (lambda t: t[NV_QUERY].fill_(0), "weight_packed times"),
        (lambda t: t.pop(QUERY + ".weight_scale"), "weight_scale is missing"),
        (
            lambda t: t.update({QUERY + ".weight_scale": torch.ones(64, 2)}),
            "blocks of [1, 16] in [64, 64] need torch.float8_e4m3fn [64, 4]",
        ),
        (
            lambda t: t.update({QUERY + ".weight_packed": torch.ones(64, 2)}),
            "nvfp4-pack-quantized needs torch.uint8 of two axes",
        ),
        (
            lambda t: t.update({QUERY + ".weight": torch.ones(64, 64).to(torch.int8)}),
            f"{QUERY}.weight is stored twice, packed and not",
        ),
    ],
)
def test_damaged_nvfp4(quantized, change, complaint):
    storage, dtype, weights, _ = STORAGES[-1]
    config = config_of(storage, weights, None)
    path, _ = quantized("qwen3_moe", compressed(storage, dtype, **weights), config)
    edit(path, change)
    assert complaint in refusal(path)


# --- ModelOpt


def modelopt_nvfp4(stem: str, W: Tensor) -> tuple[Tensors, Tensor]:
    """What compressed-tensors makes of it, with a second scale that is exact upside down."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(**NVIDIA)
    parts, _ = compressed("nvfp4-pack-quantized", torch.bfloat16, **NVIDIA)(stem, W)
    stored = {
        f"{stem}.weight": parts[f"{stem}.weight_packed"],
        f"{stem}.weight_scale": parts[f"{stem}.weight_scale"],
        f"{stem}.weight_scale_2": torch.tensor(2.0**-11),
    }
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(dict(stored))
    state = {name.removeprefix(f"{stem}."): value for name, value in converted.items()}
    state["weight_global_scale"] = state["weight_global_scale"].reshape(1)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return stored, compressor.decompress(state, scheme)["weight"]


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def test_nvfp4_of_modelopt(quantized):
    path, expected = quantized("qwen3_moe", modelopt_nvfp4, MODELOPT)
    edit(path, lambda t: t.update({f"{QUERY}.input_scale": torch.ones(())}))
    check_read(path, expected)
    assert notes_of(path) == "inputs of matrices (NVFP4), 1 input_scale"


@pytest.mark.parametrize("scale_shape", [lambda rows: (), lambda rows: (rows,)])
def test_fp8_of_modelopt_described_in_a_file_of_its_own(quantized, scale_shape):
    path, expected = quantized("mixtral", one_scale_fp8("weight_scale", scale_shape), None)
    described = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    edit_json(path / "hf_quant_config.json", quantization=described, producer={})
    edit(path, lambda t: t.update({"model.layers.0.self_attn.v_proj.v_scale": torch.ones(())}))
    check_read(path, expected)
    said = "inputs of matrices (FP8), cache of keys and values (FP8), 1 v_scale"
    assert notes_of(path) == said


@pytest.mark.parametrize(
    ("changes", "change", "complaint"),
    [
        ({"quant_algo": "NVFP4_AWQ"}, lambda t: None, "quantization_config.quant_algo"),
        ({}, lambda t: t.pop(QUERY + ".weight_scale_2"), "weight_scale_2 is missing"),
        ({}, lambda t: t.update({QUERY + ".weight_scale": torch.ones(2)}), "[64, 32] bytes needs"),
        (
            {},
            lambda t: t.update({QUERY + ".pre_quant_scale": torch.ones(64)}),
            f"unexpected tensor {QUERY}.pre_quant_scale",
        ),
    ],
)
def test_other_modelopt_is_refused(quantized, changes, change, complaint):
    path, _ = quantized("qwen3_moe", modelopt_nvfp4, MODELOPT | changes)
    edit(path, change)
    assert complaint in refusal(path)


# --- other compressed-tensors


def group_of(**changes) -> dict:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights | {"symmetric": True} | changes}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "transform_config": {},
        "sparsity_config": {},
    }


@pytest.mark.parametrize("actorder", [None, "weight", "static"])
def test_compressed_tensors_of_llm_compressor(quantized, actorder):
    check_read(*quantized("qwen3_moe", packed, group_of(actorder=actorder)))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            group_of(actorder="group"),
            "weights.actorder: Input should be 'weight', 'static' or False",
        ),
        (group_of(type="float"), "weights.type: Input should be 'int', not 'float'"),
        (group_of(strategy="tensor"), "weights.strategy"),
        ({"format": "float-quantized"}, "weights.type: Input should be 'float', not 'int'"),
        ({"format": "nvfp4-pack-quantized"}, "weights.type: Input should be 'float', not 'int'"),
        ({"format": "marlin-24"}, "quantization_config.format"),
        (
            group_of(type="float", num_bits=8, strategy="block") | {"format": "float-quantized"},
            "group_0.weights: strategy block lacks its size",
        ),
        (
            {"transform_config": {"config_groups": {"u": {}}}},
            "quantization_config.transform_config",
        ),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format"),
    ],
)
def test_other_compressed_tensors_are_refused(quantized, changes, complaint):
    path, _ = quantized("qwen3_moe", packed, group_of() | changes)
    message = refusal(path)
    assert complaint in message and "config.json" in message


@pytest.mark.parametrize("name", ["weight_g_idx", "k_scale", "weight_global_scale"])
def test_parts_that_nobody_reads_are_named(quantized, name):
    path, _ = quantized("qwen3_moe", packed, group_of())
    edit(path, lambda t: t.update({f"{QUERY}.{name}": torch.ones(64)}))
    assert f"unexpected tensor {QUERY}.{name}: qwen3-moe has no such parameter" in refusal(path)


def test_scales_without_codes_are_named(quantized):
    path, _ = quantized("qwen3_moe", packed, group_of())

    def unpack_query(tensors: Tensors) -> None:
        tensors[QUERY + ".weight"] = torch.ones(64, 64).bfloat16()
        tensors.pop(QUERY + ".weight_packed")
        tensors.pop(QUERY + ".weight_shape")

    edit(path, unpack_query)
    assert f"unexpected tensor {QUERY}.weight_scale" in refusal(path)


# --- bitsandbytes of transformers


def test_a_mixture_of_which_transformers_has_quantized_the_attention(saved, text_file, tmp_path):
    """With double quantization; bitsandbytes leaves fused experts as they are."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        saved("mixtral"), quantization_config=config, dtype=torch.bfloat16
    )
    path = tmp_path / "source"
    model.save_pretrained(path)
    shutil.copyfile(TOY_PATH / "tokenizer.model", path / "tokenizer.model")
    stored = {name.split(".")[2]: ref.stored_as for name, ref in open_checkpoint(path).units()}
    assert stored == {"attention": "nf4 g64", "experts": "bfloat16"}
    check_whole_way(path, text_file, tmp_path / "out")


# --- HQQ and torchao, as their packages packed a matrix


RECORDED = Path(__file__).parent / "recorded"
CONFIGS = {
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32}}},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "quark": {"export": {"weight_format": "real_quantized"}, "global_quant_config": {}},
}


FIRST = {"hqq": "8 bits, axis 0", "torchao": "int8 rows", "quark": "mxfp4"}


def recorded(file: Path) -> dict[str, Tensors]:
    """The tensors of each way in which a library packs, and `dense`, what they stand for."""
    ways: dict[str, Tensors] = {}
    for name, value in load_file(file).items():
        way, _, tensor = name.partition("/")
        ways.setdefault(way, {})[tensor] = value
    return ways


def with_packed_query(path: Path, library: str, tensors: Tensors) -> None:
    packed = {name: value for name, value in tensors.items() if name != "dense"}
    edit(path, lambda t: (t.pop(f"{QUERY}.weight"), t.update(packed)))
    config = {"quant_method": library} | CONFIGS[library]
    edit_json(path / "config.json", quantization_config=config)


def check_recorded(path: Path, library: str, ways: dict[str, Tensors]) -> None:
    original = load_file(path / FILE)
    for tensors in ways.values():
        save_file(original, path / FILE)
        with_packed_query(path, library, tensors)
        found = open_checkpoint(path).source.tensors
        assert found.keys() == original.keys()
        for name, ref in found.items():
            expected = tensors["dense"] if name == f"{QUERY}.weight" else original[name]
            assert torch.equal(ref.read().to(expected.dtype), expected), name


@pytest.mark.parametrize(("library", "count"), [("hqq", 10), ("torchao", 5), ("quark", 3)])
def test_matrices_that_libraries_have_packed(saved, tmp_path, library, count):
    ways = recorded(RECORDED / f"{library}.safetensors")
    assert len(ways) == count
    check_recorded(shutil.copytree(saved("mixtral"), tmp_path / "source"), library, ways)


@pytest.mark.parametrize("library", ["hqq", "torchao", "quark"])
def test_such_a_source_on_its_whole_way(saved, text_file, tmp_path, library):
    path = shutil.copytree(saved("mixtral"), tmp_path / "source")
    with_packed_query(path, library, recorded(RECORDED / f"{library}.safetensors")[FIRST[library]])
    check_whole_way(path, text_file, tmp_path / "output")


@pytest.mark.parametrize(
    ("library", "change", "complaint"),
    [
        ("hqq", lambda t: t[f"{QUERY}.nbits"].fill_(5), "is no matrix [64, 64] of 5 bits"),
        ("hqq", lambda t: t[f"{QUERY}.shape"].fill_(128), "is no matrix [128, 128] of 8 bits"),
        ("hqq", lambda t: t[f"{QUERY}.shape"].fill_(-1), f"{QUERY}.shape is no shape of a matrix"),
        ("hqq", lambda t: t.pop(f"{QUERY}.zero"), f"{QUERY}.zero is missing"),
        ("hqq", lambda t: t[f"{QUERY}.quant_zero"].fill_(1), "this variant of HQQ is not"),
        (
            "hqq",
            lambda t: t.update({f"{QUERY}.nbits": torch.tensor([8, 8])}),
            f"{QUERY}.nbits is torch.int64 [2], expected integers, 1 of them",
        ),
        (
            "hqq",
            lambda t: t.update({f"{QUERY}.shape": torch.tensor([64.0, float("nan")])}),
            f"{QUERY}.shape is torch.float32 [2], expected integers",
        ),
        (
            "hqq",
            lambda t: t.update({f"{QUERY}.quant_zero": torch.zeros(2).int()}),
            f"{QUERY}.quant_zero is torch.int32 [2], expected integers",
        ),
        (
            "hqq",
            lambda t: t.update({f"{QUERY}.W_q": torch.tensor(0, dtype=torch.uint8)}),
            "torch.uint8 [] with scales",
        ),
        (
            "hqq",
            lambda t: t.update({f"{QUERY}.zero": t[f"{QUERY}.zero"].bool()}),
            "zero points torch.bool",
        ),
        (
            "quark",
            lambda t: t.update(
                {
                    f"{QUERY}.weight": torch.ones(64, 64, dtype=torch.int8),
                    f"{QUERY}.weight_scale": torch.ones(64),
                    f"{QUERY}.weight_zero_point": torch.full((64,), 300),
                }
            ),
            "weight_zero_point torch.int64 [64] is no export of Quark",
        ),
        (
            "quark",
            lambda t: t.update({f"{QUERY}.weight_scale": torch.ones(3)}),
            f"is supported: FP8 and int8 per tensor or row, MXFP4; {WAY_OUT}",
        ),
        ("torchao", lambda t: t.pop(f"{QUERY}._weight_scale"), "_weight_scale is missing"),
        (
            "torchao",
            lambda t: t.update({f"{QUERY}._weight_scale": torch.ones(64, 3)}),
            "torch.float32 [64, 3] do not fit together",
        ),
    ],
)
def test_damaged_matrices_of_libraries(saved, tmp_path, library, change, complaint):
    path = shutil.copytree(saved("mixtral"), tmp_path / "source")
    with_packed_query(path, library, recorded(RECORDED / f"{library}.safetensors")[FIRST[library]])
    edit(path, change)
    assert complaint in refusal(path)


@pytest.mark.parametrize("kind", ["Int4WeightOnlyConfig", None])
def test_other_torchao_is_refused(saved, tmp_path, kind):
    path = shutil.copytree(saved("mixtral"), tmp_path / "source")
    described = {"quant_method": "torchao", "quant_type": {"default": {"_type": kind}}}
    edit_json(path / "config.json", quantization_config=described)
    line = refusal(path)
    assert f"quant_type: {kind or 'no quant_type'} is not supported (Float8" in line
    assert line.endswith(WAY_OUT)


@pytest.mark.readers
@pytest.mark.skipif(not READERS, reason="GROKQUANT_READERS names no environments")
@pytest.mark.parametrize("library", ["hqq", "torchao", "quark"])
def test_what_the_libraries_write_now(saved, tmp_path, library):
    run_reader(library, "write_packed.py", library, tmp_path / "packed.safetensors")
    ways = recorded(tmp_path / "packed.safetensors")
    check_recorded(shutil.copytree(saved("mixtral"), tmp_path / "source"), library, ways)
