"""Writes the layout of Grok-1's release: the bytes that CPython's pickler and numpy 1.26 write.

Used for the embedded toy and for tests. Payloads are streamed from their tensors, never copied. A
file is one pickle, protocol 4:

    | PROTO 4 | FRAME: opcodes .. | payload of >= 64 KB, outside of frames | FRAME: .. STOP |

and its opcodes build one float32 array, or a QuantizedWeight8bit with the arrays weight and scales:

    array   numpy._reconstruct(ndarray, (0,), b"b") .__setstate__((1, shape, dtype, False, payload))
"""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grokquant.files.atomic import commit, temporary, write_text
from grokquant.sources.release import file_name, leaf_names

# As in CPython's pickle.py: a frame is closed once it holds 64 KB; below 4 bytes it gets no header.
FRAME_TARGET = 64 * 1024
FRAME_MINIMUM = 4
MULTIARRAY = "numpy.core.multiarray"


@dataclass(frozen=True)
class Chunked:
    """An array that is never whole in memory: its values in order, in `chunks` of any size."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[Tensor]


Payload = Tensor | Chunked
Leaf = Payload | tuple[Payload, Payload]  # float32, or int8 weight [.., K, N], scales [.., G, N]

# Constructor argument and state of a numpy dtype, as numpy 1.26 and ml_dtypes 0.2 to 0.5 pickle it.
DTYPES: dict[torch.dtype, tuple[str, tuple]] = {
    torch.int8: ("i1", (3, "|", None, None, None, -1, -1, 0)),
    torch.float32: ("f4", (3, "<", None, None, None, -1, -1, 0)),
    torch.bfloat16: ("ml_dtypes.bfloat16", (3, "<", None, None, None, 2, 2, 80)),
}


def write_release(directory: Path, config: dict, leaves: Iterable[tuple[str, Leaf]]) -> None:
    """Writes `directory`/ckpt-0 and, last, `directory`/config.json.

    `leaves` are (name, leaf) pairs in any order, consumed one by one; their names are those of
    `release.leaf_names(config["num_hidden_layers"])`, each exactly once. Raises ValueError if one
    is missing, repeated or unknown.
    """
    index = {name: i for i, name in enumerate(leaf_names(config["num_hidden_layers"]))}
    (directory / "ckpt-0").mkdir(parents=True, exist_ok=True)
    for name, leaf in leaves:
        if name not in index:
            raise ValueError(f"unknown or repeated leaf {name}")
        write_leaf(directory / "ckpt-0" / file_name(index.pop(name)), leaf)
    if index:
        raise ValueError(f"{len(index)} leaves are missing, such as {next(iter(index))}")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_text(directory / "config.json", text)


def write_leaf(path: Path, leaf: Leaf, multiarray: str = MULTIARRAY) -> None:
    """Writes one tensor file; `multiarray` is the numpy module that the pickle names.

    Raises ValueError if the chunks of an array hold fewer or more bytes than its shape says.
    """
    arrays = list(leaf) if isinstance(leaf, tuple) else [leaf]
    parts = _framed([(array.dtype, tuple(array.shape)) for array in arrays], multiarray)
    with temporary(path) as name:
        with name.open("xb") as file:
            file.writelines(_filled(parts, arrays))
        commit(name, path)


def _filled(parts: Iterable[bytes | int], arrays: list[Payload]) -> Iterator[bytes | memoryview]:
    """The parts of `_framed` with the payloads in place of their indices."""
    for part in parts:
        if isinstance(part, int):
            yield from _payload(arrays[part])
        else:
            yield part


def quantize_leaf(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Rounds [.., K, N] to int8, with a bfloat16 scale of absmax / 127 for each K/groups rows.

    Returns codes int8 [.., K, N] in -127..127 and scales bfloat16 [.., groups, N].
    """
    *lead, rows, columns = weight.shape
    grouped = weight.float().reshape(*lead, groups, rows // groups, columns)
    largest = grouped.abs().amax(dim=-2)  # (.., groups, columns)
    scales = torch.where(largest > 0, largest / 127, 1.0).to(torch.bfloat16)
    codes = (grouped / scales.float().unsqueeze(-2)).round().clamp(-127, 127).to(torch.int8)
    return codes.reshape(weight.shape), scales


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _payload(array: Payload) -> Iterator[memoryview]:
    left = _nbytes(array.dtype, tuple(array.shape))
    for chunk in array.chunks if isinstance(array, Chunked) else [array]:
        data = chunk.detach().cpu().to(array.dtype).reshape(-1).view(torch.uint8).numpy().data
        left -= len(data)
        yield data
    if left:
        raise ValueError(f"chunks of a {tuple(array.shape)} array are {-left} bytes too long")


def _framed(arrays: list[tuple[torch.dtype, tuple]], multiarray: str) -> Iterator[bytes | int]:
    """The file as bytes, with the number i in place of the payload of array i."""
    pickler = _Pickler(multiarray)
    if len(arrays) == 1:
        pickler.array(0, *arrays[0])
    else:
        pickler.record(arrays)
    pickler.emit(b".")
    pickler.close_frame()
    return iter(pickler.parts)


class _Pickler:
    """CPython's protocol 4 for exactly the objects of the release, with its memo and frames.

    CPython numbers every object except integers, booleans, None and the empty tuple once it is
    complete, and refers to it by that number if it comes again: `memoized` and `recalled`.
    """

    def __init__(self, multiarray: str) -> None:
        self.multiarray = multiarray
        self.parts: list[bytes | int] = [b"\x80\x04"]  # PROTO 4
        self.frame: list[bytes | int] = []
        self.frame_size = 0
        self.memo: dict[object, int] = {}

    def record(self, arrays: list[tuple[torch.dtype, tuple]]) -> None:
        self.name("__main__", "QuantizedWeight8bit")
        self.begin(b")")  # EMPTY_TUPLE
        self.memoized(b"\x81")  # NEWOBJ
        self.begin(b"}")  # EMPTY_DICT
        self.memoized(b"")
        self.emit(b"(")  # MARK
        for i, field in enumerate(("weight", "scales")):
            self.text(field)
            self.array(i, *arrays[i])
        self.emit(b"ub")  # SETITEMS, BUILD

    def array(self, i: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.name(self.multiarray, "_reconstruct")
        self.name("numpy", "ndarray")
        self.integers((0,))
        if not self.recalled(b"b"):
            self.begin(b"C\x01b")  # SHORT_BINBYTES of one byte, b"b"
            self.memoized(b"", b"b")
        self.memoized(b"\x87")  # TUPLE3
        self.memoized(b"R")  # REDUCE
        self.begin(b"(")  # MARK
        self.integer(1)
        self.integers(shape)
        self.dtype(dtype)
        self.begin(b"\x89")  # NEWFALSE: not in Fortran order
        self.payload(i, _nbytes(dtype, shape))
        self.memoized(b"t")  # TUPLE
        self.emit(b"b")  # BUILD

    def dtype(self, dtype: torch.dtype) -> None:
        argument, state = DTYPES[dtype]
        self.name("numpy", "dtype")
        module, _, name = argument.rpartition(".")
        self.name(module, name) if module else self.text(name)
        self.begin(b"\x89")  # NEWFALSE
        self.begin(b"\x88")  # NEWTRUE
        self.memoized(b"\x87")  # TUPLE3
        self.memoized(b"R")  # REDUCE
        self.begin(b"(")  # MARK
        for item in state:
            if item is None:
                self.begin(b"N")  # NONE
            elif isinstance(item, str):
                self.text(item)
            else:
                self.integer(item)
        self.memoized(b"t")  # TUPLE
        self.emit(b"b")  # BUILD

    def payload(self, i: int, nbytes: int) -> None:
        if nbytes < 256:
            header = b"C" + struct.pack("<B", nbytes)  # SHORT_BINBYTES
        elif nbytes < 1 << 32:
            header = b"B" + struct.pack("<I", nbytes)  # BINBYTES
        else:
            header = b"\x8e" + struct.pack("<Q", nbytes)  # BINBYTES8
        self.begin(header) if nbytes < FRAME_TARGET else self.close_frame()
        if nbytes < FRAME_TARGET:
            self.frame.append(i)
            self.frame_size += nbytes
        else:
            self.parts += [header, i]
        self.memoized(b"")

    def name(self, module: str, name: str) -> None:
        if not self.recalled((module, name)):
            self.text(module)
            self.text(name)
            self.memoized(b"\x93", (module, name))  # STACK_GLOBAL

    def text(self, text: str) -> None:
        if not self.recalled(text):
            # SHORT_BINUNICODE
            self.begin(b"\x8c" + struct.pack("<B", len(text)) + text.encode())
            self.memoized(b"", text)

    def integers(self, values: tuple[int, ...]) -> None:
        for value in values:
            self.integer(value)
        self.memoized((b"\x85", b"\x86", b"\x87")[len(values) - 1])  # TUPLE1, TUPLE2, TUPLE3

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.begin(b"K" + struct.pack("<B", value))  # BININT1
        elif 0 <= value < 65536:
            self.begin(b"M" + struct.pack("<H", value))  # BININT2
        else:
            self.begin(b"J" + struct.pack("<i", value))  # BININT

    def recalled(self, key: object) -> bool:
        """Emits a reference if the object with this key was memoized; returns whether it was."""
        if key not in self.memo:
            return False
        self.begin(b"h" + struct.pack("<B", self.memo[key]))  # BINGET
        return True

    def memoized(self, opcodes: bytes, key: object = None) -> None:
        """Emits the last opcode of an object and notes its number, under `key` if it may recur."""
        self.memo[key if key is not None else object()] = len(self.memo)
        self.emit(opcodes + b"\x94")  # MEMOIZE

    def begin(self, opcodes: bytes) -> None:
        """Emits the first opcode of an object: CPython closes a full frame only before one."""
        if self.frame_size >= FRAME_TARGET:
            self.close_frame()
        self.emit(opcodes)

    def emit(self, opcodes: bytes) -> None:
        self.frame.append(opcodes)
        self.frame_size += len(opcodes)

    def close_frame(self) -> None:
        if self.frame_size >= FRAME_MINIMUM:
            self.parts.append(b"\x95" + struct.pack("<Q", self.frame_size))  # FRAME
        self.parts += self.frame
        self.frame = []
        self.frame_size = 0
