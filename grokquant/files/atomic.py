"""Files that are either whole or absent, even after a power cut.

    write .NAME.HOST.PROCESS.RANDOM.tmp -> sync it -> rename it to NAME -> sync the directory

Temporary names are unique, so two writers never share one, even where locks do not work.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from grokquant.errors import InputError


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A new name beside `path`; a file left under it is removed when the block ends."""
    name = temporary_name(path)
    try:
        yield name
    finally:
        name.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{uuid4().hex}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Renames the file `temporary` to `path`, durably."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with temporary(path) as name:
        name.write_text(text, encoding="utf-8")
        commit(name, path)


def copy_file(source: Path, directory: Path, name: str) -> None:
    """Copies a file to `name`, which may lie in a folder of `directory`; temporaries lie in the
    directory itself, where a later run finds them."""
    with temporary(directory / Path(name).name) as copy:
        shutil.copyfile(source, copy)
        commit(copy, directory / name)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_record(path: Path, record: dict) -> None:
    """Writes a JSON object with its checksum."""
    write_json(path, {"sha256": _digest(record), "record": record})


def read_record(path: Path) -> dict | None:
    """The object that `write_record` wrote; None if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        record = value["record"]
        digest = value["sha256"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return record if digest == _digest(record) else None


def sync(path: Path) -> None:
    """Makes a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds(path: Path, checksum: str) -> bool:
    """Whether the file is there and has this checksum."""
    return path.is_file() and sha256(path) == checksum


def remove_abandoned(directory: Path) -> None:
    """Removes temporary files of processes that have ended, but not those of other machines."""
    for path in directory.glob(f".*.{_host()}.*.tmp"):
        process = int(path.name.split(".")[-3])
        if not _alive(process):
            path.unlink(missing_ok=True)


def _host() -> str:
    return os.uname().nodename.replace(".", "-")  # dots separate the parts of a temporary name


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists, but belongs to somebody else
    # A file with our own number is from an earlier process whose number we were given.
    return process != os.getpid()


def nearest_directory(path: Path) -> Path:
    """`path` if it exists, else the closest parent that does."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_writable(directory: Path) -> None:
    """Raises InputError if `directory` can neither be written to nor created."""
    existing = nearest_directory(directory)
    if not existing.is_dir():
        what = "it is" if existing == directory else f"{existing} is"
        raise InputError(f"{directory}: cannot be written: {what} a file, not a directory")
    if not os.access(existing, os.W_OK):
        is_fixed = os.statvfs(existing).f_flag & os.ST_RDONLY
        why = os.strerror(errno.EROFS if is_fixed else errno.EACCES)
        raise InputError(f"{directory}: cannot be written: {why}")


def _digest(record: object) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
