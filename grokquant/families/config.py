"""The fields of a checkpoint's config.json that are passed on to transformers."""

from pathlib import Path

from grokquant.errors import InputError

# Fields that choose code, kernels or forms of output, not the model.
_DROPPED = {
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "experts_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Private by its name, yet Gemma 3 computes its layer types from it.
_PRIVATE_BUT_MODEL = {"_sliding_window_pattern"}
# Far above any model, and far below numbers that fill the memory before missing tensors are noted.
_MOST_LAYERS = 4096
_MOST_EXPERTS = 65536
_LARGEST = 2**31
_LAYERS = ("num_hidden_layers",)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def usual_fields(path: Path, content: dict) -> dict:
    """The fields of a config.json that define the model. Raises InputError naming a bad one."""
    fields = {key: value for key, value in content.items() if defines_the_model(key)}
    for key, value in fields.items():
        most = _MOST_LAYERS if key in _LAYERS else _MOST_EXPERTS if key in _EXPERTS else _LARGEST
        if type(value) is int and value > most:
            raise InputError(f"{path}: {key} is {value}, but at most {most} is supported")
        if key in _LAYERS and (type(value) is not int or value < 1):
            raise InputError(f"{path}: {key} must be a positive whole number, not {value!r:.40}")
    return fields


def defines_the_model(key: str) -> bool:
    """Whether a field of config.json is about the model, by its name."""
    return key not in _DROPPED and (not key.startswith("_") or key in _PRIVATE_BUT_MODEL)
