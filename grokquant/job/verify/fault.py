"""What is wrong with a result: one fault for each thing found."""

from collections.abc import Iterable
from dataclasses import dataclass

from grokquant.errors import GateError


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a result.

    `text` is a line that names the file or matrix. `file` is the file that must be made again, by
    its name relative to the result; None where that would not help, as with a file too many.
    """

    text: str
    file: str | None = None

    def __str__(self) -> str:
        return self.text


class FaultsFound(GateError):
    """A result with `faults`. The text names the first and counts the others."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        first, *others = self.faults
        super().__init__(f"{first}; {len(others)} more faults" if others else str(first))
