"""A line for people who wait: what a command is doing, whenever nothing else was said for a while.

It imports nothing large, so that it can begin before a command imports what it needs.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import TracebackType

from grokquant.errors import InputError
from grokquant.humanize import duration

# Seconds without a word after which people wonder whether a program hangs. The variable changes
# them, for those who read stderr by a program.
_SILENCE = 10.0
VARIABLE = "GROKQUANT_SILENCE"


def silence() -> float:
    """Seconds without a word after which a command says what it does. Raises InputError."""
    value = os.environ.get(VARIABLE, "")
    try:
        return float(value or _SILENCE)
    except ValueError:
        raise InputError(f"{VARIABLE}: expected seconds, not {value!r}") from None


class SignsOfLife:
    """While it is entered, `say` gets a line about what is being done after `every` silent seconds.

    `doing` may be set at any time; `heard` tells that something else was printed.
    """

    def __init__(self, doing: str, say: Callable[[str], None], every: float) -> None:
        self.doing = doing
        self.say = say
        self.every = every
        self.begun = monotonic()
        self.last = self.begun
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="signs of life", daemon=True)

    def heard(self) -> None:
        self.last = monotonic()

    def line_due(self, now: float) -> str | None:
        """The line to print at the time `now`, if any."""
        if now - self.last < self.every:
            return None
        self.last = now
        return f"{self.doing}: {duration(now - self.begun)} so far"

    def _watch(self) -> None:
        while not self._over.wait(max(self.last + self.every - monotonic(), 0.01)):
            if line := self.line_due(monotonic()):
                self.say(line)

    def __enter__(self) -> "SignsOfLife":
        with suppress(RuntimeError):  # no memory for a thread: then the command says so itself
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
