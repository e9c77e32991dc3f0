"""Repairs a finished result: only the files that `verify` rejects are made again.

    OUT.partial/files   hard links to the intact weight files of OUT, with the records of an
                        interrupted run; the run makes what is missing
    OUT                 takes over what it lacked, file by file, once all of it is whole

A repair that was killed is continued by the next one: files that OUT took over are intact then, and
those that were made have a record.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grokquant.errors import GateError, InputError
from grokquant.files import atomic
from grokquant.files.json_objects import read_json_object
from grokquant.files.unfinished import check_directory, work_path
from grokquant.grids import Scheme
from grokquant.job.plan import Plan
from grokquant.job.shards import CARD_NAME, REPORT_NAME, SUMS_NAME, is_result
from grokquant.job.verify import Fault, FaultsFound, faults
from grokquant.job.verify.listing import read_sums, sums_text
from grokquant.job.workdir import WorkDirectory
from grokquant.types import UnitReport

# The order in which a result takes over files: weights and config first.
_LAST = (REPORT_NAME, SUMS_NAME, CARD_NAME)


@dataclass(frozen=True)
class Damage:
    """What is wrong with a result: `faults`, and `rejected`, the files to be made again.

    `sums` are the checksums in SHA256SUMS and `report` is the quantization report; each is empty if
    it is itself rejected.
    """

    faults: tuple[Fault, ...]
    rejected: frozenset[str]
    sums: dict[str, str]
    report: dict


def damage_of(output: Path) -> Damage:
    """Reads all of a result, as `verify` does.

    Raises InputError if `output` is not a result, or if nothing in it tells what it was.
    """
    if not output.exists() and not work_path(output).exists():
        raise InputError(f"{output}: no such directory to repair; choose another output.path")
    has_report = is_result(output)
    if not has_report and not (output / SUMS_NAME).is_file():
        check_directory(output)
        raise InputError(f"{output}: is not a result of grokquant, so it cannot be repaired")
    sums, _ = read_sums(output)
    found = tuple(faults(output) if has_report else _faults_without_report(output))
    rejected = frozenset(fault.file for fault in found if fault.file)
    if rejected >= {REPORT_NAME, SUMS_NAME}:
        raise InputError(
            f"{output}: cannot be repaired, since neither {REPORT_NAME} nor {SUMS_NAME} is intact; "
            "overwrite=True replaces the whole result"
        )
    report = {} if REPORT_NAME in rejected else read_json_object(output / REPORT_NAME)
    return Damage(found, rejected, {} if SUMS_NAME in rejected else sums, report)


def _faults_without_report(output: Path) -> Iterator[Fault]:
    sums, found = read_sums(output)
    yield from found
    for name in {*sums, REPORT_NAME}:
        if not atomic.holds(output / name, sums.get(name, "")):
            yield Fault(f"{output / name}: is missing or damaged", name)


def adopt(work: WorkDirectory, plan: Plan, output: Path, damage: Damage) -> None:
    """Gives a work directory the intact weight files of a result, with records of their units.

    Without the report nothing is known of the units, so that all files must be made again.
    """
    if not damage.report:
        return
    reports = _reports_by_file(plan, damage.report)
    for file in plan.files:
        if file.name in damage.rejected:
            continue
        with atomic.temporary(work.files / file.name) as name:
            _link(output / file.name, name)
            work.commit(file, name, damage.sums.get(file.name), reports[file.name])
    work.tokens_per_expert = damage.report["tokens_per_expert"]


def _reports_by_file(plan: Plan, report: dict) -> dict[str, list[UnitReport]]:
    by_file = defaultdict(list)
    for row in report["units"]:
        unit = plan.units[row["name"]]
        part = next(iter(plan.format.packed_layout(unit.tensor, unit.shape, unit.scheme)))
        scheme = Scheme(**row["scheme"])
        done = UnitReport(**row | {"scheme": scheme, "seconds": 0.0})
        by_file[plan.file_of[part].name].append(done)
    return by_file


def _link(path: Path, name: Path) -> None:
    """Gives a file a second name; copies it where the filesystem has no hard links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def take_over(work: WorkDirectory, output: Path, damage: Damage) -> list[str]:
    """Moves the rejected files, which were made again, into a result. Returns their names.

    Clears the work directory. Raises GateError, with the result as it was, if they are not the
    files that it had, and FaultsFound if faults remain that no file mends.
    """
    made = {path.relative_to(work.files).as_posix(): path for path in _files_in(work.files)}
    if other := next(_other_bytes(made, work.sums, damage), None):
        work.clear()
        raise GateError(
            f"{output / other}: was made again with other bytes than this result had, perhaps on "
            "another machine; nothing is changed, and overwrite=True makes the whole result again"
        )
    names = [name for name in made if name in damage.rejected and name != SUMS_NAME]
    for name in sorted(names, key=lambda name: name in _LAST and _LAST.index(name) + 1):
        (output / name).parent.mkdir(exist_ok=True)
        made[name].replace(output / name)
        atomic.sync((output / name).parent)
    listed = made.keys() - {SUMS_NAME, CARD_NAME}
    sums = {name: work.sums.get(name) or atomic.sha256(output / name) for name in listed}
    if SUMS_NAME in damage.rejected or sums != damage.sums:
        atomic.write_text(output / SUMS_NAME, sums_text(sums))
        names.append(SUMS_NAME)
    work.clear()
    if any(fault.file is None for fault in damage.faults) and (left := tuple(faults(output))):
        raise FaultsFound(left)
    return names


def _files_in(directory: Path) -> Iterator[Path]:
    temporaries = set(directory.glob(".*.tmp"))
    return (p for p in sorted(directory.rglob("*")) if p.is_file() and p not in temporaries)


def _other_bytes(made: dict[str, Path], weights: dict[str, str], damage: Damage) -> Iterator[str]:
    """Names of files that are not those that the result had, as far as it tells: the rejected ones
    and all `weights`, of which the checksums are given."""
    known = damage.report.get("files") or damage.sums
    for name in made.keys() & known.keys() & (damage.rejected | weights.keys()):
        if (weights.get(name) or atomic.sha256(made[name])) != known[name]:
            yield name
