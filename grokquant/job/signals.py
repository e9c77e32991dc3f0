"""Ctrl-C and SIGTERM: the unit in progress is finished first; a second one stops at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grokquant.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the run is to stop. `busy` says whether something is in progress that is better
    finished, as making the work directory at the start; `notify` tells the user so."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self.requested, self.notify = False, notify
        self.busy: Callable[[], bool] = lambda: True

    def check(self) -> None:
        """Raises Stopped if that was asked for and no unit is in progress."""
        if self.requested and not self.busy():
            raise Stopped("interrupted, nothing was published")

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.busy():
            raise Stopped("interrupted, nothing was published")
        self.requested = True
        self.notify()


@contextmanager
def stopping(notify: Callable[[], None]) -> Iterator[StopRequest]:
    """Signals become requests inside the block. Only the main thread can do that."""
    request = StopRequest(notify)
    try:
        before = [signal.signal(number, request.handle) for number in _SIGNALS]
    except ValueError:
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
