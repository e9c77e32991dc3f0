"""The config.json of a model that a GGUF file describes: made of its metadata.

Only what llama.cpp computes with is in a file. A field that its metadata lack has the default of
transformers.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from grokquant.containers.gguf_names import ROWS, Architecture, known_architecture
from grokquant.containers.gguf_tokenizer import with_tokenizer
from grokquant.errors import InputError
from grokquant.files.published import is_repository
from grokquant.sources.origin import LICENCE_KEYS, with_licence
from grokquant.types import Origin, Source
from grokquant.version import OWN

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
# Numbers of tokens in a config and in the metadata.
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
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
        config = _config(source, _row(source))
    origin = _origin(source)
    # What the blocks are is in the headers of the files.
    config = config | {"quantization_config": {"quant_method": OWN, "format": "gguf"}}
    return with_tokenizer(replace(source, config=config, origin=origin))


def _row(source: Source) -> Architecture:
    """The row of a file: some names stand for a dense model and for one with experts."""
    name = source.metadata["general.architecture"]
    rows = [row for row in ROWS if row.name == name]
    if not rows:
        known = ", ".join(dict.fromkeys(row.name for row in ROWS))
        raise InputError(f"{source.path}: a model of {name[:40]!r} is not known (known: {known})")
    routed = bool(source.metadata.get(f"{name}.expert_count"))
    fitting = [row for row in rows if ("expert_count" in row.settings) == routed]
    return (fitting or rows)[0]


def _config(source: Source, row: Architecture) -> dict[str, Any]:
    """The config of a file. Raises InputError naming a key that is missing or makes no sense."""
    found: dict[str, Any] = {"architectures": [row.models[0]]}
    found |= {field: wanted[0] for field, wanted in row.required.items() if wanted[0] is not None}
    found |= dict(_fields(source, row))
    embedding = source.tensors.get(_EMBEDDING)
    if embedding is None:
        raise InputError(f"{source.path}: tensor {_EMBEDDING} is missing")
    if not isinstance(found.get("num_hidden_layers"), int):
        raise InputError(f"{source.path}: its metadata have no {row.name}.block_count")
    # More layers than tensors, and more experts than rows, are damage or an attack on memory.
    if not 0 < found["num_hidden_layers"] <= len(source.tensors):
        raise InputError(f"{source.path}: {row.name}.block_count is {found['num_hidden_layers']}")
    found["vocab_size"] = embedding.shape[0]
    found["tie_word_embeddings"] = _HEAD not in source.tensors
    found["rope_parameters"] = _rope(source, row)
    found["dtype"] = _DTYPES.get(embedding.dtype, "bfloat16")
    found |= _biases(source)
    for field, key in _TOKENS.items():
        found[field] = source.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return found


def _fields(source: Source, row: Architecture) -> Iterator[tuple[str, Any]]:
    """Fields of the config with the values of their keys, the first of several that are there."""
    seen = set()
    for key, field in row.settings.items():
        value = source.metadata.get(f"{row.name}.{key}")
        if value is None or field in seen or field in ("rope_theta", "vocab_size"):
            continue
        seen.add(field)
        yield field, _single(source, f"{row.name}.{key}", value)


def _single(source: Source, key: str, value: Any) -> Any:
    """A number as people write it; some files repeat it for each layer."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise InputError(f"{source.path}: {key} differs between layers, which is not supported")
        value = value[0]
    # The shortest number that is the same in float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(source: Source, row: Architecture) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        found = source.metadata.get(f"{row.name}.rope.{key}")
        return default if found is None else _single(source, f"{row.name}.rope.{key}", found)

    rope = {"rope_type": "default", "rope_theta": value("freq_base", 10000.0)}
    kind = value("scaling.type", "none")
    if kind != "none":
        raise InputError(f"{source.path}: positions scaled by {kind!r} are not supported")
    return rope


def _biases(source: Source) -> dict[str, bool]:
    """`attention_bias` where each projection has one; some models always have others."""
    parts = ("attn_q", "attn_k", "attn_v", "attn_output")
    has_all = all(f"blk.0.{part}.bias" in source.tensors for part in parts)
    return {"attention_bias": True} if has_all else {}


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
