"""The next matrix is read while this one is rounded: a GPU takes seconds for both together."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise

from torch import Tensor

from grokquant.types import QTensor, TensorRef


class ReadAhead:
    """Tensors that are read in about this order; one of them waits in memory, as it is stored."""

    def __init__(self, refs: Sequence[TensorRef]) -> None:
        self._after = {ref.name: following for ref, following in pairwise(refs)}
        self._reader = ThreadPoolExecutor(1, "reader")  # which starts no thread yet
        self._waiting: tuple[str, Future[Tensor | QTensor]] | None = None

    def of(self, ref: TensorRef) -> TensorRef:
        """The same tensor; once it is read, the reading of the next one begins."""
        return ref.loaded_by(partial(self._load, ref))

    def close(self) -> None:
        self._waiting = None
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _load(self, ref: TensorRef) -> Tensor | QTensor:
        waiting = self._waiting
        self._waiting = None  # another one than the expected is dropped
        stored = waiting[1].result() if waiting and waiting[0] == ref.name else ref.load()
        if following := self._after.get(ref.name):
            self._waiting = following.name, self._reader.submit(following.load)
        return stored
