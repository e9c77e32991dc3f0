"""gptqmodel loads our gptq checkpoints and multiplies out our values: `make test-readers`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reader_envs import only_with_readers, run_reader
from safetensors.torch import load_file
from test_gptqmodel_names import its_name
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.toy import TOY_PATH

pytestmark = only_with_readers
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    | {"head_dim": 32, "norm_topk_prob": True},
}
RTN = {"match": "*", "method": "rtn", "group": 128}
GPTQ = {"match": "*", "method": "gptq", "bits": 4, "group": 32}
# (family, rules): every width, groups of all kinds, several grids in one model.
CASES = [
    ("llama", [RTN | {"bits": 2, "group": 32}]),
    ("llama", [RTN | {"bits": 3}]),
    ("llama", [GPTQ]),
    ("llama", [RTN | {"bits": 8, "group": "channel"}]),
    ("mixtral", [GPTQ | {"act_order": False, "group": 128}]),
    (
        "qwen3_moe",
        [
            RTN | {"match": "layers.1.attention.*", "bits": 8},
            {"match": "layers.0.attention.*", "method": "keep"},
            RTN | {"bits": 4, "group": 32},
        ],
    ),
]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(0))


def quantized(family: str, rules: list[dict], directory: Path, text: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | MODELS[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory / "in")
    shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "in" / "tokenizer.model")
    values = {
        "model": {"path": str(directory / "in")},
        "calibration": {"text": str(text), "samples": 16, "length": 64},
        "quantize": rules,
        "max_fallbacks": 1.0,
        "output": {
            "path": str(directory / "out"),
            "format": "gptq",
            "names": "gptqmodel" if family == "mixtral" else "published",
        },
    }
    return pipeline.quantize(parse_recipe(values))


def run(tmp_path: Path, output: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """gptqmodel's logits, and its matrices by name."""
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    files = tmp_path / "tokens.npy", tmp_path / "found.safetensors"
    run_reader("gptqmodel", "read_gptq.py", output, *files)
    return load_file(tmp_path / "found.safetensors")


@pytest.mark.parametrize(("family", "rules"), CASES)
def test_gptqmodel_multiplies_out_what_we_do(family, rules, tokens, text_file, tmp_path):
    output = quantized(family, rules, tmp_path, text_file)
    found = run(tmp_path, output, tokens)
    logits = found.pop("logits").float()
    refs = [ref for _, ref in open_checkpoint(output).units() if ref.scheme]
    packed = {its_name(ref.name.removesuffix(".weight")): ref for ref in refs}
    assert found.keys() == packed.keys()
    for name, ref in packed.items():
        assert torch.equal(found[name], ref.read()), name
    model, _ = grokquant.load(output, dtype=torch.float32)
    with torch.no_grad():
        ours = model(tokens).logits
    assert (logits - ours).norm() < 5e-3 * ours.norm()  # theirs are computed in float16
