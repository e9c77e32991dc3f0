"""Work directories of unfinished runs, as those see them who look for a result."""

import os
from pathlib import Path

from grokquant.errors import InputError
from grokquant.files.missing import instead_of
from grokquant.files.published import is_repository

# In a work directory: what the run is, and the records of its committed files.
RUN = "run.json"
JOURNAL = "journal"
# Of files that people take for the results that they describe.
RECIPE_SUFFIXES = (".yaml", ".yml")


def work_path(output: Path) -> Path:
    """The directory in which a run works until `output` is complete."""
    # "." has no name; a link leads to the disk that is meant; a loop of links leads nowhere.
    output = Path(os.path.realpath(output))
    return output.with_name(output.name + ".partial")


def check_directory(path: Path) -> None:
    """Raises InputError unless `path` is a directory with something in it.

    Where it is, or will be, the result of an unfinished run, the error says how to finish it.
    """
    is_filled = path.is_dir() and any(path.iterdir())
    begun = [path] if is_filled else [path, work_path(path)]
    for work in begun:
        if (work / RUN).is_file() and (work / JOURNAL).is_dir():
            raise InputError(
                f"{path}: the run is unfinished, {work} is its work directory; the command that "
                "began it also resumes it"
            )
    if not path.exists():
        raise InputError(f"{path}: no such directory{_meant(path)}")
    if not path.is_dir():
        raise InputError(
            f"{path}: is a file, expected the directory of a checkpoint{_made_by(path)}"
        )
    if not is_filled:
        raise InputError(f"{path}: the directory is empty")


def _made_by(path: Path) -> str:
    """What to do if the file `path` is a recipe."""
    if path.suffix.lower() not in RECIPE_SUFFIXES:
        return ""
    return "; of a recipe, give the output.path that `grokquant quantize` has written"


def _meant(path: Path) -> str:
    """What may be meant by `path`, where there is nothing: a model of the Hugging Face hub, say."""
    name = str(path)
    if not is_repository(name):
        return instead_of(path)
    return f"; if it is a model of the Hugging Face hub, download it with: hf download {name}"
