"""Teacher forcing: each quantized layer on the reference's own hidden states, its error alone.

The reference's states of some windows pass every layer of the quantized model beside the states on
its own path, so that its weights are read once. Experts go one step further: each gets exactly the
inputs of the reference's expert, so that their outputs can be subtracted token by token. Of several
processes, the first one has all of these windows.
"""

import torch
from torch import Tensor

from grokquant.evaluation.cache import Entry
from grokquant.evaluation.report import Forced, RouterAgreement
from grokquant.parallel import ALONE, Team
from grokquant.streaming.blocks import BlockwiseModel, Rows
from grokquant.streaming.stream import Stream, View

# Divisors are norms of at least this: no division by zero where everything is zero.
SMALLEST_NORM = 1e-20
# What a trace records of a layer, as named in the cache.
_TRACED = ("attention", "inputs", "experts", "gates", "contributions")


def agreeing(chosen: Tensor, reference: Tensor) -> Tensor:
    """Where the experts [tokens, k] that two routers choose agree, largest gates first: booleans
    [tokens, 3] for the first expert, the first two, and all."""
    return torch.stack(
        [
            chosen[:, 0] == reference[:, 0],
            same_set(chosen[:, :2], reference[:, :2]),
            same_set(chosen, reference),
        ],
        dim=1,
    )


def router_agreement(agree: Tensor) -> RouterAgreement:
    """The shares of tokens that are `agreeing`."""
    top1, top2_set, all_of_them = agree.double().mean(0).tolist()
    return RouterAgreement(router_top1=top1, router_top2_set=top2_set, router_set=all_of_them)


def same_set(chosen: Tensor, reference: Tensor) -> Tensor:
    """Whether each token has the same experts [tokens, k], in any order: [tokens]."""
    return (chosen.sort(-1).values == reference.sort(-1).values).all(-1)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||."""
    return _ratio((x - reference).norm(), reference.norm())


def _ratio(error: Tensor, norm: Tensor) -> float:
    return (error / norm.clamp_min(SMALLEST_NORM)).item()


class ReferenceTrace(View):
    """What happens to some tokens inside a layer of the reference.

    Besides what a view records, `contributions` [tokens, k, hidden]: the output of each of a
    token's experts, times its gate.
    """

    def __init__(self, tokens: slice) -> None:
        super().__init__(tokens)
        self.contributions: Tensor | None = None

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        super().route(x, experts, gates)
        assert self.experts is not None
        self.contributions = torch.zeros((*self.experts.shape, x.shape[1]))

    def output(self, number: int, token: Tensor, y: Tensor) -> None:
        assert self.experts is not None and self.gates is not None
        assert self.contributions is not None
        traced = (token >= self.tokens.start) & (token < self.tokens.stop)
        t = token[traced] - self.tokens.start
        k = self.slots(t, number)
        self.contributions[t, k] = self.gates[t, k, None] * y[traced].float()

    def slots(self, token: Tensor, number: int) -> Tensor:
        """Which of their experts this one is for each of the traced tokens [part]."""
        assert self.experts is not None
        return (self.experts[token] == number).int().argmax(1)

    def tensors(self) -> dict[str, Tensor]:
        """All that was recorded, by name."""
        held = {name: getattr(self, name) for name in _TRACED}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


class LayerProbe(View):
    """A quantized layer on the states of a `trace`: also the outputs of its experts for the inputs
    of the reference's, which are its extra tokens.

    `damage` float64 [tokens, k] is ||g (y_q - y)||^2 for each expert of each token; `mixed_error`
    [tokens, hidden] is the error of the combined output of the experts.
    """

    def __init__(self, tokens: slice, trace: ReferenceTrace, experts: int) -> None:
        super().__init__(tokens)
        self.trace = trace
        self.count = experts
        self.extra = 0 if trace.inputs is None else len(trace.inputs)
        self.damage = torch.zeros(0, dtype=torch.float64)
        self.mixed_error = torch.zeros(0)

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        super().route(x, experts, gates)
        assert self.trace.inputs is not None and self.trace.experts is not None
        self.damage = torch.zeros(self.trace.experts.shape, dtype=torch.float64)
        self.mixed_error = torch.zeros_like(self.trace.inputs)

    def fill(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        trace = self.trace
        assert trace.inputs is not None
        assert trace.experts is not None and trace.gates is not None
        x.copy_(trace.inputs)
        experts.copy_(trace.experts)
        gates.copy_(trace.gates)

    def output(self, number: int, token: Tensor, y: Tensor) -> None:
        trace = self.trace
        assert trace.gates is not None and trace.contributions is not None
        t = token[token < self.extra]  # the first of them
        k = trace.slots(t, number)
        error = trace.gates[t, k, None] * y[: len(t)].float() - trace.contributions[t, k]
        self.damage[t, k] = error.double().square().sum(1)
        self.mixed_error.index_add_(0, t, error)

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
        damage = torch.zeros(self.count, dtype=torch.float64)
        damage.index_add_(0, trace.experts.flatten(), self.damage.flatten())
        total = damage.sum()
        shares = damage / total if total > 0 else damage
        return Forced(
            **dict(router_agreement(agreeing(self.experts, trace.experts))),
            tokens=tokens,
            block_error=block,
            attention_error=attention,
            experts_error=_ratio(self.mixed_error.norm(), mixed.norm()),
            damage=tuple(shares.tolist()),
        )


class ReferenceStream(Stream):
    """The reference on its way, with a `trace` of each layer for the first `windows` rows of batch
    1, the first text. Batch 0 is exact.

    Layers in the cache are taken from there: then their weights are not read.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        batches: list[Rows],
        windows: int,
        cache: Entry | None = None,
        team: Team = ALONE,
    ) -> None:
        super().__init__(model, batches, team)
        self.exact = batches[0].tokens.numel()
        self.windows = windows
        self.cache = cache
        self.entered = self.left
        self.trace = ReferenceTrace(slice(0, 0))

    @property
    def left(self) -> Tensor:
        """The states of the first windows after the layer, [windows, time, hidden]."""
        return self.hidden[1][: self.windows]

    def run_layer(self, index: int, view: View | None = None) -> None:
        self.entered = self.left
        text = self.tokens_of(1)
        traced = self.windows * self.batches[1].tokens.shape[1]
        self.trace = ReferenceTrace(slice(text.start, text.start + traced))
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
