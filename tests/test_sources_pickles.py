"""The opcode walker: real pickles are read, everything else is refused and nothing runs."""

import contextlib
import functools
import importlib
import io
import operator
import os
import pickle
import random
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_release import framed_size

from grokquant.errors import InputError
from grokquant.sources.pickle_objects import Malformed
from grokquant.sources.pickles import read_array, read_headers, walk
from grokquant.toy.release_writer import write_leaf

WRITE_REAL_PICKLES = """
import pickle, sys
import ml_dtypes, numpy as np
from dataclasses import dataclass

@dataclass
class QuantizedWeight8bit:
    weight: np.ndarray
    scales: np.ndarray

def counted(shape, modulus):
    return np.arange(np.prod(shape)).reshape(shape) % modulus

for i, (weight, scales) in enumerate(eval(sys.argv[2])):
    if scales is None:
        leaf = counted(weight, 251).astype(np.float32)
    else:
        leaf = QuantizedWeight8bit(
            counted(weight, 251).astype(np.int8),
            counted(scales, 97).astype(ml_dtypes.bfloat16),
        )
    with open(f"{sys.argv[1]}/{i}", "wb") as file:
        pickle.dump(leaf, file, protocol=4)
"""
SHAPES = [
    ((4,), None),
    ((63,), None),
    ((64,), None),
    ((16, 100), None),
    ((16384,), None),
    ((70000, 2), None),
    ((2, 3, 4), (2, 1, 4)),
    ((40, 40), (8, 40)),
    ((8, 64, 128), (8, 8, 128)),
    ((300, 300), (1, 300)),
    ((8, 300, 300), (8, 1, 300)),
    ((2, 400, 40000), (2, 1, 40000)),
    # frames that fill up just before, in and after the second array's opcodes
    *(((n,), (k,)) for n in range(65184, 65552, 12) for k in (1, 200, 40000)),
    *(((30000,), (k,)) for k in range(17620, 17680, 4)),
    *(((n,), (k,)) for n in (65535, 65536) for k in (32767, 32768)),
]
# int8 [2, 3, 4] counting up and zero bfloat16 scales [2, 1, 4], by numpy 1.26.4, ml_dtypes 0.3.2
NUMPY_1 = bytes.fromhex(
    "80049545010000000000008c085f5f6d61696e5f5f948c135175616e74697a6564576569676874386269749493942981"
    "947d94288c06776569676874948c156e756d70792e636f72652e6d756c74696172726179948c0c5f7265636f6e737472"
    "7563749493948c056e756d7079948c076e6461727261799493944b0085944301629487945294284b014b024b034b0487"
    "9468098c0564747970659493948c02693194898887945294284b038c017c944e4e4e4affffffff4affffffff4b007494"
    "62894318000102030405060708090a0b0c0d0e0f1011121314151617947494628c067363616c6573946808680b4b0085"
    "94680d87945294284b014b024b014b04879468128c096d6c5f647479706573948c0862666c6f61743136949394898887"
    "945294284b038c013c944e4e4e4b024b024b5074946289431000000000000000000000000000000000947494627562"
    "2e"
)

# --- what must be read


def counted(shape: tuple[int, ...], modulus: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % modulus).reshape(shape)


def leaf_of(weight: tuple[int, ...], scales: tuple[int, ...] | None):
    if scales is None:
        return counted(weight, 251).float()
    codes = counted(weight, 251).to(torch.uint8).view(torch.int8)
    return codes, counted(scales, 97).to(torch.bfloat16)


