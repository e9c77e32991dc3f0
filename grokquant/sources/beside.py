"""What lies beside the weights of a model and belongs to it: an output gets a copy as it is."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grokquant.errors import InputError
from grokquant.files.json_objects import read_json_object
from grokquant.files.regular import check_regular

_NAMES = (
    "generation_config.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "additional_chat_templates/*.jinja")
# A file called LICENSE.py is code.
_TEXTS = {"", ".txt", ".md", ".rst", ".html", ".pdf", ".json", ".jinja"}


# Far more than any of them has, a tokenizer of 300,000 words with its 40 MB included.
_MOST_BYTES = 64_000_000


def present(files: Iterable[Path]) -> tuple[Path, ...]:
    """Those of `files` that are there.

    Raises InputError for one that is no regular file, leads nowhere or is far too large.
    """
    found = tuple(file for file in files if os.path.lexists(file))
    for file in found:
        check_regular(file, _MOST_BYTES)
    return found


def read_config(path: Path, config_path: Path | None) -> dict[str, Any]:
    """The config.json in `path`, or the one that replaces it. Raises InputError."""
    file = config_path or path / "config.json"
    try:
        return read_json_object(file)
    except InputError as error:
        if file.exists() or config_path:
            raise
        text = f"{error}; only it says what the weights are, so get it from where they came from"
        raise InputError(text) from None


def files_beside(path: Path) -> dict[str, Path]:
    """The files that an output takes over as they are, by their names relative to `path`.

    Raises InputError as `present` does.
    """
    named = [path / name for name in _NAMES]
    found = [file for pattern in _PATTERNS for file in sorted(path.glob(pattern))]
    texts = [file for file in found if file.suffix in _TEXTS and not file.is_dir()]
    return {file.relative_to(path).as_posix(): file for file in present([*named, *texts])}
