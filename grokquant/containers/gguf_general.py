"""What a GGUF file says of itself: its name, and the metadata under `general`.

Names of files: github.com/ggml-org/ggml, docs/gguf.md. Keys: gguf-py/gguf/constants.py.

    Mixtral-8x7B-Instruct-v0.1-Q4_K-00001-of-00009.gguf
    base    size finetune  version encoding  shard
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from grokquant.escaping import one_line
from grokquant.files.gguf_header import DENSE, GgufTensor, Signed, Value
from grokquant.files.json_objects import read_json_object
from grokquant.types import Origin, Source
from grokquant.version import OWN

_EXPERTS = "_exps."  # in the names of tensors that stack all experts of a layer
_QUANTIZATION_VERSION = 2  # of ggml's blocks
_HUB = "https://huggingface.co/"
# llama.cpp's numbers for files of mostly one type (enum llama_ftype). Its own loader takes files of
# Q3_K, Q4_K or Q5_K for the mixtures M.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}
# Defaults of generation_config.json under llama.cpp's names, with the type that it wants.
_SAMPLING = {
    "top_k": ("top_k", Signed),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "temp": ("temperature", float),
    "penalty_repeat": ("repetition_penalty", float),
}
_SIZE_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZE = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([KMBT])", re.IGNORECASE)
_ACTIVE = re.compile(r"A\d+(?:\.\d+)?[KMBT]", re.IGNORECASE)  # the A3B of 30B-A3B
_VERSION = re.compile(r"v\d+(?:\.\d+)*", re.IGNORECASE)
_LONGEST_NAME = 100  # of a file, without size and encoding


@dataclass(frozen=True)
class _Name:
    """The parts of a model's name by the rules for GGUF files."""

    base: str
    size: str
    finetune: str | None = None
    version: str | None = None


def file_name(source: Source, tensors: Collection[GgufTensor], number: int, count: int) -> str:
    """The name of file `number` of `count`, from 0."""
    name = _name_of(source.origin.name, tensors)
    parts = [name.base, name.size, name.finetune, name.version, encoding(tensors)]
    if count > 1:
        parts.append(f"{number + 1:05d}-of-{count:05d}")
    return "-".join(part for part in parts if part) + ".gguf"


def encoding(tensors: Collection[GgufTensor]) -> str:
    """The type of most quantized weights, or of all weights if none is quantized."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type] += prod(tensor.shape)
    quantized = Counter({kind: n for kind, n in weights.items() if kind not in DENSE})
    return (quantized or weights).most_common(1)[0][0]


def general(source: Source, tensors: Collection[GgufTensor]) -> dict[str, Value]:
    """The pairs under `general`, without what is not known."""
    origin = source.origin
    name = _name_of(origin.name, tensors)
    values: dict[str, Value | None] = {
        "type": "model",
        "name": one_line(origin.name),
        "basename": name.base,
        "finetune": name.finetune,
        "version": name.version,
        "size_label": name.size,
        "quantized_by": OWN,
        "quantization_version": _QUANTIZATION_VERSION,
        "file_type": _FILE_TYPES.get(encoding(tensors)),
        "license": origin.licence,
        "license.name": origin.licence_name,
        "license.link": origin.licence_link,
        "languages": list(origin.languages) or None,
        "tags": ["text-generation"],
    }
    values |= _base_model(origin) | _sampling(source)
    return {f"general.{key}": value for key, value in values.items() if value is not None}


def _base_model(origin: Origin) -> dict[str, Value | None]:
    if origin.base_model is None:
        return {}
    organization, _, name = origin.base_model.partition("/")
    return {
        "base_model.count": 1,
        "base_model.0.name": name,
        "base_model.0.organization": organization,
        "base_model.0.repo_url": _HUB + origin.base_model,
    }


def _sampling(source: Source) -> dict[str, Value | None]:
    path = source.beside.get("generation_config.json")
    stated = read_json_object(path) if path else {}
    return {
        f"sampling.{key}": kind(stated[field])
        for key, (field, kind) in _SAMPLING.items()
        if type(stated.get(field)) in (int, float)
    }


def _name_of(model: str, tensors: Collection[GgufTensor]) -> _Name:
    """The parts of `model`, the name of a directory; its size is counted if it has none."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", model)[:_LONGEST_NAME].strip("-.") or "model"
    parts = [part for part in plain.split("-") if part]
    weights = sum(prod(tensor.shape) for tensor in tensors)
    sizes = (number for number, part in enumerate(parts) if number and _is_size(part, weights))
    first = next(sizes, None)
    if first is None:
        return _Name("-".join(parts), _size_label(tensors))
    end = first + 1
    if end < len(parts) and _ACTIVE.fullmatch(parts[end]):
        end += 1
    rest = parts[end:]
    versions = [part for part in rest if _VERSION.fullmatch(part)]
    tuned = [part for part in rest if part not in versions]
    size = "-".join(parts[first:end])
    base = "-".join(parts[:first])
    return _Name(base, size, "-".join(tuned) or None, "-".join(versions) or None)


def _is_size(part: str, weights: int) -> bool:
    """Whether a part of a name is the size of a model with so many weights, within a factor of 2.

    A context length, such as 32k, looks the same.
    """
    found = _SIZE.fullmatch(part)
    if not found:
        return False
    stated = int(found[1] or 1) * float(found[2]) * _SIZE_UNITS[found[3].upper()]
    return weights / 2 <= stated <= weights * 2


def _size_label(tensors: Collection[GgufTensor]) -> str:
    """As llama.cpp's converter counts: experts times the weights of a model with one expert each,
    8x7.2B, or all weights, 15M."""
    experts = [tensor for tensor in tensors if _EXPERTS in tensor.name]
    weights = sum(prod(t.shape) for t in tensors if _EXPERTS not in t.name)
    weights += sum(prod(tensor.shape[1:]) for tensor in experts)
    prefix = f"{experts[0].shape[0]}x" if experts else ""
    unit = next((u for u, size in reversed(_SIZE_UNITS.items()) if weights > size), "K")
    scaled = weights / _SIZE_UNITS[unit]
    return f"{prefix}{scaled:.{1 if scaled < 9.5 else 0}f}{unit}"
