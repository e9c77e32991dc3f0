"""What transformers gets to see of a stranger's config.json."""

from pathlib import Path

from grokquant.errors import InputError

# They choose code, kernels or forms of output, not the model.
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
_PRIVATE_BUT_MODEL = {"_sliding_window_pattern"}
# Far above any model, far below what would fill the memory before tensors are missed.
_MOST_LAYERS, _MOST_EXPERTS, _LARGEST = 4096, 65536, 2**31
_LAYERS = ("num_hidden_layers",)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def usual_fields(path: Path, content: dict) -> dict:
    """The fields of a config.json that make the model. Raises InputError naming a bad one."""
    fields = {key: value for key, value in content.items() if _makes_the_model(key)}
    for key, value in fields.items():
        most = _MOST_LAYERS if key in _LAYERS else _MOST_EXPERTS if key in _EXPERTS else _LARGEST
        if type(value) is int and value > most:
            raise InputError(f"{path}: {key} is {value}, at most {most} are possible")
        if key in _LAYERS and (type(value) is not int or value < 1):
            raise InputError(f"{path}: {key} must be a positive whole number, not {value!r:.40}")
    return fields


def _makes_the_model(key: str) -> bool:
    return key not in _DROPPED and (not key.startswith("_") or key in _PRIVATE_BUT_MODEL)
