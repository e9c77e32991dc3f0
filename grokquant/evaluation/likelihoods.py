"""Log-likelihoods of continuations, packed into rows that share their contexts.

A row is a context and its continuations, each on a branch of its own, so the context is computed
once. Rows of equal length form a batch; nothing is padded. The last token of a continuation is
predicted but not read by the model, so a continuation of one token adds nothing to its row:

    context      c c c c
    "a b"                a          predicted: a at the last c, b at a
    "x y z"                x y      predicted: x at the last c, y at x, z at y
    branch       0 0 0 0 1 2 2
    position     0 1 2 3 4 4 5
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.streaming.blocks import BlockwiseModel, Rows

# Positions whose logits are held at once: 268 MB in float32 for the vocabulary of Grok-1.
_POSITIONS_AT_ONCE = 512
# Positions whose log-probabilities are held at once, in float64.
_POSITIONS_COMPARED = 64

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]  # a context, never empty, and its continuation
# Log-likelihood in nats, and whether greedy decoding gives this continuation.
Likelihood = tuple[float, bool]


@dataclass(frozen=True)
class Batch:
    """Rows, and the tokens to be predicted in them.

    For every token of every continuation, each [targets]: `positions` indexes the flattened rows,
    `targets` is the token to be predicted there, `owners` indexes the `pairs` it belongs to.
    """

    rows: Rows
    pairs: list[Pair]
    positions: Tensor
    targets: Tensor
    owners: Tensor

    def of_rows(self, part: slice) -> "Batch":
        """Some rows, and what is to be predicted in them."""
        time = self.rows.tokens.shape[1]
        here = (self.positions >= part.start * time) & (self.positions < part.stop * time)
        owners = self.owners[here]
        first, last = (int(owners.min()), int(owners.max()) + 1) if len(owners) else (0, 0)
        return Batch(
            self.rows[part],
            self.pairs[first:last],  # in the order of the rows
            self.positions[here] - part.start * time,
            self.targets[here],
            owners - first,
        )


@dataclass
class _Row:
    """A context and some of its continuations."""

    context: Tokens
    continuations: list[Tokens]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)

    @property
    def branched(self) -> bool:
        return sum(len(c) > 1 for c in self.continuations) > 1

    def columns(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens, branches and positions of the row."""
        start = len(self.context)
        tokens = list(self.context)
        branches = [0] * start
        positions = list(range(start))
        for branch, continuation in enumerate(self.continuations, start=1):
            read = len(continuation) - 1
            tokens += continuation[:-1]
            branches += [branch] * read
            positions += range(start, start + read)
        return tokens, branches, positions

    def predicted_at(self) -> Iterator[list[int]]:
        """Indices in the row at which the tokens of each continuation are predicted."""
        end = len(self.context)
        for continuation in self.continuations:
            read = len(continuation) - 1
            yield [len(self.context) - 1, *range(end, end + read)]
            end += read


def pack(pairs: Iterable[Pair], longest: int, branches: bool = True) -> list[Batch]:
    """Batches that hold every pair once, in rows of at most `longest` tokens.

    A row is longer only where a single pair is. Without `branches` each pair has a row of its own.
    """
    by_context: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in pairs:
        by_context.setdefault(context, {})[continuation] = None
    by_shape: dict[tuple[int, bool], list[_Row]] = {}
    for context, continuations in by_context.items():
        for row in _rows(context, list(continuations), longest if branches else 0):
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
        torch.tensor(part) for part in zip(*(row.columns() for row in rows), strict=True)
    )
    pairs: list[Pair] = []
    found: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        start = number * row.length
        for continuation, indices in zip(row.continuations, row.predicted_at(), strict=True):
            found += [
                (start + index, target, len(pairs))
                for index, target in zip(indices, continuation, strict=True)
            ]
            pairs.append((row.context, continuation))
    packed = Rows(tokens, branches, positions) if rows[0].branched else Rows(tokens)
    return Batch(packed, pairs, *torch.tensor(found).unbind(1))


@torch.no_grad()
def likelihoods(model: BlockwiseModel, batch: Batch, hidden: Tensor) -> dict[Pair, Likelihood]:
    """Log-likelihoods of a batch under `model`, from the output of its last block, `hidden`
    [rows, time, hidden]."""
    total = torch.zeros(len(batch.pairs), dtype=torch.float64)
    missed = torch.zeros(len(batch.pairs), dtype=torch.long)
    states = hidden.flatten(0, 1)  # (positions, hidden)
    needed, which = batch.positions.unique(return_inverse=True)
    for first in range(0, len(needed), _POSITIONS_AT_ONCE):
        part = needed[first : first + _POSITIONS_AT_ONCE]
        logits = model.logits(states[None, part])[0]  # (positions, vocabulary)
        for start in range(0, len(part), _POSITIONS_COMPARED):
            compared = logits[start : start + _POSITIONS_COMPARED]
            row = which - first - start
            here = (row >= 0) & (row < len(compared))
            row = row[here]  # of `compared`, for each target (targets here,)
            targets = batch.targets[here]
            owners = batch.owners[here]
            log_p = F.log_softmax(compared.double(), dim=-1)
            total.index_add_(0, owners, log_p[row, targets])
            missed.index_add_(0, owners, (compared.argmax(-1)[row] != targets).long())
    greedy = (missed == 0).tolist()
    return dict(zip(batch.pairs, zip(total.tolist(), greedy, strict=True), strict=True))
