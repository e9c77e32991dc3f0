"""The metadata of a GGUF file that describe a model, made of its config.json.

A model that llama.cpp would compute differently is refused. Keys and meanings:
convert_hf_to_gguf.py and src/models of github.com/ggml-org/llama.cpp.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from grokquant.containers.gguf_names import (
    ARCHITECTURES,
    ROPE_FREQS,
    Architecture,
    known_architecture,
)
from grokquant.errors import InputError
from grokquant.families import config_of
from grokquant.files.gguf_header import Value
from grokquant.types import Source, TensorRef

# Keys of float32 numbers, which a config.json may have as integers.
_FLOATS = (
    "rope.freq_base",
    "attention.layer_norm_rms_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "expert_weights_scale",
    "logit_scale",
    "embedding_scale",
    "attention.output_scale",
)
# llama.cpp's own positions in the layers of Gemma 3 with a window.
LOCAL_BASE = 10000.0
# llama.cpp scales attention by the width of a head, in these models by hidden size / heads: the 27B
# of Gemma 2 and 3, which it knows by their layers.
WIDE_LAYERS = {"gemma2": 46, "gemma3": 62}
# By its layers it also knows DeepSeek-V2-Lite, whose queries have no low rank.
_LITE_LAYERS = (26, 27)
# In files the multiplier of DeepSeek's positions is stored times this.
LOG_MULTIPLIER = 0.1
LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def settings_of(source: Source) -> dict[str, Value]:
    """The pairs of metadata that describe the model.

    Raises InputError if llama.cpp does not know it or would compute it differently.
    """
    row = known_architecture(source)
    config = config_of(source)
    for key, wanted in row.required.items():
        found = getattr(config, key, source.config.get(key))
        if found not in wanted:
            _refuse(source, f"{key} is {found}", row, f"with {wanted[0]}")
    _check_layers(source, row, config)
    pairs: dict[str, Value] = {}
    for key, name in row.settings.items():
        value = setting(config, name)
        if value is not None:
            pairs[key] = float(value) if key in _FLOATS else value
    pairs["context_length"] = _context(row, config)
    pairs |= {**row.fixed, **_scaling(source, row, config)}
    return {f"{row.name}.{key}": value for key, value in pairs.items()}


def setting(config: PreTrainedConfig, name: str) -> Any:
    """A field of a config, or what follows from several; None if unset."""
    if name == "rope_theta":
        return _positions(config)["rope_theta"]
    if name == "head_dim":
        return getattr(config, name, None) or config.hidden_size // config.num_attention_heads
    if name == "qk_head_dim":
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    if name == "rotary_dim":
        share = _positions(config).get("partial_rotary_factor", 1.0)
        return int(setting(config, "head_dim") * share)
    return getattr(config, name, None)


def with_rotary_factors(source: Source) -> Source:
    """`source` with the tensor that says how Llama 3 slows its rotations, if the model does."""
    if source.config.get("architectures", [None])[0] not in ARCHITECTURES:
        return source
    config = config_of(source)
    rope = _positions(config)
    if rope["rope_type"] != "llama3":
        return source
    factors = llama3_factors(rope, setting(config, "head_dim"))
    ref = TensorRef(
        ROPE_FREQS, tuple(factors.shape), factors.dtype, factors.nbytes, lambda: factors
    )
    return replace(source, tensors={ROPE_FREQS: ref} | source.tensors)


def _refuse(source: Source, what: str, row: Architecture, computes: str) -> None:
    raise InputError(
        f"{source.path / 'config.json'}: {what}, but llama.cpp computes {row.name} {computes}; "
        "choose another output.format, such as compressed-tensors"
    )


def _check_layers(source: Source, row: Architecture, config: PreTrainedConfig) -> None:
    """Refuses layers, heads and activations that llama.cpp does not have for the model."""
    types = getattr(config, "layer_types", None)
    if row.window_pattern and types and types != layer_types(row, len(types)):
        text = f"with every {row.window_pattern}th layer without a window"
        _refuse(source, "layer_types has another pattern", row, text)
    heads = (config.num_attention_heads, getattr(config, "num_key_value_heads", None))
    if row.name == "olmoe" and heads[0] != heads[1]:
        _refuse(source, f"num_key_value_heads is {heads[1]}", row, f"with all {heads[0]}")
    layers = config.num_hidden_layers
    whole = getattr(config, "q_lora_rank", 0) is None  # queries
    if row.name == "deepseek2" and whole and layers not in _LITE_LAYERS:
        text = f"only with {' or '.join(map(str, _LITE_LAYERS))} layers"
        _refuse(source, f"q_lora_rank is None and num_hidden_layers {layers}", row, text)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in (own := _activations(row)):
        _refuse(source, f"its activation is {activation}", row, f"with {own[0]}")
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != (wanted := _query_scale(row, config)):
        _refuse(source, f"query_pre_attn_scalar is {scale}", row, f"with {wanted}")
    if row.name == "gemma3" and (base := _positions(config, local=True)["rope_theta"]) != 1e4:
        _refuse(source, f"rope_local_base_freq is {base}", row, f"with {LOCAL_BASE}")


def _activations(row: Architecture) -> tuple[str | None, ...]:
    if row.name in ("grok", "gemma", *WIDE_LAYERS):
        return ("gelu_pytorch_tanh", "gelu", "gelu_new", None)
    return ("silu", "swish", None)


def _query_scale(row: Architecture, config: PreTrainedConfig) -> int:
    if config.num_hidden_layers == WIDE_LAYERS.get(row.name):
        return config.hidden_size // config.num_attention_heads
    return setting(config, "head_dim")


def layer_types(row: Architecture, count: int) -> list[str]:
    """The layers of a pattern: all but the last of each `window_pattern` have a window."""
    whole = row.window_pattern
    last = (not (layer + 1) % whole for layer in range(count))
    return ["full_attention" if is_last else "sliding_attention" for is_last in last]


def _context(row: Architecture, config: PreTrainedConfig) -> int:
    """The longest text that llama.cpp computes as the model does: where it knows no window, texts
    that fit into one."""
    longest = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and window
    types = getattr(config, "layer_types", None)
    slides = used and (types is None or "sliding_attention" in types)
    return min(longest, int(window or longest)) if slides and not row.window_pattern else longest


def _positions(config: PreTrainedConfig, local: bool = False) -> dict[str, Any]:
    """Rotary positions; `local` are those of layers with a window."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in rope:
        rope = dict(rope["sliding_attention" if local else "full_attention"])
    theta = getattr(config, "rope_theta", 10000.0)
    return {"rope_type": "default", "rope_theta": theta} | rope


