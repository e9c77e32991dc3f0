"""What the functions of the package return: plans and reports that notebooks show as tables.

The classes of the lower rooms have a short `repr`; how they look is known here.
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from grokquant.engines import where_it_runs
from grokquant.escaping import html_text, one_line
from grokquant.evaluation.report import Report
from grokquant.humanize import duration, percent, size
from grokquant.job.budget import Budget, budget_of
from grokquant.job.findings import listed
from grokquant.job.plan import Plan
from grokquant.reporting import plots
from grokquant.reporting.html.cell import cell, cell_table, fact_list, note, title
from grokquant.reporting.html.markup import details
from grokquant.reporting.html.ranking_page import side_by_side
from grokquant.reporting.html.suite_sections import gate_line, suite_section
from grokquant.reporting.inspection import describe
from grokquant.reporting.plots import Plot, draw
from grokquant.reporting.quantization import QuantizationReport, mean_error, read_quantization
from grokquant.reporting.ranking import Ranking, rank_models, read_evaluation
from grokquant.reporting.rows import errors_words, name_of, notes, rows, verdict
from grokquant.reporting.terminal import plan_rows

# More layers than these are folded.
_MOST_LAYERS = 8


class ShownPlan(Plan):
    """A plan. A notebook shows grids, sizes, memory and time."""

    @staticmethod
    def of(plan: Plan) -> "ShownPlan":
        return ShownPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)})

    @cached_property
    def budget(self) -> Budget:
        """Memory and time; estimating them takes a few seconds."""
        return budget_of(self)

    def _repr_html_(self) -> str:
        recipe = self.recipe
        names = ("Part", "Grid (method)", "Matrices", "Weights")
        table = [
            (kind, grid, f"{count:,}" if count else "", f"{weights:,}")
            for (kind, grid), (count, weights) in plan_rows(self).items()
        ]
        peak = f"{size(self.budget.peak_bytes)} at {self.budget.peak.name}"
        totals = (
            ("Size", f"{size(self.checkpoint.file_bytes)} → {size(self.output_bytes)}"),
            ("Bits per weight", f"{self.bits_per_weight:.3f}"),
            ("Memory", peak),
            ("Time", f"{duration(self.budget.seconds)} on this machine"),
        )
        lines = [*self.checkpoint.notices, *self.notes, *where_it_runs(self.contents)]
        return cell(
            title(f"Plan: {recipe.model.path} → {recipe.output.path}")
            + cell_table(names, table, words=2)
            + fact_list(totals)
            + "".join(map(note, lines))
        )


class ShownReport(Report):
    """The report of an evaluation. A notebook shows verdict, thresholds and metrics."""

    @staticmethod
    def of(report: Report) -> "ShownReport":
        return ShownReport(**dict(report))

    def __eq__(self, other: object) -> bool:
        """The figures count, not the class."""
        return isinstance(other, Report) and dict(self) == dict(other)

    def plot(self, name: str = "layers") -> Plot:
        """A chart by name: kld, delta_p, layers, isolated, routing, load, load_shift, moved,
        damage, weight_error, output_error, bits, bits_by_kind or size. Raises InputError."""
        return draw(plots.EVALUATION, self, name)

    def _repr_html_(self) -> str:
        names = ("Metric", "Value", "±", "95 % interval", "Noise floor")
        table = [
            (row.name, row.shown, row.shown_error, row.shown_interval, row.shown_noise)
            for row in rows(self)
        ]
        return cell(
            title(f"{name_of(self.quantized)} against {name_of(self.reference)}")
            + "".join(map(note, notes(self)))
            + f'<p class="verdict">{html_text(verdict(self))}</p>'
            + gate_line(self)
            + cell_table(names, table)
            + suite_section(self)
            + note(errors_words(self))
        )


class ShownQuantization(QuantizationReport):
    """The report of a quantization. A notebook shows its errors by kind and by layer."""

    @staticmethod
    def at(path: str | Path) -> "ShownQuantization":
        return ShownQuantization(**dict(read_quantization(path)))

    def plot(self, name: str = "layers") -> Plot:
        """A chart by name: layers, weight_error, output_error, bits, bits_by_kind or load (tokens).
        Raises InputError."""
        return draw(plots.QUANTIZATION, self, name)

    def _repr_html_(self) -> str:
        layers = self._layer_table()
        if len(self.by_layer()) > _MOST_LAYERS:
            layers = details("Layer by layer", layers)
        unusual = [
            *(f"{name}: fell back to rtn" for name in self.fallbacks),
            *self.findings,
        ]
        return cell(
            title(f"{self.path}: made from {self.source}")
            + fact_list(self._facts())
            + self._kind_table()
            + layers
            + "".join(map(note, listed(unusual)))
        )

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("Size", f"{size(self.output_bytes)}, {self.bits_per_weight:.3f} bits per weight"),
            ("Matrices", f"{len(self.units):,} quantized, {len(self.fallbacks)} by a fallback"),
        ]
        if self.calibration_rows:
            sequences, length = self.calibration_rows
            facts.append(("Calibration", f"{sequences:,} sequences of {length:,} tokens"))
        return facts

    def _kind_table(self) -> str:
        names = ("Kind", "Grid", "Method", "Matrices", "Bits", "Weight error", "Output error")
        table = [
            (
                *key,
                f"{len(group):,}",
                f"{self.bits_of(group):.3f}",
                _error(mean_error(group, "relative_error")),
                _error(mean_error(group, "output_error")),
            )
            for key, group in self.by_kind().items()
        ]
        return cell_table(names, table, words=3)

    def _layer_table(self) -> str:
        names = ("Layer", "Bits", "Weight error", "Output error", "Fewest tokens of an expert")
        tokens = dict(enumerate(self.tokens_per_expert))
        table = [
            (
                str(layer),
                f"{self.bits_of(group):.3f}",
                _error(mean_error(group, "relative_error")),
                _error(mean_error(group, "output_error")),
                f"{min(tokens[layer]):,}" if tokens.get(layer) else "–",
            )
            for layer, group in self.by_layer().items()
        ]
        return cell_table(names, table)


class ShownRanking(Ranking):
    """Models ranked. A notebook shows them side by side."""

    @staticmethod
    def of(runs: Sequence[str | Path | Report]) -> "ShownRanking":
        return ShownRanking(rank_models(runs).models)

    def plot(self, name: str = "kld") -> Plot:
        """A chart by name: kld or perplexity, both against size, or routing. Raises InputError."""
        return draw(plots.RANKING, self, name)

    def __repr__(self) -> str:
        names = ", ".join(model.name for model in self.models[:8])
        return one_line(f"<Ranking of {len(self.models)} models: {names}>")

    def _repr_html_(self) -> str:
        return cell(side_by_side(self))


class ModelSummary(dict[str, Any]):
    """What `grokquant inspect --json` prints. A notebook shows its totals."""

    @staticmethod
    def of(path: str | Path) -> "ModelSummary":
        return ModelSummary(describe(path))

    def __repr__(self) -> str:
        bits = f"{self['bits_per_weight']:.3f} bits"
        return one_line(f"<ModelSummary {self['path']}: {self['family']}, {bits}>")

    def _repr_html_(self) -> str:
        facts = [
            ("Family", f"{self['family']}, {self['layers']} layers, {self['experts']} experts"),
            ("Stored as", f"{self['layout']}, {len(self['tensors']):,} tensors"),
            ("Weights", f"{self['parameters']:,}"),
            ("Size", f"{size(self['bytes'])}, {self['bits_per_weight']:.3f} bits per weight"),
        ]
        grids = [(grid, f"{count:,}") for grid, count in self["matrices"].items()]
        lines = [*filter(None, [self["notice"]]), *self["notes"], *self["where_it_runs"]]
        return cell(
            title(self["path"])
            + fact_list(facts)
            + cell_table(("Grid", "Matrices"), grids)
            + "".join(map(note, lines))
        )


def _error(share: float | None) -> str:
    return "–" if share is None else percent(share)


def evaluation_at(path: str | Path) -> ShownReport:
    return ShownReport.of(read_evaluation(path))
