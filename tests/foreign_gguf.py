"""GGUF files as other programs write them, by the gguf package alone, and what is right for them.

Names, keys and changed values are those of llama.cpp's converter (convert_hf_to_gguf.py).
"""

from collections.abc import Callable, Iterator
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
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
_GEMMA |= {"tie_word_embeddings": True}
# What tokenizers may read differently.
TEXTS = [
    "def read(path):\n    with open(path) as file:\n\treturn file.read()\n\n\n",
    "In 1998, 3.14159 and 2_000_000 were numbers: 0x7F, -12e-3.",
    "Zażółć gęślą jaźń — 漢字かな交じり文 🦙🚀 ½ µ \u00a0 é e\u0301",
    "  two   spaces  and a tab\tend  ",
    "<s>[BOS]</s> [EOS] [PAD] are words here",
    "x",
]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
_GLM = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "head_dim": 32,
    "use_qk_norm": True,
    "attention_bias": True,
}
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
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}),
    "deepseek_v3": (
        "deepseek2",
        "deepseek_v3",
        LATENT | {"q_lora_rank": 32, "n_group": 2, "norm_topk_prob": True},
    ),
    "glm4_moe": ("glm4moe", "glm4_moe", _GLM),
    "gemma": ("gemma", "gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", "gemma2", _GEMMA),
    "gemma3": ("gemma3", "gemma3_text", _GEMMA | {"num_hidden_layers": 6}),
    "gpt_oss": (
        "gpt-oss",
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 16}
        | {"rope_parameters": YARN | {"truncate": False}},
    ),
    "deepseek_v2": ("deepseek2", "deepseek_v2", LATENT | {"q_lora_rank": 32}),
    "olmoe": ("olmoe", "olmoe", _EXPERTS | {"num_key_value_heads": 4}),
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
    stacked: bool = True,
    joined: bool = False,
    **keys: Any,
) -> None:
    """Writes `model` with matrices of `kind`; its own weights become what that makes of them."""
    writer = gguf.GGUFWriter(path, MODELS[name][0], split_max_tensors=split_max_tensors)
    _write_settings(writer, name, model.config)
    for key, value in keys.items():
        _add(writer, key.replace("__", "."), value)
    waiting: dict[str, np.ndarray] = {}
    for tensor, values in _tensors(name, model):
        is_matrix = values.ndim > 1 and tensor.endswith("weight") and "ffn_gate_inp" not in tensor
        chosen = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        packed = packed_as(chosen, np.ascontiguousarray(values.numpy()))
        whole = _joined(tensor, packed, waiting) if joined else None
        if whole is not None:
            for called, all_rows in whole:
                writer.add_tensor(called, all_rows, raw_dtype=chosen)
        elif stacked or "_exps" not in tensor:
            writer.add_tensor(tensor, packed, raw_dtype=chosen)
        else:
            for expert, matrix in enumerate(packed):
                alone = tensor.replace("_exps", f".{expert}")
                writer.add_tensor(alone, np.ascontiguousarray(matrix), raw_dtype=chosen)
        values.copy_(torch.from_numpy(gguf.dequantize(packed, chosen).copy()).view(values.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_JOINS = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}


def _joined(
    tensor: str, packed: np.ndarray, waiting: dict[str, np.ndarray]
) -> list[tuple[str, np.ndarray]] | None:
    """What to write in place of a part of a joined tensor: with its last part the whole, nothing
    before; None if no tensor is joined of it."""
    layer, _, end = tensor.rpartition("blk.")[2].partition(".")
    stem, _, suffix = end.partition(".")
    for whole, parts in _JOINS.items():
        if stem in parts:
            waiting[tensor] = packed
            names = [f"blk.{layer}.{part}.{suffix}" for part in parts]
            if not all(name in waiting for name in names):
                return []
            axis = -1 if suffix == "bias" else -2  # experts stay the first axis
            values = np.concatenate([waiting[name] for name in names], axis=axis)
            return [(f"blk.{layer}.{whole}.{suffix}", np.ascontiguousarray(values))]
    return None


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


def _write_settings(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    """The pairs that llama.cpp's converter writes for the model."""
    add = {
        "max_position_embeddings": writer.add_context_length,
        "hidden_size": writer.add_embedding_length,
        "num_hidden_layers": writer.add_block_count,
        "intermediate_size": writer.add_feed_forward_length,
        "num_attention_heads": writer.add_head_count,
        "rms_norm_eps": writer.add_layer_norm_rms_eps,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "sliding_window": writer.add_sliding_window,
        "n_shared_experts": writer.add_expert_shared_count,
        "first_k_dense_replace": writer.add_leading_dense_block_count,
        "routed_scaling_factor": writer.add_expert_weights_scale,
        "q_lora_rank": writer.add_q_lora_rank,
        "kv_lora_rank": writer.add_kv_lora_rank,
    }
    for field, write in add.items():
        if getattr(config, field, None):
            write(getattr(config, field))
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if found := [getattr(config, field) for field in experts if hasattr(config, field)]:
        writer.add_expert_count(found[0])
    if MODELS[name][0] == "glm4moe":
        writer.add_rope_dimension_count(config.head_dim // 2)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if getattr(config, "n_group", 1) > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if MODELS[name][0] == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if MODELS[name][0] == "deepseek2":
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length_mla(config.v_head_dim)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
        v3 = name == "deepseek_v3"
        writer.add_expert_weights_norm(v3)
        kinds = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(kinds.SIGMOID if v3 else kinds.SOFTMAX)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _tensors(name: str, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of each tensor; what becomes of the values becomes of the model's own."""
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[MODELS[name][0]]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for full, parameter in [*model.named_parameters(), *model.named_buffers()]:
        tied = full == "lm_head.weight" and model.config.tie_word_embeddings
        if tied or "rotary" in full or full.endswith("embed_scale"):
            continue
        for stored, values, back in _stored(name, full, parameter.data, model.config):
            stem, suffix = stored, "weight"
            if stored.endswith((".weight", ".bias")):
                stem, _, suffix = stored.rpartition(".")
            values = values.clone()
            yield f"{names.get_name(stem)}.{suffix}", values
            back(values)


def _stored(
    name: str, full: str, values: Tensor, config: Any
) -> Iterator[tuple[str, Tensor, Callable[[Tensor], object]]]:
    """(usual name, values, what puts them back) of what the converter stores of a parameter."""
    arch = MODELS[name][0]
    gate, up = _halves(values, arch) if "gate_up_proj" in full else (values, values)
    stem, suffix = (full[:-5], ".bias") if full.endswith("_bias") else (full, ".weight")
    if "mlp.experts.gate_up_proj" in full:
        yield stem.replace("gate_up_proj", "gate_proj") + suffix, gate, gate.copy_
        yield stem.replace("gate_up_proj", "up_proj") + suffix, up, up.copy_
    elif "mlp.experts.down_proj" in full:
        down = values.transpose(1, 2) if arch == "gpt-oss" and values.ndim == 3 else values
        yield stem + suffix, down, down.copy_
    elif arch == "llama" and (".q_proj." in full or ".k_proj." in full):
        heads = config.num_attention_heads if ".q_" in full else config.num_key_value_heads
        view = values.unflatten(0, (heads, 2, -1)).transpose(1, 2)
        yield full, view.flatten(0, 2), lambda mixed: view.copy_(mixed.view(view.shape))
    elif arch.startswith("gemma") and "norm" in full:
        yield full, values + 1, lambda stored: values.copy_(stored - 1)
    elif full.endswith("shared_expert_gate.weight"):
        yield full, values[0], values[0].copy_
    elif full.endswith("kv_b_proj.weight"):
        heads = values.unflatten(0, (config.num_attention_heads, -1))
        k, v = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        yield full.replace("kv_b", "k_b"), k.transpose(1, 2), k.transpose(1, 2).copy_
        yield full.replace("kv_b", "v_b"), v, v.copy_
    elif full.endswith("e_score_correction_bias"):
        yield full.removesuffix("_bias") + ".bias", values, values.copy_
    else:
        yield full, values, values.copy_


def _halves(values: Tensor, arch: str) -> tuple[Tensor, Tensor]:
    """gate and up of fused experts, as views: rows of gate first, or in turn and transposed."""
    if arch != "gpt-oss":
        return values.chunk(2, dim=1)  # type: ignore[return-value]
    pairs = (values[..., half::2] for half in (0, 1))
    return tuple(pair.transpose(1, 2) if pair.ndim == 3 else pair for pair in pairs)  # type: ignore[return-value]


def rows(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (count, length), generator=torch.manual_seed(1))
