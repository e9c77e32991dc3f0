"""Large files written past the page cache (O_DIRECT).

Caching a stream of hundreds of gigabytes is useless, and making room for each page takes more time
than the disk does. A piece is written in three parts, since direct writes begin and end at
multiples of 4096:

    offset                                              offset + len(data)
    | head           | body                     | tail |
    | through cache  | direct, 16 MB at a time  | cache |
                     ^ multiples of 4096        ^
"""

import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 4096  # the block size of disks
_CHUNK = 1 << 24  # bytes of one write: large enough for full speed, small enough to copy
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has none
# Smaller pieces go through the page cache. With the sync at the end, pieces of 4 MB took three
# quarters of the time that way, pieces of 16 and 28 MB a fifth more.
LARGE = 1 << 24


class PlacedFile:
    """A new file whose bytes come in pieces, each with its offset.

    `checksum()` is its sha256 if the pieces came from the first byte to the last, else None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct: int | None = None
        self._hash = hashlib.sha256()
        self._end = 0  # of the bytes hashed so far

    def write(self, offset: int, data: memoryview) -> None:
        if offset != self._end:
            self._end = -1  # which no offset equals, so hashing is over for good
            self._place(offset, data)
            return
        self._end += len(data)
        # Both release the interpreter's lock, so hashing costs no time beside writing.
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
        # Direct writes also need memory aligned to the block size, which a mapping is.
        with mmap.mmap(-1, _CHUNK) as memory, memoryview(memory) as aligned:
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                aligned[: len(part)] = part
                with aligned[: len(part)] as chunk:
                    _write_all(self._direct, offset + start, chunk)


def forget(descriptor: int, offset: int, count: int) -> None:
    """Drops these bytes of a file from the page cache, where the system supports that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, offset: int, data: memoryview) -> None:
    while data:  # a write may accept fewer bytes than it is given
        written = os.pwrite(descriptor, data[:_CHUNK], offset)
        data = data[written:]
        offset += written
