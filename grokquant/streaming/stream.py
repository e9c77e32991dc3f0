"""All rows of an evaluation on their way through one model, layer by layer, each read once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.streaming.blocks import BlockwiseModel, Expert, Routed, Rows


class View:
    """Watches one layer work on `tokens`, a slice of all tokens that pass it.

    `attention` is its attention's output [tokens, hidden]. In a layer with experts, `inputs`
    [tokens, hidden] are what reaches them, `experts` and `gates` [tokens, k] where the router sends
    it, the largest gate first.
    """

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

    def expert(self, number: int, expert: Expert, routed: Tensor) -> Expert:
        """The function to run instead of `expert` on the indices of tokens `routed` to it."""
        return expert


class Stream:
    """Batches of rows, each of its own length, on their way through `model`.

    `hidden` are the states of each batch [rows, time, hidden] after the layers run so far. `chosen`
    are the experts that the last layer's router chose, [tokens, k] for each batch, the largest gate
    first; None if that layer is dense.
    """

    def __init__(self, model: BlockwiseModel, batches: Sequence[Rows]) -> None:
        self.model = model
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

        def make_expert(number: int, routed: Routed) -> Expert:
            return view.expert(number, model.stored_expert(index, number), routed.token)

        combine = model.combine_experts(index, make_expert)

        def watched(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            order = gates.argsort(dim=-1, descending=True, stable=True)
            ranked = experts.gather(1, order)
            self.chosen = ranked.split([rows.tokens.numel() for rows in self.batches])
            view.route(x, ranked, gates.gather(1, order))
            return combine(x, experts, gates)

        model.load_layer(index)
        hook = model.attention_output(index).register_forward_hook(
            lambda _, args, output: view.pass_attention(output)
        )
        self.hidden = model.run_batches(index, self.batches, self.hidden, watched)
        hook.remove()
        model.free_layer(index)
        if not all(torch.isfinite(hidden).all() for hidden in self.hidden):
            raise InputError(f"{model.source.path}: the outputs of layer {index} are not finite")