def _scaling(source: Source, row: Architecture, config: PreTrainedConfig) -> dict[str, Value]:
    """The pairs of positions that are scaled."""
    rope = _positions(config)
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    if kind not in row.scalings:
        place = source.path / "config.json"
        raise InputError(f"{place}: llama.cpp has no positions of type {kind!r} for {row.name}")
    if kind == "llama3":
        return {}  # a tensor says it
    factor = float(rope["factor"])
    pairs: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "linear":
        return pairs
    pairs["rope.scaling.original_context_length"] = int(
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
    )
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            pairs[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return pairs | _yarn_attention(source, row, rope, factor)


def _yarn_attention(
    source: Source, row: Architecture, rope: dict[str, Any], factor: float
) -> dict[str, Value]:
    """How much yarn sharpens attention: by default as much in llama.cpp as in transformers."""
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    every: Any = rope.get("mscale_all_dim")
    mscale = rope.get("mscale")
    if row.name == "deepseek2":
        if not every or every != mscale:
            _refuse(source, f"mscale is {mscale} and mscale_all_dim {every}", row, "with one value")
        return {"rope.scaling.yarn_log_multiplier": LOG_MULTIPLIER * every}
    if (stated := rope.get("attention_factor")) is None and every and mscale:
        stated = (0.1 * mscale * math.log(factor) + 1) / (0.1 * every * math.log(factor) + 1)
    if stated is None or math.isclose(stated, usual, rel_tol=1e-6):
        return {}
    return {"rope.scaling.attn_factor": float(stated) / usual}


def llama3_factors(rope: dict[str, Any], head: int) -> Tensor:
    """By how much each rotation is slower, [head / 2], as llama.cpp's converter has it."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    lengths = 2 * math.pi / frequencies
    low = rope.get("low_freq_factor", LLAMA3_DEFAULTS["low_freq_factor"])
    high = rope.get("high_freq_factor", LLAMA3_DEFAULTS["high_freq_factor"])
    length = rope["original_max_position_embeddings"]
    smooth = (length / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    slow = torch.where(lengths > length / low, torch.tensor(float(rope["factor"])), between)
    return torch.where(lengths < length / high, torch.tensor(1.0), slow)
