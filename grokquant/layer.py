"""Quantizing one block while the calibration tokens pass through it."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration.blocks import BlockwiseModel
from grokquant.calibration.hessian import Hessian, accumulate, blend
from grokquant.plan import Plan
from grokquant.rounding import Site, round_unit
from grokquant.types import QTensor, Unit, UnitReport

# What the Hessian of all tokens is worth in that of a starved expert, in tokens per input feature.
_PRIOR_TOKENS_PER_FEATURE = 0.1
# Below this many routed tokens per input feature an expert's own Hessian counts as starved.
_BLEND_TOKENS_PER_FEATURE = 4

Deliver = Callable[[Unit, QTensor, UnitReport], None]


class LayerQuantizer:
    """Layer `index` of a plan. Every quantized unit goes to `deliver` as soon as it is done.

    `tokens_per_expert` is filled by `run`.
    """

    def __init__(self, plan: Plan, model: BlockwiseModel, index: int, deliver: Deliver) -> None:
        self.plan, self.model, self.index, self.deliver = plan, model, index, deliver
        self.tokens_per_expert: list[int] = []
        self._everyone: Hessian | None = None

    def run(self, hidden: Tensor) -> Tensor:
        """Quantizes the block and returns the hidden states after it, its errors included."""
        self.model.load_layer(self.index)
        self._quantize_attention(hidden)
        hidden = self.model.run_layer(self.index, hidden, self.model.mix_experts(self._run_expert))
        self.model.free_layer(self.index)
        return hidden

    def _quantize_attention(self, hidden: Tensor) -> None:
        """Quantizes what is planned outside the experts, in the order of the computation."""
        for unit in self.plan.units_of(self.index, experts=False):
            site = None
            if unit.method == "gptq":
                X = self.model.inputs_of(self.index, unit.tensor, hidden)
                site = self._site(X, partial(accumulate, X))
            self.model.replace(self.index, unit.tensor, self._quantize(unit, site).dequantize())

    def _run_expert(self, expert: int, x: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """Quantizes gate and up on one site, then down on what they make of it.

        `x` [tokens, hidden] are the inputs of all experts, `token` [routed] those of this one, with
        gates `gate` [routed]. Returns the quantized expert's outputs [routed, hidden].
        """
        self.tokens_per_expert.append(len(token))
        routed = x[token]
        site = self._site(routed, lambda: self._all_inputs(x))
        W_gate, W_up = (self._expert_weight(expert, part, site) for part in ("gate", "up"))

        def inner(x: Tensor) -> Tensor:
            return self.model.apply_gate(self.index, F.linear(x, W_gate), F.linear(x, W_up))

        hidden = inner(routed)  # (routed, inner)
        site = self._site(hidden, lambda: accumulate(inner(x)))
        return F.linear(hidden, self._expert_weight(expert, "down", site)).float()

    def _all_inputs(self, x: Tensor) -> Hessian:
        """The Hessian of all tokens, made for the first starved expert of the layer."""
        if self._everyone is None:
            self._everyone = accumulate(x)
        return self._everyone

    def _expert_weight(self, expert: int, part: str, site: Site) -> Tensor:
        """The matrix that the block goes on with: quantized where planned, else as it is."""
        tensor = self.model.family.expert_tensors(self.index, expert)[part]
        unit = self.plan.unit_of_tensor.get(tensor)
        if unit is None:
            return self.model.expert_weight(tensor)
        return self._quantize(unit, site).dequantize().to(self.model.dtype)

    def _quantize(self, unit: Unit, site: Site | None) -> QTensor:
        rule = self.plan.rule_of(unit.name)
        ref = self.plan.checkpoint.source.tensors[unit.tensor]
        quantized, report = round_unit(unit, rule, ref, site)
        self.deliver(unit, quantized, report)
        return quantized

    def _site(self, X: Tensor, everyone: Callable[[], Hessian]) -> Site:
        """The site of inputs X [tokens, in]; `everyone` makes the Hessian of all tokens."""
        tokens, features = X.shape
        limits = self.plan.recipe.experts
        if tokens < limits.min_tokens:
            reason = f"{tokens} tokens, fewer than experts.min_tokens = {limits.min_tokens}"
            return Site(tokens, partial(accumulate, X), refusal=reason)
        floor = limits.blend_tokens
        if tokens >= (_BLEND_TOKENS_PER_FEATURE * features if floor is None else floor):
            return Site(tokens, partial(accumulate, X))
        prior = _PRIOR_TOKENS_PER_FEATURE * features
        return Site(
            tokens,
            lambda: blend(accumulate(X), everyone(), prior),
            note=f"{tokens} tokens, blended with all tokens as a prior of {prior:.0f}",
        )
