"""All rows of an evaluation on their way through one model, layer by layer, each read once.

Several processes share them: each takes whole pieces of rows, as they pass a layer, and each expert
runs where its owner is, for the tokens of all. The order of members is that of the rows, so every
product has the inputs that it has in one process:

    batch 0             batch 1             batch 2
    | piece | piece |   | piece | piece |   | piece |
      member 0              member 1          member 2
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.parallel import ALONE, Team
from grokquant.streaming.blocks import BlockwiseModel, Rows


class View:
    """Watches one layer work on `tokens`, a slice of all tokens that pass it.

    `attention` is its attention's output [tokens, hidden]. In a layer with experts, `inputs`
    [tokens, hidden] are what reaches them, `experts` and `gates` [tokens, k] where the router sends
    it, the largest gate first. `extra` tokens pass the experts before all others, but nothing else
    of the layer.
    """

    extra = 0

    def __init__(self, tokens: slice) -> None:
        self.tokens = tokens
        self.attention = torch.empty(0)
        self.inputs: Tensor | None = None
        self.experts: Tensor | None = None
        self.gates: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._passed = 0

    def pass_attention(self, output: Tensor) -> None:
        """Takes the next outputs [rows, time, hidden].

        All tokens come a second time in a layer with experts; the slice ends before that.
        """
        y = output.flatten(0, -2)  # (tokens, hidden)
        # The part of `tokens` within these outputs.
        first, last = (
            min(max(token - self._passed, 0), len(y))
            for token in (self.tokens.start, self.tokens.stop)
        )
        if last > first:
            self._outputs.append(y[first:last].cpu())
            self.attention = torch.cat(self._outputs)
        self._passed += len(y)

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        """Takes the inputs and routes of all tokens."""
        # Clones, so that the memory of all other tokens can be freed.
        self.inputs = x[self.tokens].clone()
        self.experts = experts[self.tokens].clone()
        self.gates = gates[self.tokens].clone()

    def fill(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        """Fills in the inputs and routes of the extra tokens."""

    def output(self, number: int, token: Tensor, y: Tensor) -> None:
        """Takes outputs y [part, hidden] of an expert; `token` counts the extra tokens, too."""


class Stream:
    """Batches of rows, each of its own length, on their way through `model`.

    `hidden` are the states of each batch [rows, time, hidden] after the layers run so far. `chosen`
    are the experts that the last layer's router chose, [tokens, k] for each batch, the largest gate
    first; None if that layer is dense. In a `team`, all this is about the rows of this member.
    Products of experts with the first `exact` tokens are in the dtype of the states.
    """

    exact = 0

    def __init__(self, model: BlockwiseModel, batches: Sequence[Rows], team: Team = ALONE) -> None:
        self.model = model
        self.team = team
        self.batches = batches
        self.hidden = [model.embed(rows.tokens) for rows in batches]
        self.chosen: tuple[Tensor, ...] | None = None

    def tokens_of(self, batch: int) -> slice:
        """The slice of all tokens that belongs to a batch."""
        sizes = [rows.tokens.numel() for rows in self.batches]
        return slice(sum(sizes[:batch]), sum(sizes[: batch + 1]))

    def run_layer(self, index: int, view: View | None = None) -> None:
        """Takes all rows through layer `index`, watched by `view`.

        Raises InputError if the weights are so large that the states are not finite.
        """
        model = self.model
        view = view or View(slice(0, 0))
        self.chosen = None

        owners = self.team.assign([1.0] * model.family.num_experts(model.config, index))
        combine = model.combine_stored(index, self.team, owners, view.output, self.exact)

        def watched(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            passing = slice(view.extra, None)
            order = gates[passing].argsort(dim=-1, descending=True, stable=True)
            ranked = experts[passing].gather(1, order)
            self.chosen = ranked.split([rows.tokens.numel() for rows in self.batches])
            view.route(x[passing], ranked, gates[passing].gather(1, order))
            extra = slice(0, view.extra)
            view.fill(x[extra], experts[extra], gates[extra])
            return combine(x, experts, gates)

        model.load_layer(index)
        hook = model.attention_output(index).register_forward_hook(
            lambda _, args, output: view.pass_attention(output)
        )
        self.hidden = model.run_batches(index, self.batches, self.hidden, watched, view.extra)
        hook.remove()
        model.free_layer(index)
        if not all(torch.isfinite(hidden).all() for hidden in self.hidden):
            raise InputError(f"{model.source.path}: the outputs of layer {index} are not finite")


def own_rows(
    team: Team, model: BlockwiseModel, batches: Sequence[Tensor], lead: int
) -> list[slice]:
    """Which rows of each batch of token ids [rows, time] this member has; the first one has at
    least `lead` rows of batch 0."""
    sizes = [model.rows_at_once(tokens.shape[1]) for tokens in batches]
    pieces = [-(-len(tokens) // size) for tokens, size in zip(batches, sizes, strict=True)]
    own = team.rows(sum(pieces), 1, least=-(-lead // sizes[0]))
    parts: list[slice] = []
    before = 0  # pieces in earlier batches
    for tokens, size, count in zip(batches, sizes, pieces, strict=True):
        first, last = (
            min(max(end - before, 0) * size, len(tokens)) for end in (own.start, own.stop)
        )
        parts.append(slice(first, last))
        before += count
    return parts
