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

    `models` are its `architectures` in config.json; a file is read as the first of them. `marks`
    are values of metadata keys, None if missing, that tell rows of one name apart: the first row
    with all of its marks counts. `modules` are those in a layer, `others` the names of tensors
    there that the gguf package does not have or that llama.cpp calls something else, `read_too`
    further names in files of others. The rows of each head of the modules in `rotated` are
    interleaved; the field there is the number of heads. The tensors in `shifted` are stored with 1
    added.

    `settings` maps metadata keys to fields of the config, or to what `gguf_config.setting` makes of
    several; `fixed` are pairs that do not depend on the config. `required` are the values of config
    fields with which llama.cpp computes, the first of which a config made from metadata gets; None
    is a missing field. Of every `window_pattern` layers all but the last have a sliding window;
    with 0, none has. `scalings` are the kinds of scaled positions that llama.cpp has for the model.
    """

    name: str
    models: tuple[str, ...]
    modules: tuple[str, ...]
    settings: Mapping[str, str]
    marks: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    read_too: Mapping[str, str] = field(default_factory=dict)
    rotated: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    required: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    shifted: tuple[str, ...] = ()
    window_pattern: int = 0
    scalings: tuple[str, ...] = ("linear", "yarn")

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


# How much slower each rotation of a head is, one tensor for all layers.
ROPE_FREQS = "rope_freqs.weight"
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
_OUTPUT_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_MLP = tuple(f"mlp.{part}_proj" for part in _PARTS)
_W = ("w1", "w3", "w2")
_MIXTRAL = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{expert}}.{w}" for w in _W))
_ROUTED = tuple(f"mlp.experts.{{expert}}.{part}_proj" for part in _PARTS)
_EXPERTS = ("mlp.gate", *_ROUTED)
_SHARED = tuple(f"mlp.shared_expert.{part}_proj" for part in _PARTS)
_SHARED_EXPERTS = tuple(f"mlp.shared_experts.{part}_proj" for part in _PARTS)
_LATENT = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_a_layernorm",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)
# Files of 2023 have each expert of Mixtral alone.
_ALONE = {
    f"block_sparse_moe.experts.{{expert}}.{w}.weight": f"ffn_{part}.{{expert}}.weight"
    for w, part in zip(_W, ("gate", "up", "down"), strict=True)
}
# Newer files have kv_b in two, see formats/gguf.py.
_SPLIT_LATENT = {f"self_attn.{part}_b_proj.weight": f"attn_{part}_b.weight" for part in ("k", "v")}
# A tensor that is no module's weight; llama.cpp calls it a bias.
_CORRECTION = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_REST = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_SETTINGS = {
    **_SIZES,
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    **_REST,
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
_MOE_SETTINGS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN_MOE_SETTINGS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Models of DeepSeek's kind: dense layers first, shared experts, weights scaled.
_DEEPSEEK_MOE_SETTINGS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
}
_LATENT_SETTINGS = {
    **_SIZES,
    "attention.key_length": "qk_head_dim",
    "attention.value_length": "v_head_dim",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    **_REST,
    "rope.dimension_count": "qk_rope_head_dim",
    "vocab_size": "vocab_size",
    **_DEEPSEEK_MOE_SETTINGS,
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_GATING = "expert_gating_func"
_SOFTMAX = 1
_SIGMOID = 2
_GROUPS = {"expert_group_count": "n_group", "expert_group_used_count": "topk_group"}
_ROTATED = {
    "self_attn.q_proj": "num_attention_heads",
    "self_attn.k_proj": "num_key_value_heads",
}
# llama.cpp takes every layer to have experts.
_ALL_ROUTED: dict[str, tuple[object, ...]] = {
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}
_FINAL_NORM = "model.norm.weight"
_GEMMA_NORMS = tuple(f"{norm}.weight" for norm in (*_NORMS, *_OUTPUT_NORMS))

_LLAMA = Architecture(
    "llama",
    ("LlamaForCausalLM", "MistralForCausalLM"),
    _ATTENTION + _NORMS + _MLP,
    _SETTINGS,
    marks={"expert_count": (None, 0)},
    rotated=_ROTATED,
    scalings=("linear", "yarn", "llama3"),
)
_LLAMA_MOE = Architecture(
    "llama",
    ("MixtralForCausalLM",),
    _ATTENTION + _NORMS + _MIXTRAL,
    _SETTINGS | _MOE_SETTINGS,
    read_too=_ALONE,
    rotated=_ROTATED,
    scalings=("linear", "yarn", "llama3"),
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
    scalings=(),
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
_DEEPSEEK_V2 = Architecture(
    "deepseek2",
    ("DeepseekV2ForCausalLM",),
    _LATENT + _NORMS + _MLP + _EXPERTS + _SHARED_EXPERTS,
    _LATENT_SETTINGS,
    read_too=_SPLIT_LATENT,
    marks={_GATING: (None, 0, _SOFTMAX)},
    fixed={_GATING: _SOFTMAX},
    required={"topk_method": ("greedy", None), "norm_topk_prob": (False, None)},
)
_DEEPSEEK_V3 = Architecture(
    "deepseek2",
    ("DeepseekV3ForCausalLM",),
    _LATENT + _NORMS + _MLP + _EXPERTS + _SHARED_EXPERTS,
    _LATENT_SETTINGS | _GROUPS,
    others=_CORRECTION,
    read_too=_SPLIT_LATENT,
    fixed={_GATING: _SIGMOID},
    required={"rope_interleave": (True, None)},
)
_GPT_OSS = Architecture(
    "gpt-oss",
    ("GptOssForCausalLM",),
    (*_ATTENTION, *_NORMS, "mlp.router", *_ROUTED),
    _SETTINGS | _MOE_SETTINGS | _WINDOW | {"expert_feed_forward_length": "intermediate_size"},
    others={"self_attn.sinks": "attn_sinks.weight"},
    required={"swiglu_limit": (7.0, None), "swiglu_alpha": (1.702, None)},
    window_pattern=2,
)
_GEMMA = Architecture(
    "gemma",
    ("GemmaForCausalLM",),
    _ATTENTION + _NORMS + _MLP,
    _SETTINGS,
    shifted=(*(f"{norm}.weight" for norm in _NORMS), _FINAL_NORM),
    required={"use_bidirectional_attention": (None, False)},
    scalings=(),
)
_GEMMA_2 = Architecture(
    "gemma2",
    ("Gemma2ForCausalLM",),
    _ATTENTION + _NORMS + _OUTPUT_NORMS + _MLP,
    _SETTINGS
    | _WINDOW
    | {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    shifted=(*_GEMMA_NORMS, _FINAL_NORM),
    window_pattern=2,
    scalings=(),
)
_GEMMA_3 = Architecture(
    "gemma3",
    ("Gemma3ForCausalLM",),
    _ATTENTION + _HEAD_NORMS + _NORMS + _OUTPUT_NORMS + _MLP,
    _SETTINGS | _WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
    shifted=(*_GEMMA_NORMS, *(f"{norm}.weight" for norm in _HEAD_NORMS), _FINAL_NORM),
    required={"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
    window_pattern=6,
    scalings=("linear",),
)
_GLM_4_MOE = Architecture(
    "glm4moe",
    ("Glm4MoeForCausalLM",),
    _ATTENTION + _HEAD_NORMS + _NORMS + _MLP + _EXPERTS + _SHARED_EXPERTS,
    _SETTINGS | {"rope.dimension_count": "rotary_dim"} | _DEEPSEEK_MOE_SETTINGS | _GROUPS,
    others=_CORRECTION,
    fixed={_GATING: _SIGMOID},
)

# The first row of a name whose marks are in the metadata of a file is that of its model.
ROWS = (
    _LLAMA,
    _LLAMA_MOE,
    _GROK,
    _QWEN2,
    _QWEN2_MOE,
    _QWEN3,
    _QWEN3_MOE,
    _OLMOE,
    _DEEPSEEK_V2,
    _DEEPSEEK_V3,
    _GPT_OSS,
    _GEMMA,
    _GEMMA_2,
    _GEMMA_3,
    _GLM_4_MOE,
)
# `architectures` of a config.json -> what llama.cpp makes of the model.
ARCHITECTURES = {model: row for row in ROWS for model in row.models}


def known_architecture(source: Source) -> Architecture:
    """The row of a model by its config. Raises InputError if llama.cpp does not know it."""
    names = source.config.get("architectures") or [None]
    found = ARCHITECTURES.get(str(names[0]))
    if found is None:
        raise InputError(f"output.format: gguf supports {', '.join(ARCHITECTURES)}, not {names[0]}")
    return found
