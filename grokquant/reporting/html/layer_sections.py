"""The sections of the page that go through the model: routing, layers, experts.

Each figure is a function of its own; it returns nothing where its figures were not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from grokquant.evaluation.report import Report, Routing, UnitRow
from grokquant.humanize import percent
from grokquant.reporting.html import report_charts
from grokquant.reporting.html.markup import (
    card,
    details,
    figure,
    grid,
    heads,
    number_at,
    section,
    table,
    table_row,
)
from grokquant.reporting.json_pointer import find_datum


@dataclass(frozen=True)
class _Column:
    """A column of the table of layers. `field` is a pointer below the layer."""

    group: str
    head: str
    field: str


_COLUMNS = (
    _Column("Error", "after the layer", "relative_error"),
    _Column("Error in isolation", "block", "forced/block_error"),
    _Column("Error in isolation", "attention", "forced/attention_error"),
    _Column("Error in isolation", "experts", "forced/experts_error"),
    _Column("Same experts", "top-1", "router_top1"),
    _Column("Same experts", "top-2", "router_top2_set"),
    _Column("Same experts", "all", "router_set"),
    _Column("Same experts in isolation", "top-1", "forced/router_top1"),
    _Column("Same experts in isolation", "top-2", "forced/router_top2_set"),
    _Column("Same experts in isolation", "all", "forced/router_set"),
    _Column("Load", "shift", "load_shift"),
)


def routing_section(report: Report) -> str:
    """Whether the routers choose the same experts; nothing for a dense model."""
    agreement = router_agreement(report)
    if not agreement:
        return ""
    changes = _routing_changes(report, report.routing) if report.routing else []
    charts = [agreement, *changes, load_shift(report)]
    return section(
        "Routing",
        "A token that is routed to a different expert meets different weights, so errors can jump "
        "here.",
        grid(charts),
    )


def router_agreement(report: Report) -> str:
    agreements = [(x.router_set, x.layer) for x in report.layers if x.router_set is not None]
    if not agreements:
        return ""
    least, layer = min(agreements)
    return figure(
        "Same experts chosen",
        "Share of tokens that a layer routes to exactly the same experts as the reference: on the "
        "model’s own path, with the errors of all earlier layers, and in isolation, where the "
        "layer gets the reference’s hidden states, so that only its attention can cause a "
        f"difference. Lowest: {percent(least, 3)} in layer {layer}. Higher is better.",
        report_charts.router_agreement(report),
    )


def load_shift(report: Report) -> str:
    if all(layer.load_shift is None for layer in report.layers):
        return ""
    shift, layer = max((x.load_shift or 0.0, x.layer) for x in report.layers)
    return figure(
        "Load shift",
        "Smallest share of tokens to reassign to match the reference’s expert load. Highest: "
        f"{percent(shift)} in layer {layer}. Lower is better.",
        report_charts.load_shifts(report),
    )


def _routing_changes(report: Report, routing: Routing) -> list[str]:
    changed = routing.changed
    total = max(changed.tokens + routing.unchanged.tokens, 1)
    words = (
        f"For {percent(changed.tokens / total, 3)} of the tokens some layer chooses different "
        "experts"
    )
    if changed.share_of_kld is not None:
        words += f"; they account for {percent(changed.share_of_kld, 3)} of the total KLD"
    charts = [
        figure(
            "KL divergence with and without a change of routing",
            f"{words}. Mean per token; shorter is better.",
            report_charts.changed_routes(report),
        )
    ]
    groups = [group for group in routing.first_change if group.tokens]
    if len(routing.first_change) > 1 and groups:
        most = max(groups, key=lambda group: group.tokens)
        words = (
            "Mean KLD in nats of the tokens whose experts differ in this layer but in no earlier "
            f"one. Most first changes: layer {most.layer}, {most.tokens:,} tokens. Lower is better."
        )
        drawing = report_charts.first_changes(report, routing)
        charts.append(figure("KL divergence by the first layer of change", words, drawing))
    return charts


def layers_section(report: Report) -> str:
    if not report.layers:
        return ""
    return section(
        "Layer by layer",
        "Which layers lose most, and how errors accumulate.",
        grid([accumulated_error(report), isolated_error(report)])
        + details("Numbers by layer", card(_layer_table(report))),
    )


def accumulated_error(report: Report) -> str:
    if not report.layers:
        return ""
    worst = max(report.layers, key=lambda layer: layer.relative_error)
    last = report.layers[-1]
    end = "" if worst is last else f", {percent(last.relative_error)} after the last"
    return figure(
        "Accumulated error",
        "‖quantized − reference‖ / ‖reference‖ of the hidden state after each layer, each model "
        f"on its own path. Largest: {percent(worst.relative_error)} after layer {worst.layer}"
        f"{end}. Lower is better.",
        report_charts.layer_errors(report),
    )


def isolated_error(report: Report) -> str:
    isolated = [(layer.forced, layer.layer) for layer in report.layers if layer.forced]
    if not isolated:
        return ""
    error, layer = max((forced.block_error, layer) for forced, layer in isolated)
    experts = any(forced.experts_error is not None for forced, _ in isolated)
    outputs = "the block, its attention and its experts" if experts else "the block and attention"
    return figure(
        "Error of each layer in isolation",
        "The same with the reference’s hidden states as the input of each layer, for the outputs "
        f"of {outputs}. The axis is logarithmic. Largest error of a block: {percent(error)} in "
        f"layer {layer}. Lower is better.",
        report_charts.isolated_errors(report),
    )


def _layer_table(report: Report) -> str:
    columns = _columns_with_numbers(report)
    above = ""
    for group, members in groupby(columns, key=lambda column: column.group):
        span = len(list(members))
        above += f'<th colspan="{span}" scope="colgroup" class="num">{group}</th>'
    names = heads("Layer", *(column.head for column in columns), numeric=len(columns))
    body = "".join(
        table_row(str(layer.layer), *(_cell(report, i, column) for column in columns))
        for i, layer in enumerate(report.layers)
    )
    return table(f"<tr><td></td>{above}</tr>{names}", body)


def _columns_with_numbers(report: Report) -> list[_Column]:
    """The columns that have something to show: none of experts for a dense model, no top-2 where
    a token goes to two experts anyway."""
    layers = range(len(report.layers))
    top2_is_all = all(layer.router_set == layer.router_top2_set for layer in report.layers)
    return [
        column
        for column in _COLUMNS
        if any(find_datum(report, f"/layers/{i}/{column.field}") for i in layers)
        and not (top2_is_all and column.field.endswith("router_top2_set"))
    ]


def _cell(report: Report, i: int, column: _Column) -> str:
    return number_at(report, f"/layers/{i}/{column.field}", lambda share: percent(share, 4), "%")


def experts_section(report: Report) -> str:
    charts = [damage(report), load(report)]
    folded = [movement(report), weight_error(report.units), output_error(report.units)]
    if not any(charts):
        charts = folded
        folded = []
    if not any(charts):
        return ""
    body = grid(charts)
    if any(folded):
        body += details("Tokens moved, and errors of each expert’s matrices", grid(folded))
    return section("Expert by expert", "One column per layer, one row per expert.", body)


def damage(report: Report) -> str:
    if not any(layer.forced and any(layer.forced.damage) for layer in report.layers):
        return ""
    return figure(
        "Share of the damage",
        "Share of each expert in the squared output error of its layer’s experts, weighted by "
        "their gates, with the reference’s routing. "
        f"{report_charts.most_damage(report)}",
        report_charts.damage_map(report),
    )


def load(report: Report) -> str:
    if not any(layer.routed for layer in report.layers):
        return ""
    return figure(
        "Load of each expert",
        "Share of a layer’s routed tokens that go to each expert of the quantized model. "
        f"{report_charts.fewest_tokens(report)}",
        report_charts.load_map(report),
    )


def movement(report: Report) -> str:
    if not any(layer.routed for layer in report.layers):
        return ""
    return figure(
        "Tokens gained and lost",
        "Tokens of each expert, quantized minus reference: blue is gained, orange is lost. "
        f"{report_charts.net_movement(report)} Near 0 is better.",
        report_charts.shift_map(report),
    )


def weight_error(units: Sequence[UnitRow]) -> str:
    return _expert_figure(
        "Weight error of each expert",
        "‖W − Q‖ / ‖W‖ of the weights, averaged over the expert’s matrices. Lower is better.",
        report_charts.expert_error_map(units, "relative_error"),
    )


def output_error(units: Sequence[UnitRow]) -> str:
    return _expert_figure(
        "Output error of each expert",
        "Relative error on the calibration inputs, averaged over the expert’s matrices. Lower is "
        "better.",
        report_charts.expert_error_map(units, "output_error"),
    )


def bits(units: Sequence[UnitRow]) -> str:
    return _expert_figure(
        "Bits of each expert",
        "Stored bits per weight, averaged over the expert’s matrices.",
        report_charts.expert_bits_map(units),
    )


def bits_by_kind(units: Sequence[UnitRow]) -> str:
    return _expert_figure(
        "Bits of each kind of matrix",
        "Stored bits per weight, averaged over the matrices of a kind in a layer.",
        report_charts.kind_bits_map(units),
    )


def _expert_figure(title: str, words: str, drawing: str | None) -> str:
    return figure(title, words, drawing) if drawing else ""