@pytest.fixture(scope="module")
def real_pickles(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("real")
    command = [sys.executable, "-c", WRITE_REAL_PICKLES, str(directory), repr(SHAPES)]
    subprocess.run(command, check=True)
    return directory


@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_real_pickles_are_read_and_written_alike(real_pickles, tmp_path, i):
    weight, scales = SHAPES[i]
    leaf = leaf_of(weight, scales)
    headers = read_headers(real_pickles / str(i))
    arrays = [read_array(real_pickles / str(i), header) for header in headers]
    wanted = [leaf] if scales is None else list(leaf)
    assert [header.field for header in headers] == (
        [""] if scales is None else ["weight", "scales"]
    )
    assert len(arrays) == len(wanted)
    assert all(
        torch.equal(a, w) and a.dtype == w.dtype for a, w in zip(arrays, wanted, strict=True)
    )

    write_leaf(tmp_path / "mine", leaf, multiarray=np.zeros(1).__reduce__()[0].__module__)
    real, mine = (real_pickles / str(i)).read_bytes(), (tmp_path / "mine").read_bytes()
    assert len(real) == len(mine)
    differing = [pair for pair in zip(real, mine, strict=True) if pair[0] != pair[1]]
    assert differing in ([], [(64, 80)])  # the bfloat16 flags of newer ml_dtypes


def test_numpy_1_bytes_are_reproduced(tmp_path):
    leaf = torch.arange(24, dtype=torch.int8).reshape(2, 3, 4), torch.zeros(2, 1, 4).bfloat16()
    write_leaf(tmp_path / "mine", leaf)
    assert (tmp_path / "mine").read_bytes() == NUMPY_1
    weight, scales = read_headers(tmp_path / "mine")
    assert (weight.shape, weight.dtype, weight.nbytes) == ((2, 3, 4), "int8", 24)
    assert (scales.shape, scales.dtype, scales.nbytes) == ((2, 1, 4), "bfloat16", 16)
    assert torch.equal(read_array(tmp_path / "mine", weight), leaf[0])


@pytest.mark.parametrize(
    ("weight", "scales", "size"),
    [
        ((8, 6144, 32768), (8, 1, 32768), 1_611_137_347),
        ((8, 32768, 6144), (8, 8, 6144), 1_611_399_491),
        ((6144, 1024), (1, 1024), 6_293_814),
        ((6144, 6144), (8, 6144), 37_847_359),
        ((6144, 6144), (1, 6144), 37_761_334),
        ((6144,), None, 24_727),
        ((6144, 8), None, 196_770),
        ((131072, 6144), None, 3_221_225_637),
    ],
)
def test_published_file_sizes(weight, scales, size):
    assert framed_size(weight, scales) == size


def test_mapped_arrays_do_not_change_the_file(tmp_path):
    write_leaf(tmp_path / "leaf", torch.ones(5))
    (header,) = read_headers(tmp_path / "leaf")
    before = (tmp_path / "leaf").read_bytes()
    read_array(tmp_path / "leaf", header).zero_()
    assert (tmp_path / "leaf").read_bytes() == before


# --- what must be refused


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def framed(body: bytes) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def calling(module: str, attribute: str, argument: str = "touch owned") -> bytes:
    return framed(name(module, attribute) + text(argument) + b"\x85R.")


def changed(old: bytes, new: bytes, count: int = 1) -> bytes:
    body = NUMPY_1[11:]
    assert old in body
    return framed(body.replace(old, new, count))


def dumped(value: object, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol)


def c_order_flag(fortran: bytes) -> bytes:
    return changed(b"\x89C\x18", fortran + b"C\x18")


SHAPE = b"K\x02K\x03K\x04\x87"
I1_STATE = b"(K\x03\x8c\x01|\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b"
I1_ARGUMENTS = b"\x8c\x02i1\x94\x89\x88\x87"
TWO_POW_62 = b"\x8a\x08" + struct.pack("<q", 1 << 62)

NOT_TENSOR_FILES: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x80",
    "no opcodes": b"\x80\x04",
    "only stop": b"\x80\x04.",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "zip": b"PK\x03\x04" + bytes(60),
    **{f"protocol {p}": dumped(np.zeros(4, np.float32), p) for p in (0, 1, 2, 3, 5)},
    "protocol 4 twice": framed(b"\x80\x04" + NUMPY_1[11:]),
    "protocol 6": b"\x80\x06" + NUMPY_1[2:],
    # calls
    "os.system": dumped(Calls(os.system, "touch owned")),
    "posix.system": calling("posix", "system"),
    "eval": dumped(Calls(eval, "open('owned', 'w')")),
    "exec": dumped(Calls(exec, "open('owned', 'w')")),
    "open": dumped(Calls(open, "owned", "w")),
    "getattr": dumped(Calls(getattr, 1, "real")),
    "__import__": dumped(Calls(__import__, "antigravity")),
    "subprocess": dumped(Calls(subprocess.Popen, "touch owned")),
    "import_module": dumped(Calls(importlib.import_module, "antigravity")),
    "runpy": dumped(Calls(runpy.run_path, "owned.py")),
    "attrgetter": dumped(Calls(operator.attrgetter, "__class__")),
    "partial": dumped(functools.partial(os.system, "touch owned")),
    "resolve_name": calling("pkgutil", "resolve_name", "os:system"),
    "pip": calling("pip", "main", "install"),
    "uuid": calling("uuid", "_get_command_stdout"),
    "ctypes": calling("ctypes", "CDLL"),
    "numpy.load": calling("numpy", "load"),
    "numpy.runstring": calling("numpy.testing._private.utils", "runstring"),
    "numpy scalar": dumped(np.float32(1)),
    "torch.load": calling("torch", "load"),
    "codecs": calling("_codecs", "encode"),
    "frombuffer": calling("numpy._core.numeric", "_frombuffer"),
    "jax": calling("jax._src.array", "_reconstruct_array"),
    "copyreg": calling("copyreg", "_reconstructor"),
    "main": calling("__main__", "__loader__"),
    "other class": calling("__main__", "QuantizedWeight4bit"),
    "class elsewhere": changed(text("__main__"), text("model")),
    "dotted": calling("numpy", "dtype.__init__.__globals__"),
    "dotted module": calling("numpy", "core.multiarray._reconstruct"),
    "builtins dotted": calling("builtins", "eval.__call__"),
    "newline in a name": calling("numpy\nos", "system"),
    "no ascii": calling("numpу", "ndarray"),
    "empty names": calling("", ""),
    "record called": calling("__main__", "QuantizedWeight8bit"),
    "ndarray called": calling("numpy", "ndarray"),
    "bfloat16 called": calling("ml_dtypes", "bfloat16"),
    "string called": framed(text("os.system") + text("id") + b"\x85R."),
    "new ndarray": framed(name("numpy", "ndarray") + b")\x81."),
    "new record with arguments": framed(
        name("__main__", "QuantizedWeight8bit") + text("id") + b"\x85\x81."
    ),
    "global in a tuple": framed(text("numpy") + text("ndarray") + b"\x86\x85\x93."),
    "global of numbers": framed(b"K\x01K\x02\x93."),
    "bare global": framed(name("numpy", "ndarray") + b"."),
    # opcodes outside the set
    "GLOBAL": framed(b"cos\nsystem\n" + text("touch owned") + b"\x85R."),
    "INST": framed(b"(" + text("touch owned") + b"ios\nsystem\n."),
    "OBJ": framed(b"(cos\nsystem\n" + text("touch owned") + b"o."),
    "NEWOBJ_EX": framed(name("numpy", "ndarray") + b")}\x92."),
    "EXT1": framed(b"\x82\x01."),
    "EXT2": framed(b"\x83\x01\x00."),
    "EXT4": framed(b"\x84\x01\x00\x00\x00."),
    "PERSID": framed(b"Pos.system\n."),
    "BINPERSID": framed(text("os.system") + b"Q."),
    "BINPUT": framed(b"K\x01q\xff."),
    "LONG_BINPUT": framed(b"K\x01r\xff\xff\xff\x7f."),
    "LONG_BINGET": framed(b"K\x01\x94j\x00\x00\x00\x00."),
    "LONG4": framed(b"\x8b\xff\xff\xff\x7f."),
    "BINUNICODE8": framed(b"\x8d" + b"\xff" * 8 + b"."),
    "BYTEARRAY8": framed(b"\x96" + struct.pack("<Q", 1 << 40) + b"."),
    "NEXT_BUFFER": framed(b"\x97."),
    "READONLY_BUFFER": framed(b"C\x01b\x98."),
    "POP": framed(b"K\x010."),
    "DUP": framed(b"K\x012\x86."),
    "POP_MARK": framed(b"(K\x011."),
    "list": dumped([1, 2]),
    "set": dumped({1, 2}),
    "float": dumped(1.5),
    "text object": dumped("hello"),
    "bytes object": dumped(b"hello"),
    "None": dumped(None),
    # bombs
    "marks": framed(b"(" * 100_000 + b"."),
    "depth": framed(b"K\x01" * 150 + b"."),
    "opcodes": framed(b")\x94" * 5000 + b"."),
    "tuple of tuples": framed(b")" + b"\x85" * 190 + b"."),
    "memo doubling": framed(
        b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)) + b"."
    ),
    "doubled nest as arguments": framed(
        name("numpy", "dtype")
        + b")\x94"
        + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(40))
        + b"R."
    ),
    "dictionary in itself": framed(b"}\x94(" + text("weight") + b"h\x00u."),
    "record of itself": framed(
        name("__main__", "QuantizedWeight8bit")
        + b")\x81\x94}("
        + text("weight")
        + b"h\x00"
        + text("scales")
        + b"h\x00ub."
    ),
    "memo beyond": framed(b"h\x07."),
    "tuple without mark": framed(b"K\x01t."),
    "tuple of nothing": framed(b"\x87."),
    "items without a mark": framed(b"}u."),
    "odd items": framed(b"}(" + text("weight") + b"u."),
    "items of a tuple": framed(b")(" + text("weight") + b"K\x01u."),
    "number as key": framed(b"}(K\x01K\x01u."),
    "unhashable key": framed(b"}(}}u."),
    "build on a number": framed(b"K\x01}b."),
    "build on nothing": framed(b"}b."),
    # arrays of other kinds
    **{
        f"{dtype} array": dumped(np.zeros(4, dtype))
        for dtype in (
            "?",
            "u1",
            "i2",
            "i8",
            "f2",
            "f8",
            "c8",
            "S3",
            "U3",
            "M8[s]",
            "V8",
            ">f4",
            ">i2",
        )
    },
    "object array": dumped(np.array([Calls(os.system, "touch owned"), None], dtype=object)),
    "structured": dumped(np.zeros(2, [("a", "i1"), ("b", "f4")])),
    "structured of objects": dumped(np.zeros(2, [("a", "O")])),
    "masked": dumped(np.ma.zeros(2, np.float32)),
    "matrix": dumped(np.zeros(2, np.float32).view(np.recarray)),
    "Fortran array": dumped(np.asfortranarray(np.ones((3, 4), np.float32))),
    "rank 0": dumped(np.float32(1).reshape(())),
    "rank 4": dumped(np.zeros((1, 1, 1, 1), np.float32)),
    "no elements": dumped(np.zeros((0, 4), np.float32)),
    # type confusion and shapes that lie
    "Fortran flag": c_order_flag(b"\x88"),
    "flag is a number": c_order_flag(b"K\x00"),
    "flags 63": changed(I1_STATE, I1_STATE.replace(b"K\x00t", b"K\x3ft")),
    "object i1": changed(I1_ARGUMENTS, I1_ARGUMENTS.replace(b"i1", b"O8")),
    "void i1": changed(I1_ARGUMENTS, I1_ARGUMENTS.replace(b"i1", b"V1")),
    "dtype with fields": changed(
        I1_STATE, I1_STATE.replace(b"NNN", b"N" + text("a") + b"\x85}(" + text("a") + b"Nu")
    ),
    "dtype of subarray": changed(I1_STATE, I1_STATE.replace(b"NNN", b"K\x01K\x02\x86NN")),
    "dtype size": changed(
        I1_STATE, I1_STATE.replace(b"J\xff\xff\xff\xff", b"J\x08\x00\x00\x00", 1)
    ),
    "big endian": changed(b"\x8c\x01<", b"\x8c\x01>"),
    "dtype version": changed(I1_STATE, I1_STATE.replace(b"K\x03", b"K\x04")),
    "dtype built twice": changed(I1_STATE, I1_STATE + I1_STATE),
    "dtype not built": changed(I1_STATE, b""),
    "dtype copies": changed(I1_ARGUMENTS, I1_ARGUMENTS.replace(b"\x89\x88", b"\x88\x88")),
    "array version": changed(b"(K\x01" + SHAPE, b"(K\x02" + SHAPE),
    "version is a flag": changed(b"(K\x01" + SHAPE, b"(\x88" + SHAPE),
    "negative": changed(SHAPE, b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x18\x87"),
    "zero": changed(SHAPE, b"K\x00K\x03K\x04\x87"),
    "flag as size": changed(SHAPE, b"\x88K\x06K\x04\x87"),
    "2^62": changed(SHAPE, TWO_POW_62 + b"K\x04K\x01\x87"),
    "2^93": changed(SHAPE, b"J\xff\xff\xff\x7f" * 3 + b"\x87"),
    "too many": changed(SHAPE, b"K\x02K\x03K\x05\x87"),
    "too few": changed(SHAPE, b"K\x02K\x03K\x03\x87"),
    "other rank": changed(SHAPE, b"K\x18K\x01K\x01K\x01(t"),
    "shape is a number": changed(SHAPE, b"K\x18"),
    "contents are a number": changed(b"C\x18" + bytes(range(24)), b"K\x18"),
    "contents are text": changed(b"C\x18" + bytes(range(24)), text("a" * 24)),
    "contents beyond the file": changed(b"C\x18", b"B\xff\xff\xff\xff"),
    "contents of 2^63": changed(b"C\x18", b"\x8e" + struct.pack("<Q", 1 << 63)),
    "array filled twice": changed(b"u", b"h\x0fh\x0fb" + b"u"),
    "subclass of ndarray": changed(text("ndarray"), text("memmap")),
    "typecode": changed(b"C\x01b", b"C\x01O"),
    # records
    "field missing": changed(text("scales"), text("weight")),
    "field unknown": changed(text("scales"), text("bias")),
    "field not array": dumped({"weight": 1, "scales": 2}),
    "bare dictionary": framed(b"}."),
    "record without fields": framed(name("__main__", "QuantizedWeight8bit") + b")\x81."),
    "record of nothing": framed(name("__main__", "QuantizedWeight8bit") + b")\x81}b."),
    # ends and frames
    "a second pickle": NUMPY_1 + NUMPY_1,
    "a byte behind": NUMPY_1 + b"\x00",
    "a byte behind in the frame": framed(NUMPY_1[11:] + b"\x00"),
    "two objects": framed(b"K\x01" + NUMPY_1[11:]),
    "no stop": framed(NUMPY_1[11:-1]),
    "no frame": b"\x80\x04" + NUMPY_1[11:],
    "frame of 0": b"\x80\x04\x95" + bytes(8) + NUMPY_1[2:],
    "frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + NUMPY_1[11:],
    "frame too long": b"\x80\x04\x95" + struct.pack("<Q", len(NUMPY_1) - 10) + NUMPY_1[11:],
    "frame too short": b"\x80\x04\x95" + struct.pack("<Q", len(NUMPY_1) - 20) + NUMPY_1[11:],
    "frame in a frame": framed(b"\x95" + struct.pack("<Q", len(NUMPY_1) - 11) + NUMPY_1[11:]),
}

