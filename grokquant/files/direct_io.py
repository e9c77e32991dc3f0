"""Large files past the page cache: a stream of hundreds of gigabytes gains nothing from it, and to
make room for each page in it costs more than the disk.
"""

import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 4096  # what a disk writes at once; direct writes begin and end at multiples of it
_CHUNK = 1 << 24
_DIRECT = getattr(os, "O_DIRECT", 0)
# Less than this is left to the page cache.
LARGE = 1 << 25


class PlacedFile:
    """A new file whose bytes come in pieces, each with its offset.

    `checksum()` is its sha256 if the pieces came from the first byte to the last, else None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct: int | None = None
        self._hash, self._end = hashlib.sha256(), 0

    def write(self, offset: int, data: memoryview) -> None:
        if offset != self._end:
            self._end = -1  # nothing comes there, so this is final
            self._place(offset, data)
            return
        self._end += len(data)
        with ThreadPoolExecutor(1, "hash") as other:
            hashing = other.submit(self._hash.update, data)
            self._place(offset, data)
            hashing.result()

    def _place(self, offset: int, data: memoryview) -> None:
        head = min(-offset % _BLOCK, len(data))
        body = (len(data) - head) // _BLOCK * _BLOCK
        if body < LARGE or not self._open_direct():
            return _write_all(self._descriptor, offset, data)
        _write_all(self._descriptor, offset, data[:head])
        self._write_direct(offset + head, data[head : head + body])
        _write_all(self._descriptor, offset + head + body, data[head + body :])

    def checksum(self) -> str | None:
        return None if self._end < 0 else self._hash.hexdigest()

    def close(self) -> None:
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def _open_direct(self) -> bool:
        """Whether this file system lets us write past the page cache."""
        if self._direct is None and _DIRECT:
            try:
                self._direct = os.open(self.path, os.O_WRONLY | _DIRECT)
            except OSError:
                return False
        return self._direct is not None

    def _write_direct(self, offset: int, data: memoryview) -> None:
        assert self._direct is not None
        with mmap.mmap(-1, _CHUNK) as memory, memoryview(memory) as aligned:
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                aligned[: len(part)] = part
                with aligned[: len(part)] as chunk:
                    _write_all(self._direct, offset + start, chunk)


def forget(descriptor: int, offset: int, count: int) -> None:
    """Takes what was read out of the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data[:_CHUNK], offset)
        data, offset = data[written:], offset + written
