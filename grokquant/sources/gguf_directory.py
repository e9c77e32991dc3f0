"""GGUF files: our own beside the config.json that describes them, and those of other programs.

    directory                 all files, with config.json, tokenizer and licence from beside them
    file, or first of a split that alone: its metadata describe the model; what lies beside it may
                              belong to others

Tensors appear raw, under the names of the files: blocks as uint8 [rows, bytes per row], the experts
of a layer as one tensor. `containers` gives them their usual names, and makes config and tokenizer
of metadata.
"""

import os
import re
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.files.gguf_header import (
    DENSE,
    READABLE,
    TYPES,
    GgufTensor,
    read_metadata,
    read_tensors,
)
from grokquant.files.json_objects import read_json_object
from grokquant.grids import GRIDS
from grokquant.sources.beside import files_beside, present, read_config
from grokquant.sources.finite import all_finite
from grokquant.sources.kind import SourceKind
from grokquant.sources.left_aside import left_aside, named
from grokquant.sources.origin import origin_of
from grokquant.sources.safetensors_directory import TOKENIZER_FILES
from grokquant.types import Origin, Source, TensorRef
from grokquant.version import OWN

NAME = "gguf"
SUFFIX = ".gguf"
_ARCHITECTURE = "general.architecture"
_KIND = "general.type"
# name-00002-of-00005.gguf
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# A model that sees has its eyes in a file of this name.
_NOT_THE_MODEL = ("mmproj",)


def recognizes(path: Path) -> bool:
    """Whether `path` holds GGUF files."""
    return any(path.glob(f"*{SUFFIX}"))


def open_source(path: Path, config_path: Path | None = None) -> Source:
    """Opens a directory or a file; only headers are read. Raises InputError for damaged files."""
    if not path.is_dir():
        return _open_file(path, config_path)
    if is_own(path) or config_path:
        files = sorted(path.glob(f"*{SUFFIX}"))
        metadata = {}
        config = read_config(path, config_path)
    else:
        files = _only_model(path)
        metadata = _metadata(files[0])
        config = _stated_config(path)
    beside = files_beside(path)
    return Source(
        path=path,
        kind=NAME,
        config=config,
        tensors=_tensors(files),
        tokenizer_files=present(path / name for name in TOKENIZER_FILES),
        weight_files=tuple(files),
        origin=origin_of(path, config, beside),
        beside=beside,
        notes=left_aside(path, [file.name for file in files]),
        metadata=metadata,
    )


def is_own(directory: Path) -> bool:
    """Whether the config.json in `directory` describes GGUF files of ours."""
    file = directory / "config.json"
    if not file.is_file():
        return False
    described = read_json_object(file).get("quantization_config")
    known = described if isinstance(described, dict) else {}
    return known.get("quant_method") == OWN and known.get("format") == NAME


def _open_file(path: Path, config_path: Path | None) -> Source:
    files = _parts(path)
    return Source(
        path=path,
        kind=NAME,
        config=read_config(path.parent, config_path) if config_path else {},
        tensors=_tensors(files),
        weight_files=tuple(files),
        origin=Origin(name=_stem(path)),
        metadata=_metadata(files[0]),
    )


def _stated_config(path: Path) -> dict[str, Any]:
    """The config.json in a directory, if it is one of a model: some hold nothing but a type."""
    file = path / "config.json"
    config = read_json_object(file) if file.exists() else {}
    return config if "architectures" in config else {}


def _only_model(path: Path) -> list[Path]:
    """The files of the one model in a directory. Raises InputError if there are more."""
    files = sorted(path.glob(f"*{SUFFIX}"))
    models = {_stem(file): file for file in reversed(files) if not _is_beside_model(file)}
    if len(models) != 1:
        names = named(file.name for file in models.values())
        raise InputError(f"{path}: holds {len(models)} models, give one of its files: {names}")
    return _parts(*models.values())


def _is_beside_model(file: Path) -> bool:
    return file.name.startswith(_NOT_THE_MODEL)


