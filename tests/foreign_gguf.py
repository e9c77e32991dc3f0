"""GGUF files as other programs write them, by the gguf package alone, and what is right for them.

Names, keys and changed values are those of llama.cpp's converter (convert_hf_to_gguf.py).
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# Name for llama.cpp, type of model for transformers, sizes, metadata keys of its own.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": (
        "qwen2moe",
        "qwen2_moe",
        _EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": (
        "qwen3moe",
        "qwen3_moe",
        _EXPERTS | {"moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32},
    ),
    "olmoe": ("olmoe", "olmoe", _EXPERTS),
}


def random_model(name: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    _, kind, sizes = MODELS[name]
    config = AutoConfig.for_model(kind, **SIZES | sizes | more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # away from norms of ones and biases of zeros
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_gguf(
    path: Path,
    name: str,
    model: PreTrainedModel,
    kind: str = "Q8_0",
    split_max_tensors: int = 0,
    **keys: Any,
) -> None:
    """Writes `model` with matrices of `kind`; its own weights become what that makes of them."""
    writer = gguf.GGUFWriter(path, MODELS[name][0], split_max_tensors=split_max_tensors)
    _write_settings(writer, model.config)
    for key, value in keys.items():
        _add(writer, key.replace("__", "."), value)
    for tensor, values in _tensors(name, model):
        is_matrix = values.ndim > 1 and "ffn_gate_inp" not in tensor
        chosen = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        packed = packed_as(chosen, np.ascontiguousarray(values.numpy()))
        writer.add_tensor(tensor, packed, raw_dtype=chosen)
        values.copy_(torch.from_numpy(gguf.dequantize(packed, chosen).copy()).view(values.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed_as(kind: gguf.GGMLQuantizationType, values: np.ndarray) -> np.ndarray:
    """Values in blocks; where the package cannot round to them, blocks of any bits with scales that
    are numbers."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        columns, size = gguf.GGML_QUANT_SIZES[kind]
        count = values.size // columns
        blocks = np.random.default_rng(kind).integers(0, 255, (9 * count, size)).astype(np.uint8)
        with np.errstate(all="ignore"):
            finite = np.isfinite(gguf.dequantize(blocks, kind)).all(axis=1)
        return blocks[finite][:count].reshape(*values.shape[:-1], -1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {str: "add_string", bool: "add_bool", int: "add_uint32", float: "add_float32"}
    getattr(writer, add.get(type(value), "add_array"))(key, value)


def _write_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _tensors(name: str, model: PreTrainedModel):
    """(name, values) of each tensor; the values are views of the model's own or written back."""
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[MODELS[name][0]]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for full, parameter in model.named_parameters():
        if full == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for module, values, back in _stored(name, full, parameter.data, model.config):
            stem, _, suffix = module.rpartition(".")
            yield f"{names.get_name(stem)}.{suffix}", values
            back(values)


def _stored(name: str, full: str, values: Tensor, config: Any):
    """(usual name, values, what puts changed values back) of what the converter stores."""
    keep = lambda changed: None  # noqa: E731
    if full.endswith("experts.gate_up_proj"):
        inner = values.shape[1] // 2
        yield full.replace("gate_up_proj", "gate_proj.weight"), values[:, :inner], keep
        yield full.replace("gate_up_proj", "up_proj.weight"), values[:, inner:], keep
    elif full.endswith("experts.down_proj"):
        yield full + ".weight", values, keep
    elif MODELS[name][0] == "llama" and (".q_proj." in full or ".k_proj." in full):
        heads = config.num_attention_heads if ".q_" in full else config.num_key_value_heads
        mixed = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield (
            full,
            mixed,
            lambda c: values.copy_(c.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)),
        )
    elif full.endswith("shared_expert_gate.weight"):
        yield full, values[0], keep
    else:
        yield full, values, keep


def rows(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (count, length), generator=torch.manual_seed(1))