_heard: list[tuple[str, tuple]] | None = None


def _listen(event: str, arguments: tuple) -> None:
    if _heard is not None:
        _heard.append((event, arguments))


@pytest.fixture(scope="module", autouse=True)
def audit_hook():
    sys.addaudithook(_listen)  # cannot be taken away again: silent unless `_heard` is a list


def events_of(path: Path) -> tuple[list[tuple[str, tuple]], Exception | None]:
    """Audit events and the exception of reading `path`."""
    global _heard
    failure = None
    _heard = []
    try:
        read_headers(path)
    except Exception as error:
        failure = error
    finally:
        events, _heard = _heard, None
    return events, failure


def test_there_are_many_hostile_files():
    assert len(NOT_TENSOR_FILES) >= 100


def bytes_read() -> int:
    """What this process has read from files so far."""
    first = Path("/proc/self/io").read_text().splitlines()[0]
    return int(first.removeprefix("rchar: "))


@pytest.mark.parametrize("kind", NOT_TENSOR_FILES)
def test_refused_in_one_line_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tensor00000_000"
    path.write_bytes(NOT_TENSOR_FILES[kind])
    before = bytes_read()
    events, failure = events_of(path)
    # Twice: by the walker, and the beginning once more to say what it is.
    assert bytes_read() - before <= 2 * len(NOT_TENSOR_FILES[kind]) + 100_000
    assert isinstance(failure, InputError), kind
    assert str(path) in str(failure) and "\n" not in str(failure) and len(str(failure)) < 400
    assert all(event == "open" and str(given[0]) == str(path) for event, given in events), events
    assert os.listdir(tmp_path) == [path.name]


