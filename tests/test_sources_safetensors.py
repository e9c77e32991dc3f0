"""Safetensors directories: round trips, and everything in them that must not be believed."""

import contextlib
import json
import math
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from grokquant.errors import InputError
from grokquant.files import json_objects
from grokquant.files.safetensors_entries import parse_entries
from grokquant.files.safetensors_header import DTYPES
from grokquant.sources import open_source
from grokquant.sources.finite import all_finite

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TENSORS = (
    {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5).bfloat16()},
    {"c.weight_packed": torch.arange(6, dtype=torch.int32).reshape(2, 3)},
)


@pytest.fixture
def sharded(tmp_path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    weight_map = {}
    for shard, tensors in zip(SHARDS, TENSORS, strict=True):
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    write_index(directory, weight_map)
    (directory / "config.json").write_text('{"model_type": "mixtral", "auto_map": {"A": "x.py"}}')
    return directory


@pytest.fixture
def single(tmp_path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(TENSORS[0], directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "mixtral"}')
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(directory: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    size = len(header) if length is None else length
    path = directory / "model.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(struct.pack("<Q", size) + header + data)


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_source(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and message.startswith(str(directory))
    return message


# --- what is read


def test_sharded(sharded):
    (sharded / "tokenizer.json").write_text("{}")
    (sharded / "README.md").write_text("---\nbase_model: x\nlicense: 'apache-2.0'\n---\n# Model\n")
    source = open_source(sharded)
    assert source.kind == "safetensors" and source.config["model_type"] == "mixtral"
    assert source.licence == "apache-2.0"
    assert source.tokenizer_files == (sharded / "tokenizer.json",)
    assert source.weight_files == tuple(sharded / shard for shard in SHARDS)
    expected = TENSORS[0] | TENSORS[1]
    assert source.tensors.keys() == expected.keys()
    for name, ref in source.tensors.items():
        assert (ref.name, ref.shape, ref.dtype) == (
            name,
            expected[name].shape,
            expected[name].dtype,
        )
        assert ref.stored_bytes == expected[name].nbytes and ref.scheme is None
        assert torch.equal(ref.read(), expected[name])


def test_single(single, tmp_path):
    source = open_source(single)
    assert source.tensors.keys() == TENSORS[0].keys() and source.licence is None
    assert torch.equal(source.tensors["a.weight"].read(), TENSORS[0]["a.weight"])
    (tmp_path / "other.json").write_text('{"model_type": "other"}')
    assert open_source(single, tmp_path / "other.json").config == {"model_type": "other"}


@pytest.mark.parametrize("kind", DTYPES)
def test_dtypes(single, kind):
    tensor = torch.zeros(2, 3, dtype=DTYPES[kind])
    save_file({"x": tensor}, single / "model.safetensors")
    ref = open_source(single).tensors["x"]
    read = ref.read()
    assert (ref.dtype, ref.shape, ref.stored_bytes) == (read.dtype, read.shape, tensor.nbytes)


def test_only_tensors_of_the_index_are_shown(sharded):
    write_index(sharded, {"a.weight": SHARDS[0]})
    assert list(open_source(sharded).tensors) == ["a.weight"]


# --- which weights are read, where there are several


def with_single(directory: Path, name: str = "model.safetensors") -> Path:
    """The directory with one more file, of which each value is 9."""
    nines = {name: torch.full_like(tensor, 9) for name, tensor in TENSORS[0].items()}
    save_file(nines, directory / name, metadata={"format": "pt"})
    return directory


def test_a_single_file_comes_before_an_index(sharded):
    """The order of transformers: `_get_resolved_checkpoint_files`, asked here."""
    directory = with_single(sharded)
    theirs, _ = _get_resolved_checkpoint_files(str(directory), None, None, None, None, False)
    source = open_source(directory)
    assert [str(path) for path in source.weight_files] == theirs
    assert source.tensors["a.weight"].read().eq(9).all()
    assert source.notes == (
        f"{directory}: the weights are those of model.safetensors; not read: "
        f"model.safetensors.index.json, {SHARDS[0]}, {SHARDS[1]}",
    )


def test_the_index_of_other_files_is_left_aside(single):
    write_index(single, {"a.weight": "model-00001-of-00009.safetensors"})
    source = open_source(single)
    assert torch.equal(source.tensors["a.weight"].read(), TENSORS[0]["a.weight"])
    assert "not read: model.safetensors.index.json" in source.notes[0]


@pytest.mark.parametrize("name", ["new.safetensors", "new.safetensors.index.json"])
def test_a_file_that_the_config_names_comes_first(sharded, name):
    directory = with_single(sharded, "new.safetensors")
    save_file(TENSORS[0], directory / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS[0], "new.safetensors")}
    (directory / "new.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"transformers_weights": name}))
    theirs, _ = _get_resolved_checkpoint_files(str(directory), None, None, None, None, False, name)
    source = open_source(directory)
    assert [str(path) for path in source.weight_files] == theirs
    assert source.tensors["a.weight"].read().eq(9).all()
    assert source.config == {}  # an output has other files
    assert "model.safetensors" in source.notes[0]


@pytest.mark.parametrize("name", [["x"], "../x.safetensors", "pytorch_model.bin", "/x.safetensors"])
def test_a_name_in_the_config_that_is_no_plain_file(single, name):
    (single / "config.json").write_text(json.dumps({"transformers_weights": name}))
    assert "transformers_weights: " in refusal(single)


def test_weights_beside_those_that_are_read_are_named(sharded):
    others = ("consolidated.00.pth", "pytorch_model-00001-of-00002.bin", "q4.gguf", "x.safetensors")
    for name in (*others, "training_args.bin", "optimizer.pt"):
        (sharded / name).write_bytes(b"")
    (note,) = open_source(sharded).notes
    assert note == (
        f"{sharded}: the weights are those of {SHARDS[0]}; not read: "
        f"{', '.join(others[:3])} and 1 more"
    )


def test_tensors_that_the_index_does_not_list_are_named(sharded):
    """Stale ones under names that the index gives to another shard, and strays."""
    stale = {"a.weight": torch.zeros(3, 3), "stray": torch.ones(2)}
    save_file(TENSORS[1] | stale, sharded / SHARDS[1])
    source = open_source(sharded)
    assert torch.equal(source.tensors["a.weight"].read(), TENSORS[0]["a.weight"])
    assert "stray" not in source.tensors
    assert source.notes == (
        f"{sharded / SHARDS[1]}: not read, since the index does not place them here: "
        "a.weight, stray",
    )


def test_nothing_is_said_of_a_plain_directory(sharded):
    assert open_source(sharded).notes == ()


def test_links_into_a_download_cache(sharded):
    cache = sharded.parent / "models--o--n"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = sharded.rename(cache / "snapshots" / "7de1a6a")
    for shard in SHARDS:
        (snapshot / shard).rename(cache / "blobs" / shard[:11])
        (snapshot / shard).symlink_to(f"../../blobs/{shard[:11]}")
    assert torch.equal(open_source(snapshot).tensors["b.weight"].read(), TENSORS[0]["b.weight"])
    (sharded.parent / "by-name").symlink_to(snapshot)
    assert (
        open_source(sharded.parent / "by-name").tensors.keys()
        == open_source(snapshot).tensors.keys()
    )


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "config.json", "tokenizer.json", SHARDS[0], "notes", "sub/x"]
)
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_directory_is_refused(sharded, name, relative):
    private = sharded.parent / "private"
    link = sharded / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.rename(private)
    else:
        private.write_text("secret")
    link.symlink_to(os.path.relpath(private, link.parent) if relative else private)
    message = refusal(sharded)
    assert message.startswith(f"{link}: is a link that leads out") and str(private) in message


def test_links_within_the_directory_and_blobs_of_nobody(sharded):
    (sharded / "more").mkdir()
    (sharded / SHARDS[0]).rename(sharded / "more" / "x")
    (sharded / SHARDS[0]).symlink_to("more/x")
    open_source(sharded)
    (sharded / "loop").symlink_to("loop")
    open_source(sharded)
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    (sharded / SHARDS[1]).rename(blobs / "y")
    (sharded / SHARDS[1]).symlink_to("../blobs/y")
    assert "leads out" in refusal(sharded)


def test_no_file_stays_open(sharded):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc")
    before = len(os.listdir(descriptors))
    source = open_source(sharded)
    assert len(os.listdir(descriptors)) == before
    assert len(source.tensors) == 3


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("# no front matter\nlicense: mit\n", None),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("---\nlicense: mit # yes\n---\n", "mit"),
        ("---\r\nlicense: other\r\n---\r\n", "other"),
        ("---\nlicense:\n- mit\n---\n", None),
    ],
)
def test_licence(single, card, licence):
    (single / "README.md").write_bytes(card.encode())
    assert open_source(single).licence == licence


