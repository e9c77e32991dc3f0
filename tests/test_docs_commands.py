"""What README and the documentation show is typed as it stands, in a clone that has seen no run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_default_recipe import WIDE, saved

from grokquant.cli import main
from grokquant.recipe import parse_any_recipe

ROOT = Path(__file__).parents[1]
# In the order in which a newcomer reads them; the others show parts of what these have made.
FIRST = [ROOT / "README.md", ROOT / "docs" / "quick-start.md", ROOT / "docs" / "grok-1.md"]
PAGES = [*FIRST, *sorted(set((ROOT / "docs").glob("*.md")) - set(FIRST))]
# How commands begin that are shown but not typed here, and why.
NOT_TYPED = {
    "make": "makes an environment of its own and runs these tests; CI types it",
    ". .venv/bin/activate": "the environment of these tests is first on PATH already",
    "hf download": "318 GB",
    "vllm serve": "make test-engines does it",
    "llama-cli": "make test-readers does it",
    "torchrun": "make test-ranks does it",
}
# Lines of recipes that take long, as they are in the clone.
SMALLER = {
    "text: python-docs": "text: text.txt",
    "samples: 128": "samples: 16",
    "length: 256": "length: 64",
    "length: 2048": "length: 64",
    "max_fallbacks: 0.01": "max_fallbacks: 1",
}


MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"
BLOCK = re.compile(r"^```(sh|python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [block for page in PAGES for block in BLOCK.findall(page.read_text())]


def commands(block: str) -> list[str]:
    """The lines of a block of sh, continued ones joined, comments left out."""
    return [line for line in block.replace("\\\n", " ").splitlines() if shlex.split(line, True)]


def steps() -> list[list[str]]:
    """Arguments of all that is typed: each command line once, and each block of Python."""
    typed: dict[str, list[str]] = {}
    for language, block in BLOCKS:
        if language == "python":
            typed[block] = [sys.executable, "-c", block]
        for line in commands(block) if language == "sh" else ():
            if not line.startswith(tuple(NOT_TYPED)):
                words = shlex.split(line, True)
                typed[shlex.join(words)] = words if is_ours(words) else ["bash", "-c", line]
    return list(typed.values())


def is_ours(words: list[str]) -> bool:
    """Whether a line needs no shell, so that this process can do it without its own imports."""
    return words[0] == "grokquant" and ">" not in words


def do(step: list[str], environment: dict[str, str]) -> None:
    if step[0] == "grokquant":
        main(step[1:], standalone_mode=False)
        return
    done = subprocess.run(step, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{step[-1]}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def clone(tmp_path, text_file) -> Path:
    """What a run needs of the repository, with recipes that take less text."""
    shutil.copytree(ROOT / "recipes", tmp_path / "clone" / "recipes")
    shutil.copyfile(text_file, tmp_path / "clone" / "text.txt")
    for recipe in (tmp_path / "clone" / "recipes").iterdir():
        text = recipe.read_text()
        for line, smaller in SMALLER.items():
            text = text.replace(line, smaller)
        # `eval` reads no file that only a recipe names.
        run, named, evaluation = text.rpartition("\neval:")
        recipe.write_text(run + named + evaluation.replace("text: text.txt", "text: python-docs"))
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models") / MIXTRAL.partition("/")[2]
    return saved(place, "mixtral", **WIDE)


def test_what_is_shown_runs(clone, tiny_release, mixtral, monkeypatch):
    """`/data/grok-1` and MIXTRAL are small models; `grokquant` is this tree's."""
    monkeypatch.chdir(clone)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for step in steps():
        for name, place in (("/data/grok-1", tiny_release), (MIXTRAL, mixtral)):
            step = [part.replace(name, str(place)) for part in step]
        do(step, environment)


@pytest.mark.parametrize("start", NOT_TYPED)
def test_what_is_not_typed_is_shown_somewhere(start):
    shown = [block for language, block in BLOCKS if language == "sh"]
    lines = [line for block in shown for line in commands(block)]
    assert any(line.startswith(start) for line in lines)


def test_parts_of_recipes_that_are_shown_are_valid():
    shown = [YAML(typ="safe").load(block) for language, block in BLOCKS if language == "yaml"]
    assert len(shown) >= 2
    rest = {
        "model": {"path": "toy"},
        "quantize": [{"match": "*", "method": "copy"}],
        "output": {"path": "out"},
    }
    for part in shown:
        parse_any_recipe(rest | part)
