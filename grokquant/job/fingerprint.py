"""The identity of a run: everything that determines its bytes.

An interrupted run is resumed only by an equal run. A finished result keeps its identity in its
report, and so is recognized wherever it and its source lie: contents count, not places or times.
"""

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.files import atomic
from grokquant.files.unfinished import work_path
from grokquant.job.plan import Plan
from grokquant.recipe import Recipe
from grokquant.text.tokenizer import tokenizer_digest

# The key of the identity that holds the digest of the calibration rows.
CALIBRATION = "calibration text"
# Their versions may change roundings.
PACKAGES = ("grokquant", "numba", "torch", "transformers")
# A source up to this size is hashed whole: that takes a second or two.
_HASHED_WHOLE = 512 * 2**20
# Of each file of a larger source, the start is hashed, a sample in every stride, and the end. Of
# Grok-1's 318 GB these are 10,000 samples, which a disk reads in seconds.
_START = 64 * 2**10
_SAMPLE = 4 * 2**10
_STRIDE = 32 * 2**20
# Samples would miss a changed router or norm, so such tensors are hashed whole.
_SMALL_TENSOR = 4 * 2**20


def identity_of(plan: Plan) -> dict:
    """Recipe, config, contents of the source, tokenizer, versions of packages. JSON values only.

    The calibration rows belong to it as well, but take longer to make; see `rows_digest`.
    """
    return {
        "recipe": settings_of(plan.recipe),
        **contents_of(plan.checkpoint),
        "first file": plan.files[0].name,  # of GGUF files the name says which model it is
        "version": {package: version(package) for package in PACKAGES},
    }


def contents_of(checkpoint: Checkpoint) -> dict:
    """What a checkpoint holds: config, weights and tokenizer. JSON values only."""
    source = checkpoint.source
    total = sum(path.stat().st_size for path in source.weight_files)
    stride = None if total <= _HASHED_WHOLE else _STRIDE
    return {
        "config": without_paths(source.config),
        "source": {path.name: content(path, stride) for path in source.weight_files},
        "small tensors": None if stride is None else _digest_of_small_tensors(checkpoint),
        "tokenizer": {path.name: tokenizer_digest(path) for path in source.tokenizer_files},
    }


def settings_of(recipe: Recipe) -> dict:
    """The keys of a recipe that determine the result, without paths: what lies there counts.

    `eval` and `max_fallbacks` change no weight.
    """
    free = {"model", "eval", "max_fallbacks"}
    settings = recipe.model_dump(mode="json", exclude_none=True, exclude=free)
    del settings["output"]["path"]
    del settings["calibration"]["text"]
    return settings


def rows_digest(rows: Tensor | None) -> str | None:
    """SHA-256 of calibration tokens [rows, time], None if the run needs none."""
    return None if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def text_digest(plan: Plan) -> str | None:
    """SHA-256 of the calibration text if the run needs it and it is a single file. With an equal
    file all rows are equal, so that they need not be made to know it."""
    text = plan.recipe.calibration.text
    known = plan.needs_calibration and isinstance(text, str) and Path(text).is_file()
    return atomic.sha256(Path(str(text))) if known else None


def difference(before: dict, now: dict, words: str = "{} was {}, now {}") -> str | None:
    """The first place at which two identities differ: recipe.quantize[0].bits was 4, now 8.

    `words` are given the place and both values.
    """
    for field in now:
        if before.get(field) != now[field]:
            return words.format(*_difference(field, before.get(field), now[field]))
    return None


def _difference(name: str, before: object, now: object) -> tuple[str, object, object]:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        index = next(i for i in range(len(now)) if before[i] != now[i])
        return _difference(f"{name}[{index}]", before[index], now[index])
    return name, before, now


def content(path: Path, stride: int | None) -> str:
    """Size and SHA-256 of a file, or of a sample in every `stride` bytes of it: reading 300 GB to
    be sure would take as long as the run."""
    size = path.stat().st_size
    if stride is None:
        return f"{size} bytes of {atomic.sha256(path)}"
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for offset, length in _samples(size, stride):
            file.seek(offset)
            digest.update(file.read(length))
    return f"{size} bytes of {digest.hexdigest()}"


def _samples(size: int, stride: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is read of a file of `size` bytes.

    | start | ...      | sample | ...      | sample | ...  | end |
    0                  stride            2 stride          size
    """
    yield 0, _START
    for offset in range(stride, size, stride):
        yield offset, _SAMPLE
    yield max(size - _SAMPLE, 0), _SAMPLE


def _digest_of_small_tensors(checkpoint: Checkpoint) -> str:
    """SHA-256 of routers, norms and the like: small tensors that are not quantized."""
    matrices = {matrix.tensor for matrix in checkpoint.matrices()}
    tensors = checkpoint.source.tensors
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - matrices):
        if tensors[name].stored_bytes <= _SMALL_TENSOR:
            tensor = tensors[name].read().contiguous().flatten()
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def without_paths(value: Any) -> Any:
    """A JSON value without texts that are absolute paths, such as transformers' `_name_or_path`:
    they are private, and say where something lies, not what it is."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return None if isinstance(value, str) and Path(value).is_absolute() else value


def stamps_of(plan: Plan) -> dict[Path, str]:
    """Size and time of change of each file of the source, to tell a change during a run."""
    return {path: stamp(path) for path in plan.checkpoint.source.weight_files}


def refuse_changed_source(plan: Plan, stamps: dict[Path, str]) -> None:
    """Raises InputError if a file of the source has changed since `stamps_of` looked at it."""
    for path, known in stamps.items():
        if not path.is_file() or stamp(path) != known:
            raise InputError(
                f"{path}: has changed during the run, so the result may be a mixture; remove "
                f"{work_path(Path(plan.recipe.output.path))} and quantize again"
            )


def stamp(path: Path) -> str:
    """Size and modification time of a file that stays where it is."""
    status = path.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"
