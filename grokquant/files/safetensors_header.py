"""The header of a safetensors file, computed before there is any data.

The safetensors library writes whole files only; ours grow tensor by tensor, each at its final
offset.

    | 8 bytes: size of the JSON | JSON, padded with spaces to 8 bytes | tensor | tensor | ..
    | header                                                          | offsets in JSON from here
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import BinaryIO

import torch

from grokquant.errors import InputError
from grokquant.files.json_objects import MAX_BYTES, parse_json_object

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class FileLayout:
    """The header of a file, where each tensor's bytes begin in it, and its size in bytes."""

    header: bytes
    offsets: dict[str, int]
    size: int


def file_layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> FileLayout:
    """The layout of a file that holds tensors of these dtypes and shapes.

    They keep their order if it aligns each tensor to the size of its values; else those with wide
    dtypes come first. Format: github.com/huggingface/safetensors, "Format".
    """
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    names = list(tensors)
    starts = dict(zip(names, accumulate([0, *sizes.values()]), strict=False))
    if any(starts[name] % tensors[name][0].itemsize for name in names):
        names.sort(key=lambda name: -tensors[name][0].itemsize)
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}  # transformers expects it
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        starts[name] = end
        end += sizes[name]
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return FileLayout(header, offsets, len(header) + end)


def read_listing(file: BinaryIO, name: str) -> dict[str, str]:
    """Dtype and shape of each tensor of a file, `BF16 [64, 32]`, in the order of their bytes; its
    metadata too. Raises InputError for a header that is no such list."""
    length = int.from_bytes(file.read(8), "little")
    entries = parse_json_object(file.read(min(length, MAX_BYTES)), f"{name}: header")
    metadata = entries.pop(_METADATA, None)
    try:
        tensors = sorted(entries, key=lambda tensor: entries[tensor]["data_offsets"])
        listing = {tensor: "{dtype} {shape}".format(**entries[tensor]) for tensor in tensors}
    except (KeyError, TypeError):
        raise InputError(f"{name}: header: lists no tensors") from None
    return listing | {_METADATA: json.dumps(metadata)}
