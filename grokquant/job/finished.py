"""A finished result where a run is to write: whether this run made it, and what lies in it."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from grokquant.errors import InputError
from grokquant.files.json_objects import read_json_object
from grokquant.job.fallbacks import Fallbacks, fallen_in
from grokquant.job.fingerprint import CALIBRATION, difference, rows_digest, text_digest
from grokquant.job.plan import Plan
from grokquant.job.shards import CARD_NAME, REPORT_NAME, SUMS_NAME, is_result

# Keys of the report: the identity of the run that made it, and in it the calibration text's file.
MADE_FROM = "made_from"
TEXT_FILE = "calibration file"

# Makes the calibration tokens [rows, time], None if no method needs them.
MakeRows = Callable[[], Tensor | None]


def made_from(plan: Plan, identity: dict) -> dict:
    """What the report keeps of a run with this `identity`, which holds its calibration rows."""
    return identity | {TEXT_FILE: text_digest(plan)}


def already_made(output: Path, plan: Plan, identity: dict, rows: MakeRows) -> bool:
    """Whether `output` is the finished result of the run that `plan` and `identity` describe.

    False where there is no result. `rows` is called only if nothing cheaper decides. Raises
    InputError, with the ways out, for a result of something else and for one that lacks a file.
    """
    if not is_result(output):
        return False
    try:
        report = read_json_object(output / REPORT_NAME)
    except InputError as error:
        raise _something_else(output, f"its report cannot be read ({error})") from None
    refuse_other_result(output, report, plan, identity, rows)
    if fault := _wrong_size(output, plan):
        raise InputError(
            f"{output}: holds this result already, but {fault}; repair=True makes what is damaged "
            f"again, or {_ways_out(output)}"
        )
    return True


def refuse_other_result(
    output: Path, report: dict, plan: Plan, identity: dict, rows: MakeRows
) -> None:
    """Raises InputError if the result with this `report` is of something else."""
    if differs := _what_differs(report, plan, identity, rows):
        raise _something_else(output, differs)


def _something_else(output: Path, differs: str) -> InputError:
    text = f"holds a finished result of something else: {differs}; {_ways_out(output)}"
    return InputError(f"{output}: {text}")


def _ways_out(output: Path) -> str:
    also = f" and deletes {', '.join(names)} in it" if (names := besides(output)) else ""
    return f"choose another output.path, or overwrite=True replaces that result{also}"


def besides(output: Path) -> list[str]:
    """What lies in a result and is no part of it: evaluation/, files of the user."""
    own = {CARD_NAME, SUMS_NAME, *_summed(output)}
    own |= {Path(name).parts[0] for name in own}  # additional_chat_templates
    others = (path for path in output.iterdir() if path.name not in own)
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def _what_differs(report: dict, plan: Plan, identity: dict, rows: MakeRows) -> str | None:
    before = report.get(MADE_FROM)
    if not isinstance(before, dict):
        return f"{REPORT_NAME} does not say what it was made from, as those of older versions"
    if changed := difference(before, identity):
        return changed
    file = text_digest(plan)
    if file is None or before.get(TEXT_FILE) != file:
        changed = difference(before, {CALIBRATION: rows_digest(rows())})
    return changed or _too_many_fallbacks(report, plan)


def _too_many_fallbacks(report: dict, plan: Plan) -> str | None:
    """`max_fallbacks` does not belong to the identity, since a run may be resumed with another."""
    match report.get("calibration_rows"):
        case [int(rows), int(length)]:
            fallbacks = Fallbacks(plan, rows, length)
        case _:
            fallbacks = Fallbacks(plan, 0, 0)
    known = (row for row in report.get("units") or () if row.get("name") in plan.units)
    for fallen in fallen_in(known):
        fallbacks.add(fallen)
    return fallbacks.excess()


def _wrong_size(output: Path, plan: Plan) -> str | None:
    """The first file that is missing, or has another size than planned."""
    sizes = {file.name: file.layout.size for file in plan.files}
    for name in [*sizes, *_summed(output), SUMS_NAME]:
        path = output / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != sizes.get(name, found):
            return f"{name} has {found} bytes, not {sizes[name]}"
    return None


def _summed(output: Path) -> list[str]:
    """The names in SHA256SUMS; none where it cannot be read."""
    try:
        text = (output / SUMS_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.partition("  ")[2] for line in text.splitlines()]
