"""The offline text: prose and docstrings that every Python installation carries.

A document is one topic of the language reference or all docstrings of one standard-library module.
A document's part follows from a hash of its name alone, so no document is ever in two parts and
parts stay put between Python versions. A paragraph that occurs twice is kept only the first time:
topics quote each other and modules copy docstrings.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

Part = Literal["train", "calibration", "heldout"]

# Shares of documents in percent: train, calibration, held-out.
_CALIBRATION_FROM, _HELDOUT_FROM = 80, 88
# pydoc_data holds the topics once more, as code.
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "pydoc_data"}
# Characters below which a repeated paragraph is a common phrase, not a copy.
_SHORT = 40


def documents(part: Part) -> list[str]:
    """The texts of `part`, in the order of their names."""
    return [text for name, text in _all_documents() if part_of(name) == part]


def part_of(name: str) -> Part:
    """The part that the document called `name` belongs to."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    if share < _CALIBRATION_FROM:
        return "train"
    return "calibration" if share < _HELDOUT_FROM else "heldout"


@cache
def _all_documents() -> tuple[tuple[str, str], ...]:
    seen: set[str] = set()
    found = []
    for name, text in sorted([*_topics(), *_modules()]):
        if fresh := _unseen_paragraphs(text, seen):
            found.append((name, fresh + "\n"))
    return tuple(found)


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs that are in `seen`, to which it adds its own."""
    fresh = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < _SHORT or words not in seen:
            fresh.append(paragraph)
        seen.add(words)
    return "\n\n".join(fresh).strip("\n")


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topic:{name}", text.strip()


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if is_covered(relative):
            yield f"module:{relative.as_posix()}", "\n\n".join(_docstrings(path))


def is_covered(relative: Path) -> bool:
    """Whether a standard-library file counts: tests and third-party packages do not."""
    return not _SKIPPED_FOLDERS.intersection(relative.parts)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, holders))
    return [text.strip() for node in nodes if (text := ast.get_docstring(node)) and text.strip()]
