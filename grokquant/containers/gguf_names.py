"""llama.cpp's names for the tensors and settings of the models that it runs, family by family.

Names and keys: github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grokquant.errors import InputError
from grokquant.types import Source

LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Architecture:
    """A family under llama.cpp's names. `{expert}` in a name stands for all experts, as one stack.

    `within` maps the endings of names in a layer, `settings` the metadata keys to fields of the
    config. `required` are config values without which llama.cpp would compute something else. The
    matrices in `rotated` have the rows of each head interleaved; the field is the number of heads.
    """

    name: str
    within: Mapping[str, str]
    settings: Mapping[str, str]
    rotated: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, object] = field(default_factory=dict)


OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ATTENTION = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
_NORMS = {"input_layernorm.weight": "attn_norm.weight"}
_NORMS |= {"post_attention_layernorm.weight": "ffn_norm.weight"}
_DENSE = {f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")}
_W = {"w1": "gate", "w3": "up", "w2": "down"}
_MIXTRAL = {"block_sparse_moe.gate.weight": "ffn_gate_inp.weight"} | {
    f"block_sparse_moe.experts.{{expert}}.{w}.weight": f"ffn_{part}_exps.weight"
    for w, part in _W.items()
}
_EXPERTS = {"mlp.gate.weight": "ffn_gate_inp.weight"} | {
    f"mlp.experts.{{expert}}.{part}_proj.weight": f"ffn_{part}_exps.weight"
    for part in ("gate", "up", "down")
}
_SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
_MOE_SETTINGS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_ROTATED = {
    "self_attn.q_proj.weight": "num_attention_heads",
    "self_attn.k_proj.weight": "num_key_value_heads",
}

_LLAMA = Architecture("llama", _ATTENTION | _NORMS | _DENSE, _SETTINGS, _ROTATED)
_LLAMA_MOE = Architecture(
    "llama", _ATTENTION | _NORMS | _MIXTRAL, _SETTINGS | _MOE_SETTINGS, _ROTATED
)
_GROK = Architecture(
    "grok",
    _ATTENTION
    | {
        "pre_attn_norm.weight": "attn_norm.weight",
        "post_attn_norm.weight": "attn_output_norm.weight",
        "pre_moe_norm.weight": "ffn_norm.weight",
        "post_moe_norm.weight": "layer_output_norm.weight",
    }
    | _MIXTRAL,
    _SETTINGS
    | _MOE_SETTINGS
    | {
        "expert_feed_forward_length": "intermediate_size",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "logit_scale": "output_multiplier_scale",
        "embedding_scale": "embedding_multiplier_scale",
        "attention.output_scale": "attn_output_multiplier",
    },
    required={"residual_moe": None},
)
_QWEN3_MOE = Architecture(
    "qwen3moe",
    _ATTENTION
    | _NORMS
    | _EXPERTS
    | {
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
    },
    _SETTINGS
    | {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    required={"norm_topk_prob": True},
)

ARCHITECTURES = {
    "Grok1ForCausalLM": _GROK,
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA_MOE,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
}


def architecture_of(source: Source) -> Architecture:
    """Raises InputError if llama.cpp does not know the model or would compute it differently."""
    names = source.config.get("architectures") or [None]
    found = ARCHITECTURES.get(str(names[0]))
    if found is None:
        raise InputError(f"output.format: gguf supports {', '.join(ARCHITECTURES)}, not {names[0]}")
    for key, wanted in found.required.items():
        if source.config.get(key) != wanted:
            raise InputError(
                f"{source.path / 'config.json'}: {key} is {source.config.get(key)}, "
                f"but llama.cpp computes {found.name} with {wanted}"
            )
    _check_rotary(source.path, source.config)
    return found


def _check_rotary(path: Path, config: dict) -> None:
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default" or config.get("sliding_window") is not None:
        what = "sliding_window" if kind == "default" else f"rope type {kind!r}"
        raise InputError(f"{path / 'config.json'}: {what} cannot be written to gguf yet")


def setting(config: dict, name: str) -> int | float | None:
    """A field of a config, wherever transformers keeps it; None if unset."""
    if name == "rope_theta":
        return (config.get("rope_parameters") or config).get(name, 10000.0)
    if name == "head_dim" and config.get(name) is None:
        return config["hidden_size"] // config["num_attention_heads"]
    if name == "num_experts" and name not in config:
        return config.get("num_local_experts")
    if name == "num_key_value_heads" and config.get(name) is None:
        return config["num_attention_heads"]
    return config.get(name)
