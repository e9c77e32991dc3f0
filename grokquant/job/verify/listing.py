"""The files of a result: a closed list, SHA256SUMS.

SHA256SUMS      names every file but itself, the card and what `grokquant eval` adds
README.md       the model card, which `grokquant eval` changes
*.py            none, but the file of `output.remote_code` where the recipe asks for it
evaluation/     the reports of `grokquant eval`
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from grokquant.errors import InputError
from grokquant.files.regular import read_regular
from grokquant.job.seal import sums_text
from grokquant.job.shards import CARD_NAME, SUMS_NAME
from grokquant.job.verify.fault import Fault

EVALUATION = "evaluation/"
_MAX_SUMS = 16_000_000  # a line has 80 bytes, a model at most some thousand files
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
# What git and the hub's download put into a directory; nothing reads a model from there.
_OF_THE_HUB = (".gitattributes", ".cache/huggingface/")
_CODE = {".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".sh", ".ipynb"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz"}


def read_sums(directory: Path) -> tuple[dict[str, str], list[Fault]]:
    """The checksum of each file by its name in SHA256SUMS, and the faults of that file."""
    path = directory / SUMS_NAME
    if not path.exists():
        return {}, [Fault(f"{path}: is missing", SUMS_NAME)]
    try:
        text = read_regular(path, _MAX_SUMS).decode("utf-8", "replace")
    except InputError as error:
        return {}, [Fault(str(error), SUMS_NAME)]
    if not text:
        return {}, [Fault(f"{path}: is empty", SUMS_NAME)]
    sums: dict[str, str] = {}
    faults = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        found = _LINE.fullmatch(line)
        if found is None or not _is_plain(found[2]):
            faults.append(Fault(f"{path}:{number}: is not a checksum and a name", SUMS_NAME))
        elif found[2] in sums:
            faults.append(Fault(f"{path}:{number}: names {found[2]} again", SUMS_NAME))
        else:
            sums[found[2]] = found[1]
    return sums, faults or _other_form(path, text, sums)


def listing_faults(directory: Path, sums: dict[str, str], code: str | None) -> Iterator[Fault]:
    """Files that are missing from a result or are no part of it; `code` is the one file of Python
    that it may hold."""
    present = set(_names(directory))
    for name in sorted({*sums, CARD_NAME}):
        if name not in present:
            yield Fault(f"{directory / name}: is missing", name)
        elif not (directory / name).is_file():
            yield Fault(f"{directory / name}: is not a file", name)
    for name in sorted(present):
        kind = None if name == code else _forbidden(name)
        if kind:
            yield Fault(f"{directory / name}: is {kind}, which no result of grokquant holds")
        elif name not in sums and not _is_free(name):
            yield Fault(f"{directory / name}: is no part of the result")


def _other_form(path: Path, text: str, sums: dict[str, str]) -> list[Fault]:
    if text == sums_text(sums):
        return []
    return [Fault(f"{path}: is not as grokquant writes it", SUMS_NAME)]


def _is_plain(name: str) -> bool:
    """Whether a name stays in the directory; `..` is damage, and could lead out of it."""
    plain = PurePosixPath(name)
    return plain.as_posix() == name and not plain.is_absolute() and ".." not in plain.parts


def _names(directory: Path) -> Iterator[str]:
    """Everything below a directory that is no directory; links are not followed."""
    for folder, folders, files in os.walk(directory):
        links = (name for name in folders if os.path.islink(os.path.join(folder, name)))
        for name in (*files, *links):
            yield Path(folder, name).relative_to(directory).as_posix()


def _forbidden(name: str) -> str | None:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _CODE:
        return "code"
    return "a pickle" if suffix in _PICKLES else None


def _is_free(name: str) -> bool:
    """Whether SHA256SUMS need not name a file."""
    return name in (SUMS_NAME, CARD_NAME) or name.startswith((EVALUATION, *_OF_THE_HUB))
