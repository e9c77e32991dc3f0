"""Pieces at any place, past the page cache or through it, make the same file."""

import errno
import hashlib
import os
from itertools import pairwise
from pathlib import Path

import pytest

from grokquant.files import direct_io
from grokquant.files.direct_io import PlacedFile

DATA = bytes(range(256)) * 1024  # 256 KB


@pytest.fixture(params=["direct", "no direct"])
def way(request, monkeypatch):
    monkeypatch.setattr(direct_io, "LARGE", 8192)
    monkeypatch.setattr(direct_io, "_CHUNK", 16384)
    if request.param == "no direct":
        really = os.open

        def refuse(path, flags, *mode):
            if flags & direct_io._DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return really(path, flags, *mode)

        monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("cuts", [[], [1], [100, 5000], [4096, 8192], [3, 70000, 70001, 200000]])
@pytest.mark.parametrize("backwards", [False, True])
def test_pieces_make_the_whole(tmp_path: Path, way, cuts, backwards):
    edges = [0, *cuts, len(DATA)]
    pieces = list(pairwise(edges))
    file = PlacedFile(tmp_path / "file")
    for start, stop in reversed(pieces) if backwards else pieces:
        file.write(start, memoryview(DATA)[start:stop])
    file.close()
    assert (tmp_path / "file").read_bytes() == DATA
    known = hashlib.sha256(DATA).hexdigest() if not backwards or not cuts else None
    assert file.checksum() == known


def test_an_existing_file_is_not_touched(tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        PlacedFile(tmp_path / "file")
