"""`verify` finds whatever is changed in a result, and names it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import seal

from grokquant.job import pipeline
from grokquant.job.verify import FaultsFound, faults, verify
from grokquant.recipe import parse_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory, smallest_release) -> Path:
    """A small result; to be copied, not touched."""
    rule = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
    output = {"path": str(tmp_path_factory.mktemp("made") / "out"), "shard": "20KB"}
    values = {"model": {"path": str(smallest_release)}, "quantize": [rule], "output": output}
    return pipeline.quantize(parse_recipe(values))


@pytest.fixture
def result(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "result"))


def found(directory: Path) -> dict[str, str | None]:
    """The text of each fault, with the file that it names as one to be made again."""
    return {fault.text: fault.file for fault in faults(directory)}


SHARD = "model-00003-of-00012.safetensors"


def cut_lines(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


# How to change a result, and parts of what is said about it.
LISTING: dict[str, tuple[Callable[[Path], object], str]] = {
    "emptied sums": (lambda r: (r / "SHA256SUMS").write_text(""), "SHA256SUMS: is empty"),
    "shortened sums": (lambda r: cut_lines(r / "SHA256SUMS"), "recipe.yaml: is no part of"),
    "a missing file": (lambda r: (r / SHARD).unlink(), f"{SHARD}: is missing"),
    "a missing card": (lambda r: (r / "README.md").unlink(), "README.md: is missing"),
    "a note": (lambda r: (r / "note.txt").write_text("x"), "note.txt: is no part of the result"),
    "a hidden note": (lambda r: (r / ".x").write_text("x"), ".x: is no part of the result"),
    "code": (lambda r: (r / "modeling.py").write_text("x"), "modeling.py: is code"),
    "a pickle": (lambda r: (r / "x.PKL").write_text("x"), "x.PKL: is a pickle"),
    "a FIFO": (lambda r: os.mkfifo(r / "fifo"), "fifo: is no part of the result"),
    "a doubled line": (
        lambda r: (r / "SHA256SUMS").write_text((r / "SHA256SUMS").read_text() * 2),
        "names config.json again",
    ),
    "a line of another form": (
        lambda r: (r / "SHA256SUMS").write_text((r / "SHA256SUMS").read_text() + "# x\n"),
        "is not a checksum and a name",
    ),
    "lines in another order": (
        lambda r: (r / "SHA256SUMS").write_text(
            "".join(reversed((r / "SHA256SUMS").read_text().splitlines(keepends=True)))
        ),
        "SHA256SUMS: is not as grokquant writes it",
    ),
    "a name that leads out": (
        lambda r: (r / "SHA256SUMS").write_text(
            (r / "SHA256SUMS").read_text().replace("  config", "  ../config")
        ),
        "SHA256SUMS:1: is not a checksum and a name",
    ),
}


@pytest.mark.parametrize("change", LISTING)
def test_the_list_of_files_is_closed(result, change):
    act, complaint = LISTING[change]
    act(result)
    assert any(complaint in text for text in found(result)), found(result)


def test_code_is_named_even_where_the_sums_know_it(result):
    (result / "modeling.py").write_text("x")
    seal(result)
    assert f"{result / 'modeling.py'}: is code, which no result of grokquant holds" in found(result)


def test_every_fault_is_named_with_the_file_to_make_again(result):
    flipped = bytearray((result / SHARD).read_bytes())
    flipped[len(flipped) // 2] ^= 1  # of a code
    (result / SHARD).write_bytes(flipped)
    (result / "note.txt").write_text("x")
    (result / "tokenizer.model").unlink()
    texts = found(result)
    assert texts.pop(f"{result / SHARD}: does not match its checksum in SHA256SUMS") == SHARD
    assert texts.pop(f"{result / 'note.txt'}: is no part of the result") is None
    assert texts.pop(f"{result / 'tokenizer.model'}: is missing") == "tokenizer.model"
    with pytest.raises(FaultsFound, match="tokenizer.model: is missing; 2 more faults"):
        verify(result)
