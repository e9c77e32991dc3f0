"""The sections of the page, from the figures that matter most to single matrices."""

from collections.abc import Iterable
from html import escape

from grokquant.evaluation import figures
from grokquant.evaluation.markup import datum, details, error_of, figure, section, value_of
from grokquant.evaluation.report import Estimate, Report, TaskValue, UnitRow
from grokquant.evaluation.tables import (
    NBSP,
    bf16_bytes,
    name_of,
    number,
    percent,
    protocol_words,
    quantile_rows,
    rough,
    rows,
    size,
)

# Longer lists are cut here; report.json has all of it.
_WORST_UNITS, _MOST_FALLBACKS = 10, 40


def metrics_section(report: Report) -> str:
    lead = {"Mean PPL(Q)/PPL(base)", "Mean KLD", "Same top p"}
    parts, block = [], ""
    for row in rows(report):
        if row.block != block:
            head = f'<th colspan="5" scope="rowgroup">{row.block}</th>'
            parts.append(f'<tr class="block">{head}</tr>')
            block = row.block
        unit = f"{NBSP}{row.unit}" if row.unit else ""
        parts.append(
            f'<tr class="{"lead" if row.name in lead else "plain"}">'
            f'<th scope="row">{escape(row.name)}</th><td class="num">{value_of(row)}{unit}</td>'
            f'<td class="num err">{error_of(row)}</td><td class="better">{row.better}</td>'
            f'<td class="words">{escape(row.words)}</td></tr>'
        )
    return section(
        "How far from the reference",
        "Names as in llama.cpp. ± is one standard error, over documents (or windows) drawn again.",
        '<div class="card"><table class="metrics"><thead><tr><th>Metric</th>'
        '<th class="num">Value</th><th class="num">±</th><th>Better</th><th>In plain words</th>'
        f"</tr></thead><tbody>{''.join(parts)}</tbody></table></div>",
    )


def tasks_section(report: Report) -> str:
    if not report.tasks or not report.tasks.tasks:
        return ""
    lines = []
    for t, task in enumerate(report.tasks.tasks):
        for m, metric in enumerate(task.metrics):
            path = f"/tasks/tasks/{t}/metrics/{m}"
            arrow = {True: "↑ higher", False: "↓ lower", None: ""}[metric.higher_is_better]
            cells = (
                _estimated(f"{path}/quantized", metric.quantized),
                _estimated(f"{path}/reference", metric.reference),
                f'<td class="num">{metric.items:,}</td><td class="better">{arrow}</td>',
            )
            name = f"{escape(task.name)}, {escape(metric.metric)}"
            lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    return section(
        "Tasks",
        f"Of lm-eval {report.tasks.lm_eval}, both models on the same items. ± is one "
        "standard error over items.",
        '<div class="card"><table class="metrics"><thead><tr><th>Task</th>'
        '<th class="num">Quantized</th><th class="num">±</th><th class="num">Reference</th>'
        '<th class="num">±</th><th class="num">Items</th><th>Better</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>",
    )


def _estimated(path: str, found: TaskValue | Estimate) -> str:
    """Two cells: a value and its error."""
    value = datum(f"{path}/value", found.value, number(found.value, found.error or 0))
    error = "" if found.error is None else number(found.error, found.error)
    return f'<td class="num">{value}</td><td class="num err">{error}</td>'


def texts_section(report: Report) -> str:
    """The texts of a suite beside the first one, with what matters most of each."""
    if not report.further_texts:
        return ""
    lines = []
    for i, text in enumerate(report.further_texts):
        path = f"/further_texts/{i}"
        found = (
            (f"{path}/perplexity/ratio", text.perplexity.ratio),
            (f"{path}/kld/mean", text.kld.mean),
            (f"{path}/same_top_p", text.same_top_p),
        )
        cells = "".join(_estimated(*pair) for pair in found)
        name = escape(protocol_words(text.protocol))
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    heads = ("PPL(Q)/PPL(base)", "Mean KLD, nats", "Same top p")
    return section(
        "Other texts",
        "Figures of one text or protocol cannot be compared with those of another.",
        '<div class="card"><table class="metrics"><thead><tr><th>Text</th>'
        + "".join(f'<th class="num">{head}</th><th class="num">±</th>' for head in heads)
        + f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>",
    )


