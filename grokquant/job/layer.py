"""Quantizing one layer while the calibration tokens pass through it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache, partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration.hessian import Hessian, accumulate
from grokquant.calibration.site import BuildHessian, Inputs, Prior, Site
from grokquant.job.attention import LAST, missing_of_attention
from grokquant.job.division import Division
from grokquant.job.hidden_units import HiddenUnits, kept_tokens
from grokquant.job.mixture import Mixture, Original, inverse_squares, normalized
from grokquant.job.plan import Plan
from grokquant.job.read_ahead import ReadAhead
from grokquant.job.unit import report_of, round_unit
from grokquant.job.workdir import States
from grokquant.memory import memory_for
from grokquant.methods import METHODS
from grokquant.methods.method import Aim, UnusableHessian, errors_of
from grokquant.methods.refit import refit
from grokquant.parallel import ALONE, Ask
from grokquant.recipe import ExpertsSection
from grokquant.streaming.blocks import BlockwiseModel, Combine, Outputs, Routed
from grokquant.streaming.gradients import Metrics
from grokquant.threads import alone
from grokquant.types import QTensor, Unit, UnitReport

# Weight of the Hessian of all tokens in that of a starved expert, in tokens per input feature.
_PRIOR_TOKENS_PER_FEATURE = 0.1
# An expert with fewer routed tokens per input feature than this counts as starved.
_BLEND_TOKENS_PER_FEATURE = 4
# One row of tokens in so many is held out of the rounding of experts that have an aim.
_HELD_OUT = 8


Emit = Callable[[Unit, QTensor, UnitReport], None]
Committed = Callable[[Unit], QTensor | None]


def is_starved(limits: ExpertsSection, tokens: int, features: int) -> bool:
    """Whether a Hessian of `tokens` over `features` must be blended with that of all tokens."""
    floor = limits.blend_tokens
    return tokens < (_BLEND_TOKENS_PER_FEATURE * features if floor is None else floor)


class LayerQuantizer:
    """Layer `index` of a plan. Every unit goes to `emit` when it is final; units that `committed`
    returns are reused.

    `run` fills `tokens_per_expert`, and `revised` with the carried-over tensors that a method
    changed. Methods see it as their `Layer`.
    """

    inputs: Tensor
    outputs: Tensor
    reference_inputs: Tensor
    reference_outputs: Tensor

    def __init__(
        self,
        plan: Plan,
        model: BlockwiseModel,
        index: int,
        emit: Emit,
        committed: Committed,
        division: Division | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.plan = plan
        self.division = division or Division(plan, ALONE)
        self.model = model
        self.index = index
        self.emit = emit
        self.committed = committed
        self.output_gradients = metrics.of_sum if metrics else None
        self.site_gradients: Mapping[str, Tensor] = metrics.of_sites if metrics else {}
        self.tokens_per_expert: list[int] = []
        self.revised: dict[str, Tensor] = {}
        self.units: Sequence[Unit] = plan.units_of(index)
        self._is_dense = index in plan.lone_experts
        if self._is_dense:
            model.take_as_expert(index)
        methods = {unit.method for unit in self.units}
        self._rounding = {name: METHODS[name].begin_layer(self) for name in methods}
        self.revises = any(METHODS[name].revises for name in methods)
        self._held: dict[str, tuple[QTensor, UnitReport]] = {}
        self._everyone: dict[int | None, Hessian] = {}
        self._all_inputs: Tensor | None = None  # of the experts, where some of them need it
        self._original: Original | None = None
        # The inputs [tokens, in] of sites of attention in the original, by what they read.
        self._given: dict[str, Tensor] = {}
        tensors = plan.checkpoint.source.tensors
        self._reading = ReadAhead([tensors[unit.tensor] for unit in self._own_experts()])

    def _own_experts(self) -> list[Unit]:
        """The units of experts that are made here, expert by expert."""
        own = [unit for unit in self.units if self.division.is_made_here(unit)]
        return sorted(filter(self.plan.in_expert, own), key=lambda unit: unit.expert or 0)

    def run(self, states: States) -> States:
        """Quantizes the layer and returns the states after it, its errors included.

        `states` may be overwritten.
        """
        self.inputs = states.hidden
        self.model.load_layer(self.index)
        reference = self._run_reference(states.reference)
        with closing(self._reading):
            self.outputs = self._run_quantized(states.hidden)
            if self.revises:
                self._revise()
                self.outputs = self._run_quantized(states.hidden)
        self.model.free_layer(self.index)
        self._emit_held()
        return States(self.outputs, reference)

    def original(self, tensor: str) -> Tensor:
        """A tensor of the layer as the source has it, on the model's device."""
        return self.plan.checkpoint.source.tensors[tensor].load_on(self.model.device)

    def expert_tensors(self, expert: int) -> Mapping[str, str]:
        return self.model.expert_tensors(self.index, expert)

    @property
    def mixture_gain(self) -> Tensor | None:
        return self.model.mixture_gain(self.index)

    @property
    def attention_gain(self) -> Tensor | None:
        return self.model.attention_gain(self.index)

    def slopes(self, expert: int, gate: Tensor, up: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return self.model.slopes(self.index, expert, gate, up, rows)

    def head_directions(self) -> Tensor:
        return self.model.head_directions

    def later_routers(self) -> Iterator[Tensor]:
        return self.model.later_routers(self.index)

    def _run_reference(self, hidden: Tensor | None) -> Tensor | None:
        """The states after this layer of the original model, before anything is quantized."""
        if hidden is None:
            return None
        self.reference_inputs = hidden
        self._given = {
            units[0].reads: self.model.inputs_of(self.index, units[0].tensor, hidden)
            for units in self.plan.sites_outside_experts(self.index)
            if any(map(self.plan.aims_alone, units))
        }
        before: list[Tensor] = []
        has_aim = self.plan.takes_turns(self.index)
        keep = before.append if has_aim else None
        combine = self._record_original(before) if has_aim else self._combine_stored()
        self.reference_outputs = self.model.run_layer(self.index, hidden, combine, keep)
        return self.reference_outputs

    def _combine_stored(self) -> Combine:
        """Combines the experts as they are stored, each where its owner is."""
        owners = self.division.owners(self.index)
        return self.model.combine_stored(self.index, self.division.team, owners)

    def _record_original(self, before: list[Tensor]) -> Combine:
        """Combines the experts as they are stored and keeps what they take and give; `before` gets
        the states without them."""
        combine = self._combine_stored()

        def combine_and_keep(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            outputs = combine(x, experts, gates)
            self._original = Original(x, outputs, before.pop().flatten(0, 1))
            return outputs

        return combine_and_keep

    def _run_quantized(self, hidden: Tensor) -> Tensor:
        self.tokens_per_expert = []
        self._refit_attention(hidden)
        self._quantize_outside_experts(hidden)
        if not self.revises:
            self._given.clear()
        self._refit_router(hidden)
        if not self.model.family.runs_experts:
            self._quantize_experts_at_once()
        original = self._original
        if original is None:
            return self._run(hidden, self._combine_quantized())
        if not self.revises:  # then the layer runs again, and its memory is kept
            self._original = None
        before: list[Tensor] = []
        aim_and_combine = self._combine_in_turn(original, before)
        return self.model.run_layer(self.index, hidden, aim_and_combine, before.append)

    def _run(self, hidden: Tensor, combine: Combine) -> Tensor:
        """The states after the layer, over those before it unless a method may ask for them."""
        if self.revises or self.plan.needs_reference:
            return self.model.run_layer(self.index, hidden, combine)
        return self.model.run_layer_over(self.index, hidden, combine)

    def _combine_quantized(self) -> Combine:
        """Combines the experts and quantizes each where its owner is."""
        owners = self.division.owners(self.index)
        team = self.division.team
        combine = self.model.combine_experts(self.index, self._make_expert, team, owners)

        def count_and_combine(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            self._count(x, experts)
            return combine(x, experts, gates)

        return count_and_combine

    def _combine_in_turn(self, original: Original, before: list[Tensor]) -> Combine:
        """The same towards the sum of all experts in the original; `before` gets the states without
        them."""
        owners = self.division.owners(self.index)
        team = self.division.team

        def aim_and_combine(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            stored = self._combine_stored()(x, experts, gates)
            mixture = Mixture(original, before.pop(), stored, self.mixture_gain, team)
            del stored
            self._count(x, experts)
            make, guide, answer = self._make_expert, mixture.guide, mixture.outputs_for
            combine = self.model.combine_in_turn(self.index, make, guide, answer, team, owners)
            return combine(x, experts, gates)

        return aim_and_combine

    def _count(self, x: Tensor, experts: Tensor) -> None:
        """Notes the tokens of each expert [tokens, k], and the inputs of all for those of few."""
        if self._is_dense:
            return
        team = self.division.team
        owners = self.division.owners(self.index)
        counts = team.total(experts.flatten().bincount(minlength=len(owners)))
        self.tokens_per_expert = counts.tolist()
        starved = {owners[e] for e, n in enumerate(self.tokens_per_expert) if self._blends(e, n)}
        self._all_inputs = team.gather(x, starved)

    def _refit_attention(self, hidden: Tensor) -> None:
        if names := self.plan.refitted_attention(self.index):
            before = self.model.inputs_of(self.index, names[0], self.reference_inputs)
            self._refit(names, before, self.model.inputs_of(self.index, names[0], hidden))

    def _refit_router(self, hidden: Tensor) -> None:
        name = self.plan.refitted_router(self.index)
        if name and self._original is not None:
            inputs = self.model.inputs_of(self.index, name, hidden)
            self._refit([name], self._original.inputs, inputs)

    def _refit(self, names: list[str], before: Tensor, inputs: Tensor) -> None:
        """Fits matrices to what they give for the inputs `before` [tokens, in] of the original."""
        team = self.division.team
        has_moved = torch.tensor([int(not torch.equal(before, inputs))])
        if not team.total(has_moved).any():
            return
        where = self.division.writer_of_file(self.plan.file_of[names[0]])
        sides = [team.gather(rows, {where}) for rows in (before, inputs)]
        fitted = self._fitted(names, *sides) if team.is_here(where) else None
        tensors = self.plan.checkpoint.source.tensors
        layout = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
        self.revised |= team.shared(fitted, dict, dict, layout, where)
        for name in names:
            self.model.replace(self.index, name, self.revised[name])

    def _fitted(
        self, names: list[str], before: Tensor | None, inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Those matrices, from the inputs [tokens, in] of all rows."""
        assert before is not None and inputs is not None
        aim = Aim(torch.ones(len(inputs)), reference=self._inputs(before))
        site = Site(len(inputs), inputs.shape[1], self._inputs(inputs), aim=aim)
        matrices = [self.original(name) for name in names]
        with suppress(UnusableHessian):  # states are not finite; the run stops after this layer
            matrices = refit(matrices, site)
        return dict(zip(names, matrices, strict=True))

    def _quantize_outside_experts(self, hidden: Tensor) -> None:
        """Attention and other matrices, site by site in the order of the computation."""
        for units in self.plan.sites_outside_experts(self.index):
            known = {unit.name: self._known(unit) for unit in units}
            left = [unit for unit in units if known[unit.name] is None]
            site = None
            if any(METHODS[unit.method].needs_site for unit in left):
                X = self.model.inputs_of(self.index, units[0].tensor, hidden)  # [tokens, in]
                site = self._site_outside_experts(X, units[0], hidden)
            for unit in units:
                own = site if METHODS[unit.method].needs_site else None
                quantized = known[unit.name] or self._made_by_its_maker(unit, own)
                self.model.replace(self.index, unit.tensor, quantized.dequantize())

    def _site_outside_experts(self, X: Tensor, unit: Unit, hidden: Tensor) -> Site | None:
        """The site with all inputs of a unit, where that is made."""
        if unit.reads in self._given:
            return self._site_of_attention(X, unit, hidden)
        everything = self.division.team.gather(X, {self.division.maker_of(unit)})
        if everything is None:
            return None
        return Site(len(everything), everything.shape[1], self._inputs(everything))

    def _site_of_attention(self, X: Tensor, unit: Unit, hidden: Tensor) -> Site | None:
        """The site of a matrix of attention, and what its outputs should be, where it is made."""
        goal, rms = self._given[unit.reads], torch.ones(len(X))
        is_last = unit.part == LAST
        if is_last:
            states = self.reference_inputs, hidden
            goal, rms = missing_of_attention(self.model, self.index, goal, *states)
        makers = {self.division.maker_of(unit)}
        gathered = [self.division.team.gather(t, makers) for t in (X, goal, rms.unsqueeze(1))]
        if any(t is None for t in gathered):
            return None
        every_X, every_goal, every_rms = (t for t in gathered if t is not None)
        weights = alone(lambda: inverse_squares(every_rms.squeeze(1)))
        row = torch.arange(len(every_X)) // self.inputs.shape[1]
        sites = []
        for part in _kept_and_held_out(row):
            aim = Aim(normalized(weights[part]))
            if is_last:
                aim = replace(aim, outputs=partial(every_goal.__getitem__, part))
            else:
                aim = replace(aim, reference=self._inputs(every_goal, part))
            inputs = self._inputs(every_X, part)
            sites.append(Site(len(part), every_X.shape[1], inputs, aim=aim))
        own, *held_out = sites
        own.held_out = held_out[0] if held_out else None
        return own

    def _made_by_its_maker(self, unit: Unit, site: Site | None) -> QTensor:
        made = self._round(unit, site) if self.division.is_made_here(unit) else None
        return self.division.shared(unit, made, self.model.device)

    def _quantize_experts_at_once(self) -> None:
        """Experts of a model whose code computes them all at once, by methods that need no data."""
        for unit in self.units:
            if unit.expert is not None:
                quantized = self._known(unit) or self._made_by_its_maker(unit, None)
                self.model.replace_expert(unit, quantized.dequantize())

    def _make_expert(self, expert: int, given: Routed, ask: Ask | None = None) -> Outputs:
        """Quantizes gate and up on one site, then down on the hidden units that they make."""
        x = given.x
        token = given.token
        parts = self._parts(given)
        to_inner, to_down = self._aims(expert, given, parts, ask)
        routed = [self._inputs(x, token[part]) for part in parts]
        everyone = self._everyones_hessian
        first = self._first_part
        site = self._site(expert, first, routed, len(token), x.shape[1], everyone, to_inner)
        W_gate = self._expert_weight(expert, "gate", site) if first == "gate" else None
        W_up = self._expert_weight(expert, "up", site)
        del site  # with the factors of its Hessian
        make = self.model.hidden_units(self.index, expert, W_gate, W_up)
        features = len(W_up)
        units = HiddenUnits(self.model, make, features, given, kept_tokens(self.plan))

        def everyones(block: int | None) -> Hessian:
            inputs = (self.model.by_rows(make, x) for x in self._everyones_inputs())
            return accumulate(inputs, features, block)

        inner: list[Inputs] = [partial(units.inputs, part) for part in parts]
        site = self._site(expert, "down", inner, len(token), features, everyones, to_down)
        W_down = self._expert_weight(expert, "down", site)
        for aim in to_down:
            assert aim.outputs is not None
            aim.outputs()  # an expert has its turn even where its rounding did not ask
        bias = self.model.expert_bias(self.index, expert, "down")
        return lambda part: F.linear(units.of(part), W_down, bias)

    def _parts(self, routed: Routed) -> list[Tensor]:
        """The places among the tokens of an expert that its rounding sees, and those held out.
        Without an aim all in one."""
        if routed.guide is None:
            return [torch.arange(len(routed.token))]
        return _kept_and_held_out(routed.guide.row)

    def _aims(
        self, expert: int, routed: Routed, parts: list[Tensor], ask: Ask | None
    ) -> tuple[list[Aim], list[Aim]]:
        """What gate and up, and what down of an expert should give, for each part of its tokens;
        nothing without an aim."""
        guide = routed.guide
        if guide is None or ask is None:
            return [], []
        expert_as_stored = self.model.stored_expert(self.index, expert)
        stored = [self.model.by_rows(expert_as_stored, routed.x[routed.token]).cpu()]
        del expert_as_stored
        bias = self.model.expert_bias(self.index, expert, "down")

        @cache
        def outputs() -> list[Tensor]:
            wanted = ask(stored.pop())  # which are not needed any more
            if bias is not None:
                wanted -= bias.float().cpu()
            return [wanted[part] for part in parts]

        def of_part(number: int) -> Tensor:
            return outputs()[number]

        weights = normalized(guide.weight)
        to_inner = [
            Aim(weights[part], reference=self._inputs(guide.inputs, routed.token[part]))
            for part in parts
        ]
        to_down = [
            Aim(weights[part], outputs=partial(of_part, number))
            for number, part in enumerate(parts)
        ]
        return to_inner, to_down

    def _inputs(self, x: Tensor, token: Tensor | None = None) -> Inputs:
        """The rows `token` of x (default: all), some at a time on the model's device."""
        device = self.model.device
        if token is None:
            return lambda: (part.to(device) for part in self.model.inputs_at_once(x))
        return lambda: (x[part].to(device) for part in self.model.inputs_at_once(token))

    def _everyones_inputs(self) -> Iterator[Tensor]:
        """The inputs of all experts, for all tokens."""
        assert self._all_inputs is not None
        return self._inputs(self._all_inputs)()

    def _everyones_hessian(self, block: int | None) -> Hessian:
        """The Hessian of all tokens, computed when the first expert of the layer is starved."""
        if block not in self._everyone:
            features = self._features(0, self._first_part)
            self._everyone[block] = accumulate(self._everyones_inputs(), features, block)
        return self._everyone[block]

    def _blends(self, expert: int, tokens: int) -> bool:
        """Whether a Hessian of an expert is blended with that of all tokens."""
        limits = self.plan.recipe.experts
        sites = (self._first_part, "down")
        spans = [self._span(expert, part, self._features(expert, part)) for part in sites]
        units = filter(None, (self._unit(expert, part) for part in self.expert_tensors(expert)))
        needed = any(METHODS[unit.method].needs_site for unit in units)
        starved = any(is_starved(limits, tokens, span) for span in spans)
        return needed and starved and tokens >= limits.min_tokens

    @property
    def _first_part(self) -> str:
        """The first matrix of an expert: some have no gate."""
        return "gate" if "gate" in self.expert_tensors(0) else "up"

    def _features(self, expert: int, part: str) -> int:
        return self.plan.checkpoint.source.tensors[self._tensor(expert, part)].shape[1]

    def _site(
        self,
        expert: int,
        part: str,
        inputs: list[Inputs],
        tokens: int,
        features: int,
        everyone: BuildHessian,
        aims: list[Aim],
    ) -> Site:
        """The site that `part` of an expert reads, with a prior if it has too few tokens."""
        limits = self.plan.recipe.experts
        own = inputs[0]
        if tokens < limits.min_tokens and not self._is_dense:
            reason = f"{tokens} tokens, fewer than experts.min_tokens = {limits.min_tokens}"
            return Site(tokens, features, own, refusal=reason)
        site = Site(tokens, features, own)
        span = self._span(expert, part, features)
        if is_starved(limits, tokens, span) and not self._is_dense:
            site.prior = Prior(everyone, _PRIOR_TOKENS_PER_FEATURE * span)
        if aims:
            site.aim = aims[0]
        if len(aims) > 1:
            site.held_out = Site(len(aims[1].weights), features, inputs[1], aim=aims[1])
        return site

    def _span(self, expert: int, part: str, features: int) -> int:
        """The number of input features that share one block of the Hessian."""
        unit = self._unit(expert, part)
        return METHODS[unit.method].block_columns(features, unit.settings) if unit else features

    def _expert_weight(self, expert: int, part: str, site: Site) -> Tensor:
        """The matrix for the rest of the layer: quantized if planned, else unchanged."""
        unit = self._unit(expert, part)
        if unit is None:
            return self.model.expert_weight(self._tensor(expert, part))
        quantized = self._known(unit) or self._round(unit, site)
        return quantized.dequantize().to(self.model.dtype)

    def _unit(self, expert: int, part: str) -> Unit | None:
        return self.plan.unit_of_tensor.get(self._tensor(expert, part))

    def _tensor(self, expert: int, part: str) -> str:
        return self.expert_tensors(expert)[part]

    def _known(self, unit: Unit) -> QTensor | None:
        """The unit if it is rounded: in this run of a held layer, or by an earlier run.

        A held layer is redone as a whole, whatever of it is committed.
        """
        if not self.revises:
            return self.committed(unit)
        return self._held[unit.name][0] if unit.name in self._held else None

    def _round(self, unit: Unit, site: Site | None) -> QTensor:
        ref = self._reading.of(self.plan.checkpoint.source.tensors[unit.tensor])
        rounding = self._rounding[unit.method]
        with memory_for(f"{unit.name}: {unit.method}"):
            quantized, report = round_unit(unit, ref, rounding, site, self.model.device)
        if self.revises:
            self._held[unit.name] = quantized, report
        else:
            self.emit(unit, quantized, report)
        return quantized

    def _revise(self) -> None:
        """Applies the changes that methods make after the whole layer has run."""
        for rounding in self._rounding.values():
            revision = rounding.revise()
            for name, quantized in revision.codes.items():
                self._held[name] = quantized, self._revised_report(name, quantized)
            for tensor, value in revision.tensors.items():
                self.revised[tensor] = value
                self.model.replace(self.index, tensor, value)

    def _revised_report(self, name: str, quantized: QTensor) -> UnitReport:
        """The report of a revised unit; its output error is no longer known."""
        start = perf_counter()
        unit = self.plan.units[name]
        errors = errors_of(self.original(unit.tensor), quantized)
        before = self._held[name][1]
        return report_of(unit, errors, start, before.tokens, None, before.fallback, before.note)

    def _emit_held(self) -> None:
        for unit in self.units:
            if unit.name in self._held and self.committed(unit) is None:
                self.emit(unit, *self._held[unit.name])
        self._held.clear()


def _kept_and_held_out(row: Tensor) -> list[Tensor]:
    """Places among tokens of these rows, those of every eighth row apart; all in one if one were
    empty."""
    is_held_out = row % _HELD_OUT == _HELD_OUT - 1
    if is_held_out.all() or not is_held_out.any():
        return [torch.arange(len(row))]
    return [torch.where(~is_held_out)[0], torch.where(is_held_out)[0]]
