"""The output directory: shards, index, config and papers, published whole or not at all.

Everything is written to `OUT.partial` beside the output; the finished directory takes the final
name by rename. So a directory under the final name is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from grokquant.errors import GrokquantError, InputError
from grokquant.plan import Plan

CARD_NAME = "README.md"
REPORT_NAME = "quantization-report.json"
INDEX_NAME = "model.safetensors.index.json"
SUMS_NAME = "SHA256SUMS"
# Stands in a directory as long as a run is writing it.
_MARK = ".grokquant-unfinished"


@contextmanager
def staged(output: Path, source: Path) -> Iterator[Path]:
    """A fresh directory that becomes `output` when the block ends, and vanishes if it fails.

    An earlier result of ours is replaced only then. Raises InputError if `output` holds anything
    else, or the checkpoint `source` that is being read.
    """
    _refuse_foreign(output, source)
    output = output.absolute()  # "." has no name that could be extended
    partial = output.with_name(output.name + ".partial")
    _clear_partial(partial)
    try:
        partial.mkdir(parents=True)
        (partial / _MARK).touch()
        yield partial
        (partial / _MARK).unlink()
        _publish(partial, output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{output}: cannot be written: {_plain(error)}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _clear_partial(partial: Path) -> None:
    """Removes what a killed run left behind. Raises InputError if it is not such a thing."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise InputError(f"{partial}: is in the way; move it or choose another output")
    ours = any((partial / name).is_file() for name in (_MARK, REPORT_NAME))
    if partial.exists() and any(partial.iterdir()) and not ours:
        raise InputError(f"{partial}: is not empty and not a result of grokquant; move it")
    shutil.rmtree(partial, ignore_errors=True)


def _refuse_foreign(output: Path, source: Path) -> None:
    if source.resolve().is_relative_to(output.resolve()):
        raise InputError(f"{output}: holds the model itself; choose another")
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"{output}: is a file, the output needs a directory")
    if any(output.iterdir()) and not (output / REPORT_NAME).is_file():
        raise InputError(f"{output}: is not empty and not a result of grokquant; choose another")


def check_writable(directory: Path) -> None:
    """Raises InputError where `directory` can neither be written to nor made."""
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError(f"{directory}: cannot be written")


class ShardWriter:
    """Takes tensors in any order and writes each shard once its last tensor has come."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory, self.plan = directory, plan
        self.shard_of = {t.name: i for i, shard in enumerate(plan.shards) for t in shard}
        self.planned = {t.name: t for shard in plan.shards for t in shard}
        self.waiting: list[dict[str, Tensor]] = [{} for _ in plan.shards]

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            planned = self.planned[name]
            if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
                raise GrokquantError(f"{name}: not what was planned; this is a bug")
            index = self.shard_of[name]
            self.waiting[index][name] = tensor
            if len(self.waiting[index]) == len(self.plan.shards[index]):
                self._write(index)

    def finish(self) -> None:
        """Writes the index. Raises GrokquantError if a planned tensor never came."""
        for index, tensors in enumerate(self.waiting):
            if tensors:
                missing = {t.name for t in self.plan.shards[index]} - set(tensors)
                raise GrokquantError(f"{min(missing)}: planned but never written; this is a bug")
        weight_map = {n: self.plan.shard_name(i) for n, i in sorted(self.shard_of.items())}
        metadata = {"total_size": self.plan.output_bytes}
        write_json(self.directory / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})

    def _write(self, index: int) -> None:
        path = self.directory / self.plan.shard_name(index)
        tensors = {name: tensor.contiguous() for name, tensor in self.waiting[index].items()}
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files private
        sync(path)
        self.waiting[index] = {}


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` under a temporary name, syncs it and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sums(directory: Path) -> None:
    """SHA256SUMS of everything but the card, which people edit. `sha256sum -c` reads it."""
    free = {SUMS_NAME, CARD_NAME, _MARK}
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name not in free)
    write_text(directory / SUMS_NAME, "".join(f"{sha256(p)}  {p.name}\n" for p in files))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Makes a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, output: Path) -> None:
    """Renames `partial` to `output`. An earlier result steps aside, and back if that fails."""
    sync(partial)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as aside:
        old = Path(aside, output.name)
        try:
            if output.exists():
                output.replace(old)
            partial.replace(output)
        except BaseException:
            if old.exists():
                old.replace(output)
            raise
    sync(output.parent)


def _plain(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