# --- what is refused: the directory and its index


def test_config(single):
    (single / "config.json").write_text("[]")
    assert "config.json: expected a JSON object" in refusal(single)
    (single / "config.json").unlink()
    assert "config.json: cannot be read" in refusal(single)


def test_shards_without_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "shards without model.safetensors.index.json" in refusal(sharded)


def test_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    assert f"{SHARDS[1]}: no such file" in refusal(sharded)
    (sharded / SHARDS[1]).mkdir()
    assert f"{SHARDS[1]}: cannot be read: it is a directory" in refusal(sharded)
    (sharded / SHARDS[1]).rmdir()
    (sharded / SHARDS[1]).symlink_to("nowhere")
    assert f"{SHARDS[1]}: no such file" in refusal(sharded)


def test_swapped_shards(sharded):
    (sharded / SHARDS[0]).rename(sharded / "x")
    (sharded / SHARDS[1]).rename(sharded / SHARDS[0])
    (sharded / "x").rename(sharded / SHARDS[1])
    assert f"{SHARDS[0]}: tensor 'a.weight' is missing, the index" in refusal(sharded)


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "a/../../b.safetensors",
        "sub/model.safetensors",
        "/etc/model.safetensors",
        "C:model.safetensors",
        "C:\\model.safetensors",
        "\\\\server\\model.safetensors",
        "sub\\model.safetensors",
        "model.bin",
        "model.safetensors.bin",
        ".safetensors",
        "..safetensors",
        "model.safetensors\n",
        "model.safetensors\x00",
        "mödel.safetensors",
        "x" * 5000,
        "",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_file_names_of_the_index(sharded, file):
    write_index(sharded, {"a.weight": file})
    assert "not a plain .safetensors file name" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_weight_map(sharded, weight_map):
    write_index(sharded, weight_map)
    assert "index.json: weight_map must map" in refusal(sharded)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"weight_map": {"a": "x", "a": "y"}}'],
)
def test_broken_index(sharded, raw):
    (sharded / "model.safetensors.index.json").write_bytes(raw)
    assert "model.safetensors.index.json" in refusal(sharded)


