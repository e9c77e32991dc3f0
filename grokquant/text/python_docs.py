"""The offline text: prose and docstrings that come with every Python installation.

A document is one topic of the language reference or all docstrings of one standard-library module.
Its part follows from a hash of its name alone, so that no document is in two parts and a document
keeps its part in other Python versions. A repeated paragraph is kept only the first time: topics
quote each other and modules copy docstrings.
"""

import ast
import gc
import hashlib
import os
import sysconfig
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

Part = Literal["train", "calibration", "heldout"]

# Parts in percent of documents: 80 to train the toy, 8 to calibrate, 12 held out to evaluate.
_CALIBRATION_FROM = 80
_HELDOUT_FROM = 88
# pydoc_data holds the topics again, as code.
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "pydoc_data"}
# A repeated paragraph with fewer characters is a common phrase, not a copy.
_SHORT = 40
_Holder = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_HOLDERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# The fields of statements that hold statements, in Python's order.
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


def documents(part: Part) -> list[str]:
    """The documents of `part`, in the order of their names."""
    return [text for name, text in _all_documents() if part_of(name) == part]


def part_of(name: str) -> Part:
    """The part of the document called `name`."""
    share = digest(name) % 100
    if share < _CALIBRATION_FROM:
        return "train"
    return "calibration" if share < _HELDOUT_FROM else "heldout"


def digest(name: str) -> int:
    """A hash of 32 bits; Python's own differs from process to process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


@cache
def _all_documents() -> tuple[tuple[str, str], ...]:
    seen: set[str] = set()
    found = []
    with uncollected():
        read = sorted([*_topics(), *_modules()])
    for name, text in read:
        if fresh := unseen_paragraphs(text, seen):
            found.append((name, fresh + "\n"))
    return tuple(found)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected in the block: syntax trees need none, and the many objects that
    parsing makes start collections that visit all of torch and transformers."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unseen_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`; adds its own to them."""
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
    root = standard_library()
    for path in sorted(covered_files(root)):
        yield f"module:{path.relative_to(root).as_posix()}", documentation_of(path)


def standard_library() -> Path:
    """The folder of Python's own modules."""
    return Path(sysconfig.get_path("stdlib"))


def covered_files(root: Path) -> Iterator[Path]:
    """The files that the text includes. Folders of packages, often large, are not entered."""
    for folder, folders, names in os.walk(root):
        folders[:] = (name for name in folders if name not in _SKIPPED_FOLDERS)
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        yield from (path for path in paths if is_covered(path.relative_to(root)))


def is_covered(relative: Path) -> bool:
    """Whether the text includes this file: it leaves out tests and third-party packages."""
    return not _SKIPPED_FOLDERS.intersection(relative.parts)


def docstrings_of(path: Path) -> list[str]:
    """The docstrings of a module and of all that is in it, without empty ones."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # some installations carry files for other Python versions
    nodes = _holders(tree)
    return [text.strip() for node in nodes if (text := ast.get_docstring(node)) and text.strip()]


def documentation_of(path: Path) -> str:
    """Them as the paragraphs of one text."""
    return "\n\n".join(docstrings_of(path))


def _holders(tree: ast.Module) -> Iterator[_Holder]:
    """What may have a docstring, in the order of `ast.walk`, which also visits all expressions."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        if isinstance(node, _HOLDERS):
            yield node
        for block in _BLOCKS:
            todo.extend(getattr(node, block, ()))
