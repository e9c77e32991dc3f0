"""Checks that a result is whole and unchanged, and that all it says agrees.

    listing     the list of files is closed: SHA256SUMS
    papers      report, card and evaluation have not been changed
    replan      the plan, again, from recipe, config and the names of tensors
    agreement   grids, headers, config, index and report are those of that plan
    values      scales and other floats are finite

Each byte is read about once: a file of weights is hashed, then looked at while still in memory.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import GateError, InputError
from grokquant.files.atomic import sha256
from grokquant.files.json_objects import read_json_object
from grokquant.files.links import refuse_links_out
from grokquant.files.unfinished import check_directory
from grokquant.job import metadata
from grokquant.job.plan import Plan
from grokquant.job.seal import digest_of
from grokquant.job.shards import REPORT_NAME, SUMS_NAME, is_result
from grokquant.job.verify import agreement, papers
from grokquant.job.verify.fault import Fault, FaultsFound
from grokquant.job.verify.listing import listing_faults, read_sums
from grokquant.job.verify.replan import planned_again
from grokquant.job.verify.values import value_faults
from grokquant.recipe import load_recipe
from grokquant.sources import open_source
from grokquant.types import Source

_DIGEST = re.compile("[0-9A-Fa-f]{64}")
__all__ = ["Fault", "FaultsFound", "faults", "verify", "verify_against_plan"]


def verify_against_plan(directory: Path, plan: Plan) -> None:
    """Raises GateError unless every planned unit is in `directory` on the planned grid."""
    grids = {name: ref.scheme for name, ref in open_checkpoint(directory).units()}
    found = next(agreement.unit_faults(plan, grids), None)
    if found:
        raise GateError(str(found))


def verify(directory: str | Path, digest: str | None = None) -> int:
    """Checks a finished result: its files, their agreement, finite values, and its digest if given.

    Returns the number of quantized matrices. Raises FaultsFound, a GateError, with every fault, and
    InputError where `directory` is not a result or `digest` is none.
    """
    path = Path(directory)
    found = (*_digest_faults(path, digest), *faults(path))
    if found:
        raise FaultsFound(found)
    return len(read_json_object(path / REPORT_NAME)["units"])


def faults(directory: str | Path) -> Iterator[Fault]:
    """Everything that is wrong with a finished result, as it is found.

    Raises InputError where `directory` is not a result, or one of an earlier version.
    """
    path = Path(directory)
    if not is_result(path):
        check_directory(path)
        raise InputError(f"{path}: has no {REPORT_NAME}, so it is not a finished output")
    refuse_links_out(path)
    sums, found = read_sums(path)
    yield from found
    report, found = papers.read_report(path)
    yield from found
    plan, found = _plan_of(path, sums, report)
    code = plan.remote_code.file if plan and plan.remote_code else None
    yield from listing_faults(path, sums, code)
    yield from _content_faults(path, sums, plan)
    yield from found
    if plan:
        yield from agreement.all_faults(path, plan, report)
    yield from papers.report_and_sums_faults(path, report, sums)
    yield from papers.card_faults(path, report, sums)
    yield from papers.evaluation_faults(path)


def _digest_faults(path: Path, digest: str | None) -> Iterator[Fault]:
    if digest is None:
        return
    if not _DIGEST.fullmatch(digest):
        text = f"expected the 64 hexadecimal digits of a digest, not {digest[:80]!r}"
        raise InputError(text, "digest")
    sums = path / SUMS_NAME
    if sums.is_file() and (found := digest_of(path)) != digest.lower():
        yield Fault(f"{sums}: has the digest {found}, not {digest.lower()}")


def _plan_of(
    path: Path, sums: Mapping[str, str], report: Mapping
) -> tuple[Plan | None, list[Fault]]:
    """The plan of a result; None where recipe, config and headers make none, and the fault."""
    try:
        recipe = load_recipe(path / metadata.RECIPE_NAME)
        return planned_again(recipe, open_checkpoint(path), report), []
    except InputError as error:
        text = str(error)
        file = next((name for name in sums if text.startswith(f"{path / name}:")), None)
        if file and not (path / file).is_file():
            return None, []  # named as missing already
        return None, [Fault(text, file)]


def _content_faults(path: Path, sums: Mapping[str, str], plan: Plan | None) -> Iterator[Fault]:
    """Reads every file once: its checksum, and the values of its tensors right afterwards, while
    the system still has the file in memory."""
    stored = _stored(path)
    weights = {file.name for file in stored.weight_files} if stored else set()
    for name, expected in sums.items():
        if not (path / name).is_file():
            continue  # named as missing already
        if sha256(path / name) != expected:
            yield Fault(f"{path / name}: does not match its checksum in {SUMS_NAME}", name)
        if stored and name in weights:
            yield from value_faults(stored, path / name, plan)


def _stored(path: Path) -> Source | None:
    """The tensors as they are stored; None where headers are damaged, which `_plan_of` names."""
    try:
        return open_source(path)
    except InputError:
        return None
