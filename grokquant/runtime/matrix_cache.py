"""Keeps matrices in memory up to a limit; the one used longest ago goes first."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

# The tensors of a matrix in memory, by names of its holder.
Parts = dict[str, Tensor]


@dataclass
class MatrixCache:
    """What a model holds of its quantized matrices, by name.

    `limit` is in bytes, None for none. A matrix larger than that is held until the next one comes.
    `hits`, `misses` and `bytes_read` count since the model was loaded.
    """

    limit: int | None = None
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    held: OrderedDict[str, Parts] = field(default_factory=OrderedDict)
    nbytes: int = 0

    def get(self, name: str, stored_bytes: int, expected: int, read: Callable[[], Parts]) -> Parts:
        """The parts of the matrix `name`, by `read` if they are not held.

        `stored_bytes` are those of its file. `expected` bytes are freed first, so that old and new
        matrices never exceed the limit together.
        """
        if name in self.held:
            self.hits += 1
            self.held.move_to_end(name)
            return self.held[name]
        self.misses += 1
        self.bytes_read += stored_bytes
        self._make_room(expected)
        parts = read()
        self.held[name] = parts
        self.nbytes += _bytes(parts)
        return parts

    def clear(self) -> None:
        self.held.clear()
        self.nbytes = 0

    def _make_room(self, expected: int) -> None:
        while self.limit is not None and self.held and self.nbytes + expected > self.limit:
            _, parts = self.held.popitem(last=False)
            self.nbytes -= _bytes(parts)


def _bytes(parts: Parts) -> int:
    return sum(part.nbytes for part in parts.values())
