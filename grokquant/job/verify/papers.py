"""What a result says of its own files: the checksums in its report, its card, its evaluation."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from grokquant.errors import InputError
from grokquant.files.atomic import sha256
from grokquant.files.json_objects import MAX_BYTES, read_json_object
from grokquant.files.regular import read_regular
from grokquant.job import card_parts
from grokquant.job.metadata import SCHEMA
from grokquant.job.seal import CARD, CHECKSUM, FILES, checksum_of, digest_of
from grokquant.job.shards import CARD_NAME, REPORT_NAME, SUMS_NAME
from grokquant.job.verify.fault import Fault
from grokquant.job.verify.listing import EVALUATION, read_sums


def read_report(directory: Path) -> tuple[dict, list[Fault]]:
    """The quantization report of a result, and its faults.

    Raises InputError where it is of an earlier version, and so lacks what is compared.
    """
    path = directory / REPORT_NAME
    try:
        report = read_json_object(path)
    except InputError as error:
        text = str(error).removeprefix(f"{path}: ").removeprefix("cannot be read: ")
        return {}, [Fault(f"{path}: cannot be read: {text}", REPORT_NAME)]
    schema = report.get("schema")
    if schema == "grokquant.quantization/1" and CHECKSUM not in report:
        raise InputError(
            f"{path}: is of an earlier version of grokquant, whose results do not say enough to be "
            f"verified; quantize again, or check the bytes alone with `sha256sum -c {SUMS_NAME}`"
        )
    if schema != SCHEMA:
        return {}, [Fault(f"{path}: cannot be read: its schema is not {SCHEMA}", REPORT_NAME)]
    if report.get(CHECKSUM) != checksum_of(report):
        return report, [Fault(f"{path}: was changed, its own checksum does not match", REPORT_NAME)]
    return report, []


def report_and_sums_faults(
    directory: Path, report: Mapping, sums: Mapping[str, str]
) -> Iterator[Fault]:
    """Where the report and SHA256SUMS contradict each other about a file."""
    files = report.get(FILES)
    known = files if isinstance(files, dict) else {}
    for name in sorted({*sums, *known} - {REPORT_NAME}):
        path = directory / name
        if name not in sums:
            yield Fault(f"{path}: is in {REPORT_NAME}, but not in {SUMS_NAME}", SUMS_NAME)
        elif name not in known:
            yield Fault(f"{path}: is in {SUMS_NAME}, but not in {REPORT_NAME}")
        elif sums[name] != known[name]:
            text = f"its checksum in {SUMS_NAME} is not that in {REPORT_NAME}"
            yield Fault(f"{path}: {text}", name)


def card_faults(directory: Path, report: Mapping, sums: Mapping[str, str]) -> Iterator[Fault]:
    """Whether the model card is as it was written, but for what `grokquant eval` adds."""
    path = directory / CARD_NAME
    if not path.is_file():
        return  # named as missing already
    try:
        text = read_regular(path, MAX_BYTES).decode()
    except (InputError, UnicodeDecodeError) as error:
        yield Fault(f"{path}: cannot be read: {error}", CARD_NAME)
        return
    if card_parts.fixed_checksum(text) != report.get(CARD):
        yield Fault(f"{path}: was changed outside its evaluation", CARD_NAME)
    if not card_parts.is_table_intact(text):
        yield Fault(f"{path}: its evaluation was changed by hand", CARD_NAME)
    if sums and card_parts.DIGEST.of(text) != card_parts.digest_lines(digest_of(directory)):
        yield Fault(f"{path}: states another digest than that of {SUMS_NAME}", CARD_NAME)


def evaluation_faults(directory: Path) -> Iterator[Fault]:
    """Whether the reports of `grokquant eval` are as it wrote them. No run makes them again."""
    folder = directory / EVALUATION
    if not folder.is_dir():
        return
    sums, faults = read_sums(folder)
    present = {path.name for path in folder.iterdir()} - {SUMS_NAME}
    yield from (Fault(str(fault)) for fault in faults)
    for name in sorted({*sums, *present}):
        if name not in present:
            yield Fault(f"{folder / name}: is missing")
        elif name not in sums:
            yield Fault(f"{folder / name}: is no part of the evaluation")
        elif not (folder / name).is_file() or sha256(folder / name) != sums[name]:
            yield Fault(f"{folder / name}: does not match its checksum in {folder / SUMS_NAME}")
