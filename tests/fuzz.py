"""Feeds mutated headers to the readers of files from strangers: `make fuzz`.

    python tests/fuzz.py [--count N] [--processes P]

A reader either reads a file or refuses it with its own exception, in one line of bounded length.
Anything else is printed with the bytes that caused it, and the exit code is 1. Cases depend on
nothing but the name of the reader and their number, so that a failure can be repeated.
"""

import argparse
import io
import json
import os
import random
import re
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from grokquant.errors import InputError
from grokquant.files import gguf_header
from grokquant.files.json_objects import parse_strict_object
from grokquant.files.safetensors_header import file_layout
from grokquant.sources import safetensors_directory
from grokquant.sources.pickle_objects import Malformed
from grokquant.sources.pickles import walk
from grokquant.toy.release_writer import write_leaf

CHUNK = 10_000  # cases of a process at a time
MOST_EDITS = 4
LONGEST_MESSAGE = 1000
ALSO_OUTSIDE = 1 / 8  # of cases are edited in their lengths and magic numbers too
NUMBERS = tuple(
    struct.pack("<Q", number % (1 << 64))
    for number in (0, 1, 2, 31, 255, 1 << 16, 1 << 24, 1 << 31, 1 << 32, 1 << 62, 1 << 63, -1)
)


@dataclass(frozen=True)
class Reader:
    """A reader and what to feed it with.

    `bodies` are mutated and `whole` makes files of them, with lengths that fit. `words` are what
    the format's bytes mean: they are written over others or put between them. `value`, where there
    is one, matches what is replaced whole.
    """

    read: Callable[[bytes], None]
    bodies: tuple[bytes, ...]
    words: tuple[bytes, ...]
    whole: Callable[[bytes], bytes] = bytes
    value: re.Pattern[bytes] | None = None


def read_safetensors(raw: bytes) -> None:
    safetensors_directory.parse_header(io.BytesIO(raw), "x")


def read_pickle(raw: bytes) -> None:
    for header in walk(io.BytesIO(raw)):
        assert header.offset > 0 and header.offset + header.nbytes < len(raw), "outside the file"


def read_gguf(raw: bytes) -> None:
    for tensor in gguf_header.parse_header(io.BytesIO(raw), "x"):
        assert tensor.offset > 0 and tensor.offset + tensor.bytes <= len(raw), "outside the file"


def read_index(raw: bytes) -> None:
    safetensors_directory.shards_of(parse_strict_object(raw, "x"), "x")


def safetensors_bodies() -> Iterator[bytes]:
    tensors = {
        "model.layers.0.mlp.weight": (torch.bfloat16, (2, 3)),
        "scale": (torch.float32, ()),
        "codes": (torch.uint8, (4, 2)),
    }
    yield file_layout(tensors).header[8:]
    yield file_layout({"a": (torch.int8, (24,))}).header[8:]


def with_length(body: bytes) -> bytes:
    """A safetensors file with this header and 24 bytes of data."""
    return struct.pack("<Q", len(body)) + body + bytes(24)


def pickle_bodies() -> Iterator[bytes]:
    """What follows the length of the one frame of a small file: an array, or codes and scales."""
    codes = torch.arange(24, dtype=torch.int8).reshape(2, 3, 4)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "leaf"
        for leaf in (torch.ones(5), (codes, torch.ones(2, 1, 4).bfloat16())):
            write_leaf(path, leaf)
            yield path.read_bytes()[11:]


def framed(body: bytes) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def gguf_bodies() -> Iterator[bytes]:
    """Whole files, as lengths are everywhere in them."""
    tensors = [
        gguf_header.GgufTensor("token_embd.weight", "F16", (2, 8)),
        gguf_header.GgufTensor("blk.0.ffn.weight", "Q8_0", (2, 32)),
        gguf_header.GgufTensor("norm", "F32", (3,)),
    ]
    pairs: dict[str, gguf_header.Value] = {
        "general.architecture": "grok",
        "general.alignment": 32,
        "tokens": ["a", "bc", ""],
        "scores": [0.5, -1.0],
        "kinds": [1, 2, 3],
        "eps": 1e-5,
        "flag": True,
        "split": gguf_header.Short(3),
    }
    for metadata, held in ((pairs, tensors), ({}, tensors[1:2])):
        layout = gguf_header.gguf_layout(metadata, held)
        yield layout.header + bytes(layout.size - len(layout.header))


def index_bodies() -> Iterator[bytes]:
    names = [f"model.layers.{layer}.{part}.weight" for layer, part in product(range(2), "qkv")]
    shards = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)] * 3
    content = {"metadata": {"total_size": 96}, "weight_map": dict(zip(names, shards, strict=True))}
    yield json.dumps(content).encode()
    yield json.dumps(content, indent=2).encode()


