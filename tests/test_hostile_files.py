"""Files that are not what they should be: never read without end, always named in one line."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grokquant.errors import GrokquantError, InputError
from grokquant.evaluation.report import read_report
from grokquant.files import json_objects
from grokquant.files.gguf_header import read_tensors
from grokquant.files.impostors import impostor
from grokquant.files.json_objects import parse_json_object, read_json_object
from grokquant.files.regular import open_regular
from grokquant.job.verify import verify
from grokquant.recipe import load_recipe
from grokquant.sources import open_source
from grokquant.sources.origin import front_matter
from grokquant.sources.pickles import read_headers
from grokquant.text.documents import load_documents


def open_indexed(directory: Path) -> object:
    """Opens a model whose weights are in shards, so that the index is read."""
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    return open_source(directory)


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda path: open_source(path.parent),
    "model.safetensors.index.json": lambda path: open_indexed(path.parent),
    "model.safetensors": lambda path: open_source(path.parent),
    "quantize_config.json": lambda path: open_source(path.parent),
    "tokenizer.json": lambda path: open_source(path.parent),
    "generation_config.json": lambda path: open_source(path.parent),
    "recipe.yaml": load_recipe,
    "x.gguf": read_tensors,
    "tensor00000_000": read_headers,
    "text.txt": lambda path: load_documents(str(path), "heldout"),
    "text.jsonl": lambda path: load_documents(str(path), "heldout"),
    "report.json": read_report,
    "SHA256SUMS": lambda path: verify(path.parent),
    "quantization-report.json": lambda path: verify(path.parent),
}
# Of these only the beginning is read, whatever their size.
HEADS = {"model.safetensors", "x.gguf", "tensor00000_000"}


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory of a model that each case damages in one file."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "quantization-report.json").write_text('{"units": []}')
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    return folder


def refusal(name: str, directory: Path) -> str:
    with pytest.raises(GrokquantError) as caught:
        READERS[name](directory / name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and str(directory / name) in message
    return message


@pytest.mark.parametrize("name", READERS)
def test_sparse_files_are_refused_before_they_are_read(directory, name):
    path = directory / name
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, 5 << 30)
    message = refusal(name, directory)
    assert name in HEADS or "larger than" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "LICENSE"])
def test_a_link_that_leads_nowhere_is_no_missing_file(directory, name):
    (directory / name).symlink_to("gone")
    with pytest.raises(InputError, match=f"{name}: cannot be read: No such file"):
        open_source(directory)


def make(path: Path, kind: str) -> object:
    if kind == "directory":
        return path.mkdir()
    if kind == "fifo":
        return os.mkfifo(path)
    if kind == "device":
        return path.symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    os.chdir(path.parent)  # names of sockets are short
    server.bind(path.name)
    return server


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "socket"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_named(directory, name, kind, monkeypatch):
    monkeypatch.chdir(directory)
    (directory / name).unlink(missing_ok=True)
    kept = make(directory / name, kind)
    try:
        READERS[name](directory / name)
    except GrokquantError as error:
        assert str(directory) in str(error) and "\n" not in str(error)
    else:
        # A file that need not be there, and which a directory of that name is not.
        assert name == "quantize_config.json"
    del kept


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_open_regular_says_what_it_is(tmp_path, kind):
    make(tmp_path / "x", kind)
    names = {"directory": "a directory", "fifo": "a FIFO", "device": "a device"}
    with pytest.raises(InputError, match=f"x: cannot be read: it is {names[kind]}, not a file"):
        open_regular(tmp_path / "x")


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "a: not valid JSON"),
        (b'{"a": "\\ud800"}', "a: not valid JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' occurs twice"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "nested more than 64 deep"),
        (b'{"a":' * 100_000, "nested more than 64 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": "' + b'\\"' * 500_000, "not valid JSON"),
        (b'{"' + b"k" * 100_000 + b'": 1, "' + b"k" * 100_000 + b'": 2}', "occurs twice"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_json_that_is_refused(tmp_path, raw, complaint):
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_json_object(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and complaint in message and len(message) < 500


def test_json_with_brackets_and_quotes_in_its_strings_is_read():
    content = {'"[{\\': "[" * 100, "b": ['\\"', "{" * 100, "\\"], "c": "," * 100}
    assert parse_json_object(json.dumps(content).encode(), "x") == content
    assert parse_json_object(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}


def test_json_of_many_values_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(json_objects, "MAX_VALUES", 100)
    raw = b'{"a": [' + b",".join([b"0"] * 101) + b"]}"
    monkeypatch.setattr(json_objects.json, "loads", None)
    with pytest.raises(InputError, match="more than 100 values"):
        parse_json_object(raw, "x")


def test_a_key_twice_among_many_takes_a_look_at_each():
    compared = 0

    class Key(str):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    count = 2000
    pairs: list[tuple[str, object]] = [(Key(number), 0) for number in range(count)]
    with pytest.raises(ValueError, match="'1999' occurs twice"):
        json_objects._unique([*pairs, (Key(count - 1), 0)])
    assert compared < 10 * count


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4932000000\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (LFS, "is a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"<html><body>404 Not Found</body></html>", "is a web page"),
        (b"\n<!DOCTYPE html>\n<html>", "is a web page"),
        (b"Entry not found", "holds a server's answer ('entry not found')"),
    ],
)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "x.gguf", "tensor00000_000", "report.json"]
)
def test_what_a_download_left_instead_is_named(directory, name, content, complaint):
    (directory / name).write_bytes(content)
    message = refusal(name, directory)
    assert complaint in message


@pytest.mark.parametrize("head", [b"{", b"GGUF", b"\x80\x04", b"version 2", b"<s>"])
def test_other_files_are_no_impostors(head):
    assert impostor(head) is None


def test_an_unfinished_download_is_named(directory):
    shard = "model-00001-of-00001.safetensors"
    (directory / "model.safetensors").rename(directory / f"{shard}.incomplete")
    index = {"weight_map": {"a": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"no such file; {shard}.incomplete is an unfinished"):
        open_source(directory)


def test_a_model_card_of_any_size_is_looked_at_briefly(directory):
    card = directory / "README.md"
    card.write_text("---\n" + "a: b\n" * 200_000 + "license: mit\n---\n")
    assert front_matter(card) == {}
    card.write_text("---\nlicense: mit\n---\n")
    os.truncate(card, 5 << 30)
    assert front_matter(card) == {"license": "mit"}
