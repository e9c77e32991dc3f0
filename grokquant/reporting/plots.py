"""The charts of reports one by one: `report.plot("layers")` in a notebook."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from grokquant.errors import InputError
from grokquant.evaluation.report import Report
from grokquant.reporting.html import layer_sections, quantization_figures, ranking_page, sections
from grokquant.reporting.html.cell import cell
from grokquant.reporting.quantization import QuantizationReport
from grokquant.reporting.ranking import Ranking

T = TypeVar("T")
# By the name of a plot: its HTML, or nothing where its figures were not measured.
Plots = Mapping[str, Callable[[T], str]]


@dataclass(frozen=True)
class Plot:
    """A chart with its caption, which a notebook shows."""

    name: str
    html: str

    def __repr__(self) -> str:
        return f"<Plot {self.name}>"

    def _repr_html_(self) -> str:
        return cell(self.html)


EVALUATION: Plots[Report] = {
    "kld": sections.kld_by_token,
    "delta_p": sections.delta_p_by_token,
    "layers": layer_sections.accumulated_error,
    "isolated": layer_sections.isolated_error,
    "routing": layer_sections.router_agreement,
    "load": layer_sections.load,
    "load_shift": layer_sections.load_shift,
    "moved": layer_sections.movement,
    "damage": layer_sections.damage,
    "weight_error": lambda report: layer_sections.weight_error(report.units),
    "output_error": lambda report: layer_sections.output_error(report.units),
    "bits": lambda report: layer_sections.bits(report.units),
    "bits_by_kind": lambda report: layer_sections.bits_by_kind(report.units),
    "size": sections.size_figure,
}

QUANTIZATION: Plots[QuantizationReport] = {
    "layers": quantization_figures.error_by_layer,
    "weight_error": lambda report: layer_sections.weight_error(report.units),
    "output_error": lambda report: layer_sections.output_error(report.units),
    "bits": lambda report: layer_sections.bits(report.units),
    "bits_by_kind": lambda report: layer_sections.bits_by_kind(report.units),
    "load": quantization_figures.calibration_load,
}

RANKING: Plots[Ranking] = {
    "kld": ranking_page.kld_against_size,
    "perplexity": ranking_page.perplexity_against_size,
    "routing": ranking_page.routing_by_layer,
}


def draw(plots: Plots[T], figures: T, name: str) -> Plot:
    """The plot called `name`. Raises InputError where there is none, or nothing to draw in it."""
    if name not in plots:
        raise InputError(f"{name!r} is no plot; there are: {', '.join(plots)}", "name")
    html = plots[name](figures)
    if not html:
        there = [other for other, of in plots.items() if of(figures)]
        raise InputError(f"{name}: was not measured; there are: {', '.join(there)}", "name")
    return Plot(name, html)
