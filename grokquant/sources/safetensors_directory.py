"""A Hugging Face directory: config.json and safetensors, in one file or in indexed shards.

Tensors appear raw, under their names and in their dtypes; `formats` unpacks quantized ones.
"""

import glob
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from grokquant.errors import InputError, said_by
from grokquant.files.impostors import impostor
from grokquant.files.json_objects import read_json_object
from grokquant.files.regular import open_regular
from grokquant.files.safetensors_entries import Entry, parse_entries
from grokquant.sources import presharded
from grokquant.sources.beside import files_beside, present, read_config
from grokquant.sources.finite import all_finite
from grokquant.sources.kind import SourceKind
from grokquant.sources.left_aside import left_aside, unlisted
from grokquant.sources.origin import origin_of
from grokquant.types import Source, TensorRef

NAME = "safetensors"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The key of config.json by which a model names its file of weights, or its index, itself.
EXPLICIT = "transformers_weights"
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*\.safetensors")
# Far above any real checkpoint; more is damage, or an attack on memory.
MAX_HEADER_BYTES = 25_000_000
# Where older writers describe their quantization, if config.json does not, and their quant_method.
OLDER_CONFIGS = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def recognizes(path: Path) -> bool:
    """Whether `path` holds safetensors files or their index."""
    return (path / INDEX).exists() or any(path.glob("*.safetensors"))


def open_source(path: Path, config_path: Path | None = None) -> Source:
    """Opens the directory `path`; only headers are read, and no file stays open.

    Raises InputError for missing or malformed files, unsafe file names in the index and tensors
    that are not in their shard. Code in the directory is ignored.
    """
    config = _read_config(path, config_path)
    index, by_file = _weights(path, config.pop(EXPLICIT, None))
    notes = left_aside(path, [*by_file, *index])
    opened = {}
    for file, names in by_file.items():
        opened[file], strays = _open_shard(path / file, names)
        notes += strays
    refs = [ref for refs in opened.values() for ref in refs]
    if presharded.is_presharded(path):
        refs = _joined(path, config, opened)
    beside = files_beside(path)
    return Source(
        path=path,
        kind=NAME,
        config=config,
        tensors={ref.name: ref for ref in refs},
        tokenizer_files=present(path / name for name in TOKENIZER_FILES),
        weight_files=tuple(path / file for file in by_file),
        origin=origin_of(path, config, beside),
        beside=beside,
        notes=notes,
    )


def _read_config(path: Path, config_path: Path | None) -> dict:
    config = read_config(path, config_path)
    for name, method in OLDER_CONFIGS.items():
        if config.get("quantization_config") is None and (path / name).is_file():
            config["quantization_config"] = {"quant_method": method} | read_json_object(path / name)
    return config


def _weights(path: Path, explicit: object) -> tuple[list[str], Mapping[str, list[str] | None]]:
    """The index, if one is read, and the file names with the tensors to read from each; None means
    all of them. `explicit` is what config.json says of them.

    But for rank files, which transformers does not read, they are what transformers loads.
    """
    if presharded.is_presharded(path):
        index = [INDEX] if (path / INDEX).exists() else []
        return index, dict.fromkeys(presharded.rank_files(path))
    if explicit is not None:
        return _explicit(path, explicit)
    if (path / SINGLE).exists():
        return [], {SINGLE: None}
    if (path / INDEX).exists():
        return [INDEX], _indexed(path / INDEX)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if len(files) > 1 or "-of-" in files[0]:
        raise InputError(f"{path}: shards without {INDEX}: the directory is incomplete")
    return [], {files[0]: None}


def _explicit(path: Path, name: object) -> tuple[list[str], Mapping[str, list[str] | None]]:
    """The same where config.json names a file of weights or an index."""
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name.removesuffix(".index.json")):
        raise InputError(
            f"{path / 'config.json'}: {EXPLICIT}: {str(name)[:80]!r} is not a plain .safetensors "
            "or .safetensors.index.json file name"
        )
    if name.endswith(".json"):
        return [name], _indexed(path / name)
    return [], {name: None}


