"""Checks that an output is as planned: every unit present, on its grid, intact."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.errors import GateError, InputError
from grokquant.files.atomic import sha256
from grokquant.files.json_objects import read_json_object
from grokquant.files.links import refuse_links_out
from grokquant.grids import Scheme
from grokquant.job.plan import Plan
from grokquant.job.shards import REPORT_NAME, SUMS_NAME
from grokquant.job.verify.fault import Fault, FaultsFound
from grokquant.job.verify.listing import listing_faults, read_sums

__all__ = ["Fault", "FaultsFound", "faults", "verify", "verify_against_plan"]


def verify_against_plan(directory: Path, plan: Plan) -> None:
    """Raises GateError unless every planned unit is in `directory` on the planned grid."""
    expected = {name: unit.scheme for name, unit in plan.units.items()}
    found = next(_unit_faults(open_checkpoint(directory), expected), None)
    if found:
        raise GateError(str(found))


def verify(directory: str | Path) -> int:
    """Checks a finished output: checksums, every unit of its report, finite values.

    Returns the number of matrices checked. Raises FaultsFound, a GateError, with every fault, and
    InputError where `directory` is not an output.
    """
    found = tuple(faults(directory))
    if found:
        raise FaultsFound(found)
    return len(read_json_object(Path(directory) / REPORT_NAME)["units"])


def faults(directory: str | Path) -> Iterator[Fault]:
    """Everything that is wrong with a finished output, as it is found.

    Raises InputError where `directory` is not an output.
    """
    path = Path(directory)
    if not (path / REPORT_NAME).is_file():
        raise InputError(f"{path}: has no {REPORT_NAME}, so it is not a finished output")
    refuse_links_out(path)
    expected: dict[str, Scheme] = {}
    try:
        expected = _reported_schemes(path)
    except InputError as error:
        yield Fault(str(error), REPORT_NAME)
    sums, found = read_sums(path)
    yield from found
    yield from listing_faults(path, sums)
    yield from _checksum_faults(path, sums)
    try:
        checkpoint = open_checkpoint(path)
    except InputError as error:
        yield Fault(str(error))
        return
    yield from _unit_faults(checkpoint, expected)
    yield from _value_faults(checkpoint)


def _checksum_faults(path: Path, sums: Mapping[str, str]) -> Iterator[Fault]:
    for name, expected in sums.items():
        if (path / name).is_file() and sha256(path / name) != expected:
            yield Fault(f"{path / name}: does not match its checksum in {SUMS_NAME}", name)


def _reported_schemes(path: Path) -> dict[str, Scheme]:
    try:
        report = read_json_object(path / REPORT_NAME)
        return {row["name"]: Scheme(**row["scheme"]) for row in report["units"]}
    except InputError as error:
        text = str(error).removeprefix(f"{path / REPORT_NAME}: ").removeprefix("cannot be read: ")
        raise InputError(f"{path / REPORT_NAME}: cannot be read: {text}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / REPORT_NAME}: cannot be read: {error}") from None


def _unit_faults(checkpoint: Checkpoint, expected: Mapping[str, Scheme]) -> Iterator[Fault]:
    found = {name: ref.scheme for name, ref in checkpoint.units()}
    for name, scheme in expected.items():
        if name not in found:
            yield Fault(f"{name}: planned, but missing from the output")
        elif found[name] != scheme:
            yield Fault(f"{name}: planned as {scheme}, but stored as {found[name] or 'bf16'}")


def _value_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Reads every tensor; sources raise InputError for non-finite values."""
    for ref in checkpoint.source.tensors.values():
        try:
            ref.load()
        except InputError as error:
            yield Fault(str(error))
