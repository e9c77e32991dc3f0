"""Quantizing one block while the calibration tokens pass through it."""

from collections.abc import Callable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration.hessian import Hessian, accumulate, blend
from grokquant.calibration.site import Site
from grokquant.job.plan import Plan
from grokquant.job.unit import round_unit
from grokquant.recipe import ExpertsSection
from grokquant.streaming.blocks import BlockwiseModel, Expert
from grokquant.types import QTensor, Unit, UnitReport

# What the Hessian of all tokens is worth in that of a starved expert, in tokens per input feature.
_PRIOR_TOKENS_PER_FEATURE = 0.1
# Below this many routed tokens per input feature an expert's own Hessian counts as starved.
_BLEND_TOKENS_PER_FEATURE = 4

# Makes an iterator over inputs [some tokens, features] of a site, each time it is called.
Inputs = Callable[[], Iterator[Tensor]]
# Makes the Hessian of a site, of blocks of so many columns if it is given a number.
BuildHessian = Callable[[int | None], Hessian]
Deliver = Callable[[Unit, QTensor, UnitReport], None]
Committed = Callable[[Unit], QTensor | None]


def is_starved(limits: ExpertsSection, tokens: int, features: int) -> bool:
    """Whether a Hessian of so few tokens over so many features needs that of all tokens as well."""
    floor = limits.blend_tokens
    return tokens < (_BLEND_TOKENS_PER_FEATURE * features if floor is None else floor)


class LayerQuantizer:
    """Layer `index` of a plan. Every quantized unit goes to `deliver` as soon as it is done, but
    those that `committed` knows are taken as they are.

    `tokens_per_expert` is filled by `run`.
    """

    def __init__(
        self,
        plan: Plan,
        model: BlockwiseModel,
        index: int,
        deliver: Deliver,
        committed: Committed,
    ) -> None:
        self.plan, self.model, self.index = plan, model, index
        self.deliver, self.committed = deliver, committed
        self.tokens_per_expert: list[int] = []
        self._everyone: dict[int | None, Hessian] = {}

    def run(self, hidden: Tensor) -> Tensor:
        """Quantizes the block and returns the hidden states after it, its errors included."""
        self.model.load_layer(self.index)
        self._quantize_attention(hidden)
        combine = self.model.combine_experts(self.index, self._make_expert)
        hidden = self.model.run_layer(self.index, hidden, combine)
        self.model.free_layer(self.index)
        return hidden

    def _quantize_attention(self, hidden: Tensor) -> None:
        """Quantizes what is planned outside the experts, in the order of the computation."""
        for unit in self.plan.units_of(self.index, experts=False):
            site = None
            if unit.method == "gptq" and self.committed(unit) is None:
                X = self.model.inputs_of(self.index, unit.tensor, hidden)
                site = Site(len(X), self._hessian(self._inputs(X), X.shape[1]))
            self.model.replace(self.index, unit.tensor, self._quantize(unit, site).dequantize())

    def _make_expert(self, expert: int, x: Tensor, token: Tensor) -> Expert:
        """Quantizes gate and up on one site, then down on what they make of it.

        `x` [tokens, hidden] are the inputs of all experts, `token` [routed] those of this one.
        """
        self.tokens_per_expert.append(len(token))
        features = x.shape[1]
        routed = self._inputs(x, token)
        span = self._span(expert, "gate", features)
        site = self._site(routed, len(token), features, span, partial(self._all_inputs, x))
        W_gate, W_up = (self._expert_weight(expert, part, site) for part in ("gate", "up"))
        hidden_units = self.model.hidden_units(self.index, expert, W_gate, W_up)

        def inner(inputs: Inputs) -> Inputs:
            return lambda: map(hidden_units, inputs())

        everyone = self._hessian(inner(self._inputs(x)), len(W_up))
        span = self._span(expert, "down", len(W_up))
        site = self._site(inner(routed), len(token), len(W_up), span, everyone)
        W_down = self._expert_weight(expert, "down", site)
        bias = self.model.expert_bias(self.index, expert, "down")
        return lambda x: F.linear(hidden_units(x), W_down, bias)

    def _inputs(self, x: Tensor, token: Tensor | None = None) -> Inputs:
        """The rows `token` of x, all of them by default, some at a time on the model's device."""
        device = self.model.device
        if token is None:
            return lambda: (part.to(device) for (part,) in self.model.parts(x))
        return lambda: (x[part].to(device) for (part,) in self.model.parts(token))

    def _hessian(self, inputs: Inputs, features: int) -> BuildHessian:
        return lambda block: accumulate(inputs(), features, block)

    def _all_inputs(self, x: Tensor, block: int | None) -> Hessian:
        """The Hessian of all tokens, made for the first starved expert of the layer."""
        if block not in self._everyone:
            self._everyone[block] = accumulate(self._inputs(x)(), x.shape[1], block)
        return self._everyone[block]

    def _expert_weight(self, expert: int, part: str, site: Site) -> Tensor:
        """The matrix that the block goes on with: quantized where planned, else as it is."""
        tensor = self._tensor(expert, part)
        unit = self.plan.unit_of_tensor.get(tensor)
        if unit is None:
            return self.model.expert_weight(tensor)
        return self._quantize(unit, site).dequantize().to(self.model.dtype)

    def _quantize(self, unit: Unit, site: Site | None) -> QTensor:
        if (done := self.committed(unit)) is not None:
            return done
        rule = self.plan.rule_of(unit.name)
        ref = self.plan.checkpoint.source.tensors[unit.tensor]
        quantized, report = round_unit(unit, rule, ref, site, self.model.device)
        self.deliver(unit, quantized, report)
        return quantized

    def _span(self, expert: int, part: str, features: int) -> int:
        """How many of a matrix's input features the feedback of one of them can reach."""
        unit = self.plan.unit_of_tensor.get(self._tensor(expert, part))
        block = self.plan.rule_of(unit.name).hessian_block if unit else None
        return min(block or features, features)

    def _tensor(self, expert: int, part: str) -> str:
        return self.model.family.expert_tensors(self.index, expert)[part]

    def _site(
        self, inputs: Inputs, tokens: int, features: int, span: int, everyone: BuildHessian
    ) -> Site:
        """The site of `tokens` inputs [tokens, features]; `everyone` makes all tokens' Hessian."""
        own, limits = self._hessian(inputs, features), self.plan.recipe.experts
        if tokens < limits.min_tokens:
            reason = f"{tokens} tokens, fewer than experts.min_tokens = {limits.min_tokens}"
            return Site(tokens, own, refusal=reason)
        if not is_starved(limits, tokens, span):
            return Site(tokens, own)
        prior = _PRIOR_TOKENS_PER_FEATURE * span
        return Site(
            tokens,
            lambda block: blend(own(block), everyone(block), prior),
            note=f"{tokens} tokens, blended with all tokens as a prior of {prior:.0f}",
        )