def _stem(file: Path) -> str:
    """The name of a model by that of its file, or of one of its files."""
    split = _SPLIT.fullmatch(file.name)
    return split[1] if split else file.stem


def _parts(file: Path) -> list[Path]:
    """All files of the split that `file` is one of. Raises InputError if one is missing."""
    split = _SPLIT.fullmatch(file.name)
    if not split:
        if not os.path.lexists(file):
            raise InputError(f"{file}: no such file")
        return [file]
    stem, _, count = split.groups()
    names = [f"{stem}-{number:05d}-of-{count}{SUFFIX}" for number in range(1, int(count) + 1)]
    files = [file.with_name(name) for name in names]
    if missing := [part for part in files if not os.path.lexists(part)]:
        raise InputError(f"{missing[0]}: no such file, one of the {int(count)} of {stem}")
    return files


def _metadata(file: Path) -> dict[str, Any]:
    """The metadata of the first file of a model. Raises InputError if it is of something else."""
    found = read_metadata(file)
    if not isinstance(found.get(_ARCHITECTURE), str):
        raise InputError(f"{file}: its metadata have no {_ARCHITECTURE}, which says what it is")
    if (kind := found.get(_KIND, "model")) != "model":
        raise InputError(f"{file}: holds no model, its {_KIND} is {str(kind)[:40]!r}")
    return found


def _tensors(files: list[Path]) -> dict[str, TensorRef]:
    refs: dict[str, TensorRef] = {}
    for file in files:
        for tensor in read_tensors(file):
            if tensor.name in refs:
                raise InputError(f"{file}: {tensor.name} is also in another file")
            refs[tensor.name] = _ref(file, tensor)
    return refs


def _ref(path: Path, tensor: GgufTensor) -> TensorRef:
    """One tensor of a file; the experts of a stack are rows below each other."""
    dtype = DENSE.get(tensor.type, torch.uint8)
    columns = tensor.shape[-1] if tensor.type in DENSE else tensor.row_bytes
    rows = prod(tensor.shape[:-1])
    shape = (columns,) if len(tensor.shape) == 1 else (rows, columns)
    load_rows = partial(_read, path, tensor, dtype, columns)

    def load() -> Tensor:
        return load_rows(0, rows).view(shape)

    return TensorRef(
        tensor.name,
        shape,
        dtype,
        tensor.bytes,
        load,
        load_rows=load_rows if rows > 1 else None,
        grid_name=None if tensor.type in DENSE else tensor.type,
    )


def _read(
    path: Path, tensor: GgufTensor, dtype: torch.dtype, columns: int, first: int, stop: int
) -> Tensor:
    """Rows `first` to `stop` - 1, [rows, columns]."""
    size = (stop - first) * tensor.row_bytes
    raw = np.fromfile(path, np.uint8, size, offset=tensor.offset + first * tensor.row_bytes)
    if len(raw) < size:
        raise InputError(f"{path}: {tensor.name} cannot be read: the file has become shorter")
    rows = torch.from_numpy(raw).view(dtype).view(stop - first, columns)
    if not all_finite(rows):
        raise InputError(f"{path}: tensor {tensor.name!r} holds non-finite values")
    _refuse_nonfinite_scales(path, tensor, rows)
    return rows


def _refuse_nonfinite_scales(path: Path, tensor: GgufTensor, rows: Tensor) -> None:
    """Raises InputError where a scale or offset of a block is NaN or infinite."""
    if tensor.type in DENSE or tensor.type not in TYPES:
        return
    blocks = rows.view(-1, READABLE[tensor.type][2])  # (blocks, bytes)
    for byte in GRIDS[tensor.type.lower()].float16_at:
        scales = blocks[:, byte : byte + 2].contiguous().view(torch.float16)
        if not all_finite(scales):
            raise InputError(f"{path}: tensor {tensor.name!r} holds non-finite scales")


KIND = SourceKind(
    name=NAME,
    looks_for="a .gguf file",
    recognizes=recognizes,
    open_source=open_source,
)
