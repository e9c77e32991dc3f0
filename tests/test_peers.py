"""Directories that other tools have made are evaluated and compared as ours are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from grokquant.cli import main
from grokquant.toy import TOY_PATH

GROUP = 32
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*block_sparse_moe.gate$"],
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.20.0",
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "actorder": "static",
                "dynamic": False,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
}


def matrices(path: Path) -> list[str]:
    parts = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")
    return [name for name in load_file(path / "model.safetensors") if name.endswith(parts)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("reference")
    MixtralForCausalLM(config).bfloat16().save_pretrained(path)
    shutil.copyfile(TOY_PATH / "tokenizer.model", path / "tokenizer.model")
    return path


@pytest.fixture(scope="module")
def peer(reference, tmp_path_factory) -> Path:
    """What the compressed-tensors package makes of the reference, as llm-compressor lays it out."""
    path = tmp_path_factory.mktemp("peer")
    scheme = QuantizationConfig.model_validate(CONFIG).config_groups["group_0"]
    tensors = load_file(reference / "model.safetensors")
    for name in matrices(reference):
        weight = tensors.pop(name)
        groups = weight.float().view(weight.shape[0], -1, GROUP)
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        state = {"weight": weight, "weight_scale": scale.bfloat16()}
        written = PackedQuantizationCompressor.compress(state, scheme)
        stem = name.removesuffix("weight")
        tensors |= {stem + part: value.contiguous() for part, value in written.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((reference / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    shutil.copyfile(TOY_PATH / "tokenizer.model", path / "tokenizer.model")
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_peer_is_evaluated_and_compared_with_ours(reference, peer, text_file, tmp_path):
    recipe = {
        "model": {"path": str(reference)},
        "quantize": [{"match": "layers.*", "method": "rtn", "bits": 8, "group": GROUP}],
        "output": {"path": str(tmp_path / "ours")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run("quantize", tmp_path / "recipe.yaml")
    text = ("--reference", reference, "--text", text_file, "--samples", 3, "--length", 40)
    before = sorted(path.name for path in peer.iterdir())
    report = json.loads(run("eval", peer, *text, "--json", "--output", tmp_path / "theirs"))
    assert sorted(path.name for path in peer.iterdir()) == before
    assert report["units"] == [] and report["quantized"]["family"] == "mixtral"
    assert report["quantized"]["schemes"] == {"int4 g32 sym": len(matrices(reference))}
    assert 1e-6 < report["kld"]["mean"]["value"] < 0.1
    assert all(layer["forced"]["damage"] for layer in report["layers"])
    run("eval", tmp_path / "ours", *text)
    found = json.loads(run("compare", tmp_path / "theirs", tmp_path / "ours", "--json"))
    assert [run["name"] for run in found["runs"]] == ["ours", peer.name]
    assert found["runs"][1]["kld"] == report["kld"]["mean"]
    assert [run["rank"] for run in found["runs"]] == [1, 2]


def test_columns_in_another_order_are_refused(reference, peer, tmp_path):
    """Groups by activation would be read as if they lay side by side."""
    other = Path(shutil.copytree(peer, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["actorder"] = "group"
    (other / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(main, ["eval", str(other), "--reference", str(reference)])
    assert result.exit_code == 2 and "weights.actorder: Input should be" in result.stderr
