"""Checks that an output is as planned: every unit present, on its grid, intact."""

from collections.abc import Mapping
from pathlib import Path

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.errors import GateError, InputError
from grokquant.files.atomic import sha256
from grokquant.files.json_objects import read_json_object
from grokquant.files.links import refuse_links_out
from grokquant.files.regular import read_regular
from grokquant.grids import Scheme
from grokquant.job.plan import Plan
from grokquant.job.shards import REPORT_NAME, SUMS_NAME

_MAX_SUMS = 16_000_000  # a line has 80 bytes, a model at most some thousand files


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
    refuse_links_out(path)
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
    raw = read_regular(sums, _MAX_SUMS)
    for line in raw.decode("utf-8", "replace").splitlines():
        expected, _, name = line.partition("  ")
        # A name with a directory in it is damage, and could lead out of the output.
        if Path(name).is_absolute() or ".." in Path(name).parts or not (path / name).is_file():
            raise GateError(f"{path / name}: is missing")
        if sha256(path / name) != expected:
            raise GateError(f"{path / name}: does not match its checksum in {SUMS_NAME}")


def _reported_schemes(path: Path) -> dict[str, Scheme]:
    try:
        report = read_json_object(path / REPORT_NAME)
        return {row["name"]: Scheme(**row["scheme"]) for row in report["units"]}
    except InputError as error:
        text = str(error).removeprefix(f"{path / REPORT_NAME}: ").removeprefix("cannot be read: ")
        raise GateError(f"{path / REPORT_NAME}: cannot be read: {text}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
