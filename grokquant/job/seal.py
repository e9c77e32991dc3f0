"""Seals a finished result: each file has its checksum in two places, and all have one digest.

    quantization-report.json   `files`: checksums of the other files; `card`: of the model card
                               without what changes later; `checksum`: of the report itself
    SHA256SUMS                 checksums of all files but the card, for `sha256sum -c`
    README.md                  the digest, which is the checksum of SHA256SUMS
    evaluation/SHA256SUMS      checksums of the reports of `grokquant eval`

Who changes one file, or some of them and SHA256SUMS, is found. Who changes all of this is found
only by a digest that was kept elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from grokquant.files.atomic import sha256, write_json, write_text
from grokquant.job import card_parts
from grokquant.job.shards import CARD_NAME, REPORT_NAME, SUMS_NAME

# Keys of the report.
FILES = "files"
CARD = "card"
CHECKSUM = "checksum"


def seal(directory: Path, report: dict, known: Mapping[str, str]) -> None:
    """Writes the report, SHA256SUMS and the digest in the card of a result that is else complete.

    `known` are checksums of files that need not be read again.
    """
    text = card_parts.with_digest_section((directory / CARD_NAME).read_text(encoding="utf-8"))
    names = [name for name in _names(directory) if name not in (CARD_NAME, REPORT_NAME, SUMS_NAME)]
    files = {name: known.get(name) or sha256(directory / name) for name in names}
    content = report | {FILES: files, CARD: card_parts.fixed_checksum(text)}
    write_json(directory / REPORT_NAME, content | {CHECKSUM: checksum_of(content)})
    sums = files | {REPORT_NAME: sha256(directory / REPORT_NAME)}
    write_text(directory / SUMS_NAME, sums_text(sums))
    write_text(directory / CARD_NAME, card_parts.with_digest(text, digest_of(directory)))


def seal_evaluation(*reports: Path) -> None:
    """Writes the SHA256SUMS of reports that lie in one directory."""
    sums = {path.name: sha256(path) for path in reports}
    write_text(reports[0].parent / SUMS_NAME, sums_text(sums))


def digest_of(directory: Path) -> str:
    """The digest of a whole result."""
    return sha256(directory / SUMS_NAME)


def checksum_of(report: Mapping) -> str:
    """SHA-256 of what a report says, but for its checksum."""
    content = {key: value for key, value in report.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of a SHA256SUMS."""
    names = sorted(sums, key=PurePosixPath)
    return "".join(f"{sums[name]}  {name}\n" for name in names)


def _names(directory: Path) -> list[str]:
    """The files below a directory, without temporary ones of another run, which may go on where
    the filesystem has no locks."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if not (name.startswith(".") and name.endswith(".tmp")))
