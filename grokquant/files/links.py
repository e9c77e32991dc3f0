"""Links in the directory of a model, which may come from anybody.

    models--xai-org--grok-1/
        blobs/5c69d7cb..                            what was downloaded
        snapshots/7de1a6a/tokenizer.model -> ../../blobs/5c69d7cb..       fine
                          chat_template.jinja -> /home/me/.ssh/id_ed25519   refused

What a model's directory holds is copied into results and published. A link out of it would take a
private file along.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from grokquant.errors import InputError


def refuse_links_out(directory: Path) -> None:
    """Raises InputError if a link in `directory`, or one folder below, leads out of it."""
    for path in _links(directory):
        refuse_link_out(path, directory)


def refuse_link_out(path: Path, directory: Path) -> None:
    """Raises InputError if `path` leads out of `directory` and the blobs of its download cache."""
    target = Path(os.path.realpath(path))
    if any(target.is_relative_to(place) for place in _places(directory)):
        return
    raise InputError(
        f"{path}: is a link that leads out of the model's directory, to {target}, and could "
        "publish a private file; remove it, or put a copy there if it belongs to the model"
    )


def refuse_no_place(path: Path) -> None:
    """Raises InputError where a new directory can never be at `path`: the root, a loop of links, or
    `x/../y` without a directory x, which the system looks up first."""
    try:
        meant = path.resolve()
    except RuntimeError:  # where Python 3.13 lets creating the directory fail
        raise InputError(f"{path}: is a loop of links; choose another directory") from None
    if not meant.name:
        raise InputError(f"{path}: is the root of all files; choose a new directory")
    passed = [parent for parent in (path, *path.parents) if parent.name == ".."]
    missing = [up.parent for up in passed if not up.is_dir()]
    if missing:
        raise InputError(f"{path}: {missing[-1]} is no directory; write {meant} if you mean that")


def _places(directory: Path) -> Iterator[Path]:
    root = Path(os.path.realpath(directory))
    yield root
    for parent in root.parents:
        if parent.name == "snapshots":  # of a hub cache
            yield parent.parent / "blobs"


def _links(directory: Path) -> Iterator[Path]:
    """The links in a directory and in its folders; what they hold below is never read."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_symlink():
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            with os.scandir(entry) as inner:
                names = sorted(item.path for item in inner if item.is_symlink())
            yield from map(Path, names)
