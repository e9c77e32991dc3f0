"""Checks that an output is as planned: every unit present, on its grid, intact."""

import json
from collections.abc import Mapping
from pathlib import Path

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.errors import GateError, InputError
from grokquant.files.atomic import sha256
from grokquant.grids import Scheme
from grokquant.job.plan import Plan
from grokquant.job.shards import REPORT_NAME, SUMS_NAME


def verify_against_plan(directory: Path, plan: Plan) -> None:
    """Raises GateError unless every planned unit is in `directory` on the planned grid."""
    expected = {name: unit.scheme for name, unit in plan.units.items()}
    _check_units(open_checkpoint(directory), expected)


def verify(directory: str | Path) -> int:
    """Checks a finished output: checksums, every unit of its report, finite values.

    Returns the number of matrices checked. Raises GateError naming the first problem, and
    InputError where `directory` is not an output.
    """
    path = Path(directory)
    if not (path / REPORT_NAME).is_file():
        raise InputError(f"{path}: has no {REPORT_NAME}, so it is not a finished output")
    _check_sums(path)
    expected = _reported_schemes(path)
    try:
        checkpoint = open_checkpoint(path)
        _check_units(checkpoint, expected)
        _check_values(checkpoint)
    except InputError as error:
        raise GateError(str(error)) from None
    return len(expected)


def _check_sums(path: Path) -> None:
    sums = path / SUMS_NAME
    if not sums.is_file():
        raise GateError(f"{sums}: is missing")
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        # A name with a directory in it is damage, and could lead out of the output.
        if Path(name).is_absolute() or ".." in Path(name).parts or not (path / name).is_file():
            raise GateError(f"{path / name}: is missing")
        if sha256(path / name) != expected:
            raise GateError(f"{path / name}: does not match its checksum in {SUMS_NAME}")


def _reported_schemes(path: Path) -> dict[str, Scheme]:
    try:
        report = json.loads((path / REPORT_NAME).read_text(encoding="utf-8"))
        return {row["name"]: Scheme(**row["scheme"]) for row in report["units"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GateError(f"{path / REPORT_NAME}: cannot be read: {error}") from None


def _check_units(checkpoint: Checkpoint, expected: Mapping[str, Scheme]) -> None:
    found = {name: ref.scheme for name, ref in checkpoint.units()}
    for name, scheme in expected.items():
        if name not in found:
            raise GateError(f"{name}: planned, but missing from the output")
        if found[name] != scheme:
            raise GateError(f"{name}: planned as {scheme}, but stored as {found[name] or 'bf16'}")


def _check_values(checkpoint: Checkpoint) -> None:
    """Reads every tensor; sources raise InputError for non-finite values."""
    for ref in checkpoint.source.tensors.values():
        ref.load()