def suite_section(report: Report) -> str:
    if not report.suite or not report.suite.gates:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{escape(gate.threshold)}</th><td>{escape(gate.where)}</td>'
        f'<td class="num">{datum(f"/suite/gates/{i}/value", gate.value, number(gate.value))}</td>'
        f'<td class="num">{datum(f"/suite/gates/{i}/limit", gate.limit, number(gate.limit))}</td>'
        f"<td>{'met' if gate.met else '<b>missed</b>'}</td></tr>"
        for i, gate in enumerate(report.suite.gates)
    )
    return section(
        f"Thresholds of the suite {escape(report.suite.name)}",
        "Each on the text, layer or task that is worst.",
        '<div class="card"><table class="metrics"><thead><tr><th>Threshold</th><th>Worst</th>'
        '<th class="num">Value</th><th class="num">Limit</th><th></th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>",
    )


def distribution_section(report: Report) -> str:
    kld, delta = report.kld, report.delta_p
    charts = figure(
        "KL divergence by token",
        f"Half of the tokens move less than {rough(kld.median)} nats, one in a hundred more than "
        f"{rough(kld.q99_0)}, the worst one {rough(kld.maximum)}. Further left is better."
        + (" Rounding leaves some at zero or below, which are not drawn." * (kld.minimum <= 0)),
        figures.kld_quantiles(report),
    ) + figure(
        "Change in the probability of the true token",
        f"For 90 % of the tokens it stays between {percent(delta.q5_0)} and "
        f"{percent(delta.q95_0)}. A steep line at zero is better.",
        figures.delta_p_quantiles(report),
    )
    cells = "".join(
        f'<tr><th scope="row">{name[0].upper() + name[1:]}</th><td class="num">'
        + ("–" if nats is None else datum(f"/kld/{name}", nats, number(nats)))
        + '</td><td class="num">'
        + datum(f"/delta_p/{name}", share, percent(share, 3), "%")
        + "</td></tr>"
        for name, nats, share in quantile_rows(report)
    )
    table = (
        '<table><thead><tr><th>Percentile of tokens</th><th class="num">KLD, nats</th>'
        f'<th class="num">Δp</th></tr></thead><tbody>{cells}</tbody></table>'
    )
    return section(
        "Token by token",
        "Averages hide the tail, and the tail is what breaks code and long reasoning.",
        f'<div class="grid">{charts}</div>{details("All percentiles", table)}',
    )


def layers_section(report: Report) -> str:
    if not report.layers:
        return ""
    worst, last = max(report.layers, key=lambda x: x.relative_error), report.layers[-1]
    end = "" if worst is last else f"; the last layer ends at {percent(last.relative_error)}"
    charts = figure(
        "Relative error of the hidden state",
        f"‖quantized − reference‖ / ‖reference‖ after each layer. Largest: "
        f"{percent(worst.relative_error)} after layer {worst.layer}{end}. Lower is better.",
        figures.layer_errors(report),
    )
    routed = [layer for layer in report.layers if layer.router_top1 is not None]
    if routed:
        least = min(routed, key=lambda x: x.router_top1 or 0)
        charts += figure(
            "Same experts chosen",
            "Share of tokens for which the router picks the same first expert, and the same two "
            f"in any order. Least: {percent(least.router_top1 or 0, 3)} for the first, in layer "
            f"{least.layer}. Higher is better.",
            figures.router_agreement(report),
        )
    return section(
        "Layer by layer",
        "Each model goes its own way through the text, so the errors of earlier layers count.",
        f'<div class="grid">{charts}</div>{details("Numbers by layer", _layer_table(report))}',
    )


def _layer_table(report: Report) -> str:
    def cell(path: str, value: float | None) -> str:
        return "–" if value is None else datum(path, value, percent(value, 4), "%")

    cells = "".join(
        f'<tr><th scope="row">{layer.layer}</th>'
        + "".join(
            f'<td class="num">{cell(f"/layers/{i}/{key}", getattr(layer, key))}</td>'
            for key in ("relative_error", "router_top1", "router_top2_set")
        )
        + "</tr>"
        for i, layer in enumerate(report.layers)
    )
    return (
        '<table><thead><tr><th>Layer</th><th class="num">Relative error</th>'
        '<th class="num">Same first expert</th><th class="num">Same two experts</th></tr></thead>'
        f"<tbody>{cells}</tbody></table>"
    )


