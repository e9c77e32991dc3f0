"""Members of a team in threads of one process, which exchange through gloo as processes do."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar
from unittest.mock import patch

from torch.distributed import HashStore

from grokquant.families import family
from grokquant.parallel import Members, Team

T = TypeVar("T")


def together(
    size: int, work: Callable[[Team], T], lost: Callable[[Members, str], None] | None = None
) -> list[T]:
    """What `work` returns on each of `size` members; raises the first error of any.

    torch has one default dtype for all threads: it stays while a member builds an empty model. Only
    buffers that none of these models has would have another dtype.
    """
    store = HashStore()
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(number: int) -> None:
        try:
            results[number] = work(Members(store, number, size, lost=lost))
        except BaseException as error:
            errors[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    with patch.object(family, "_default_dtype", nullcontext):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for number in sorted(errors):
        raise errors[number]
    return [results[number] for number in range(size)]
