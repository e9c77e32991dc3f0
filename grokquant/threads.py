"""Work in pieces, one thread to a piece: sums in an order that no number of threads changes.

Left alone, MKL, oneDNN and torch split one product or sum among all threads, so that its order, and
with it the last bits, depend on their number. Here the work is split instead, into pieces whose
sizes depend on the work alone; inside a piece every library computes on the piece's one thread.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

from grokquant.devices import CPU

P = TypeVar("P")
T = TypeVar("T")


class Workers:
    """As many threads as torch has where this is made.

    None but the caller's inside a piece, which is not split again, and for another device, whose
    results no thread of the CPU changes.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        count = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool = _pool(count) if count > 1 else None

    def map(self, work: Callable[[P], T], pieces: Iterable[P]) -> list[T]:
        """Results of `work` for all pieces, in order."""
        if self._pool is None:
            return in_order(work, pieces)
        return _computed(self._pool, work, pieces)


def in_pieces(work: Callable[[P], T], pieces: Iterable[P], device: torch.device = CPU) -> list[T]:
    """Results of `work` for all pieces, in order, computed by the workers that there are here."""
    return Workers(device).map(work, pieces)


def in_order(work: Callable[[P], T], pieces: Iterable[P]) -> list[T]:
    """The same one after the other, each on all threads of torch, or on another device."""
    return [work(piece) for piece in pieces]


def alone(work: Callable[[], T]) -> T:
    """The result of `work`, computed on one thread. Workers made before help it."""
    if torch.get_num_threads() == 1:
        return work()
    (result,) = _computed(_pool(1), lambda _: work(), [None])
    return result


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Pieces of `size` from `start` to before `stop`; the last one may be smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _computed(pool: ThreadPoolExecutor, work: Callable[[P], T], pieces: Iterable[P]) -> list[T]:
    grad = torch.is_grad_enabled()  # threads do not share this mode

    def compute(piece: P) -> T:
        with torch.set_grad_enabled(grad):
            return work(piece)

    futures = [pool.submit(compute, piece) for piece in pieces]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute alone, started now: Python waits without end for one that finds no
    memory when it starts, and later there may be none."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "piece", _compute_alone)
    everyone = Barrier(threads)
    wait([pool.submit(everyone.wait) for _ in range(threads)])
    # A thread that sets its number also sets that of threads made later.
    torch.set_num_threads(before)
    return pool


def _compute_alone() -> None:
    torch.get_num_threads()  # the first call in a thread would undo the next line
    torch.set_num_threads(1)


# The threads of a process are not in its fork.
os.register_at_fork(after_in_child=_pool.cache_clear)
