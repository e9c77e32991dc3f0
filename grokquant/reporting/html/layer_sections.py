"""The sections of the page that go through the model: routing, layers, experts."""

from grokquant.evaluation.report import Layer, Report, Routing
from grokquant.reporting.html import report_charts
from grokquant.reporting.html.markup import (
    datum,
    details,
    figure,
    heads,
    section,
    table,
)
from grokquant.reporting.rows import percent

# Columns of the table of layers: (group, head, field). Fields of the layer alone begin "forced.".
_COLUMNS = (
    ("Error", "after the layer", "relative_error"),
    ("Error of the layer alone", "block", "forced.block_error"),
    ("Error of the layer alone", "attention", "forced.attention_error"),
    ("Error of the layer alone", "experts", "forced.experts_error"),
    ("Same experts", "first", "router_top1"),
    ("Same experts", "first two", "router_top2_set"),
    ("Same experts", "all", "router_set"),
    ("Same experts, layer alone", "first", "forced.router_top1"),
    ("Same experts, layer alone", "first two", "forced.router_top2_set"),
    ("Same experts, layer alone", "all", "forced.router_set"),
    ("Load", "shift", "load_shift"),
)


def routing_section(report: Report) -> str:
    """How far the routers go along; nothing for a dense model."""
    agreements = [(x.router_set, x.layer) for x in report.layers if x.router_set is not None]
    if not agreements:
        return ""
    least, layer = min(agreements)
    shift, shifted = max((x.load_shift or 0.0, x.layer) for x in report.layers)
    charts = figure(
        "Same experts chosen",
        "Share of tokens that a layer sends to exactly the reference’s experts: on the model’s "
        "own path, with all errors before, and where the layer gets the reference’s states, so "
        f"that only its attention can be the cause. Least: {percent(least, 3)} in layer {layer}. "
        "Higher is better.",
        report_charts.router_agreement(report),
    )
    if report.routing:
        charts += _damage_of_changes(report, report.routing)
    charts += figure(
        "Load shift",
        "The least share of a layer’s tokens that would have to go to another expert to give the "
        f"reference’s loads. Most: {percent(shift)} in layer {shifted}. Lower is better.",
        report_charts.load_shifts(report),
    )
    return section(
        "Routing",
        "A token that goes to another expert meets other weights: here errors can jump.",
        f'<div class="grid">{charts}</div>',
    )


def _damage_of_changes(report: Report, routing: Routing) -> str:
    changed, unchanged = routing.changed, routing.unchanged
    total = max(changed.tokens + unchanged.tokens, 1)
    words = (
        f"In {percent(changed.tokens / total, 3)} of the tokens some layer chooses other experts"
    )
    if changed.share_of_kld is not None:
        words += f"; they carry {percent(changed.share_of_kld, 3)} of all KLD"
    charts = figure(
        "KL divergence with and without a change of routing",
        f"{words}. Mean per token; shorter is better.",
        report_charts.changed_routes(report, routing),
    )
    rows = [row for row in routing.first_change if row.tokens]
    if len(routing.first_change) > 1 and rows:
        most = max(rows, key=lambda row: row.tokens)
        charts += figure(
            "KL divergence by the first layer of change",
            "Mean KLD, in nats, of the tokens whose experts differ in this layer and in none "
            f"before. Most begin in layer {most.layer}: {most.tokens:,} tokens. Lower is better.",
            report_charts.first_changes(routing),
        )
    return charts


