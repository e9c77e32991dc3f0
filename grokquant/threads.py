"""Work in pieces, one thread to a piece: sums in an order that no number of threads changes.

Left alone, MKL, oneDNN and torch split one product or sum among all threads, so that its order, and
with it the last bits, depend on their number. Here the work is split instead, into pieces whose
sizes depend on the work alone; inside a piece every library computes on the piece's one thread.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from grokquant.devices import CPU

P = TypeVar("P")
T = TypeVar("T")


class Workers:
    """As many threads as torch has where this is made; none but that one inside a piece, which is
    not split again, and for another device, whose results no thread of the CPU changes."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.count > 1:
            # Threads begin with torch's defaults, not with the modes of the thread that makes them.
            modes = (torch.is_grad_enabled(),)
            self._pool = ThreadPoolExecutor(self.count, "piece", _compute_alone, modes)
        return self

    def map(self, work: Callable[[P], T], pieces: Iterable[P]) -> list[T]:
        """Results of `work` for all pieces, in order."""
        if self._pool is None:
            return [work(piece) for piece in pieces]
        return list(self._pool.map(work, pieces))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(cancel_futures=True)
        # A thread that sets its number also sets that of threads made later.
        torch.set_num_threads(self.count)


def in_pieces(work: Callable[[P], T], pieces: Iterable[P]) -> list[T]:
    """Results of `work` for all pieces, in order, computed by `Workers` of their own."""
    with Workers() as workers:
        return workers.map(work, pieces)


def in_order(work: Callable[[P], T], pieces: Iterable[P]) -> list[T]:
    """The same one after the other, each on all threads of torch, or on another device."""
    return [work(piece) for piece in pieces]


def alone(work: Callable[[], T]) -> T:
    """The result of `work`, computed on one thread."""
    (result,) = in_pieces(lambda _: work(), [None])
    return result


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Pieces of `size` from `start` to before `stop`; the last one may be smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _compute_alone(grad: bool) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(grad)
