"""The header of GGUF files, version 3, read and written.

    | GGUF | version | tensors | pairs |     counts in 64 bits, the version in 32, little endian
    | key, type, value | ..                  the metadata
    | name, dimensions, type, offset | ..    one for each tensor; offsets count from the data
    | padding to 32 bytes | data             each tensor padded to 32 bytes

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
# Types of metadata values, by GGUF's numbers.
_UINT16 = 2
_UINT32 = 4
_INT32 = 5
_FLOAT32 = 6
_BOOL = 7
_STRING = 8
_ARRAY = 9
# Bytes of a value, by the number of its type; strings and arrays are not of one size.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The largest count in a header that we believe: a larger one is damage and would fill the memory.
_MOST = 1 << 26

# A metadata value. An int is stored as uint32; other integers are `Short` or `Signed`.
Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]


class Short(int):
    """An integer stored as uint16."""


class Signed(int):
    """An integer stored as int32."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `shape` has the columns last, `offset` is in bytes of the file."""

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
    """The layout of a file that holds these tensors in this order."""
    infos = b""
    starts: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        starts[tensor.name] = end
        # GGUF has the columns first.
        dims = b"".join(struct.pack("<Q", size) for size in reversed(tensor.shape))
        number = TYPES[tensor.type][0]
        infos += _string(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims
        infos += struct.pack("<IQ", number, end)
        end += _aligned(tensor.bytes)
    pairs = b"".join(_string(key) + _value(value) for key, value in metadata.items())
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + pairs + infos
    header += bytes(_aligned(len(header)) - len(header))
    last = tensors[-1].bytes if tensors else 0
    size = len(header) + end - (_aligned(last) - last)  # the last tensor is not padded
    offsets = {name: len(header) + start for name, start in starts.items()}
    return FileLayout(header, offsets, size)


def read_tensors(path: Path) -> list[GgufTensor]:
    """The tensors of a file, read from its header alone. Raises InputError if it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            tensors = _read_infos(file)
        except (struct.error, ValueError, KeyError, OverflowError) as error:
            raise InputError(f"{path}: not a readable GGUF file: {error}") from None
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
        raise ValueError(f"version {version} is not supported, only 3 is")
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
        raise ValueError(f"{name!r} has unknown type {number} (known: {', '.join(TYPES)})")
    if shape[0] % TYPES[_BY_NUMBER[number]][1]:
        raise ValueError(f"{name!r}: rows of {shape[0]} values do not divide into blocks")
    return GgufTensor(name, _BY_NUMBER[number], tuple(reversed(shape)), offset)


def _skip(file: BinaryIO, kind: int) -> None:
    """Skips a value of type `kind`."""
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
        raise ValueError("it ends within its header")
    return raw.decode("utf-8", "replace")


def _counted(count: int) -> int:
    if count > _MOST:
        raise ValueError(f"it counts {count} items in its header")
    return count


def _value(value: Value) -> bytes:
    """The bytes of a value, its type first."""
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
    return struct.pack("<I", _ARRAY) + _array(value)


def _array(values: Sequence[str] | Sequence[int] | Sequence[float]) -> bytes:
    """The type of the items, their number, and the items."""
    count = len(values)
    if isinstance(values[0], str):
        strings = b"".join(_string(str(item)) for item in values)
        return struct.pack("<IQ", _STRING, count) + strings
    if isinstance(values[0], float):
        return struct.pack(f"<IQ{count}f", _FLOAT32, count, *values)
    return struct.pack(f"<IQ{count}i", _INT32, count, *values)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
