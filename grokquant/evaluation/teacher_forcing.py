"""Teacher forcing: each quantized layer on the reference's own hidden states, its error alone.

The reference's states of some windows pass every layer of the quantized model beside the states on
its own path, so that its weights are read once. Experts go one step further: each gets exactly the
inputs of the reference's expert, so that their outputs can be subtracted token by token.
"""

import torch
from torch import Tensor

from grokquant.evaluation.cache import Entry
from grokquant.evaluation.report import Forced, RouterAgreement
from grokquant.streaming.blocks import BlockwiseModel, Expert, Rows
from grokquant.streaming.stream import Stream, View

# Divisors are norms of at least this: no division by zero where everything is zero.
_SMALLEST_NORM = 1e-20
# What a trace records of a layer, as named in the cache.
_TRACED = ("attention", "inputs", "experts", "gates", "contributions")


def router_agreement(chosen: Tensor, reference: Tensor) -> RouterAgreement:
    """Agreement of the experts [tokens, k] that two routers choose, largest gates first."""
    return RouterAgreement(
        router_top1=_share(chosen[:, 0] == reference[:, 0]),
        router_top2_set=_share(same_set(chosen[:, :2], reference[:, :2])),
        router_set=_share(same_set(chosen, reference)),
    )


def same_set(chosen: Tensor, reference: Tensor) -> Tensor:
    """Whether each token has the same experts [tokens, k], in any order: [tokens]."""
    return (chosen.sort(-1).values == reference.sort(-1).values).all(-1)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||."""
    return _ratio((x - reference).norm(), reference.norm())


def _ratio(error: Tensor, norm: Tensor) -> float:
    return (error / norm.clamp_min(_SMALLEST_NORM)).item()


def _share(true: Tensor) -> float:
    return true.double().mean().item()


class ReferenceTrace(View):
    """What happens to the first `tokens` inside a layer of the reference.

    Besides what a view records, `contributions` [tokens, k, hidden]: the output of each of a
    token's experts, times its gate.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(slice(0, tokens))
        self.contributions: Tensor | None = None

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        super().route(x, experts, gates)
        assert self.experts is not None
        self.contributions = torch.zeros((*self.experts.shape, x.shape[1]))

    def expert(self, number: int, expert: Expert, routed: Tensor) -> Expert:
        """The same expert, its outputs recorded. It runs on the `routed` tokens in their order."""
        assert self.experts is not None and self.gates is not None
        assert self.contributions is not None
        contributions = self.contributions
        gates = self.gates
        token, slot = torch.where(self.experts == number)
        done = 0

        def recorded(x: Tensor) -> Tensor:
            nonlocal done
            y = expert(x)  # (part, hidden)
            t = token[done : done + len(y)]  # fewer than y where the traced tokens end
            k = slot[done : done + len(y)]
            contributions[t, k] = gates[t, k, None] * y[: len(t)].float().cpu()
            done += len(y)
            return y

        return recorded

    def tensors(self) -> dict[str, Tensor]:
        """All that was recorded, by name."""
        held = {name: getattr(self, name) for name in _TRACED}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


class LayerProbe(View):
    """A quantized layer on the states of a `trace`: also the outputs of its experts for the inputs
    of the reference's.

    `damage` [experts] sums ||g (y_q - y)||^2 over the tokens of each expert; `mixed_error`
    [tokens, hidden] is the error of the combined output of the experts.
    """

    def __init__(
        self, tokens: slice, trace: ReferenceTrace, model: BlockwiseModel, experts: int
    ) -> None:
        super().__init__(tokens)
        self.trace = trace
        self.device = model.device
        self.damage = torch.zeros(experts, dtype=torch.float64)
        self.mixed_error = torch.zeros(0)

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        super().route(x, experts, gates)
        assert self.trace.inputs is not None
        self.mixed_error = torch.zeros_like(self.trace.inputs)

    def expert(self, number: int, expert: Expert, routed: Tensor) -> Expert:
        trace = self.trace
        assert trace.experts is not None and trace.gates is not None
        assert trace.inputs is not None and trace.contributions is not None
        for token, slot in BlockwiseModel.parts(*torch.where(trace.experts == number)):
            y = expert(trace.inputs[token].to(self.device)).float().cpu()  # (part, hidden)
            error = trace.gates[token, slot, None] * y - trace.contributions[token, slot]
            self.damage[number] += error.double().square().sum()
            self.mixed_error.index_add_(0, token, error)
        return expert

    def figures(self, left: Tensor, left_reference: Tensor) -> Forced:
        """The layer's figures, from its outputs `left` and those of the reference's layer for the
        same inputs, `left_reference`, both [rows, time, hidden]."""
        trace = self.trace
        tokens = left.shape[0] * left.shape[1]
        block = relative_error(left, left_reference)
        attention = relative_error(self.attention, trace.attention)
        if self.experts is None or trace.experts is None or trace.contributions is None:
            return Forced(tokens=tokens, block_error=block, attention_error=attention)
        mixed = trace.contributions.sum(1)  # (tokens, hidden)
        total = self.damage.sum()
        shares = self.damage / total if total > 0 else self.damage
        return Forced(
            **dict(router_agreement(self.experts, trace.experts)),
            tokens=tokens,
            block_error=block,
            attention_error=attention,
            experts_error=_ratio(self.mixed_error.norm(), mixed.norm()),
            damage=tuple(shares.tolist()),
        )


class ReferenceStream(Stream):
    """The reference on its way, with a `trace` of each layer for the first `windows` rows.

    Layers in the cache are taken from there: then their weights are not read.
    """

    def __init__(
        self, model: BlockwiseModel, batches: list[Rows], windows: int, cache: Entry | None = None
    ) -> None:
        super().__init__(model, batches)
        self.windows = windows
        self.cache = cache
        self.entered = self.hidden[0][:windows]
        self.trace = ReferenceTrace(0)

    @property
    def left(self) -> Tensor:
        """The states of the first windows after the layer, [windows, time, hidden]."""
        return self.hidden[0][: self.windows]

    def run_layer(self, index: int, view: View | None = None) -> None:
        self.entered = self.left
        self.trace = ReferenceTrace(self.windows * self.hidden[0].shape[1])
        cached = self.cache.read(index) if self.cache else None
        if cached is not None:
            self._restore(cached)
            return
        super().run_layer(index, self.trace if self.windows else None)
        if self.cache:
            self.cache.write(index, self._tensors(), len(self.model.layers))

    def _tensors(self) -> dict[str, Tensor]:
        """States after the layer and what happened inside, as they are cached."""
        named = {f"hidden.{i}": hidden for i, hidden in enumerate(self.hidden)}
        named |= {f"chosen.{i}": chosen.short() for i, chosen in enumerate(self.chosen or ())}
        return named | (self.trace.tensors() if self.windows else {})

    def _restore(self, cached: dict[str, Tensor]) -> None:
        batches = range(len(self.batches))
        self.hidden = [cached[f"hidden.{i}"] for i in batches]
        routed = "chosen.0" in cached
        self.chosen = tuple(cached[f"chosen.{i}"].long() for i in batches) if routed else None
        for name in _TRACED:
            setattr(self.trace, name, cached.get(name))