# --- what is refused: headers

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes) -> bytes:
    return json.dumps({"x": ENTRY | changes}).encode()


RAW = json.dumps(ENTRY).encode()
BROKEN_HEADERS: dict[str, tuple[bytes, bytes]] = {
    "empty object": (b"{}", b""),
    "only metadata": (b'{"__metadata__": {"a": "b"}}', b""),
    "list": (b"[]", b""),
    "not JSON": (b'{"x": ', b""),
    "bad UTF-8": (b'{"\xff": 1}', b""),
    "nested": (b'{"x":' + b"[" * 100_000, b""),
    "duplicate": (b'{"x": ' + RAW + b', "x": ' + RAW + b"}", bytes(8)),
    "duplicate field": (b'{"x": {"shape": [1], ' + RAW[1:] + b"}", bytes(8)),
    "duplicate metadata": (
        b'{"__metadata__": {}, "__metadata__": {}, "x": ' + RAW + b"}",
        bytes(8),
    ),
    "unknown dtype": (entry(dtype="I3"), bytes(8)),
    "complex dtype": (entry(dtype="C64", shape=[1]), bytes(8)),
    "four bit dtype": (entry(dtype="F4", shape=[16]), bytes(8)),
    "negative size": (entry(shape=[-2]), bytes(8)),
    "fraction": (entry(shape=[2.5]), bytes(8)),
    "overflow": (entry(shape=[1 << 62, 8]), bytes(8)),
    "offsets and shape": (entry(shape=[3]), bytes(8)),
    "hole at the start": (entry(data_offsets=[4, 12]), bytes(12)),
    "backwards": (entry(data_offsets=[8, 0]), bytes(8)),
    "truncated": (entry(), bytes(7)),
    "trailing": (entry(), bytes(9)),
    "metadata of numbers": (b'{"__metadata__": {"a": 1}, "x": ' + RAW + b"}", bytes(8)),
    "entry is a number": (b'{"x": 1}', b""),
    "overlap": (b'{"x": ' + RAW + b', "y": ' + RAW + b"}", bytes(8)),
    "no values": (entry(shape=[0, 2], data_offsets=[0, 0]), b""),
    "no values of an endless size": (entry(shape=[2**64 - 1, 0], data_offsets=[0, 0]), b""),
    "no values beside others": (
        b'{"x": ' + RAW + b', "y": {"dtype": "I8", "shape": [0], "data_offsets": [8, 8]}}',
        bytes(8),
    ),
    "unknown field": (entry(quantized=True), bytes(8)),
    "true for a size": (entry(shape=[True, 2]), bytes(8)),
    "a size as text": (entry(shape=["2"]), bytes(8)),
    "one offset": (entry(data_offsets=[0]), bytes(8)),
    "many dimensions": (entry(shape=[1] * 30 + [2]), bytes(8)),
    "hole between": (
        b'{"x": ' + RAW + b', "y": {"dtype": "I8", "shape": [1], "data_offsets": [9, 10]}}',
        bytes(10),
    ),
    "name is a path": (b'{"../../x": ' + RAW + b"}", bytes(8)),
    "name is a Windows path": (b'{"..\\x": ' + RAW + b"}", bytes(8)),
    "name is a directory": (b'{"..": ' + RAW + b"}", bytes(8)),
    "name has an escape": (b'{"\u001b[2J": ' + RAW + b"}", bytes(8)),
    "no name": (b'{"": ' + RAW + b"}", bytes(8)),
    "long name": (b'{"' + b"x" * 100_000 + b'": ' + RAW + b"}", bytes(8)),
    "metadata is a list": (b'{"__metadata__": [], "x": ' + RAW + b"}", bytes(8)),
    "much metadata": (
        json.dumps({"__metadata__": {str(i): "" for i in range(20_000)}, "x": ENTRY}).encode(),
        bytes(8),
    ),
    "a byte order mark": (b"\xef\xbb\xbf" + entry(), bytes(8)),
    "no dtype": (b'{"x": {"shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
}


@pytest.mark.parametrize("kind", BROKEN_HEADERS)
def test_broken_header(single, kind):
    write_raw(single, *BROKEN_HEADERS[kind])
    assert "model.safetensors" in refusal(single)


@pytest.mark.parametrize(
    ("length", "complaint"),
    [
        (0, "truncated"),
        (1000, "truncated"),
        (25_000_001, "header of 25000001 bytes"),
        (1 << 63, "header of"),
        ((1 << 64) - 1, "header of"),
    ],
)
def test_header_length(single, length, complaint):
    write_raw(single, entry(), bytes(8), length)
    assert complaint in refusal(single)


@pytest.mark.parametrize("size", range(0, 8))
def test_shorter_than_a_length(single, size):
    (single / "model.safetensors").write_bytes(bytes(size))
    assert ("truncated" if size else "is empty") in refusal(single)


def test_too_many_tensors(single, monkeypatch):
    empty = '{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{i}":{empty}' for i in range(100_001)) + "}"
    write_raw(single, header.encode())
    # Counted before the library sees it, which would take seconds and memory.
    monkeypatch.setattr("grokquant.sources.safetensors_directory.safe_open", None)
    assert "100001 tensors" in refusal(single)