JSON_VALUE = re.compile(rb'"[^"]*"|-?\d+|\[[^]]*\]')
JSON_WORDS = (
    b"-1", b"0", b"1e999", b"1.5", b"18446744073709551615", b"9" * 5000, b"NaN", b"null", b"true",
    b"[]", b"{}", b"[" * 70, b'{"a":' * 70, b'""', b'"a"', b'"\\ud800"', b'"\\u0000"', b'"../a"',
    b'"/etc/passwd"', b'"F64"', b'"BOOL"', b'"__metadata__"', b'"a":', b",", b"\xff", b"\x00",
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"weight_map"', b"[0,0]", b"[24,0]", b"[0,48]",
    b"\xef\xbb\xbf", b"//", b"\xed\xa0\x80",
)  # fmt: skip
PICKLE_WORDS = (
    *(bytes([code]) for code in b"()tRbuNKMJChBo0i}]2.\x81\x85\x86\x87\x88\x89\x8c\x8e\x93\x94"),
    b"h\x00", b"h\x08", b"h\xff", b"K\x00", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x08",
    b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"\x80\x04", b"\x8c\x02f4", b"\x8c\x01O",
    *NUMBERS,
)  # fmt: skip
GGUF_WORDS = (
    *(struct.pack("<I", number) for number in (*range(14), 30, 99, 1 << 31)),
    *NUMBERS,
    struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 64),
    struct.pack("<IIQ", 9, 9, 1),
    struct.pack("<IIQ", 9, 8, 1 << 20),
    b"\x00", b"\xff\xfe", b"GGUF",
)  # fmt: skip

READERS = {
    "safetensors": Reader(
        read_safetensors, tuple(safetensors_bodies()), JSON_WORDS, with_length, JSON_VALUE
    ),
    "pickle": Reader(read_pickle, tuple(pickle_bodies()), PICKLE_WORDS, framed),
    "gguf": Reader(read_gguf, tuple(gguf_bodies()), GGUF_WORDS),
    "index": Reader(read_index, tuple(index_bodies()), JSON_WORDS, value=JSON_VALUE),
}


@dataclass(frozen=True)
class Outcome:
    """What became of the cases of one chunk; `failures` are texts."""

    reader: str
    read: int
    refused: int
    seconds: float
    failures: list[str]


def cases(name: str, chunk: int, count: int) -> Iterator[bytes]:
    """The `count` files that make up a chunk."""
    reader = READERS[name]
    draw = random.Random(f"{name} {chunk}")
    for _ in range(count):
        raw = reader.whole(edited(draw.choice(reader.bodies), reader, draw))
        yield edited(raw, reader, draw) if draw.random() < ALSO_OUTSIDE else raw


def edited(body: bytes, reader: Reader, draw: random.Random) -> bytes:
    data = bytearray(body)
    for _ in range(1 + int(draw.random() * MOST_EDITS)):
        place = int(draw.random() * (len(data) + 1))
        draw.choice(EDITS)(data, place, reader, draw)
    return bytes(data)


def set_byte(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    data[place : place + 1] = bytes([draw.getrandbits(8)])


def flip_bit(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    if place < len(data):
        data[place] ^= 1 << draw.getrandbits(3)


def delete(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    del data[place : place + 1 + draw.getrandbits(3)]


def insert_word(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    data[place:place] = draw.choice(reader.words)


def write_word(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    word = draw.choice(reader.words)
    data[place : place + len(word)] = word


def replace_value(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    found = reader.value and reader.value.search(data, place)
    if found:
        data[found.start() : found.end()] = draw.choice(reader.words)


def repeat(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    """Copies up to 32 bytes from elsewhere."""
    first = int(draw.random() * (len(data) + 1))
    data[place:place] = data[first : first + 1 + draw.getrandbits(5)]


def cut(data: bytearray, place: int, reader: Reader, draw: random.Random) -> None:
    """Ends the data here, one time in four."""
    if draw.getrandbits(2) == 0:
        del data[place:]


EDITS = (set_byte, flip_bit, delete, insert_word, write_word, replace_value, repeat, cut)


def run_chunk(name: str, chunk: int, count: int = CHUNK) -> Outcome:
    start = time.process_time()
    refused = 0
    failures = []
    for raw in cases(name, chunk, count):
        try:
            READERS[name].read(raw)
        except (InputError, Malformed) as error:
            refused += 1
            message = str(error)
            if "\n" in message or len(message) > LONGEST_MESSAGE:
                failures.append(f"{name}, chunk {chunk}: {message[:200]!r}\n{raw!r}")
        except Exception:
            failures.append(f"{name}, chunk {chunk}: {traceback.format_exc()}\n{raw!r}")
    seconds = time.process_time() - start
    return Outcome(name, count - refused, refused, seconds, failures)


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--count", type=int, default=1_000_000, help="cases for each reader")
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--processes", type=int, default=cores)
    chosen = options.parse_args()
    chunks = range(-(-chosen.count // CHUNK))
    jobs = [(name, chunk) for name in READERS for chunk in chunks]
    with ProcessPoolExecutor(chosen.processes, get_context("fork")) as pool:
        outcomes = list(pool.map(run_chunk, *zip(*jobs, strict=True), chunksize=5))
    for name in READERS:
        of_reader = [outcome for outcome in outcomes if outcome.reader == name]
        read = sum(outcome.read for outcome in of_reader)
        refused = sum(outcome.refused for outcome in of_reader)
        seconds = sum(outcome.seconds for outcome in of_reader)
        print(f"{name}: {refused:,} refused, {read:,} read, {seconds:.0f} s of CPU")
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    print(*failures[:20], sep="\n\n", end="")
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
