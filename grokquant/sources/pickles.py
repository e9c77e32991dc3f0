"""The release's pickles, walked and never run, to find the arrays of one tensor file.

A closed set of opcodes moves placeholders about; names are compared as strings and nothing is
ever imported, called or evaluated. Payloads are skipped here and read on request. Opcodes lie in
frames, payloads of 64 KiB and more between them. A file of int8 weight and bfloat16 scales:

    80 04     95 n ..          B n weight   95 n ..        B n scales   95 n .. 2e
    protocol  frame: dtype,    payload      frame: dtype,  payload      last frame,
              shape of weight               of scales                   ends the file
"""

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.files.direct_io import LARGE, forget
from grokquant.files.impostors import impostor
from grokquant.files.regular import open_regular, read_head
from grokquant.sources import pickle_objects as objects
from grokquant.sources.pickle_objects import ArrayHeader, Blob, Malformed, require

DTYPES = {"int8": torch.int8, "float32": torch.float32, "bfloat16": torch.bfloat16}

# Limits, with room above what the release's writer needs.
MAX_OPCODES = 200
MAX_STACK = 64
MAX_TEXT = 32
MAX_UNFRAMED = 3  # CPython writes no frame around fewer than 4 bytes


def read_headers(path: Path) -> tuple[ArrayHeader, ...]:
    """The arrays of a tensor file, without reading them: one, or weight and scales.

    Raises InputError naming the file for anything that the release's writer does not produce.
    """
    try:
        with open_regular(path) as file:
            return walk(file)
    except Malformed as error:
        if what := impostor(read_head(path, 200)):
            raise InputError(f"{path}: {what}") from None
        raise InputError(f"{path}: not a Grok-1 tensor file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def walk(file: BinaryIO) -> tuple[ArrayHeader, ...]:
    """`read_headers` of an open file; raises Malformed."""
    return _Walker(file).walk()


def read_array(
    path: Path,
    header: ArrayHeader,
    first: int = 0,
    stop: int | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """The array, or its items `first` to `stop` - 1 along the first axis.

    `into` is memory to read into, uint8 and large enough: new memory costs more than reading.
    Raises InputError where the file cannot be read.
    """
    shape = ((header.shape[0] if stop is None else stop) - first, *header.shape[1:])
    dtype = DTYPES[header.dtype]
    row = prod(header.shape[1:]) * dtype.itemsize
    size = shape[0] * row
    raw = torch.from_numpy(np.empty(size, np.uint8)) if into is None else into[:size]
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(header.offset + first * row)
            _fill(file, raw.numpy().data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    return raw.view(dtype).view(shape)


def _fill(file: BinaryIO, memory: memoryview) -> None:
    """Reads until `memory` is full. Large arrays leave the page cache as soon as they are read."""
    large = len(memory) >= LARGE
    while memory:
        count = file.readinto(memory[:LARGE])  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file has become shorter")
        if large:
            forget(file.fileno(), file.tell() - count, count)
        memory = memory[count:]


class _Walker:
    """The stack machine of pickle protocol 4, with placeholders for objects."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, 2)
        self.position = file.seek(0)
        self.frame_end: int | None = None
        self.unframed = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def walk(self) -> tuple[ArrayHeader, ...]:
        require(self.size > 0, "the file is empty")
        require(self.take(2) == b"\x80\x04", "it does not begin as a pickle of protocol 4")
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)
            if opcode == b".":
                return self.stop()
            self.step(opcode)
        raise Malformed(f"more than {MAX_OPCODES} opcodes")

    def step(self, opcode: bytes) -> None:
        start = self.position - 1
        framed = self.frame_end is not None or opcode in BETWEEN_FRAMES
        if opcode not in OPCODES:
            raise Malformed(f"opcode {opcode!r} at byte {start} is not allowed")
        OPCODES[opcode](self)
        self.unframed += 0 if framed else self.position - start
        if self.unframed > MAX_UNFRAMED:
            raise Malformed(f"byte {start} is outside a frame")
        if len(self.stack) > MAX_STACK:
            raise Malformed(f"the stack overflows at byte {start}")
        if self.position == self.frame_end:
            self.frame_end = None

    def stop(self) -> tuple[ArrayHeader, ...]:
        require(self.position == self.size, f"{self.size - self.position} bytes follow its end")
        require(self.frame_end == self.size, "its end is outside a frame")
        require(len(self.stack) == 1, f"it ends with {len(self.stack)} objects on the stack")
        return objects.headers(self.stack[0])

    # reading

    def advance(self, count: int) -> int:
        """Skips `count` bytes, all inside the file and its frame; returns where they begin."""
        start = self.position
        end = start + count
        if end > self.size:
            raise Malformed(f"truncated: {count} bytes at byte {start} of {self.size}")
        if self.frame_end is not None and end > self.frame_end:
            raise Malformed(f"byte {start} reads past the end of its frame")
        self.position = end
        return start

    def take(self, count: int) -> bytes:
        self.advance(count)
        return self.file.read(count)

    def number(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def frame(self) -> None:
        require(self.frame_end is None, f"a frame inside a frame at byte {self.position - 1}")
        length = self.number("<Q")
        end = self.position + length
        require(length > 0 and end <= self.size, f"truncated: a frame of {length} bytes")
        self.frame_end = end

    def text(self) -> None:
        length = self.number("<B")
        require(length <= MAX_TEXT, f"a string of {length} bytes at byte {self.position}")
        raw = self.take(length)
        printable = all(32 <= byte < 127 for byte in raw)
        require(printable, f"a string that is not plain before byte {self.position}")
        self.push(raw.decode("ascii"))

    def blob(self, length_code: str) -> None:
        length = self.number(length_code)
        offset = self.advance(length)
        self.push(Blob(offset, length, self.file.read(1) if length == 1 else None))
        self.file.seek(self.position)

    # the stack

    def push(self, item: Any) -> None:
        self.stack.append(item)

    def pop(self) -> Any:
        if not self.stack:
            raise Malformed(f"the stack is empty at byte {self.position}")
        return self.stack.pop()

    def top(self) -> Any:
        self.push(self.pop())
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def push_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(items[::-1]))

    def memoize(self) -> None:
        self.memo.append(self.top())

    def recall(self) -> None:
        index = self.number("<B")
        require(index < len(self.memo), f"memo entry {index} does not exist")
        self.push(self.memo[index])

    def set_items(self) -> None:
        items = self.pop_to_mark()
        target = self.top()
        require(type(target) is dict and len(items) % 2 == 0, "items without a dictionary")
        keys = items[::2]
        values = items[1::2]
        require(all(type(key) is str for key in keys), "a dictionary key that is not a string")
        target.update(zip(keys, values, strict=True))

    def apply(self, action: Callable[[Any, Any], object]) -> None:
        last = self.pop()
        first = self.pop()
        self.push(action(first, last))

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        objects.set_state(target, state)


MARK = object()

OPCODES: dict[bytes, Callable[[_Walker], None]] = {
    b"\x95": _Walker.frame,
    b"\x94": _Walker.memoize,
    b"h": _Walker.recall,
    b"\x8c": _Walker.text,
    b"C": lambda walker: walker.blob("<B"),
    b"B": lambda walker: walker.blob("<I"),
    b"\x8e": lambda walker: walker.blob("<Q"),
    b"K": lambda walker: walker.push(walker.number("<B")),
    b"M": lambda walker: walker.push(walker.number("<H")),
    b"J": lambda walker: walker.push(walker.number("<i")),
    b"N": lambda walker: walker.push(None),
    b"\x88": lambda walker: walker.push(True),
    b"\x89": lambda walker: walker.push(False),
    b"(": lambda walker: walker.push(MARK),
    b")": lambda walker: walker.push(()),
    b"}": lambda walker: walker.push({}),
    b"\x85": lambda walker: walker.push_tuple(1),
    b"\x86": lambda walker: walker.push_tuple(2),
    b"\x87": lambda walker: walker.push_tuple(3),
    b"t": lambda walker: walker.push(tuple(walker.pop_to_mark())),
    b"u": _Walker.set_items,
    b"\x93": lambda walker: walker.apply(objects.find),
    b"\x81": lambda walker: walker.apply(objects.new),
    b"R": lambda walker: walker.apply(objects.call),
    b"b": _Walker.build,
}
BETWEEN_FRAMES = {b"\x95", b"B", b"\x8e"}  # payloads of 64 KiB and more lie between frames