def _joined(path: Path, config: dict, opened: dict[str, list[TensorRef]]) -> list[TensorRef]:
    """The whole tensors of rank files, which must include those of the index, if there is one."""
    if config.get("quantization_config") is not None:
        raise InputError(
            f"{path}: quantized models split over ranks (*-TP-*.safetensors) are not supported; "
            "use the original checkpoint"
        )
    refs = presharded.joined(path, opened)
    if (path / INDEX).exists():
        known = {ref.name for ref in refs}
        for file, names in _indexed(path / INDEX).items():
            for name in names:
                if name not in known:
                    raise InputError(f"{path / file}: tensor {name!r} is in no rank file")
    return refs


def _indexed(index: Path) -> dict[str, list[str]]:
    """File names with the tensors that the index places in each."""
    return shards_of(read_json_object(index), str(index))


def shards_of(content: dict, name: str) -> dict[str, list[str]]:
    """File names with the tensors in each, by an index with this content, which errors call
    `name`."""
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{name}: weight_map must map tensor names to file names")
    by_file: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise InputError(f"{name}: {str(file)[:80]!r} is not a plain .safetensors file name")
        by_file.setdefault(file, []).append(tensor)
    return dict(sorted(by_file.items()))


def _open_shard(path: Path, names: list[str] | None) -> tuple[list[TensorRef], tuple[str, ...]]:
    """The tensors of a file, by default all, and a line about others that it holds."""
    found = _read_header(path)
    for name in names or ():
        if name not in found:
            raise InputError(f"{path}: tensor {name!r} is missing, the index places it here")
    refs = [_ref(path, name, found[name]) for name in names or sorted(found)]
    strays = found.keys() - set(names or found)
    return refs, unlisted(path, strays)


def _read_header(path: Path) -> dict[str, Entry]:
    """The tensors in the header of a file, which is then safe for the safetensors library."""
    if not path.exists():
        raise InputError(f"{path}: no such file{_unfinished(path)}")
    with open_regular(path) as file:
        return parse_header(file, str(path))


def parse_header(file: BinaryIO, name: str) -> dict[str, Entry]:
    """The tensors in the header of an open file, which errors call `name`."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        what = impostor(start + file.read(200))
        raise InputError(
            f"{name}: {what or f'header of {length} bytes (limit {MAX_HEADER_BYTES})'}"
        )
    raw = file.read(length)
    if not raw or len(raw) < length:
        what = f"truncated: {len(raw)} of the {length} bytes of its header; download it again"
        raise InputError(f"{name}: {impostor(start) or what}")
    data_bytes = file.seek(0, os.SEEK_END) - 8 - length
    return parse_entries(raw, name, data_bytes)


def _unfinished(path: Path) -> str:
    """What to say of a missing file whose download has begun."""
    begun = sorted(path.parent.glob(f"{glob.escape(path.name)}*.incomplete"))
    return f"; {begun[0].name} is an unfinished download of it, download it again" if begun else ""


def _ref(path: Path, name: str, entry: Entry) -> TensorRef:
    shape = entry.shape
    load = partial(_load, path, name)
    return TensorRef(
        name,
        shape,
        entry.dtype,
        entry.end - entry.start,
        load,
        load_rows=(lambda first, stop: load((slice(first, stop),))) if shape else None,
        load_part=load if shape else None,
    )


def _load(path: Path, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
    """The part that `index` selects, by default all."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: tensor {name!r} cannot be read: {said_by(error, 200)}") from None
    if not all_finite(tensor):
        raise InputError(f"{path}: tensor {name!r} holds non-finite values")
    return tensor


KIND = SourceKind(
    name=NAME,
    looks_for="model.safetensors.index.json or model.safetensors",
    recognizes=recognizes,
    open_source=open_source,
)
