"""The header of GGUF files, version 3, read and written.

    | GGUF | version | tensors | pairs |     counts in 64 bits, the version in 32, little endian
    | key, type, value | ..                  the metadata
    | name, dimensions, type, offset | ..    one for each tensor; offsets count from the data
    | padding | data                         data and tensors begin at multiples of 32 bytes,
                                             or of `general.alignment` where a pair says so

Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from grokquant.errors import InputError
from grokquant.files.impostors import impostor
from grokquant.files.regular import open_regular
from grokquant.files.safetensors_header import FileLayout
from grokquant.grids import GRIDS, OTHER_BLOCKS

ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
# Names of ggml types with their numbers, values per block and bytes per block.
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2)} | {
    grid.name.upper(): (grid.ggml_type, grid.block_columns, grid.block_bytes)
    for grid in GRIDS.values()
    if grid.ggml_type is not None
}
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READABLE = TYPES | OTHER_BLOCKS
_BY_NUMBER = {number: name for name, (number, _, _) in READABLE.items()}
# Types of metadata values, by GGUF's numbers.
_UINT16 = 2
_UINT32 = 4
_INT32 = 5
_FLOAT32 = 6
_BOOL = 7
_STRING = 8
_ARRAY = 9
# How `struct` calls numbers, by the number of their type, and how many bytes they take.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in _NUMBERS.items()}
# What a header may hold; more is damage, or an attack on memory and time. The largest vocabularies
# have 800,000 strings with their merges, the longest strings are chat templates.
_MOST_PAIRS = 1 << 16
_MOST_TENSORS = 100_000
_MOST_ITEMS = 1 << 24
_MOST_STRINGS = 1 << 21
_LONGEST_STRING = 1 << 24
_LONGEST_KEY = (1 << 16) - 1  # by the format
_LONGEST_NAME = 128  # llama.cpp reads names of up to 63 bytes
_MOST_HEADER_BYTES = 1 << 28
# Files with 16 KiB pages exist; nothing is known of more than this.
_LARGEST_ALIGNMENT = 1 << 20

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
        _, values, size = READABLE[self.type]
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
    with open_regular(path) as file:
        return parse_header(file, str(path))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file: numbers, strings and lists of them. Raises InputError for a damaged
    header."""
    with open_regular(path) as file:
        header = _Header(file, keep=True)
        _parse(header, file, str(path))
    return header.values