def experts_section(report: Report) -> str:
    charts = []
    if any(layer.routed for layer in report.layers):
        charts.append(
            figure(
                "Load of each expert",
                "What each expert of the quantized model gets of the tokens routed in a layer. "
                f"{figures.least_fed(report)}",
                figures.load_map(report),
            )
        )
        charts.append(
            figure(
                "Tokens gained and lost",
                "Tokens of each expert, quantized minus reference: blue gained, orange lost. "
                f"{figures.moved(report)} Near 0 is better.",
                figures.shift_map(report),
            )
        )
    words = {
        "relative_error": ("Weight error of each expert", "‖W − Q‖ / ‖W‖ of the weights"),
        "output_error": ("Output error of each expert", "The same on the calibration inputs"),
    }
    for key, (title, meaning) in words.items():
        if drawn := figures.unit_error_map(report, key):
            caption = f"{meaning}, averaged over the expert’s matrices. Lower is better."
            charts.append(figure(title, caption, drawn))
    if not charts:
        return ""
    return section(
        "Expert by expert",
        "A column for each layer, a row for each expert.",
        f'<div class="grid">{"".join(charts)}</div>',
    )


def weights_section(report: Report) -> str:
    model, reference = report.quantized, report.reference
    charts = figure("Size", _size_words(report), figures.sizes(report))
    schemes = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="num">{n:,}</td></tr>'
        for name, n in model.schemes.items()
    )
    if schemes:
        charts += figure(
            "Grids",
            "Bits, columns that share a scale, symmetry, and in brackets the method that rounded.",
            '<table><thead><tr><th>Grid</th><th class="num">Matrices</th></tr></thead>'
            f"<tbody>{schemes}</tbody></table>",
        )
    worst = sorted(report.units, key=lambda unit: -unit.relative_error)[:_WORST_UNITS]
    return section(
        "What was quantized",
        f"{name_of(model)} at {model.bits_per_weight:.2f} bits per weight, "
        f"{name_of(reference)} at {reference.bits_per_weight:.2f}, all tensors counted.",
        f'<div class="grid">{charts}</div>{_fallbacks(report)}'
        + (details("The matrices with the largest error", _unit_table(worst)) if worst else ""),
    )


def _size_words(report: Report) -> str:
    model, reference = report.quantized, report.reference
    words = f"All weight files, against the same weights as bf16 ({size(bf16_bytes(model))})."
    if reference.bits_per_weight < 15:
        words += " The reference itself is stored quantized and was multiplied out to compare."
    return words


def _unit_table(units: Iterable[UnitRow]) -> str:
    def share(value: float | None) -> str:
        return "–" if value is None else percent(value)

    cells = "".join(
        f'<tr><th scope="row"><code>{escape(unit.name)}</code></th><td>{escape(unit.scheme)}</td>'
        f'<td>{escape(unit.method)}</td><td class="num">{share(unit.relative_error)}</td>'
        f'<td class="num">{share(unit.output_error)}</td>'
        f'<td class="num">{"–" if unit.tokens is None else f"{unit.tokens:,}"}</td></tr>'
        for unit in units
    )
    return (
        "<table><thead><tr><th>Matrix</th><th>Grid</th><th>Method</th>"
        '<th class="num">Weight error</th><th class="num">Output error</th>'
        f'<th class="num">Calibration tokens</th></tr></thead><tbody>{cells}</tbody></table>'
    )


def _fallbacks(report: Report) -> str:
    fallen = [unit for unit in report.units if unit.fallback]
    if not fallen:
        return ""
    items = "".join(
        f"<li><code>{escape(unit.name)}</code>: {escape(unit.fallback or '')}</li>"
        for unit in fallen[:_MOST_FALLBACKS]
    )
    if len(fallen) > _MOST_FALLBACKS:
        items += f"<li>and {len(fallen) - _MOST_FALLBACKS} more, see report.json</li>"
    noun = "matrix was" if len(fallen) == 1 else "matrices were"
    return (
        f'<div class="warn"><h3>{len(fallen)} {noun} not quantized as planned</h3>'
        f"<ul>{items}</ul></div>"
    )
