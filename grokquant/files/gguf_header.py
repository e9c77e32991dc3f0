"""GGUF files, version 3: what stands before the data, read and written.

Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from grokquant.errors import InputError
from grokquant.files.safetensors_header import FileLayout
from grokquant.grids import GRIDS

ALIGNMENT = 32
# Names of ggml types with their numbers, values per block and bytes per block.
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2)} | {
    grid.name.upper(): (grid.ggml_type, grid.block_columns, grid.block_bytes)
    for grid in GRIDS.values()
    if grid.ggml_type is not None
}
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BY_NUMBER = {number: name for name, (number, _, _) in TYPES.items()}
_UINT16, _INT32, _UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 2, 5, 4, 6, 7, 8, 9
# Bytes of the values that are of one size, by the number of their type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST = 1 << 26  # of anything counted in a header: more is damage

# A value of the metadata; other integers than 32 bits without sign are `Short` or `Signed`.
Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]


class Short(int):
    """A number that GGUF stores in 16 bits, without sign."""


class Signed(int):
    """A number that GGUF stores in 32 bits, with its sign."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `shape` has the columns last, `offset` counts from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        _, values, size = TYPES[self.type]
        return self.shape[-1] // values * size

    @property
    def bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


def gguf_layout(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> FileLayout:
    """The file of these tensors, in this order."""
    infos, offsets, end = b"", {}, 0
    for tensor in tensors:
        offsets[tensor.name] = end
        dims = b"".join(struct.pack("<Q", size) for size in reversed(tensor.shape))
        number = TYPES[tensor.type][0]
        infos += _string(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims
        infos += struct.pack("<IQ", number, end)
        end += _aligned(tensor.bytes)
    pairs = b"".join(_string(key) + _value(value) for key, value in metadata.items())
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + pairs + infos
    header += bytes(_aligned(len(header)) - len(header))
    last = tensors[-1].bytes if tensors else 0
    size = len(header) + end - (_aligned(last) - last)
    return FileLayout(header, {name: len(header) + start for name, start in offsets.items()}, size)


def read_tensors(path: Path) -> list[GgufTensor]:
    """The tensors of a file, by its header alone. Raises InputError where it is no whole one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            tensors = _read_infos(file)
        except (struct.error, ValueError, KeyError, OverflowError) as error:
            raise InputError(f"{path}: not a GGUF file that can be read: {error}") from None
        start = _aligned(file.tell())
    placed = [GgufTensor(t.name, t.type, t.shape, start + t.offset) for t in tensors]
    for tensor in placed:
        if tensor.offset + tensor.bytes > size:
            raise InputError(f"{path}: truncated: {tensor.name} ends after the file")
    return placed


def _read_infos(file: BinaryIO) -> list[GgufTensor]:
    if (magic := file.read(4)) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    version, tensors, pairs = struct.unpack("<IQQ", file.read(20))
    if version != 3:
        raise ValueError(f"version {version}, only 3 is known")
    for _ in range(_counted(pairs)):
        _read_string(file)
        _skip(file, *struct.unpack("<I", file.read(4)))
    return [_read_info(file) for _ in range(_counted(tensors))]


def _read_info(file: BinaryIO) -> GgufTensor:
    name = _read_string(file)
    (dims,) = struct.unpack("<I", file.read(4))
    if not 0 < dims <= 4:
        raise ValueError(f"{name!r} has {dims} dimensions")
    shape = struct.unpack(f"<{dims}Q", file.read(8 * dims))
    number, offset = struct.unpack("<IQ", file.read(12))
    if number not in _BY_NUMBER:
        raise ValueError(f"{name!r} has type {number}, known are {', '.join(TYPES)}")
    if shape[0] % TYPES[_BY_NUMBER[number]][1]:
        raise ValueError(f"{name!r}: rows of {shape[0]} are no whole blocks")
    return GgufTensor(name, _BY_NUMBER[number], tuple(reversed(shape)), offset)


def _skip(file: BinaryIO, kind: int) -> None:
    """Passes over a value."""
    if kind == _STRING:
        _read_string(file)
    elif kind == _ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in _SIZES:
            file.seek(_SIZES[inner] * _counted(count), 1)
            return
        for _ in range(_counted(count)):
            _skip(file, inner)
    else:
        file.seek(_SIZES[kind], 1)


def _read_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    raw = file.read(_counted(length))
    if len(raw) < length:
        raise ValueError("it ends in its header")
    return raw.decode("utf-8", "replace")


def _counted(count: int) -> int:
    if count > _MOST:
        raise ValueError(f"a count of {count}")
    return count


def _value(value: Value) -> bytes:
    """A value with its type before it."""
    match value:
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case Short():
            return struct.pack("<IH", _UINT16, value)
        case Signed():
            return struct.pack("<Ii", _INT32, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
    if isinstance(value[0], str):
        kind, items = _STRING, b"".join(_string(str(item)) for item in value)
    elif isinstance(value[0], float):
        kind, items = _FLOAT32, struct.pack(f"<{len(value)}f", *value)
    else:
        kind, items = _INT32, struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
