"""Files of others: only regular ones, and never more of them than is expected.

A FIFO would wait for ever, a device never ends, and a sparse file of gigabytes is a few bytes on
disk but fills the memory of whoever reads it whole.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from grokquant.errors import InputError
from grokquant.files.missing import instead_of

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file. Raises InputError naming `path` and what it is instead."""
    try:
        file = open(path, "rb", opener=_at_once)  # noqa: SIM115  (the caller closes it)
    except IsADirectoryError:
        raise _refusal(path, stat.S_IFDIR) from None
    except FileNotFoundError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{instead_of(path)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a name with a null byte
        raise InputError(f"{str(path)!r}: cannot be read: not a name of a file") from None
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind != stat.S_IFREG:
        file.close()
        raise _refusal(path, kind)
    return file


def _at_once(name: str, flags: int) -> int:
    """Opens without waiting: a FIFO that nobody writes to would block."""
    return os.open(name, flags | os.O_NONBLOCK)


def _refusal(path: Path, kind: int) -> InputError:
    what = _KINDS.get(kind, "special")
    return InputError(f"{path}: cannot be read: it is {what}, not a file")


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of a regular file. Raises InputError where there are more than `most`."""
    with open_regular(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, most)
        raw = file.read(most + 1)
    _check_size(path, len(raw), most)
    return raw


def check_regular(path: Path, most: int) -> None:
    """Raises InputError for what is no regular file, or has more than `most` bytes."""
    with open_regular(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, most)


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise InputError(f"{path}: larger than {most} bytes, the limit for such a file")


def read_head(path: Path, most: int) -> bytes:
    """The first bytes of a regular file, at most `most`. Raises InputError."""
    with open_regular(path) as file:
        return file.read(most)
