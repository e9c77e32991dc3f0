"""llama.cpp's names for the tensors and settings of the models that it runs, family by family.

Names of tensors are those of the gguf package; keys: gguf-py/gguf/constants.py there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from grokquant.errors import InputError
from grokquant.types import Source

LAYER = "model.layers.{layer}."
EXPERT = ".{expert}"  # in the name of a module: all experts, as one stack
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Architecture:
    """A family under llama.cpp's names.

    `models` are its `architectures` in config.json; a file is read as the first of them. `modules`
    are those in a layer, `others` the names of tensors there that the gguf package does not have or
    that llama.cpp calls something else, `read_too` further names in files of others. `settings`
    maps metadata keys to fields of the config. `required` are the values of config fields with
    which llama.cpp computes, the first of which a config made from metadata gets; None is a missing
    field. The rows of each head of the modules in `rotated` are interleaved; the field there is
    the number of heads. The tensors in `shifted` are stored with 1 added.
    """

    name: str
    models: tuple[str, ...]
    modules: tuple[str, ...]
    settings: Mapping[str, str]
    others: Mapping[str, str] = field(default_factory=dict)
    read_too: Mapping[str, str] = field(default_factory=dict)
    rotated: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    shifted: tuple[str, ...] = ()

    @cached_property
    def within(self) -> dict[str, str]:
        """The endings of llama.cpp's names in a layer, by the endings of the usual names."""
        # Imported here: it takes as long as many commands.
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(numbers[self.name], 1)
        found: dict[str, str] = {}
        for module in self.modules:
            name = names.get_name(LAYER.format(layer=0) + module.replace(EXPERT, ""))
            assert name is not None, f"the gguf package has no {module} of {self.name}"
            stored = name.removeprefix("blk.0.")
            found |= {module + suffix: stored + suffix for suffix in _SUFFIXES}
        return {**found, **self.others}

    def heads_field(self, ending: str) -> str | None:
        """The field with the number of heads whose rows are interleaved in a tensor, if any."""
        return self.rotated.get(ending.rpartition(".")[0])


# Matrices of one row, which files hold as vectors.
VECTORS = ("mlp.shared_expert_gate.weight",)
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = ("gate", "up", "down")
_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MLP = tuple(f"mlp.{part}_proj" for part in _PARTS)
_W = ("w1", "w3", "w2")
_MIXTRAL = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{expert}}.{w}" for w in _W))
_EXPERTS = ("mlp.gate", *(f"mlp.experts.{{expert}}.{part}_proj" for part in _PARTS))
_SHARED = tuple(f"mlp.shared_expert.{part}_proj" for part in _PARTS)
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
_QWEN_MOE_SETTINGS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_ROTATED = {
    "self_attn.q_proj": "num_attention_heads",
    "self_attn.k_proj": "num_key_value_heads",
}
# llama.cpp takes every layer to have experts.
_ALL_ROUTED: dict[str, tuple[object, ...]] = {
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}

_LLAMA = Architecture(
    "llama",
    ("LlamaForCausalLM", "MistralForCausalLM"),
    _ATTENTION + _NORMS + _MLP,
    _SETTINGS,
    rotated=_ROTATED,
)
_LLAMA_MOE = Architecture(
    "llama",
    ("MixtralForCausalLM",),
    _ATTENTION + _NORMS + _MIXTRAL,
    _SETTINGS | _MOE_SETTINGS,
    rotated=_ROTATED,
)
_GROK = Architecture(
    "grok",
    ("Grok1ForCausalLM",),
    (*_ATTENTION, "pre_attn_norm", "post_attn_norm", "pre_moe_norm", *_MIXTRAL),
    _SETTINGS
    | _MOE_SETTINGS
    | {
        "expert_feed_forward_length": "intermediate_size",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "logit_scale": "output_multiplier_scale",
        "embedding_scale": "embedding_multiplier_scale",
        "attention.output_scale": "attn_output_multiplier",
    },
    others={"post_moe_norm.weight": "layer_output_norm.weight"},
    read_too={"post_moe_norm.weight": "post_ffw_norm.weight"},
    required={"residual_moe": (None,)},
)
_QWEN2 = Architecture("qwen2", ("Qwen2ForCausalLM",), _ATTENTION + _NORMS + _MLP, _SETTINGS)
_QWEN2_MOE = Architecture(
    "qwen2moe",
    ("Qwen2MoeForCausalLM",),
    (*_ATTENTION, *_NORMS, *_EXPERTS, *_SHARED, "mlp.shared_expert_gate"),
    _SETTINGS
    | _QWEN_MOE_SETTINGS
    | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    required={"norm_topk_prob": (False, None)} | _ALL_ROUTED,
)
_QWEN3 = Architecture(
    "qwen3", ("Qwen3ForCausalLM",), _ATTENTION + _HEAD_NORMS + _NORMS + _MLP, _SETTINGS
)
_QWEN3_MOE = Architecture(
    "qwen3moe",
    ("Qwen3MoeForCausalLM",),
    _ATTENTION + _HEAD_NORMS + _NORMS + _EXPERTS,
    _SETTINGS | _QWEN_MOE_SETTINGS,
    required={"norm_topk_prob": (True,)} | _ALL_ROUTED,
)
_OLMOE = Architecture(
    "olmoe",
    ("OlmoeForCausalLM",),
    _ATTENTION + _HEAD_NORMS + _NORMS + _EXPERTS,
    _SETTINGS | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
    required={"norm_topk_prob": (False, None), "clip_qkv": (None,)},
)

ROWS = (_LLAMA, _LLAMA_MOE, _GROK, _QWEN2, _QWEN2_MOE, _QWEN3, _QWEN3_MOE, _OLMOE)
# `architectures` of a config.json -> what llama.cpp makes of the model.
ARCHITECTURES = {model: row for row in ROWS for model in row.models}


def architecture_of(source: Source) -> Architecture:
    """Raises InputError if llama.cpp does not know the model or would compute it differently."""
    found = known_architecture(source)
    for key, wanted in found.required.items():
        if source.config.get(key) not in wanted:
            raise InputError(
                f"{source.path / 'config.json'}: {key} is {source.config.get(key)}, "
                f"but llama.cpp computes {found.name} with {wanted[0]}"
            )
    return found


def known_architecture(source: Source) -> Architecture:
    """The row of a model by its config. Raises InputError if llama.cpp does not know it."""
    names = source.config.get("architectures") or [None]
    found = ARCHITECTURES.get(str(names[0]))
    if found is None:
        raise InputError(f"output.format: gguf supports {', '.join(ARCHITECTURES)}, not {names[0]}")
    return found


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
