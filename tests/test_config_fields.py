"""config.json: what it may say of a model, and what of it an output's says again."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_stored_layer
from mutations import Place, changed, mutations
from test_families import MODELS, TOKENS, saved  # noqa: F401

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.errors import GrokquantError, InputError
from grokquant.families import FAMILIES
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.streaming.blocks import BlockwiseModel

# Fields that need not be there and change the model if they are.
ADDED = (
    "dtype",
    "head_dim",
    "layer_types",
    "mlp_only_layers",
    "num_experts",
    "num_local_experts",
    "partial_rotary_factor",
    "per_layer_config",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
    "torch_dtype",
    "_sliding_window_pattern",
)


def run(checkpoint: Checkpoint) -> None:
    """Computes what an evaluation computes."""
    model = BlockwiseModel(checkpoint, torch.float32)
    hidden = model.embed(TOKENS[:1, :20])
    for index in range(len(model.layers)):
        model.load_layer(index)
        hidden = run_stored_layer(model, index, hidden)
        model.free_layer(index)
    model.logits(hidden)


def try_out(source: Path, config: Path, wanted: list[tuple[Place, object]]) -> None:
    """Opens a model with each changed config, and runs it if it opens."""
    content = json.loads((source / "config.json").read_text())
    config.write_text(json.dumps(content))
    run(open_checkpoint(source, config))
    for place, value in wanted:
        config.write_text(json.dumps(changed(content, place, value)))
        try:
            run(open_checkpoint(source, config))
        except GrokquantError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 600
            assert str(config) in message or str(source) in message, (place, value)
        except BaseException as error:
            pytest.fail(f"{place} = {value!r}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_changed_configs_end_in_one_line(saved, family, tmp_path):  # noqa: F811
    _, source = saved(family)
    everything = mutations(json.loads((source / "config.json").read_text()), *ADDED)
    sample = random.Random(family).sample(everything, 25)
    try_out(source, tmp_path / "changed.json", sample)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_all_changed_configs_end_in_one_line(saved, family, tmp_path):  # noqa: F811
    _, source = saved(family)
    content = json.loads((source / "config.json").read_text())
    try_out(source, tmp_path / "changed.json", mutations(content, *ADDED))


@torch.no_grad()
def test_changed_configs_of_a_release_end_in_one_line(tiny_release, tmp_path):
    content = json.loads((tiny_release / "config.json").read_text())
    sample = random.Random(0).sample(mutations(content, *ADDED), 40)
    try_out(tiny_release, tmp_path / "changed.json", sample)


LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(content: dict) -> Any:
    name = content["architectures"][0]
    return FAMILIES[name].config(Path("config.json"), content)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: Input should be less than or equal"),
        ({"num_hidden_layers": True}, "num_hidden_layers: Input should be a valid integer"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: Input should be a valid integer, not 2.0"),
        ({"hidden_size": -1}, "hidden_size: Input should be greater than or equal to 1, not -1"),
        ({"hidden_size": [64]}, "hidden_size: Input should be a valid integer, not [64]"),
        ({"vocab_size": "x" * 10**6}, "vocab_size: Input should be a valid integer, not 'xxx"),
        ({"hidden_act": "x"}, "hidden_act: 'x' is not an activation that transformers knows"),
        ({"torch_dtype": "float9"}, "torch_dtype: 'float9' is not a dtype"),
        ({"torch_dtype": "Tensor"}, "torch_dtype: 'Tensor' is not a dtype"),
        ({"rope_scaling": {"rope_type": "x"}}, "rope_scaling.rope_type: Input should be 'default'"),
        ({"rope_scaling": {"type": 1}}, "rope_scaling.type: Input should be 'default'"),
        ({"rope_scaling": LLAMA_3 | {"factor": "8"}}, "rope_scaling.factor: Input should be a val"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 32, which is no multiple of num_key_"),
        ({"pad_token_id": 32_000}, "pad_token_id is 32000, but vocab_size only 32000"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id: "),
        ({"per_layer_config": {"0": {}}}, "per_layer_config is not supported"),
        ({"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9}, "num_experts only 8"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "num_experts_per_tok is missing"),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": None}, "must be positive"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "must be positive, not 0"),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "layer_types": ["x", "x"]},
            "layer_types: Input should be 'full_attention' or 'sliding_attention'",
        ),
    ],
)
def test_what_a_config_may_not_say(changes, complaint):
    with pytest.raises(InputError) as caught:
        config_of(LLAMA | changes)
    assert complaint in str(caught.value) and len(str(caught.value)) < 300
    assert str(caught.value).startswith("config.json: ")


YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    "content",
    [
        {"pad_token_id": -1, "eos_token_id": [128001, 128008], "rope_scaling": LLAMA_3},
        {"pretraining_tp": 1, "rope_scaling": None, "rope_theta": 500000, "mlp_bias": False},
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "q_lora_rank": None,
            "num_experts_per_tok": 6,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "rope_scaling": YARN,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
        },
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
        },
        {
            "architectures": ["GptOssForCausalLM"],
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": YARN | {"truncate": False, "rope_type": "yarn"},
            "swiglu_limit": 7.0,
        },
        {
            "architectures": ["Gemma3ForCausalLM"],
            "rope_local_base_freq": 10000,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
        },
        {"architectures": ["Qwen2MoeForCausalLM"], "use_sliding_window": False, "rope_theta": 1e6},
        {"architectures": ["OlmoeForCausalLM"], "clip_qkv": None, "norm_topk_prob": False},
        {"architectures": ["OlmoeForCausalLM"], "clip_qkv": 8.0, "torch_dtype": "float32"},
        {"architectures": ["MixtralForCausalLM"], "sliding_window": None, "head_dim": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 4096, "head_dim": 128},
    ],
)
def test_configs_of_published_models_are_read(content):
    assert config_of(LLAMA | content).num_hidden_layers == 2


# Names of code, kernels and places; none of them says anything about the model.
ODD: dict[str, object] = {
    "auto_map": {"AutoConfig": "configuration_x.XConfig"},
    "custom_pipelines": {"x": {"impl": "x.X"}},
    "trust_remote_code": True,
    "_attn_implementation": "somebody/kernel",
    "_attn_implementation_internal": "somebody/kernel",
    "attn_implementation": "somebody/kernel",
    "experts_implementation": "somebody/kernel",
    "_name_or_path": "/home/me/private",
    "x\x1b[2J": 1,
}


def test_fields_that_are_not_the_models_are_left_out_by_name(saved, tmp_path):  # noqa: F811
    _, directory = saved("mixtral")
    source = tmp_path / "source"
    shutil.copytree(directory, source)
    plain = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(plain | ODD))
    rules = [{"match": "*", "method": "rtn", "bits": 8, "group": "channel"}]
    values = {"model": {"path": str(source)}, "output": {"path": str(tmp_path / "out")}}
    output = pipeline.quantize(parse_recipe(values | {"quantize": rules}))
    written = json.loads((output / "config.json").read_text())
    assert not ODD.keys() & written.keys()
    assert plain.keys() - {"dtype"} <= written.keys()
    note = f"{source}/config.json: mixtral has no such settings, left out: {', '.join(ODD)}"
    assert note in open_checkpoint(source).notices
    assert open_checkpoint(output).notices == ()
