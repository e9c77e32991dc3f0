"""Ctrl-C and SIGTERM: the first lets the current file finish, the second stops immediately."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

from grokquant.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a stop was requested. `busy` says whether work is in progress that should be finished
    first, such as creating the work directory; `notify` tells the user that it will be."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self.notify = notify
        self.requested = False
        # Until the run says otherwise: the work directory is being made.
        self.busy: Callable[[], bool] = lambda: True

    def check(self) -> None:
        """Raises Stopped if a stop was requested and no work is in progress."""
        if self.requested and not self.busy():
            raise Stopped("interrupted; no output was written")

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Raises Stopped at a second signal, or if nothing is in progress."""
        again = self.requested
        self.requested = True  # also for those who wait for other processes when Stopped is raised
        if again or not self.busy():
            raise Stopped("interrupted; no output was written")
        self.notify()


@contextmanager
def stopping(notify: Callable[[], None]) -> Iterator[StopRequest]:
    """Turns signals into stop requests inside the block; ignored ones stay ignored.

    Only the main thread can do that. In another one nothing changes: SIGTERM ends the process, and
    Ctrl-C interrupts the main thread.
    """
    request = StopRequest(notify)
    if current_thread() is not main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # A handler that is None is none of Python's, and could not be restored.
    taken = [number for number in _SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number in taken:
            signal.signal(number, before[number])
