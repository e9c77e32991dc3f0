"""The config.json of a model that a GGUF file describes, made of its metadata: the inverse of
`gguf_settings`.

Only what llama.cpp computes with is in a file. A field that its metadata lack has the default of
transformers.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grokquant.containers.gguf_names import (
    ROPE_FREQS,
    ROWS,
    Architecture,
    known_architecture,
)
from grokquant.containers.gguf_settings import (
    LLAMA3_DEFAULTS,
    LOCAL_BASE,
    LOG_MULTIPLIER,
    WIDE_LAYERS,
    layer_types,
    llama3_factors,
)
from grokquant.containers.gguf_tokenizer import with_tokenizer
from grokquant.errors import InputError
from grokquant.files.published import is_repository
from grokquant.memory import refused
from grokquant.sources.origin import LICENCE_KEYS, with_licence
from grokquant.types import Origin, Source
from grokquant.version import OWN

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
# Numbers of tokens in a config and in the metadata.
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_MISTRAL = "MistralForCausalLM"
# Of weights that are floats; blocks have no dtype.
_DTYPES = {torch.float16: "float16", torch.float32: "float32"}


def described(source: Source) -> Source:
    """`source` with the config and the tokenizer that its metadata describe, unless files beside it
    do. Raises InputError for a model that is not known, or not the one of the config."""
    stated = source.metadata["general.architecture"]
    if source.config:
        known = known_architecture(source)
        if known.name != stated:
            raise InputError(
                f"{source.path / 'config.json'}: describes {known.models[0]}, which is "
                f"{known.name} for llama.cpp, but the weights are those of {stated[:40]!r}"
            )
        config = source.config
    else:
        row = _row(source)
        with refused(f"{source.path}: its metadata make no config"):
            config = _config(source, row)
    # What the blocks are is in the headers of the files.
    config = config | {"quantization_config": {"quant_method": OWN, "format": "gguf"}}
    made = with_tokenizer(replace(source, config=config, origin=_origin(source)))
    return replace(made, metadata={}) if source.config else made


def _row(source: Source) -> Architecture:
    """The row of a file: some names stand for several models."""
    name = source.metadata["general.architecture"]
    if all(row.name != name for row in ROWS):
        known = ", ".join(dict.fromkeys(row.name for row in ROWS))
        raise InputError(f"{source.path}: a model of {name[:40]!r} is not known (known: {known})")

    def fits(row: Architecture) -> bool:
        marks = row.marks.items()
        found = (source.metadata.get(f"{name}.{key}") in values for key, values in marks)
        return row.name == name and all(found)

    return next(row for row in ROWS if fits(row))


def _model(source: Source, row: Architecture) -> str:
    """The model in config.json: Mistral is llama for llama.cpp, only its name says what it is."""
    names = (source.metadata.get(f"general.{key}", "") for key in ("basename", "name"))
    is_mistral = any("mistral" in str(name).lower() for name in names)
    return _MISTRAL if is_mistral and _MISTRAL in row.models else row.models[0]


def _config(source: Source, row: Architecture) -> dict[str, Any]:
    """The config of a file. Raises InputError naming a key that is missing or makes no sense."""
    model = _model(source, row)
    found: dict[str, Any] = {"architectures": [model]}
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    found["model_type"] = next((kind for kind, name in kinds if name == model), None)
    if model == _MISTRAL:
        found["sliding_window"] = None  # llama.cpp has none there
    found |= {field: wanted[0] for field, wanted in row.required.items() if wanted[0] is not None}
    found |= dict(_fields(source, row))
    embedding = source.tensors.get(_EMBEDDING)
    if embedding is None:
        raise InputError(f"{source.path}: tensor {_EMBEDDING} is missing")
    if not isinstance(found.get("num_hidden_layers"), int):
        raise InputError(f"{source.path}: its metadata have no {row.name}.block_count")
    # More layers than tensors are damage, or an attack on memory.
    if not 0 < found["num_hidden_layers"] <= len(source.tensors):
        raise InputError(f"{source.path}: {row.name}.block_count is {found['num_hidden_layers']}")
    found["vocab_size"] = embedding.shape[0]
    found["tie_word_embeddings"] = _HEAD not in source.tensors
    found["dtype"] = _DTYPES.get(embedding.dtype, "bfloat16")
    found |= _biases(source) | _derived(source, row, found)
    for field, key in _TOKENS.items():
        found[field] = source.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return found


def _fields(source: Source, row: Architecture) -> Iterator[tuple[str, Any]]:
    """Fields of the config with the values of their keys, the first of several that are there."""
    seen = {"rope_theta", "vocab_size", "qk_head_dim", "rotary_dim"}  # follow from several
    for key, field in row.settings.items():
        value = _value(source, row, key)
        if value is None or field in seen:
            continue
        seen.add(field)
        yield field, value


def _value(source: Source, row: Architecture, key: str) -> Any:
    """A number as people write it, None if it is missing; some files repeat it for each layer."""
    value = source.metadata.get(f"{row.name}.{key}")
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise InputError(
                f"{source.path}: {row.name}.{key} differs between layers, which is not supported"
            )
        value = value[0]
    # The shortest number that is the same in float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _derived(source: Source, row: Architecture, found: dict[str, Any]) -> dict[str, Any]:
    """Fields that follow from several keys."""
    rope = _rope(source, row)
    if row.name == "grok":
        return {"rope_theta": rope["rope_theta"]}
    fields: dict[str, Any] = {"rope_parameters": rope}
    if nextn := _value(source, row, "nextn_predict_layers"):
        fields["num_hidden_layers"] = found["num_hidden_layers"] - nextn
    if row.window_pattern:
        count = fields.get("num_hidden_layers", found["num_hidden_layers"])
        fields["layer_types"] = layer_types(row, count)
    if row.name == "deepseek2":
        fields |= _latent(source, row)
    if row.name == "glm4moe":
        fields["attention_bias"] = "blk.0.attn_q.bias" in source.tensors
        fields["use_qk_norm"] = "blk.0.attn_q_norm.weight" in source.tensors
        share = (_value(source, row, "rope.dimension_count") or 0) / max(found["head_dim"], 1)
        fields["rope_parameters"]["partial_rotary_factor"] = share or 0.5
    if row.name in WIDE_LAYERS:
        head = found["head_dim"]
        wide = found["num_hidden_layers"] == WIDE_LAYERS[row.name]
        whole = found["hidden_size"] // found["num_attention_heads"]
        fields["query_pre_attn_scalar"] = whole if wide else head
    if row.name == "gemma3":
        local = _value(source, row, "rope.freq_base_swa") or LOCAL_BASE
        fields["rope_parameters"] = {
            "full_attention": fields["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return fields


def _latent(source: Source, row: Architecture) -> dict[str, Any]:
    """The widths of latent attention: newer files state those of one head, too, and call all heads
    of the latent one."""
    rotary = _value(source, row, "rope.dimension_count")
    names = ("attention.key_length", "attention.value_length")
    key, value = (_value(source, row, f"{n}_mla") or _value(source, row, n) for n in names)
    if not all(isinstance(size, int) for size in (rotary, key, value)) or rotary >= key:
        raise InputError(f"{source.path}: {row.name}.attention.key_length makes no sense")
    return {
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": value,
        "q_lora_rank": _value(source, row, "attention.q_lora_rank") or None,
        "num_key_value_heads": _value(source, row, "attention.head_count"),
    }


def _rope(source: Source, row: Architecture) -> dict[str, Any]:
    """Rotary positions as transformers has them."""
    theta = _value(source, row, "rope.freq_base") or 10000.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = _value(source, row, "rope.scaling.type") or "none"
    factor = _value(source, row, "rope.scaling.factor")
    if ROPE_FREQS in source.tensors:
        return rope | _slowed(source, theta, source.tensors[ROPE_FREQS].read())
    if kind == "none" or not factor:
        return rope
    if kind not in row.scalings:
        raise InputError(f"{source.path}: positions scaled by {kind!r} are not supported")
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return rope
    length = _value(source, row, "rope.scaling.original_context_length")
    rope["original_max_position_embeddings"] = length
    if row.name == "gpt-oss":
        rope["truncate"] = False  # as the model was trained
    if multiplier := _value(source, row, "rope.scaling.yarn_log_multiplier"):
        mscale = round(multiplier / LOG_MULTIPLIER, 6)
        rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    if attention := _value(source, row, "rope.scaling.attn_factor"):
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    for key in ("beta_fast", "beta_slow"):
        if value := _value(source, row, f"rope.scaling.yarn_{key}"):
            rope[key] = value
    return rope


def _slowed(source: Source, theta: float, factors: Tensor) -> dict[str, Any]:
    """The parameters of Llama 3 that make these factors, with texts of a power of two in training.

    Raises InputError if there are none.
    """
    slowest = round(float(factors.max()), 4)
    for power in range(5, 21):
        rope = {"rope_type": "llama3", "factor": slowest, **LLAMA3_DEFAULTS}
        rope |= {"original_max_position_embeddings": 1 << power, "rope_theta": theta}
        if torch.allclose(llama3_factors(rope, 2 * len(factors)), factors, rtol=1e-4):
            return rope
    raise InputError(f"{source.path}: {ROPE_FREQS} is not that of Llama 3, which is not supported")


def _biases(source: Source) -> dict[str, bool]:
    """Fields of biases that a file has throughout; some models always have others."""
    kinds = {
        "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
    }
    return {
        field: True
        for field, parts in kinds.items()
        if all(f"blk.0.{part}.bias" in source.tensors for part in parts)
    }


def _origin(source: Source) -> Origin:
    """What the metadata say of the model, where nothing beside the file does."""
    origin = source.origin
    base = str(source.metadata.get("general.base_model.0.repo_url", ""))
    repository = base.removeprefix("https://huggingface.co/")
    if origin.base_model is None and is_repository(repository):
        origin = replace(origin, base_model=repository)
    if origin.licence is not None:
        return origin
    stated = {key: source.metadata.get(f"general.{key.replace('_', '.')}") for key in LICENCE_KEYS}
    return with_licence(origin, stated, source.beside)
