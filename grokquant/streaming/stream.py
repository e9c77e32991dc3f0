"""One model and everything that is to pass through it, layer by layer, each layer read once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.streaming.blocks import BlockwiseModel, Expert, Rows


class View:
    """What a layer does to `tokens`, some of all that pass it one after another.

    `attention` is the output of its attention [tokens, hidden]. In a layer with experts these get
    `inputs` [tokens, hidden] with `gates` [tokens, k], the largest first, of the `experts`.
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
        """Takes the next outputs [rows, time, hidden]; all tokens may come a second time."""
        y = output.flatten(0, -2)  # (tokens, hidden)
        first, last = (
            min(max(place - self._passed, 0), len(y))
            for place in (self.tokens.start, self.tokens.stop)
        )
        if last > first:
            self._outputs.append(y[first:last].cpu())
            self.attention = torch.cat(self._outputs)
        self._passed += len(y)

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        """Takes what reaches the experts, of all tokens."""
        kept = (t[self.tokens].clone() for t in (x, experts, gates))  # the rest may go
        self.inputs, self.experts, self.gates = kept

    def expert(self, number: int, expert: Expert, routed: Tensor) -> Expert:
        """What is to run in the place of `expert`, on the tokens `routed` [tokens] to it."""
        return expert


class Stream:
    """Batches of rows of a length of their own, on their way through `model`.

    `hidden` are the states of each batch [rows, time, hidden] after the layers that have run;
    `chosen` the experts of the last one [tokens, k] for each batch, that with the largest gate
    first, None where it was dense.
    """

    def __init__(self, model: BlockwiseModel, batches: Sequence[Rows]) -> None:
        self.model, self.batches = model, batches
        self.hidden = [model.embed(rows.tokens) for rows in batches]
        self.chosen: tuple[Tensor, ...] | None = None

    def tokens_of(self, batch: int) -> slice:
        """Which of all tokens are those of a batch."""
        sizes = [rows.tokens.numel() for rows in self.batches]
        return slice(sum(sizes[:batch]), sum(sizes[: batch + 1]))

    def run_layer(self, index: int, view: View | None = None) -> None:
        """Takes all rows through layer `index`; `view` is shown what happens inside.

        Raises InputError where the weights are so large that the states are not finite.
        """
        model, view = self.model, view or View(slice(0, 0))
        self.chosen = None

        def make_expert(number: int, x: Tensor, routed: Tensor) -> Expert:
            return view.expert(number, model.stored_expert(index, number), routed)

        mix = model.mix_experts(index, make_expert)

        def watched(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            order = gates.argsort(dim=-1, descending=True, stable=True)
            ranked = experts.gather(1, order)
            self.chosen = ranked.split([rows.tokens.numel() for rows in self.batches])
            view.route(x, ranked, gates.gather(1, order))
            return mix(x, experts, gates)

        model.load_layer(index)
        hook = model.attention_output(index).register_forward_hook(
            lambda _, args, output: view.pass_attention(output)
        )
        self.hidden = model.run_batches(index, self.batches, self.hidden, watched)
        hook.remove()
        model.free_layer(index)
        if not all(torch.isfinite(hidden).all() for hidden in self.hidden):
            raise InputError(f"{model.source.path}: the outputs of layer {index} are not finite")
