"""The experts of a layer: what their matrices read, and what they should give."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from grokquant.calibration.hessian import Hessian, accumulate
from grokquant.calibration.site import BuildHessian, Inputs, Prior, Site
from grokquant.job.held_out import kept_and_held_out
from grokquant.job.hidden_units import HiddenUnits
from grokquant.job.mixture import normalized
from grokquant.job.plan import Plan
from grokquant.methods import METHODS
from grokquant.methods.method import Aim
from grokquant.parallel import Ask
from grokquant.recipe import ExpertsSection
from grokquant.streaming.blocks import BlockwiseModel, Expert
from grokquant.types import Routed, Unit

# Weight of the Hessian of all tokens in that of a starved expert, in tokens per input feature.
_PRIOR_TOKENS_PER_FEATURE = 0.1
# An expert with fewer routed tokens per input feature than this counts as starved.
_BLEND_TOKENS_PER_FEATURE = 4


def is_starved(limits: ExpertsSection, tokens: int, features: int) -> bool:
    """Whether a Hessian of `tokens` over `features` must be blended with that of all tokens."""
    floor = limits.blend_tokens
    return tokens < (_BLEND_TOKENS_PER_FEATURE * features if floor is None else floor)


class LayerExperts:
    """The experts of layer `index` of a plan.

    `all_inputs` [tokens, hidden] are those of all its tokens, where an expert that has too few of
    its own is made.
    """

    all_inputs: Tensor | None = None

    def __init__(self, plan: Plan, model: BlockwiseModel, index: int) -> None:
        self.plan = plan
        self.model = model
        self.index = index
        self.limits = plan.recipe.experts
        self.is_dense = index in plan.lone_experts
        self._everyone: dict[int | None, Hessian] = {}

    def tensors(self, expert: int) -> Mapping[str, str]:
        """Checkpoint names of the matrices of an expert by part: gate, up, down."""
        return self.model.expert_tensors(self.index, expert)

    def unit(self, expert: int, part: str) -> Unit | None:
        """The unit of a matrix; None if it is kept."""
        return self.plan.unit_of_tensor.get(self.tensors(expert)[part])

    @property
    def first_part(self) -> str:
        """The first matrix of an expert: some have no gate."""
        return "gate" if "gate" in self.tensors(0) else "up"

    def blends(self, expert: int, tokens: int) -> bool:
        """Whether a Hessian of an expert is blended with that of all tokens."""
        sites = (self.first_part, "down")
        spans = [self._span(expert, part) for part in sites]
        units = filter(None, (self.unit(expert, part) for part in self.tensors(expert)))
        needed = any(METHODS[unit.method].needs_site for unit in units)
        starved = any(is_starved(self.limits, tokens, span) for span in spans)
        return needed and starved and tokens >= self.limits.min_tokens

    def site(
        self, expert: int, part: str, inputs: Inputs, tokens: int, everyone: BuildHessian
    ) -> Site:
        """What `part` of an expert reads: the inputs that its rounding sees, of all its `tokens`.

        Too few are blended with the Hessian that `everyone` makes, or refused.
        """
        features = self._features(expert, part)
        site = Site(tokens, features, inputs)
        if self.is_dense:
            return site
        if tokens < self.limits.min_tokens:
            few = f"{tokens} tokens, fewer than experts.min_tokens = {self.limits.min_tokens}"
            site.refusal = few
            return site
        span = self._span(expert, part)
        if is_starved(self.limits, tokens, span):
            site.prior = Prior(everyone, _PRIOR_TOKENS_PER_FEATURE * span)
        return site

    def everyones_inputs(self) -> Iterator[Tensor]:
        """The inputs of all experts, for all tokens."""
        assert self.all_inputs is not None
        return self.model.reader_of(self.all_inputs)()

    def everyones_hessian(self, block: int | None) -> Hessian:
        """The Hessian of all tokens, computed when the first expert of the layer is starved."""
        if block not in self._everyone:
            features = self._features(0, self.first_part)
            self._everyone[block] = accumulate(self.everyones_inputs(), features, block)
        return self._everyone[block]

    def _features(self, expert: int, part: str) -> int:
        tensor = self.tensors(expert)[part]
        return self.plan.checkpoint.source.tensors[tensor].shape[1]

    def _span(self, expert: int, part: str) -> int:
        """The number of input features that share one block of the Hessian."""
        features = self._features(expert, part)
        unit = self.unit(expert, part)
        return METHODS[unit.method].block_columns(features, unit.settings) if unit else features


class ExpertSites:
    """The two sites of an expert, for what is `routed` to it: its inputs, which gate and up read,
    and its hidden units, which down reads.

    With a guide, `ask` tells what its outputs should be, given those of the stored expert.
    """

    def __init__(
        self, experts: LayerExperts, expert: int, routed: Routed, ask: Ask | None = None
    ) -> None:
        self._experts = experts
        self._model = experts.model
        self._expert = expert
        self._routed = routed
        self._tokens = len(routed.token)
        self._guide = routed.guide if ask else None
        # The places among its tokens that rounding sees, then those held out, if any.
        self._parts = [torch.arange(self._tokens)]
        if ask and self._guide:
            self._parts = kept_and_held_out(self._guide.row)
            self._weights = normalized(self._guide.weight)
            self._wanted = _ask_once(ask, experts, expert, routed, self._parts)

    def of_inputs(self) -> Site:
        """The site of gate and up."""
        tokens = [self._routed.token[part] for part in self._parts]
        inputs = [self._model.reader_of(self._routed.x, token) for token in tokens]
        everyone = self._experts.everyones_hessian
        site = self._site(self._experts.first_part, inputs, everyone)
        if self._guide:
            references = [self._model.reader_of(self._guide.inputs, token) for token in tokens]
            aims = [
                Aim(self._weights[part], reference=reference)
                for part, reference in zip(self._parts, references, strict=True)
            ]
            site.take_aim(aims, inputs)
        return site

    def of_hidden_units(self, units: HiddenUnits, make: Expert) -> Site:
        """The site of down, which reads the `units` that `make` computes."""
        inputs: list[Inputs] = [partial(units.inputs, part) for part in self._parts]

        def everyone(block: int | None) -> Hessian:
            every = (self._model.by_rows(make, x) for x in self._experts.everyones_inputs())
            return accumulate(every, units.features, block)

        site = self._site("down", inputs, everyone)
        if self._guide:
            aims = [
                Aim(self._weights[part], outputs=partial(self._wanted_of, number))
                for number, part in enumerate(self._parts)
            ]
            site.take_aim(aims, inputs)
        return site

    def take_turn(self) -> None:
        """Asks for the outputs, if rounding has not: an expert has its turn in any case."""
        if self._guide:
            self._wanted()

    def _site(self, part: str, inputs: list[Inputs], everyone: BuildHessian) -> Site:
        return self._experts.site(self._expert, part, inputs[0], self._tokens, everyone)

    def _wanted_of(self, number: int) -> Tensor:
        return self._wanted()[number]


def _ask_once(
    ask: Ask, experts: LayerExperts, expert: int, routed: Routed, parts: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """Gives what down of an expert should give, for each of the parts of its tokens."""
    model, index = experts.model, experts.index
    expert_as_stored = model.stored_expert(index, expert)
    stored = [model.by_rows(expert_as_stored, routed.x[routed.token]).cpu()]
    bias = model.expert_bias(index, expert, "down")

    @cache
    def wanted() -> list[Tensor]:
        outputs = ask(stored.pop())  # which are not needed any more
        if bias is not None:
            outputs -= bias.float().cpu()
        return [outputs[part] for part in parts]

    return wanted
