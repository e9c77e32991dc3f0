"""States of a reference on disk, for the next quantized model that is compared with it.

    DIR/KEY/entry.json               what the states depend on; KEY is its SHA-256
    DIR/KEY/layer-00000.safetensors  states after the layer, and what happened inside it
    DIR/KEY/layer-00000.json         checksum of that file

A damaged or foreign file is computed again, with a note. The least recently used entries go when
the directory would outgrow its budget.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.files import atomic
from grokquant.humanize import size
from grokquant.job.fingerprint import stamp
from grokquant.streaming.blocks import Rows

# Packages whose arithmetic the states depend on.
_PACKAGES = ("grokquant", "torch", "transformers")
_NAME = "entry.json"
# Room for the header of a safetensors file and its record, in bytes: far more than they take.
_OVERHEAD = 100_000


def key_of(
    reference: Checkpoint,
    batches: Iterable[Rows],
    windows: int,
    device: torch.device,
    products: torch.dtype,
) -> dict:
    """All that the states depend on: files of the checkpoint (path, size and time of change),
    tokens, kind of device, dtype of products, versions of packages. JSON values only."""
    digest = hashlib.sha256()
    for rows in batches:
        for tensor in (rows.tokens, rows.branches, rows.positions):
            given = torch.empty(0, dtype=torch.long) if tensor is None else tensor.contiguous()
            digest.update(f"{list(given.shape)}".encode())
            digest.update(given.numpy().tobytes())
    source = reference.source
    return {
        "config": source.config,
        "files": {str(path.resolve()): stamp(path) for path in source.weight_files},
        "tokens": digest.hexdigest(),
        "windows": windows,
        "device": device.type,
        "products": str(products),
        "version": {package: version(package) for package in _PACKAGES},
    }


class Cache:
    """A directory of at most `budget` bytes; `note` is called with a line about each problem.

    Raises InputError where the directory cannot be made.
    """

    def __init__(self, directory: Path, budget: int, note: Callable[[str], None]) -> None:
        self.directory = directory
        self.budget = budget
        self.note = note
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{directory}: cannot be written: {error.strerror}") from None

    def entry(self, key: dict) -> "Entry":
        """The entry of `key`, which now is the most recently used one."""
        return Entry(self, key)

    def make_room(self, needed: int, keep: Path) -> bool:
        """Removes old entries but `keep` until `needed` bytes fit. Returns whether they do."""
        others = [path for path in self.directory.iterdir() if _is_entry(path) and path != keep]
        others.sort(key=lambda path: (path / _NAME).stat().st_mtime_ns, reverse=True)
        held = {path: _bytes_of(path) for path in (*others, keep)}
        while sum(held.values()) + needed > self.budget and others:
            oldest = others.pop()
            shutil.rmtree(oldest, ignore_errors=True)
            del held[oldest]
        return sum(held.values()) + needed <= self.budget


class Entry:
    """The layers of one reference on one text."""

    def __init__(self, cache: Cache, key: dict) -> None:
        self.cache = cache
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.path = cache.directory / self.key
        self.writable = True
        try:
            self.path.mkdir(exist_ok=True)
            atomic.remove_abandoned(self.path)
            if atomic.read_record(self.path / _NAME) != key:
                atomic.write_record(self.path / _NAME, key)
            os.utime(self.path / _NAME)
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def read(self, layer: int) -> dict[str, Tensor] | None:
        """The tensors written for a layer; None if there are none, or they are damaged."""
        path = self._file(layer)
        if not path.is_file():
            return None
        record = atomic.read_record(path.with_suffix(".json"))
        try:
            ours = record and (record.get("entry"), record.get("layer")) == (self.key, layer)
            if record and ours and atomic.holds(path, str(record.get("sha256"))):
                return load_file(path)
        except (OSError, SafetensorError):
            pass
        self.cache.note(f"{path}: is damaged or not ours, its layer is computed again")
        return None

    def write(self, layer: int, tensors: dict[str, Tensor], layers: int) -> None:
        """Writes the tensors of a layer, unless all `layers` of this size would not fit."""
        if not self.writable:
            return
        needed = sum(tensor.nbytes for tensor in tensors.values()) + _OVERHEAD
        if needed * layers > self.cache.budget:
            limit = size(self.cache.budget)
            self._give_up(
                f"{layers} layers take about {size(needed * layers)}, allowed are {limit}"
            )
            return
        path = self._file(layer)
        try:
            path.unlink(missing_ok=True)
            if not self.cache.make_room(needed, self.path):
                self._give_up(f"there is no room left in {size(self.cache.budget)}")
                return
            with atomic.temporary(path) as name:
                save_file({k: t.contiguous() for k, t in tensors.items()}, name)
                checksum = atomic.sha256(name)
                atomic.commit(name, path)
            record = {"entry": self.key, "layer": layer, "sha256": checksum}
            atomic.write_record(path.with_suffix(".json"), record)
        except (OSError, SafetensorError) as error:
            self._give_up(str(error))

    def _file(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"

    def _give_up(self, reason: str) -> None:
        self.writable = False
        self.cache.note(f"{self.cache.directory}: nothing more is cached: {reason}")


def _is_entry(path: Path) -> bool:
    """Whether a directory was made by this cache; nothing else is ever removed."""
    return len(path.name) == 64 and not path.is_symlink() and (path / _NAME).is_file()


def _bytes_of(directory: Path) -> int:
    try:
        return sum(path.stat().st_size for path in directory.iterdir())
    except OSError:  # another process has just removed it
        return 0