def test_the_audit_hook_hears_what_it_should(tmp_path):
    global _heard
    _heard = []
    with pytest.raises(ValueError):
        pickle.load(io.BytesIO(dumped(Calls(int, "not a number"))))
    events, _heard = _heard, None
    assert "pickle.find_class" in [event for event, _ in events]


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "pipe"):
        with pytest.raises(InputError, match="cannot be read: "):
            read_headers(path)


def test_truncated_anywhere():
    for end in range(len(NUMPY_1)):
        with pytest.raises(Malformed):
            walk(io.BytesIO(NUMPY_1[:end]))


def test_truncated_large_file(tmp_path):
    path = tmp_path / "leaf"
    write_leaf(path, leaf_of((2, 400, 400), (2, 1, 400)))
    raw = path.read_bytes()
    points = {0, 1, 2, 11, 200, 300, 320000, len(raw) - 1, len(raw) - 5, len(raw) - 900}
    for end in sorted(points | set(range(0, len(raw), 4999)), reverse=True):
        os.truncate(path, end)
        with pytest.raises(InputError, match="truncated|empty"):
            read_headers(path)


def test_every_flipped_bit_of_the_framing_is_noticed():
    """But for the one that turns a flag of ml_dtypes into its other known value."""
    original = walk(io.BytesIO(NUMPY_1))
    payload = {i for h in original for i in range(h.offset, h.offset + h.nbytes)}
    passed = []
    for i in sorted(set(range(len(NUMPY_1))) - payload):
        for bit in range(8):
            flipped = NUMPY_1[:i] + bytes([NUMPY_1[i] ^ 1 << bit]) + NUMPY_1[i + 1 :]
            with contextlib.suppress(Malformed):
                assert walk(io.BytesIO(flipped)) == original
                passed.append((i, bit))
    assert passed == [(NUMPY_1.index(b"K\x02K\x02KP") + 5, 4)]


def mutated(raw: bytes, generator: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(data))
        choice = generator.randrange(4)
        if choice == 0:
            data[at] = generator.randrange(256)
        elif choice == 1:
            del data[at : at + generator.randint(1, 9)]
        elif choice == 2:
            data[at:at] = generator.choice(
                [b"(", b"\x94", b"t", b"R", b"b", b"u", b"\x87", b"h\x08"]
            )
        else:
            other = generator.randrange(len(data))
            data[at:at] = data[other : other + generator.randint(1, 30)]
        if not data:
            break
    data[3:11] = struct.pack("<Q", max(len(data) - 11, 0))
    return bytes(data)


def test_fuzz_finds_only_refusals_and_arrays_inside_the_file():
    generator = random.Random(7)
    refused = 0
    for _ in range(20_000):
        raw = mutated(NUMPY_1, generator)
        try:
            for header in walk(io.BytesIO(raw)):
                assert header.offset > 0 and header.offset + header.nbytes < len(raw)
        except Malformed:
            refused += 1
    assert refused > 15_000
