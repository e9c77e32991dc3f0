"""Texts that every installation has: Python's documentation and code, and packages' documentation.

    python-docs     topics of the language reference, docstrings of the standard library
    python-code     the sources of the standard library
    package-docs    docstrings of numpy and scipy: prose of mathematics and statistics

A document is a topic or a module, and its part follows from its name: `heldout` is read by
evaluations alone. `calibration` is, of `python-docs`, what the toy was not trained on, of the
others all that is not held out.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from grokquant.text import python_docs
from grokquant.text.python_docs import Part, covered_files, part_of

# Both are requirements of grokquant.
_PACKAGES = ("numpy", "scipy")


def documents(text: str, part: Part) -> list[str]:
    """The documents of a part of one of TEXTS."""
    return TEXTS[text](part)


def _code(part: Part) -> list[str]:
    root = python_docs.standard_library()
    paths = (path for name, path in _modules(root, "module") if _is_of(name, part))
    return list(filter(str.strip, map(_source, paths)))


def _package_docs(part: Part) -> list[str]:
    seen: set[str] = set()
    found = []
    with python_docs.uncollected():
        for package in _PACKAGES:
            for name, path in _modules(_folder(package), package):
                if _is_of(name, part):
                    text = python_docs.documentation_of(path)
                    found.append(python_docs.unseen_paragraphs(text, seen))
    return [text + "\n" for text in found if text]


def some_documents(text: str, share: int) -> list[str]:
    """The documents of one in `share` modules, of any part: what takes that share of the time."""
    folders = [python_docs.standard_library()]
    if text == "package-docs":
        folders = [_folder(package) for package in _PACKAGES]
    paths = [path for folder in folders for path in sorted(covered_files(folder))]
    read = _source if text == "python-code" else python_docs.documentation_of
    with python_docs.uncollected():
        return list(filter(str.strip, map(read, paths[::share])))


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _modules(root: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of the modules below a folder; those of the standard library are called as in
    `python-docs`, so that the code of a module is held out with its documentation."""
    for path in sorted(covered_files(root)):
        yield f"{prefix}:{path.relative_to(root).as_posix()}", path


def _is_of(name: str, part: Part) -> bool:
    held_out = part_of(name) == "heldout"
    return held_out == (part == "heldout")


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a few are in the encodings of their time


TEXTS: dict[str, Callable[[Part], list[str]]] = {
    "python-docs": python_docs.documents,
    "python-code": _code,
    "package-docs": _package_docs,
}
