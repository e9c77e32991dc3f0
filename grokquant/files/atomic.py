"""Files that are whole or not there at all, even after a power cut.

A file appears under its name by rename, after its bytes are on the disk; then its directory is
synced. Temporary names are unique, so two writers never share one, whatever a lock says.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A new name beside `path`; a file still there when the block ends is removed."""
    name = temporary_name(path)
    try:
        yield name
    finally:
        name.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{uuid4().hex}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Gives the file `temporary` the name `path`, durably."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with temporary(path) as name:
        name.write_text(text, encoding="utf-8")
        commit(name, path)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_record(path: Path, record: dict) -> None:
    write_json(path, {"sha256": _digest(record), "record": record})


def read_record(path: Path) -> dict | None:
    """The record that `write_record` wrote; None if the file is missing or was changed."""
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
    return path.is_file() and sha256(path) == checksum


def remove_abandoned(directory: Path) -> None:
    """Removes temporary files whose writers are gone; those of other machines are left alone."""
    for path in directory.glob(f".*.{_host()}.*.tmp"):
        if not _alive(int(path.name.split(".")[-3])):
            path.unlink(missing_ok=True)


def _host() -> str:
    return os.uname().nodename.replace(".", "-")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # With our own number, the file is that of an earlier process that had it before us.
    return process != os.getpid()


def nearest_directory(path: Path) -> Path:
    """`path` or the closest of its parents that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _digest(record: object) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
