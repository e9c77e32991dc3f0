"""Log-likelihoods of continuations: packed into rows that share their contexts, read off a model.

A row is a context and its continuations, each on a branch of its own, so that a context is computed
once. Rows of one length make a batch; nothing is padded. A continuation's last token is predicted
but never read, so one of a single token adds nothing to its row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.streaming.blocks import BlockwiseModel, Rows

# Positions whose logits are held at once, and how many of them as log-probabilities.
_POSITIONS_AT_ONCE, _POSITIONS_COMPARED = 512, 64

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]  # a context, never empty, and what is to follow it
# Log-likelihood in nats, and whether greedy decoding gives just that.
Likelihood = tuple[float, bool]


@dataclass(frozen=True)
class Batch:
    """Rows, and where in them what is predicted.

    For every token of every continuation: `places` [targets] indices into the flattened rows,
    `targets` the token that should be predicted there, `owners` whose it is, an index of `pairs`.
    """

    rows: Rows
    pairs: list[Pair]
    places: Tensor
    targets: Tensor
    owners: Tensor


@dataclass
class _Row:
    """A row in the making: a context with some of its continuations."""

    context: Tokens
    continuations: list[Tokens]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)

    @property
    def branched(self) -> bool:
        return sum(len(c) > 1 for c in self.continuations) > 1

    def flattened(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens, branches and positions of the row."""
        start = len(self.context)
        tokens, branches, positions = list(self.context), [0] * start, list(range(start))
        for branch, continuation in enumerate(self.continuations, start=1):
            read = len(continuation) - 1
            tokens += continuation[:-1]
            branches += [branch] * read
            positions += range(start, start + read)
        return tokens, branches, positions

    def places(self) -> Iterator[list[int]]:
        """For each continuation where its tokens are predicted."""
        end = len(self.context)
        for continuation in self.continuations:
            read = len(continuation) - 1
            yield [len(self.context) - 1, *range(end, end + read)]
            end += read


def pack(pairs: Iterable[Pair], longest: int) -> list[Batch]:
    """Batches in which every pair stands once, in rows of at most `longest` tokens.

    A row is longer where a single pair is.
    """
    by_context: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in pairs:
        by_context.setdefault(context, {})[continuation] = None
    by_shape: dict[tuple[int, bool], list[_Row]] = {}
    for context, continuations in by_context.items():
        for row in _rows(context, list(continuations), longest):
            by_shape.setdefault((row.length, row.branched), []).append(row)
    return [_batch(rows) for _, rows in sorted(by_shape.items(), key=lambda item: item[0])]


def _rows(context: Tokens, continuations: Sequence[Tokens], longest: int) -> Iterator[_Row]:
    row = _Row(context, [])
    for continuation in continuations:
        if row.continuations and row.length + len(continuation) - 1 > longest:
            yield row
            row = _Row(context, [])
        row.continuations.append(continuation)
    yield row


def _batch(rows: list[_Row]) -> Batch:
    tokens, branches, positions = (
        torch.tensor(part) for part in zip(*(row.flattened() for row in rows), strict=True)
    )
    pairs: list[Pair] = []
    found: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        for continuation, places in zip(row.continuations, row.places(), strict=True):
            start = number * row.length
            found += [
                (start + place, target, len(pairs))
                for place, target in zip(places, continuation, strict=True)
            ]
            pairs.append((row.context, continuation))
    laid = Rows(tokens, branches, positions) if rows[0].branched else Rows(tokens)
    return Batch(laid, pairs, *torch.tensor(found).unbind(1))


@torch.no_grad()
def likelihoods(model: BlockwiseModel, batch: Batch, hidden: Tensor) -> dict[Pair, Likelihood]:
    """What `model` says of a batch, from what its last block returned [rows, time, hidden]."""
    total = torch.zeros(len(batch.pairs), dtype=torch.float64)
    missed = torch.zeros(len(batch.pairs), dtype=torch.long)
    states = hidden.flatten(0, 1)  # (places, hidden)
    needed, which = batch.places.unique(return_inverse=True)
    for first in range(0, len(needed), _POSITIONS_AT_ONCE):
        part = needed[first : first + _POSITIONS_AT_ONCE]
        logits = model.logits(states[None, part])[0]  # (positions, vocabulary)
        for start in range(0, len(part), _POSITIONS_COMPARED):
            compared = logits[start : start + _POSITIONS_COMPARED]
            row = which - first - start
            here = (row >= 0) & (row < len(compared))
            row, targets, owners = row[here], batch.targets[here], batch.owners[here]
            log_p = F.log_softmax(compared.double(), dim=-1)
            total.index_add_(0, owners, log_p[row, targets])
            missed.index_add_(0, owners, (compared.argmax(-1)[row] != targets).long())
    greedy = (missed == 0).tolist()
    return dict(zip(batch.pairs, zip(total.tolist(), greedy, strict=True), strict=True))
