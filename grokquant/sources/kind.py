"""What a kind of source is: how to recognize its directories and how to open them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grokquant.types import Source


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """One form in which checkpoints lie on disk.

    `looks_for` names the files that make a directory one of this kind, for people. `recognizes`
    tells from a directory alone. `open_source(path, config_path)` opens it without reading weights;
    `config_path` replaces its config.json. It raises InputError for a broken checkpoint.
    """

    name: str
    looks_for: str
    recognizes: Callable[[Path], bool]
    open_source: Callable[[Path, Path | None], Source]
