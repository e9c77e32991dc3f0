"""Members of a team in threads of one process, which exchange through gloo as processes do."""

import threading
from collections.abc import Callable
from typing import TypeVar

from torch.distributed import HashStore

from grokquant.parallel import Members, Team

T = TypeVar("T")


def together(
    size: int, work: Callable[[Team], T], lost: Callable[[Members, str], None] | None = None
) -> list[T]:
    """What `work` returns on each of `size` members; raises the first error of any."""
    store = HashStore()
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(number: int) -> None:
        try:
            results[number] = work(Members(store, number, size, lost=lost))
        except BaseException as error:
            errors[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number in sorted(errors):
        raise errors[number]
    return [results[number] for number in range(size)]
