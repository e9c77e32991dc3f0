"""Every damaged input ends in one line that names file and place; nothing is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import damaged_files
import pytest
from click.testing import CliRunner
from damaged_files import (
    ANYTHING,
    CONFIGS,
    GGUF,
    INDEXES,
    SAFETENSORS,
    TOKENIZER,
    TOKENIZERS,
    Case,
    write_llama,
)
from malicious_pickles import MALICIOUS
from test_bad_input import PROGRESS
from test_recipe import GOOD, MISTAKES
from test_sources_pickles import NOT_TENSOR_FILES

from grokquant.cli import main

MOST_MEMORY = 64 << 20  # above rest

# Each kind of file: the model around it, the name of the file, and what is done to it.
KINDS: dict[str, tuple[str, str, dict[str, Case]]] = {
    "safetensors": ("safetensors", "model.safetensors", SAFETENSORS | ANYTHING),
    "gguf": ("gguf", "x.gguf", GGUF | ANYTHING),
    "index": ("index", damaged_files.INDEX, INDEXES | ANYTHING),
    "config": ("safetensors", "config.json", CONFIGS | ANYTHING),
}
CASES = [(kind, name) for kind, (_, _, cases) in KINDS.items() for name in cases]


class Memory:
    """How much more memory than at rest this process took, at its peak, within a block."""

    status = Path("/proc/self/status")

    def __enter__(self) -> "Memory":
        self.known = os.access("/proc/self/clear_refs", os.W_OK)
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
            self.rest = self.value("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.grown = self.value("VmHWM") - self.rest if self.known else 0

    def value(self, name: str) -> int:
        line = next(line for line in self.status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10


def listing(root: Path) -> list[tuple]:
    return sorted(
        (str(path), path.lstat().st_mode, path.lstat().st_size) for path in root.rglob("*")
    )


def bytes_read() -> int:
    """What this process has read from files so far."""
    first = Path("/proc/self/io").read_text().splitlines()[0]
    return int(first.removeprefix("rchar: "))


def refusal(root: Path, *arguments: object) -> str:
    """The line with which a command refuses what lies in `root`, having done nothing."""
    before = listing(root)
    size = sum(min(size, 1 << 20) for _, _, size in before)
    read = bytes_read()
    with Memory() as memory:
        result = CliRunner().invoke(main, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = [line for line in result.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert len(lines) == 1 and result.stderr.endswith(f"{lines[0]}\n"), result.stderr
    line = lines[0]
    assert line.startswith("grokquant: ") and line.isprintable() and len(line) < 3000
    assert listing(root) == before
    assert memory.grown < MOST_MEMORY
    assert bytes_read() - read < 8 * size + (1 << 22)
    return line


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory) -> None:
    """The good models, so that no case pays for imports."""
    root = tmp_path_factory.mktemp("good")
    for kind in ("safetensors", "gguf", "index"):
        write_llama(root / kind, kind)
        result = CliRunner().invoke(main, ["inspect", str(root / kind)])
        assert (result.exit_code, result.stderr) == (0, ""), result.output


def test_there_are_many():
    assert len(SAFETENSORS) >= 40 and len(GGUF) >= 25 and len(NOT_TENSOR_FILES) >= 140
    assert len(INDEXES | CONFIGS | TOKENIZERS) >= 20 and len(MISTAKES) >= 40


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_damaged_file_is_named(tmp_path, kind, name):
    model, file, cases = KINDS[kind]
    act, words = cases[name]
    write_llama(tmp_path / "m", model)
    act(tmp_path / "m" / file)
    line = refusal(tmp_path, "inspect", tmp_path / "m")
    assert words in line and f"{tmp_path}/m" in line


@pytest.fixture(scope="module")
def release(tmp_path_factory, smallest_release) -> Path:
    """A release one file of which each case replaces."""
    root = tmp_path_factory.mktemp("release")
    shutil.copytree(smallest_release, root / "m")
    return root


PICKLES = NOT_TENSOR_FILES | MALICIOUS


@pytest.mark.parametrize("name", PICKLES)
def test_a_damaged_pickle_is_named(release, monkeypatch, name):
    monkeypatch.chdir(release)  # where a pickle that runs would leave its mark
    path = release / "m" / "ckpt-0" / "tensor00003_000"
    path.write_bytes(PICKLES[name])
    line = refusal(release, "inspect", release / "m")
    assert f"{path}: " in line


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES)
def test_a_mistake_in_a_recipe_is_named(tmp_path, old, new, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace(old, new))
    assert f"grokquant: {path}:{expected}" in refusal(tmp_path, "plan", path)


@pytest.mark.parametrize("name", [*TOKENIZERS, *sorted(ANYTHING)])
def test_a_damaged_tokenizer_is_named(tmp_path, name):
    act, words = TOKENIZERS.get(name) or ANYTHING[name]
    write_llama(tmp_path / "m", "safetensors")
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZER))
    act(path)
    recipe = tmp_path / "recipe.yaml"
    values = {
        "model": {"path": str(tmp_path / "m")},
        "quantize": [{"match": "*", "method": "rtn", "bits": 8, "group": 32}],
        "output": {"path": str(tmp_path / "out")},
    }
    recipe.write_text(json.dumps(values))
    line = refusal(tmp_path, "quantize", recipe)
    assert words in line and f"{tmp_path}/m" in line


@pytest.mark.parametrize(
    ("kind", "name"), [("safetensors", "half of the data"), ("config", "a FIFO")]
)
def test_the_same_in_a_process_of_its_own(tmp_path, kind, name):
    model, file, cases = KINDS[kind]
    act, words = cases[name]
    write_llama(tmp_path / "m", model)
    act(tmp_path / "m" / file)
    before = listing(tmp_path)
    command = [sys.executable, "-m", "grokquant", "inspect", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert listing(tmp_path) == before
