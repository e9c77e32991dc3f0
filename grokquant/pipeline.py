"""The story of `grokquant quantize`: from a recipe to a smaller checkpoint that is proved complete.

Plan; then block by block, on the calibration tokens as the quantized blocks before it left them:
load, quantize, run, write, free. Then prove that every planned unit is there, and publish.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from grokquant import papers
from grokquant.calibration.blocks import BlockwiseModel
from grokquant.calibration.text import calibration_rows
from grokquant.errors import GateError, InputError
from grokquant.formats import FORMATS
from grokquant.layer import LayerQuantizer
from grokquant.output import ShardWriter, staged, write_sums
from grokquant.plan import Plan, build_plan
from grokquant.recipe import Recipe
from grokquant.rounding import round_unit
from grokquant.tokenizer import load_tokenizer
from grokquant.types import QTensor, Unit, UnitReport
from grokquant.verify import verify_against_plan


class Progress(Protocol):
    """What a run tells its spectators."""

    def planned(self, plan: Plan) -> None: ...
    def calibrating(self, rows: int, length: int) -> None: ...
    def layer_done(self, index: int, reports: list[UnitReport], tokens: list[int]) -> None: ...


def quantize(recipe: Recipe, progress: Progress | None = None) -> Path:
    """Quantizes as `recipe` says and returns the output directory.

    Raises InputError for input that cannot be used and GateError where a gate is missed; either
    way nothing appears under the output's name.
    """
    plan = build_plan(recipe)
    if progress:
        progress.planned(plan)
    output = Path(recipe.output.path)
    with staged(output, plan.checkpoint.source.path) as directory:
        run = Run(plan, ShardWriter(directory, plan), progress)
        run.write_kept(plan.kept_outside_layers)
        for index, tokens in enumerate(_blocks(run)):
            run.write_kept(plan.kept_in_layer(index))
            run.end_layer(index, tokens)
        run.writer.finish()
        papers.write(
            directory, plan, papers.Record(run.reports, run.tokens_per_expert, run.calibration_rows)
        )
        verify_against_plan(directory, plan)
        write_sums(directory)
    return output


@dataclass
class Run:
    """What a run has done so far. Every finished unit passes through `deliver`."""

    plan: Plan
    writer: ShardWriter
    progress: Progress | None
    reports: list[UnitReport] = field(default_factory=list)
    tokens_per_expert: list[list[int]] = field(default_factory=list)
    calibration_rows: tuple[int, ...] = ()
    _layer_start: int = 0

    def deliver(self, unit: Unit, quantized: QTensor, report: UnitReport) -> None:
        packing = FORMATS[self.plan.recipe.output.format]
        self.writer.add(packing.pack(unit.tensor, quantized))
        self.reports.append(report)
        _check_fallbacks(self.plan, self.reports)

    def write_kept(self, tensors: list[str]) -> None:
        """Carries tensors over as they are: router, norms, embedding, matrices that are kept."""
        for name in tensors:
            tensor = self.plan.checkpoint.source.tensors[name].read()
            if not torch.isfinite(tensor).all():
                raise InputError(f"{name}: the source holds non-finite values")
            self.writer.add({name: tensor})

    def end_layer(self, index: int, tokens: list[int]) -> None:
        self.tokens_per_expert.append(tokens)
        if self.progress:
            self.progress.layer_done(index, self.reports[self._layer_start :], tokens)
        self._layer_start = len(self.reports)


def _blocks(run: Run) -> Iterator[list[int]]:
    """Quantizes one block per step; yields how many tokens each expert saw (none without data)."""
    return _with_calibration(run) if run.plan.needs_calibration else _without_data(run)


def _with_calibration(run: Run) -> Iterator[list[int]]:
    checkpoint = run.plan.checkpoint
    rows = calibration_rows(run.plan.recipe.calibration, load_tokenizer(checkpoint), checkpoint)
    run.calibration_rows = tuple(rows.shape)
    if run.progress:
        run.progress.calibrating(*rows.shape)
    model = BlockwiseModel(checkpoint)
    hidden = model.embed(rows)  # (rows, time, hidden)
    for index in range(checkpoint.config.num_hidden_layers):
        layer = LayerQuantizer(run.plan, model, index, run.deliver)
        hidden = layer.run(hidden)
        if not torch.isfinite(hidden).all():
            raise InputError(f"layer {index}: its outputs on the calibration text are not finite")
        yield layer.tokens_per_expert


def _without_data(run: Run) -> Iterator[list[int]]:
    for index in range(run.plan.checkpoint.config.num_hidden_layers):
        for unit in run.plan.units_of(index):
            ref = run.plan.checkpoint.source.tensors[unit.tensor]
            quantized, report = round_unit(unit, run.plan.rule_of(unit.name), ref, None)
            run.deliver(unit, quantized, report)
        yield []


def _check_fallbacks(plan: Plan, reports: list[UnitReport]) -> None:
    """Raises GateError as soon as more units fell back than the recipe allows."""
    fallen = [report for report in reports if report.fallback]
    allowed = plan.recipe.max_fallbacks * len(plan.units)
    if len(fallen) > allowed:
        named = "; ".join(f"{report.name}: {report.fallback}" for report in fallen[:3])
        raise GateError(
            f"{len(fallen)} of {len(plan.units)} matrices fell back to rtn, "
            f"max_fallbacks = {plan.recipe.max_fallbacks:g} allows {int(allowed)} ({named})"
        )
