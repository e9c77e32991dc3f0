"""Quantizing one layer while the calibration tokens pass through it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration.site import Site
from grokquant.job.attention import Attention
from grokquant.job.division import Division
from grokquant.job.experts import ExpertSites, LayerExperts
from grokquant.job.hidden_units import HiddenUnits, kept_tokens
from grokquant.job.mixture import Mixture, Original
from grokquant.job.plan import Plan
from grokquant.job.read_ahead import ReadAhead
from grokquant.job.unit import report_of, round_unit
from grokquant.job.workdir import States
from grokquant.memory import memory_for
from grokquant.methods import METHODS
from grokquant.methods.method import Aim, UnusableHessian, errors_of
from grokquant.methods.refit import refit
from grokquant.parallel import ALONE, Ask
from grokquant.streaming.blocks import BlockwiseModel, Combine, Outputs, Routed
from grokquant.streaming.gradients import Metrics
from grokquant.types import QTensor, Unit, UnitReport

Emit = Callable[[Unit, QTensor, UnitReport], None]
Committed = Callable[[Unit], QTensor | None]


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
        self._experts = LayerExperts(plan, model, index)
        if self._experts.is_dense:
            model.take_as_expert(index)
        self._attention = Attention(self.division, model, index)
        methods = {unit.method for unit in self.units}
        self._rounding = {name: METHODS[name].begin_layer(self) for name in methods}
        self.revises = any(METHODS[name].revises for name in methods)
        self._held: dict[str, tuple[QTensor, UnitReport]] = {}
        self._original: Original | None = None
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
        self._rounding.clear()  # refers to this layer: now its states are free
        return States(self.outputs, reference)

    def original(self, tensor: str) -> Tensor:
        """A tensor of the layer as the source has it, on the model's device."""
        return self.plan.checkpoint.source.tensors[tensor].load_on(self.model.device)

    def expert_tensors(self, expert: int) -> Mapping[str, str]:
        return self._experts.tensors(expert)

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
        self._attention.record(hidden)
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
            self._attention.forget()
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
        if self._experts.is_dense:
            return
        team = self.division.team
        owners = self.division.owners(self.index)
        counts = team.total(experts.flatten().bincount(minlength=len(owners)))
        self.tokens_per_expert = counts.tolist()
        numbered = enumerate(self.tokens_per_expert)
        starved = {owners[e] for e, tokens in numbered if self._experts.blends(e, tokens)}
        self._experts.all_inputs = team.gather(x, starved)

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
        aim = Aim(torch.ones(len(inputs)), reference=self.model.reader_of(before))
        site = Site(len(inputs), inputs.shape[1], self.model.reader_of(inputs), aim=aim)
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
        if self._attention.has_aim(unit):
            return self._attention.site(X, unit, hidden)
        everything = self.division.team.gather(X, {self.division.maker_of(unit)})
        if everything is None:
            return None
        return Site(len(everything), everything.shape[1], self.model.reader_of(everything))

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
        sites = ExpertSites(self._experts, expert, given, ask)
        site = sites.of_inputs()
        has_gate = self._experts.first_part == "gate"
        W_gate = self._expert_weight(expert, "gate", site) if has_gate else None
        W_up = self._expert_weight(expert, "up", site)
        del site  # with the factors of its Hessian
        make = self.model.hidden_units(self.index, expert, W_gate, W_up)
        units = HiddenUnits(self.model, make, len(W_up), given, kept_tokens(self.plan))
        site = sites.of_hidden_units(units, make)
        W_down = self._expert_weight(expert, "down", site)
        sites.take_turn()
        bias = self.model.expert_bias(self.index, expert, "down")
        return lambda part: F.linear(units.of(part), W_down, bias)

    def _expert_weight(self, expert: int, part: str, site: Site) -> Tensor:
        """The matrix for the rest of the layer: quantized if planned, else unchanged."""
        unit = self._experts.unit(expert, part)
        if unit is None:
            return self.model.expert_weight(self._experts.tensors(expert)[part])
        quantized = self._known(unit) or self._round(unit, site)
        return quantized.dequantize().to(self.model.dtype)

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
