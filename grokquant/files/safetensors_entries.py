"""What the header of a safetensors file says of its tensors, checked more strictly than the library
does.

    | size | {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": ..} | a | b | end
                                                                                    0   8

Every byte after the header belongs to exactly one tensor. The library also accepts fields of no
meaning, names that are paths and tensors without values; no writer of models makes these.
"""

import re
from dataclasses import dataclass
from math import prod

import torch

from grokquant.errors import InputError
from grokquant.files.json_objects import parse_json_object
from grokquant.files.safetensors_header import DTYPES

# Far above any real checkpoint; more is damage, or an attack on memory.
MAX_TENSORS = 100_000
_MAX_METADATA = 10_000
_MAX_DIMENSIONS = 8
_MAX_NAME = 1000
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_PATH = re.compile(r"[/\\\0-\x1f\x7f]|\A\.+\Z")


@dataclass(frozen=True)
class Entry:
    """A tensor: the dtype and shape that the header gives it, and its first byte and the one after
    its last, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def parse_entries(raw: bytes, name: str, data_bytes: int) -> dict[str, Entry]:
    """The tensors of the header `raw`, which `data_bytes` follow. Raises InputError that begins
    with `name`, the file's."""
    # Of each tensor the values: dtype, two offsets and a shape.
    most = MAX_TENSORS * (_MAX_DIMENSIONS + 3) + 2 * _MAX_METADATA
    content = parse_json_object(raw, f"{name}: header", most_values=most)
    if not raw.startswith(b"{"):
        raise InputError(f"{name}: header: does not begin with {{")
    _check_metadata(content.pop(_METADATA, {}), name)
    if not 0 < len(content) <= MAX_TENSORS:
        raise InputError(f"{name}: {len(content)} tensors, expected 1 to {MAX_TENSORS}")
    entries = {key: _entry(key, value, name) for key, value in content.items()}
    _check_places(entries, name, data_bytes)
    return entries


def _check_metadata(metadata: object, name: str) -> None:
    if not isinstance(metadata, dict) or len(metadata) > _MAX_METADATA:
        raise InputError(f"{name}: {_METADATA} is not an object of at most {_MAX_METADATA} texts")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise InputError(f"{name}: {_METADATA}: {key[:80]!r} is not a text")


def _entry(key: str, value: object, name: str) -> Entry:
    """Raises InputError where `value` does not describe a tensor called `key`."""
    if not key or len(key) > _MAX_NAME or _PATH.search(key):
        raise InputError(f"{name}: {key[:80]!r} cannot be the name of a tensor")
    where = f"{name}: tensor {key!r}"
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise InputError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    shape = value["shape"]
    offsets = value["data_offsets"]
    if not _are_sizes(shape, _MAX_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise InputError(f"{where}: shape and data_offsets must be lists of sizes")
    kind = value["dtype"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(f"{where} has dtype {str(kind)[:20]}, which is not supported")
    size = prod(shape) * DTYPES[kind].itemsize
    if size == 0:
        raise InputError(f"{where} has shape {shape}, and so no values")
    start, end = offsets
    if end - start != size:
        raise InputError(f"{where} has {end - start} bytes, but its shape {shape} needs {size}")
    return Entry(DTYPES[kind], tuple(shape), start, end)


def _are_sizes(values: object, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_places(entries: dict[str, Entry], name: str, data_bytes: int) -> None:
    """Raises InputError unless tensors follow each other from the header to the end of the file."""
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != end:
            what = "overlaps the one before it" if entry.start < end else "follows a hole"
            raise InputError(
                f"{name}: tensor {key!r} {what}: it begins at byte {entry.start} of the data, "
                f"expected {end}: the file is damaged, download it again"
            )
        end = entry.end
    if end > data_bytes:
        what = f"{data_bytes} of the {end} bytes of its tensors; download it again"
        raise InputError(f"{name}: truncated: {what}")
    if end < data_bytes:
        raise InputError(
            f"{name}: {data_bytes - end} bytes follow its last tensor: the file is damaged, "
            "download it again"
        )
