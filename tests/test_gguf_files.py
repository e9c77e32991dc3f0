"""GGUF files: the gguf package reads what we wrote, and we read it back as it was."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from grokquant.checkpoint import open_checkpoint
from grokquant.containers.container import Slot
from grokquant.containers.gguf_vocabulary import vocabulary
from grokquant.errors import InputError
from grokquant.files.gguf_header import GgufTensor, Short, Signed, gguf_layout, read_tensors
from grokquant.job import pipeline
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
        (lambda raw: raw[:-64], "truncated: c ends after the file"),
        (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "it counts"),
    ],
)
def test_damaged_files_are_named(written, tmp_path, damage, complaint):
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(written[0].read_bytes()))
    with pytest.raises(InputError, match=f"bad.gguf: .*{complaint}"):
        read_tensors(path)


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
    names = [f"model-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    names = names if count > 1 else ["model.gguf"]
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
