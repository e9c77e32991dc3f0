"""The parts of a model card that change after it is written, between marks that nobody sees.

<!-- evaluation -->
| Mean KLD | ..                 written by `grokquant eval`
<!-- sha256 5c69d7cb.. -->      of the lines above
<!-- /evaluation -->

<!-- digest -->
grokquant verify ..             the digest of all files, known last
<!-- /digest -->
"""

import re
from dataclasses import dataclass
from hashlib import sha256

NOT_EVALUATED = (
    "Not evaluated yet. `grokquant eval` with the source as reference writes the table here."
)
_CHECKSUM = re.compile(r"(.*)\n<!-- sha256 ([0-9a-f]{64}) -->", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """The lines of a card between two marks."""

    start: str
    end: str

    def of(self, card: str) -> str | None:
        """The lines, None where the marks are missing."""
        _, start, rest = card.partition(f"{self.start}\n")
        lines, end, _ = rest.partition(f"\n{self.end}")
        return lines if start and end else None

    def marked(self, lines: str) -> str:
        return f"{self.start}\n{lines}\n{self.end}"

    def filled(self, card: str, lines: str) -> str:
        """The card with other `lines`; as it is where the marks are missing."""
        before = self.of(card)
        if before is None:
            return card
        return card.replace(self.marked(before), self.marked(lines), 1)


EVALUATION = Part("<!-- evaluation -->", "<!-- /evaluation -->")
DIGEST = Part("<!-- digest -->", "<!-- /digest -->")


def with_table(card: str, table: str) -> str:
    """The card with an evaluation, and a checksum that tells later whether it was changed."""
    table = table.strip()
    return EVALUATION.filled(card, f"{table}\n<!-- sha256 {_hash(table)} -->")


def is_table_intact(card: str) -> bool:
    """Whether the evaluation is as `with_table` left it, or there is none yet."""
    lines = EVALUATION.of(card) or ""
    found = _CHECKSUM.fullmatch(lines)
    return _hash(found[1]) == found[2] if found else lines == NOT_EVALUATED


def with_digest_section(card: str) -> str:
    """The card with a place for the digest."""
    return f"""{card}
## Integrity

`SHA256SUMS` has a checksum of every file, and the digest below is the checksum of that list. It
proves something if you got it from the makers by another way: who can change these files can
change this page.

{DIGEST.marked("")}
"""


def with_digest(card: str, digest: str) -> str:
    """The card with the digest of all files in its place."""
    return DIGEST.filled(card, digest_lines(digest))


def digest_lines(digest: str) -> str:
    return f"```sh\ngrokquant verify . --digest {digest}\n```"


def fixed_checksum(card: str) -> str:
    """SHA-256 of the card without the parts that change."""
    for part in (EVALUATION, DIGEST):
        card = part.filled(card, "")
    return _hash(card)


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