def layers_section(report: Report) -> str:
    if not report.layers:
        return ""
    worst, last = max(report.layers, key=lambda x: x.relative_error), report.layers[-1]
    end = "" if worst is last else f"; the last layer ends at {percent(last.relative_error)}"
    charts = figure(
        "Error that has built up",
        f"‖quantized − reference‖ / ‖reference‖ of the hidden state after each layer, each model "
        f"on its own path. Largest: {percent(worst.relative_error)} after layer {worst.layer}"
        f"{end}. Lower is better.",
        report_charts.layer_errors(report),
    )
    forced = [(x.forced.block_error, x.layer) for x in report.layers if x.forced]
    if forced:
        error, layer = max(forced)
        experts = any(x.forced and x.forced.experts_error is not None for x in report.layers)
        parts = "the block, its attention and its experts" if experts else "the block and attention"
        charts += figure(
            "Error of each layer alone",
            f"The same where each layer gets the reference’s states: of what leaves {parts}. The "
            f"axis is logarithmic. Largest of a block: {percent(error)} in layer {layer}. Lower is "
            "better.",
            report_charts.errors_alone(report),
        )
    return section(
        "Layer by layer",
        "Which layers lose most, and how much is handed on to the next.",
        f'<div class="grid">{charts}</div>{details("Numbers by layer", _layer_table(report))}',
    )


def _layer_table(report: Report) -> str:
    columns = [c for c in _COLUMNS if any(_value(x, c[2]) is not None for x in report.layers)]
    if all(x.router_set == x.router_top2_set for x in report.layers):
        columns = [c for c in columns if not c[2].endswith("router_top2_set")]
    groups = dict.fromkeys(group for group, _, _ in columns)
    above = "".join(
        f'<th colspan="{sum(c[0] == group for c in columns)}" scope="colgroup" class="num">'
        f"{group}</th>"
        for group in groups
    )
    body = "".join(
        f'<tr><th scope="row">{layer.layer}</th>'
        + "".join(f'<td class="num">{_cell(layer, i, key)}</td>' for _, _, key in columns)
        + "</tr>"
        for i, layer in enumerate(report.layers)
    )
    names = (name for _, name, _ in columns)
    return table(f"<tr><td></td>{above}</tr>" + heads("Layer", *names, numbers=len(columns)), body)


def _cell(layer: Layer, index: int, key: str) -> str:
    value = _value(layer, key)
    shown = "" if value is None else percent(value, 4)
    return datum(f"/layers/{index}/{key.replace('.', '/')}", value, shown, "%")


def _value(layer: Layer, key: str) -> float | None:
    part, _, name = key.rpartition(".")
    return getattr(layer.forced if part else layer, name, None)


def experts_section(report: Report) -> str:
    charts, folded = [], []
    if any(layer.forced and any(layer.forced.damage) for layer in report.layers):
        charts.append(
            figure(
                "Share of the damage",
                "What each expert’s rounding adds to the squared error of its layer’s experts, "
                "weighted by gates, on the reference’s routes. "
                f"{report_charts.most_damage(report)}",
                report_charts.damage_map(report),
            )
        )
    if any(layer.routed for layer in report.layers):
        charts.append(
            figure(
                "Load of each expert",
                "What each expert of the quantized model gets of the tokens routed in a layer. "
                f"{report_charts.least_fed(report)}",
                report_charts.load_map(report),
            )
        )
        folded.append(
            figure(
                "Tokens gained and lost",
                "Tokens of each expert, quantized minus reference: blue gained, orange lost. "
                f"{report_charts.moved(report)} Near 0 is better.",
                report_charts.shift_map(report),
            )
        )
    folded += _unit_errors(report)
    if not charts:
        charts, folded = folded, []
    if not charts:
        return ""
    grid = f'<div class="grid">{"".join(charts)}</div>'
    if folded:
        maps = f'<div class="grid">{"".join(folded)}</div>'
        grid += details("Tokens moved, and errors of each expert’s matrices", maps, card=False)
    return section("Expert by expert", "A column for each layer, a row for each expert.", grid)


def _unit_errors(report: Report) -> list[str]:
    words = {
        "relative_error": ("Weight error of each expert", "‖W − Q‖ / ‖W‖ of the weights"),
        "output_error": ("Output error of each expert", "The same on the calibration inputs"),
    }
    return [
        figure(
            title,
            f"{meaning}, averaged over the expert’s matrices. Lower is better.",
            drawn,
        )
        for key, (title, meaning) in words.items()
        if (drawn := report_charts.unit_error_map(report, key))
    ]
