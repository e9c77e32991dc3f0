"""The fingerprint of a run: everything that determines its bytes, and must not change before it is
resumed."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from grokquant.errors import InputError
from grokquant.files import atomic
from grokquant.job.plan import Plan

# Keys of a recipe that change no weight, so that a run may be resumed with other values.
_FREE = {"max_fallbacks", "eval"}
# Their versions may change roundings.
_PACKAGES = ("grokquant", "numba", "torch", "transformers")


def identity_of(plan: Plan, rows: Tensor | None) -> dict:
    """Recipe, config and files of the source (size and modification time), tokenizer, calibration
    rows, versions of packages.

    `rows` are the calibration tokens [rows, time], or None if the run needs none. JSON values only.
    """
    source = plan.checkpoint.source
    recipe = plan.recipe.model_dump(mode="json", exclude_none=True, exclude=_FREE)
    calibration = None if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return {
        "recipe": recipe,
        "config": source.config,
        "source": {path.name: stamp(path) for path in source.weight_files},
        "tokenizer": {path.name: atomic.sha256(path) for path in source.tokenizer_files},
        "calibration text": calibration,
        "version": {package: version(package) for package in _PACKAGES},
    }


def refuse_changed_source(plan: Plan, identity: dict) -> None:
    """Raises InputError if a file of the source has changed since `identity_of` looked at it."""
    source = plan.checkpoint.source
    known = identity["source"]
    for path in source.weight_files:
        if not path.is_file() or stamp(path) != known[path.name]:
            raise InputError(
                f"{path}: has changed during the run, so the result may be a mixture; remove "
                f"{plan.recipe.output.path}.partial and quantize again"
            )


def stamp(path: Path) -> str:
    """Size and modification time; hashing 300 GB would take as long as the run."""
    status = path.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"