def parse_header(file: BinaryIO, name: str) -> list[GgufTensor]:
    """`read_tensors` of an open file, which errors call `name`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = _Header(file)
    tensors = _parse(header, file, name)
    start = _aligned(file.tell(), header.alignment)
    placed = [replace(tensor, offset=start + tensor.offset) for tensor in tensors]
    _check_places(name, placed, start, header.alignment, size)
    return placed


def _parse(header: "_Header", file: BinaryIO, name: str) -> list[GgufTensor]:
    """The tensors of a header, which ends at the place of `file`. Raises InputError."""
    try:
        return header.read()
    except (struct.error, ValueError, OverflowError) as error:
        file.seek(0)
        if what := impostor(file.read(200)):
            raise InputError(f"{name}: {what}") from None
        raise InputError(f"{name}: not a readable GGUF file: {error}") from None


def read_listing(file: BinaryIO, name: str) -> dict[str, str]:
    """Type and shape of each tensor of a file, `Q4_0 [64, 32]`, in the order of their bytes, after
    its metadata. Raises InputError for a damaged header."""
    header = _Header(file)
    try:
        tensors = header.read()
    except (struct.error, ValueError, OverflowError) as error:
        raise InputError(f"{name}: not a readable GGUF file: {error}") from None
    return header.values | {t.name: f"{t.type} {list(t.shape)}" for t in tensors}


def _check_places(
    name: str, tensors: list[GgufTensor], start: int, alignment: int, size: int
) -> None:
    """Raises InputError unless each tensor begins where the one before it ends, as llama.cpp wants
    it, and ends within the file."""
    expected = start
    for tensor in tensors:
        if tensor.offset != expected:
            raise InputError(
                f"{name}: tensor {tensor.name!r} is said to begin at byte {tensor.offset}, but the "
                f"one before it ends at {expected}: the file is damaged, download it again"
            )
        if tensor.offset + tensor.bytes > size:
            what = f"{tensor.name!r} ends after the file; download it again"
            raise InputError(f"{name}: truncated: {what}")
        expected += _aligned(tensor.bytes, alignment)


class _Header:
    """Reads a header from its first byte. Raises ValueError and struct.error for damage.

    `values` are those of the metadata as they are with `keep`, else what can be compared of them.
    """

    def __init__(self, file: BinaryIO, keep: bool = False) -> None:
        self.file = file
        self.keep = keep
        self.alignment = ALIGNMENT
        self.strings = 0
        self.values: dict[str, Any] = {}

    def read(self) -> list[GgufTensor]:
        """All tensors, with offsets that count from the data."""
        if (magic := self.file.read(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        version, tensors, pairs = self.unpack("<IQQ")
        if version != 3:
            raise ValueError(f"version {version} is not supported, only 3 is")
        self.read_pairs(_counted(pairs, _MOST_PAIRS, "pairs"))
        count = _counted(tensors, _MOST_TENSORS, "tensors")
        found = [self.read_info() for _ in range(count)]
        names: set[str] = set()
        for tensor in found:
            if tensor.name in names:
                raise ValueError(f"tensor {tensor.name!r} occurs twice")
            names.add(tensor.name)
        return found

    def read_pairs(self, count: int) -> None:
        """Reads the alignment and the `values`."""
        keys: set[str] = set()
        for _ in range(count):
            key = self.read_string(_LONGEST_KEY)
            if key in keys:
                raise ValueError(f"key {key[:80]!r} occurs twice")
            keys.add(key)
            (kind,) = self.unpack("<I")
            if key == ALIGNMENT_KEY:
                self.alignment = self.read_alignment(kind)
            else:
                self.values[key] = self.value(kind) if self.keep else self.described(kind)

    def read_alignment(self, kind: int) -> int:
        if kind != _UINT32:
            raise ValueError(f"{ALIGNMENT_KEY} has type {kind}, not {_UINT32} (uint32)")
        (value,) = self.unpack("<I")
        if not 8 <= value <= _LARGEST_ALIGNMENT or value & (value - 1):
            raise ValueError(
                f"{ALIGNMENT_KEY} is {value}, not a power of two from 8 to {_LARGEST_ALIGNMENT}"
            )
        return value

    def read_info(self) -> GgufTensor:
        name = self.read_string(_LONGEST_NAME)
        (dims,) = self.unpack("<I")
        if not 0 < dims <= 4:
            raise ValueError(f"{name!r} has {dims} dimensions")
        shape = self.unpack(f"<{dims}Q")
        number, offset = self.unpack("<IQ")
        if number not in _BY_NUMBER:
            raise ValueError(f"{name!r} has unknown type {number} (known: {', '.join(READABLE)})")
        if 0 in shape or prod(shape) >= 1 << 63:
            raise ValueError(f"{name!r} has shape {list(shape)}")
        if shape[0] % READABLE[_BY_NUMBER[number]][1]:
            raise ValueError(f"{name!r}: rows of {shape[0]} values do not divide into blocks")
        return GgufTensor(name, _BY_NUMBER[number], tuple(reversed(shape)), offset)

    def value(self, kind: int) -> Any:
        """A value of type `kind` as it is."""
        if kind == _STRING:
            return self.read_string()
        if kind in _NUMBERS:
            return self.unpack("<" + _NUMBERS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"it has a value of unknown type {kind}")
        inner, count = self.unpack("<IQ")
        if inner == _STRING:
            return [self.read_string() for _ in range(_counted(count, _MOST_STRINGS, "strings"))]
        if inner not in _NUMBERS:
            raise ValueError(f"it has an array of type {inner}, which is not supported")
        return list(self.unpack(f"<{_counted(count, _MOST_ITEMS, 'items')}{_NUMBERS[inner]}"))

    def described(self, kind: int) -> str:
        """A number as it is, of other values a digest."""
        start = self.file.tell()
        self.skip(kind)
        length = self.file.tell() - start
        self.file.seek(start)
        raw = self.file.read(length)
        if kind in _NUMBERS:
            return str(struct.unpack("<" + _NUMBERS[kind], raw)[0])
        return f"{len(raw)} bytes of {hashlib.sha256(raw).hexdigest()}"

    def skip(self, kind: int) -> None:
        """Skips a value of type `kind`."""
        if kind == _STRING:
            self.read_string()
        elif kind in _SIZES:
            self.take(_SIZES[kind])
        elif kind == _ARRAY:
            self.skip_array()
        else:
            raise ValueError(f"it has a value of unknown type {kind}")

    def skip_array(self) -> None:
        inner, count = self.unpack("<IQ")
        if inner in _SIZES:
            self.take(_SIZES[inner] * _counted(count, _MOST_ITEMS, "items"))
        elif inner == _STRING:
            for _ in range(_counted(count, _MOST_STRINGS, "strings")):
                self.read_string()
        else:
            raise ValueError(f"it has an array of type {inner}, which is not supported")

    def read_string(self, longest: int = _LONGEST_STRING) -> str:
        self.strings = _counted(self.strings + 1, _MOST_STRINGS, "strings")
        (length,) = self.unpack("<Q")
        raw = self.take(_counted(length, longest, "bytes of a string"))
        return raw.decode("utf-8", "replace")

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, count: int) -> bytes:
        raw = self.file.read(count)
        if len(raw) < count:
            raise ValueError("it ends within its header")
        _counted(self.file.tell(), _MOST_HEADER_BYTES, "bytes")
        return raw


def _counted(count: int, most: int, what: str) -> int:
    if count > most:
        raise ValueError(f"it counts {count} {what} in its header (limit {most})")
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


def _aligned(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment
