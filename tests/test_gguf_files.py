"""GGUF files: the gguf package reads what we wrote, and we read it back as it was."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from grokquant.checkpoint import open_checkpoint
from grokquant.containers.container import Slot
from grokquant.containers.gguf_vocabulary import vocabulary
from grokquant.errors import InputError
from grokquant.files.gguf_header import DENSE as DENSE_TYPES
from grokquant.files.gguf_header import (
    TYPES,
    GgufTensor,
    Short,
    Signed,
    gguf_layout,
    read_tensors,
)
from grokquant.formats.gguf_blocks import unpack_blocks
from grokquant.grids import GRIDS
from grokquant.job import pipeline
from grokquant.sources import gguf_directory
from grokquant.types import Source

DENSE = {"match": "*", "method": "keep"}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A file of three tensors and some metadata."""
    tensors = [
        GgufTensor("a", "F32", (3, 5)),
        GgufTensor("b", "BF16", (2, 4, 6)),
        GgufTensor("c", "Q8_0", (2, 64)),
    ]
    metadata = {
        "general.architecture": "grok",
        "split.no": Short(3),
        "split.tensors.count": Signed(7),
        "x.count": 12,
        "x.scale": 0.25,
        "x.flag": True,
        "x.words": ["né", "b"],
        "x.numbers": [1, -2],
        "x.scores": [0.5, -1.0],
    }
    layout = gguf_layout(metadata, tensors)
    draw = np.random.default_rng(0)
    data = {t.name: draw.integers(0, 255, t.bytes).astype(np.uint8) for t in tensors}
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    whole = bytearray(layout.size)
    whole[: len(layout.header)] = layout.header
    for name, offset in layout.offsets.items():
        whole[offset : offset + len(data[name])] = data[name].tobytes()
    path.write_bytes(whole)
    return path, data


def test_the_package_reads_names_shapes_values_and_metadata(written):
    path, data = written
    reader = GGUFReader(path)
    assert {t.name: t.data.tobytes() for t in reader.tensors} == {
        name: value.tobytes() for name, value in data.items()
    }
    assert [list(t.shape) for t in reader.tensors] == [[5, 3], [6, 4, 2], [64, 2]]
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["x.words"] == ["né", "b"] and values["x.numbers"] == [1, -2]
    assert (values["x.count"], values["x.scale"], values["x.flag"]) == (12, 0.25, True)
    assert (values["split.no"], values["split.tensors.count"]) == (3, 7)


def test_we_read_what_we_wrote(written):
    path, data = written
    for tensor in read_tensors(path):
        raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.bytes]
        assert raw == data[tensor.name].tobytes()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda raw: b"PK" + raw[2:], "it begins with"),
        (lambda raw: raw[:4] + b"\x02" + raw[5:], "version 2"),
        (lambda raw: raw[:60], "not a readable GGUF file"),
        (lambda raw: raw[:-64], "truncated: 'c' ends after the file"),
        (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "it counts"),
    ],
)
def test_damaged_files_are_named(written, tmp_path, damage, complaint):
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(written[0].read_bytes()))
    with pytest.raises(InputError, match=f"bad.gguf: .*{complaint}"):
        read_tensors(path)


def gguf_file(pairs: bytes, count: int, tensors: list[tuple[str, int]], alignment: int) -> bytes:
    """A file with float32 tensors of 8 values at these offsets; the value at each is its number."""
    infos = b""
    for name, offset in tensors:
        infos += struct.pack("<Q", len(name)) + name.encode()
        infos += struct.pack("<IQIQ", 1, 8, 0, offset)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + pairs + infos
    header += bytes(-len(header) % alignment)
    end = max(offset for _, offset in tensors) + alignment
    return header + np.arange(end // 4, dtype=np.float32).tobytes()


def alignment_pair(value: int, kind: int = 4) -> bytes:
    key = b"general.alignment"
    return struct.pack("<Q", len(key)) + key + struct.pack("<II", kind, value)


@pytest.mark.parametrize("alignment", [8, 32, 128, 256, 4096, 16384])
def test_data_lie_where_the_alignment_of_the_file_says(tmp_path, alignment):
    path = tmp_path / "x.gguf"
    places = [("a", 0), ("b", max(32, alignment)), ("c", 2 * max(32, alignment))]
    path.write_bytes(gguf_file(alignment_pair(alignment), 1, places, max(32, alignment)))
    expected = {t.name: int(t.data_offset) for t in GGUFReader(path).tensors}
    assert {t.name: t.offset for t in read_tensors(path)} == expected


@pytest.mark.parametrize("value", [0, 1, 4, 24, 33, 48, 1 << 21, 1 << 31])
def test_an_impossible_alignment_is_refused(tmp_path, value):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_file(alignment_pair(value), 1, [("a", 0)], 32))
    with pytest.raises(InputError, match=f"general.alignment is {value}, not a power of two"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ([("a", 0), ("b", 0)], "tensor 'b' is said to begin"),
        ([("a", 0), ("b", 16)], "tensor 'b' is said to begin"),
        ([("a", 32), ("b", 0)], "tensor 'a' is said to begin"),
        ([("a", 0), ("b", 64)], "tensor 'b' is said to begin"),
        ([("a", 0), ("a", 32)], "tensor 'a' occurs twice"),
        ([("a", 0), ("b", 1 << 63)], "tensor 'b' is said to begin"),
    ],
)
def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path, places, complaint):
    path = tmp_path / "x.gguf"
    raw = gguf_file(b"", 0, [(name, min(offset, 64)) for name, offset in places], 32)
    for name, offset in places:
        raw = raw.replace(
            name.encode() + struct.pack("<IQIQ", 1, 8, 0, min(offset, 64)),
            name.encode() + struct.pack("<IQIQ", 1, 8, 0, offset),
        )
    path.write_bytes(raw)
    with pytest.raises(InputError, match=f"x.gguf: .*{complaint}"):
        read_tensors(path)


def pair(key: bytes, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + value


@pytest.mark.parametrize(
    ("pairs", "count", "complaint"),
    [
        (alignment_pair(32, 5), 1, "general.alignment has type 5"),
        (alignment_pair(32) * 2, 2, "key 'general.alignment' occurs twice"),
        (pair(b"a", struct.pack("<I", 99)), 1, "unknown type 99"),
        (pair(b"a", struct.pack("<IIQ", 9, 9, 1) * 2000), 1, "array of type 9"),
        (pair(b"a", struct.pack("<IIQ", 9, 8, 1 << 40)), 1, "strings in its header"),
        (pair(b"a", struct.pack("<IIQ", 9, 4, 1 << 40)), 1, "items in its header"),
        (pair(b"a", struct.pack("<IQ", 8, 1 << 40)), 1, "bytes of a string"),
        (b"", 1 << 30, "pairs in its header"),
    ],
)
def test_headers_that_would_take_all_time_or_memory_are_refused(tmp_path, pairs, count, complaint):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_file(pairs, count, [("a", 0)], 32))
    with pytest.raises(InputError, match=complaint):
        read_tensors(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [name for name in TYPES if name not in DENSE_TYPES])
def test_scales_that_are_not_finite_are_named(tmp_path, kind, value):
    """Each float16 of a block, wherever its kind of block has them."""
    grid = GRIDS[kind.lower()]
    found = []
    for byte in range(0, grid.block_bytes - 1, 2):
        blocks = np.zeros((2, grid.block_bytes), np.uint8)
        blocks[1, byte : byte + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        tensor = GgufTensor("a", kind, (2, grid.block_columns))
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf_layout({}, [tensor]).header + blocks.tobytes())
        rows = torch.from_numpy(blocks).view(2, 1, -1)
        quantized = unpack_blocks(grid.name, rows, grid.scheme)
        try:
            gguf_directory._ref(path, read_tensors(path)[0]).load()
        except InputError as error:
            assert "x.gguf: tensor 'a' holds non-finite scales" in str(error)
            found.append(byte)
            assert not quantized.dequantize().isfinite().all()
        else:
            assert quantized.dequantize().isfinite().all()
    assert found


def test_heads_are_interleaved_and_back():
    rows = torch.arange(16.0).view(16, 1)
    stored = Slot("q", heads=2).stored(rows)
    assert stored.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(Slot("q", heads=2).restored(stored, torch.float32), rows)


@pytest.fixture(params=["500MB", "100KB"])
def dense(tiny_recipe, request) -> Path:
    output = tiny_recipe(DENSE).output.model_copy(update={"format": "gguf"})
    recipe = tiny_recipe(DENSE, output=output.model_dump() | {"shard": request.param})
    return pipeline.quantize(recipe)


def test_a_dense_file_holds_every_weight_of_the_source(dense, tiny_release):
    files = sorted(dense.glob("*.gguf"))
    count = len(files)
    stem = f"{tiny_release.name}-4x559K-BF16"
    names = [f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.gguf"]
    assert [file.name for file in files] == names
    source, found = open_checkpoint(tiny_release).source, open_checkpoint(dense).source
    assert source.tensors.keys() == found.tensors.keys()
    for name, ref in source.tensors.items():
        assert torch.equal(ref.read().float(), found.tensors[name].read().float()), name


def test_a_matrix_that_is_nowhere_is_missed(dense, tmp_path):
    if (files := sorted(dense.glob("*.gguf")))[1:]:
        shutil.copytree(dense, tmp_path / "part")
        (tmp_path / "part" / files[1].name).unlink()
        with pytest.raises(InputError, match=r"part: tensor \S+ is missing"):
            open_checkpoint(tmp_path / "part")


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
DIGITS = {"type": "Digits", "individual_digits": False}


@pytest.mark.parametrize(
    ("pre_tokenizer", "cut"),
    [
        (BYTES, "gpt-2"),
        (BYTES | {"use_regex": False}, None),
        (BYTES | {"add_prefix_space": True}, None),
        (METASPACE, None),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, None),
    ],
)
def test_only_known_cuts_are_written(tmp_path, pre_tokenizer, cut):
    """llama.cpp cuts texts by the name that the file gives: another one would change the tokens."""
    path = tmp_path / "tokenizer.json"
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [
        plain | {"id": 3, "content": "<s>", "special": True},
        plain | {"id": 4, "content": "<x>"},
    ]
    content = {"model": model, "added_tokens": added, "pre_tokenizer": pre_tokenizer}
    path.write_text(json.dumps(content))
    source = Source(tmp_path, "safetensors", {"vocab_size": 6}, {}, tokenizer_files=(path,))
    if cut is None:
        with pytest.raises(InputError, match=r"tokenizer.json: pre_tokenizer: gguf supports only"):
            vocabulary(source)
        return
    found = vocabulary(source)
    assert found["tokenizer.ggml.pre"] == cut
    assert found["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<s>", "<x>", "[PAD5]"]
    assert found["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 4, 5]
    assert found["tokenizer.ggml.merges"] == ["a b"]
