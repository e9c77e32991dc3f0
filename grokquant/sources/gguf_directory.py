"""A directory with GGUF files and the config.json that describes them.

Tensors appear raw, under the names of the files: blocks as uint8 [rows, bytes per row], the experts
of a layer as one tensor. `containers` gives them their usual names.
"""

from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.files.gguf_header import DENSE, TYPES, GgufTensor, read_tensors
from grokquant.grids import GRIDS
from grokquant.sources.beside import files_beside, present, read_config
from grokquant.sources.finite import all_finite
from grokquant.sources.kind import SourceKind
from grokquant.sources.left_aside import left_aside
from grokquant.sources.origin import origin_of
from grokquant.sources.safetensors_directory import TOKENIZER_FILES
from grokquant.types import Source, TensorRef

NAME = "gguf"


def recognizes(path: Path) -> bool:
    """Whether `path` holds GGUF files."""
    return any(path.glob("*.gguf"))


def open_source(path: Path, config_path: Path | None = None) -> Source:
    """Opens the directory `path`; only headers are read. Raises InputError for damaged files."""
    config = read_config(path, config_path)
    files = sorted(path.glob("*.gguf"))
    refs: dict[str, TensorRef] = {}
    for file in files:
        for tensor in read_tensors(file):
            if tensor.name in refs:
                raise InputError(f"{file}: {tensor.name} is also in another file")
            refs[tensor.name] = _ref(file, tensor)
    beside = files_beside(path)
    return Source(
        path=path,
        kind=NAME,
        config=config,
        tensors=refs,
        tokenizer_files=present(path / name for name in TOKENIZER_FILES),
        weight_files=tuple(files),
        origin=origin_of(path, config, beside),
        beside=beside,
        notes=left_aside(path, [file.name for file in files]),
    )


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
        tensor.name, shape, dtype, tensor.bytes, load, load_rows=load_rows if rows > 1 else None
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
    if tensor.type in DENSE:
        return
    blocks = rows.view(-1, TYPES[tensor.type][2])  # (blocks, bytes)
    for byte in GRIDS[tensor.type.lower()].float16_at:
        scales = blocks[:, byte : byte + 2].contiguous().view(torch.float16)
        if not all_finite(scales):
            raise InputError(f"{path}: tensor {tensor.name!r} holds non-finite scales")


KIND = SourceKind(
    name=NAME,
    looks_for="a .gguf file with config.json",
    recognizes=recognizes,
    open_source=open_source,
)
