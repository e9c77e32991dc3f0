"""The fields of a config.json that describe a model, checked before transformers sees them.

`ConfigFields` says what each may be. transformers allocates what a config asks for, computes with
what it finds there, and raises errors of any class deep in a model.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from grokquant.errors import InputError

# Fields that choose code, kernels or forms of output, not the model.
_NOT_THE_MODEL = {
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# What transformers reads although the config class of a family does not declare it.
_READ_TOO = {
    "_sliding_window_pattern",
    "head_dim",
    "max_window_layers",
    "model_type",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "sliding_window_pattern",
    "torch_dtype",
}
# Fields that make another model of it, one that no family describes.
_REFUSED = ("per_layer_config",)

# Far above any model, and far below numbers that fill the memory before missing tensors are noted.
_MOST_LAYERS = 4096
# Of models that carry a state from token to token.
_UNLIMITED = 2**20
Layers = Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
Experts = Annotated[int, Field(ge=0, le=65_536)]
HeadSize = Annotated[int, Field(ge=1, le=65_536)]
Size = Annotated[int, Field(ge=1, le=2**24)]
Positions = Annotated[int, Field(ge=1, le=2**31)]
Number = Annotated[int, Field(ge=0, le=2**31)]
# Files say -1 where there is no such token.
Token = Annotated[int, Field(ge=-1, le=2**24)]
Real = Annotated[float, Field(ge=-1e9, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Base = Annotated[float, Field(gt=1, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
LayerType = Literal["full_attention", "sliding_attention"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]


def _check_activation(name: str) -> str:
    if name not in ACT2FN:
        raise ValueError(f"{name[:40]!r} is not an activation that transformers knows")
    return name


def _check_dtype(name: str) -> str:
    found = getattr(torch, name.removeprefix("torch."), None)
    if name != "auto" and not isinstance(found, torch.dtype):
        raise ValueError(f"{name[:40]!r} is not a dtype")
    return name


Activation = Annotated[str, AfterValidator(_check_activation)]
Dtype = Annotated[str, AfterValidator(_check_dtype)]


class _Fields(BaseModel):
    """Strict: no text for a number, no true for 1, no 1.0 for 1. Other fields are not looked at.

    A default means only that a field may be absent; it is never used.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class RopeFields(_Fields):
    """Rotary positions."""

    rope_type: RopeType = Field(default="default")
    type: RopeType = Field(default="default")
    rope_theta: Base = Field(default=10_000.0)
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    factor: Positive = Field(default=1.0)
    original_max_position_embeddings: Positions = Field(default=1)
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Real | None = None
    mscale_all_dim: Real | None = None
    truncate: bool = Field(default=True)
    low_freq_factor: Positive = Field(default=1.0)
    high_freq_factor: Positive = Field(default=4.0)
    short_factor: list[Positive] = Field(default=[], max_length=65_536)
    long_factor: list[Positive] = Field(default=[], max_length=65_536)


class LayeredRopeFields(RopeFields):
    """Rotary positions, or those of each type of layer."""

    full_attention: RopeFields | None = None
    sliding_attention: RopeFields | None = None


class ConfigFields(_Fields):
    """What config.json may say about a model. transformers knows which of it a family needs."""

    num_hidden_layers: Layers
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    moe_intermediate_size: Size | None = None
    shared_expert_intermediate_size: Size | None = None
    max_position_embeddings: Positions | None = None
    original_max_position_embeddings: Positions | None = None
    layer_types: Annotated[list[LayerType], Field(max_length=4096)] | None = None
    tie_word_embeddings: bool | None = None

    num_attention_heads: HeadSize | None = None
    num_key_value_heads: HeadSize | None = None
    head_dim: HeadSize | None = None
    kv_lora_rank: Size | None = None
    q_lora_rank: Size | None = None
    qk_nope_head_dim: HeadSize | None = None
    qk_rope_head_dim: HeadSize | None = None
    v_head_dim: HeadSize | None = None
    query_pre_attn_scalar: Positive | None = None
    attention_bias: bool | None = None
    qkv_bias: bool | None = None
    attention_dropout: Share | None = None
    attn_logit_softcapping: Positive | None = None
    clip_qkv: Positive | None = None
    use_bidirectional_attention: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: Number | None = None
    sliding_window_pattern: Layers | None = None
    private_pattern: Layers | None = Field(default=None, alias="_sliding_window_pattern")
    max_window_layers: Number | None = None

    num_experts: Experts = Field(default=0)
    num_local_experts: Experts = Field(default=0)
    n_routed_experts: Experts = Field(default=0)
    n_shared_experts: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_experts_per_tok: Annotated[int, Field(ge=1, le=65_536)] | None = None
    n_group: HeadSize | None = None
    topk_group: HeadSize | None = None
    topk_method: Literal["greedy", "group_limited_greedy"] = Field(default="greedy")
    norm_topk_prob: bool | None = None
    routed_scaling_factor: Real | None = None
    first_k_dense_replace: Number | None = None
    decoder_sparse_step: Layers | None = None
    mlp_only_layers: Annotated[list[Number], Field(max_length=4096)] | None = None
    router_aux_loss_coef: Real | None = None
    router_jitter_noise: Share | None = None
    mlp_bias: bool | None = None
    swiglu_alpha: Real | None = None
    swiglu_limit: Positive | None = None

    hidden_act: Activation | None = None
    hidden_activation: Activation | None = None
    rms_norm_eps: Share | None = None
    initializer_range: Share | None = None
    final_logit_softcapping: Positive | None = None
    pad_token_id: Token | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | Annotated[list[Token], Field(max_length=1000)] | None = None

    rope_theta: Base | None = None
    rope_local_base_freq: Base | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    rope_parameters: LayeredRopeFields | None = None
    rope_scaling: LayeredRopeFields | None = None

    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None