@pytest.mark.parametrize("bloat", [b"0,", b"[],", b"{},"])
def test_a_bloated_header_is_refused_before_it_is_parsed(monkeypatch, bloat):
    header = b'{"x": [' + bloat * (24_000_000 // len(bloat)) + b"0]}"
    monkeypatch.setattr(json_objects.json, "loads", None)
    with pytest.raises(InputError, match="x: header: .*it has more than 1120000 values"):
        parse_entries(header, "x", 0)


def test_truncated_anywhere(single):
    path = single / "model.safetensors"
    for end in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, end)
        refusal(single)


def test_damaged_after_opening(single):
    source = open_source(single)
    write_raw(single, entry(), bytes(8))
    with pytest.raises(InputError, match="tensor 'a.weight' cannot be read"):
        source.tensors["a.weight"].read()
    (single / "model.safetensors").unlink()
    with pytest.raises(InputError, match="tensor 'a.weight' cannot be read"):
        source.tensors["a.weight"].read()


def test_fuzz_raises_nothing_but_input_errors(single):
    generator = random.Random(3)
    raw = (single / "model.safetensors").read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    data = raw[8 + len(header) :]
    opened = 0
    for _ in range(2000):
        mutant = bytearray(header)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(mutant))
            if generator.random() < 0.5:
                mutant[at] = generator.choice(b'0123456789[]{}",:-eE\\x F\xff\x00')
            else:
                del mutant[at : at + generator.randint(1, 5)]
        write_raw(single, bytes(mutant), data)
        with contextlib.suppress(InputError):
            for ref in open_source(single).tensors.values():
                read = ref.read()
                assert read.shape == ref.shape and read.dtype == ref.dtype
            opened += 1
    assert opened < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_all_finite_finds_a_single_bad_value(dtype):
    values = torch.zeros(3, 1000, dtype=dtype)
    assert all_finite(values) and all_finite(values[:0])
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), math.inf, -math.inf]
    for value in bad:
        spoiled = values.float()
        spoiled[2, 500] = value
        assert not all_finite(spoiled.to(dtype))
    assert all_finite(torch.ones(3, dtype=torch.uint16))