def carried_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """Keys of config.json that transformers reads for a family: what its class declares, its
    other names for that, and the fields of earlier versions."""
    declared = config_class.__dataclass_fields__  # type: ignore[attr-defined]
    names = config_class.attribute_map
    return _READ_TOO.union(declared, names, names.values())


def model_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """The `carried_keys` that define the model."""
    return set(filter(defines_the_model, carried_keys(config_class)))


def defines_the_model(key: str) -> bool:
    """Whether a field of a config of transformers is about the model, by its name."""
    return key not in _NOT_THE_MODEL and (not key.startswith("_") or key in _READ_TOO)


def check_fields(path: Path, content: dict) -> dict:
    """Returns `content`, of the config.json at `path`. Raises InputError naming a bad field."""
    for key in _REFUSED:
        if content.get(key) is not None:
            raise InputError(f"{path}: {key} is not supported")
    try:
        ConfigFields.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(part for part in first["loc"] if part in _KEYS)
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {key}: {message}{_found(first)}") from None
    return content


def check_bounds(path: Path, content: dict) -> None:
    """Raises InputError for numbers in a config.json, of any key, that would fill the memory."""
    layers = content.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise InputError(f"{path}: num_hidden_layers is {layers}, more than {_MOST_LAYERS}")


def positions_of(config: PreTrainedConfig) -> int:
    """The most tokens that a text may have; models without positions set no limit."""
    return getattr(config, "max_position_embeddings", None) or _UNLIMITED


# Keys in the location of an error; it also holds the names of types.
_KEYS = (
    ConfigFields.model_fields.keys() | LayeredRopeFields.model_fields | {"_sliding_window_pattern"}
)


def _found(error: Any) -> str:
    if error["type"] in ("missing", "value_error"):
        return ""
    return f", not {repr(error['input'])[:40]}"


def check_sizes(path: Path, config: PreTrainedConfig) -> None:
    """Raises InputError naming fields of a config, defaults included, that contradict each other.

    Fields that a family does not have are no contradiction.
    """

    def number(name: str) -> Any:
        return getattr(config, name, None)

    for small, large in _AT_MOST:
        if number(small) is not None and number(large) and number(small) > number(large):
            raise InputError(
                f"{path}: {small} is {number(small)}, but {large} only {number(large)}"
            )
    for whole, part in _MULTIPLES:
        if number(whole) and number(part) and number(whole) % number(part):
            raise InputError(
                f"{path}: {whole} is {number(whole)}, which is no multiple of {part} "
                f"({number(part)})"
            )
    if number("num_experts") and number("num_experts_per_tok") is None:
        raise InputError(f"{path}: num_experts_per_tok is missing")
    pad = number("pad_token_id")
    if pad is not None and not -1 <= pad < config.vocab_size:
        raise InputError(f"{path}: pad_token_id is {pad}, but vocab_size only {config.vocab_size}")
    slides = "sliding_attention" in (number("layer_types") or ())
    window = number("sliding_window")
    if (slides and not window) or (window == 0 and not hasattr(config, "use_sliding_window")):
        raise InputError(f"{path}: sliding_window must be positive, not {window}")


_AT_MOST = (
    ("num_experts_per_tok", "num_experts"),
    ("topk_group", "n_group"),
)
_MULTIPLES = (
    ("num_attention_heads", "num_key_value_heads"),
    ("num_experts", "n_group"),
)
