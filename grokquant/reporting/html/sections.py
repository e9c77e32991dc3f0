"""The sections of the page about the whole model: metrics, tokens, sizes."""

from collections.abc import Iterable
from html import escape

from grokquant.evaluation.report import Report, UnitRow
from grokquant.reporting.html import report_charts
from grokquant.reporting.html.markup import (
    datum,
    details,
    error_of,
    figure,
    heads,
    interval_of,
    section,
    table,
    token_error_of,
    value_of,
)
from grokquant.reporting.rows import (
    NBSP,
    bf16_bytes,
    errors_words,
    name_of,
    noise_rows,
    number,
    percent,
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
    for row in [*rows(report), *noise_rows(report)]:
        if row.block != block:
            head = f'<th colspan="6" scope="rowgroup">{row.block}</th>'
            parts.append(f'<tr class="block">{head}</tr>')
            block = row.block
        unit = f"{NBSP}{row.unit}" if row.unit else ""
        parts.append(
            f'<tr class="{"lead" if row.name in lead else "plain"}">'
            f'<th scope="row">{escape(row.name)}</th><td class="num">{value_of(row)}{unit}</td>'
            f'<td class="num err">{error_of(row)}</td><td class="num ends">{interval_of(row)}</td>'
            f'<td class="better">{row.better}</td><td class="words">{escape(row.words)}</td></tr>'
        )
    head = (
        '<tr><th>Metric</th><th class="num">Value</th><th class="num">±</th>'
        f'<th class="num">95{NBSP}% interval</th><th>Better</th><th>In plain words</th></tr>'
    )
    return section(
        "How far from the reference",
        f"Names as in llama.cpp. {errors_words(report)}",
        f'<div class="card">{table(head, "".join(parts), "metrics")}</div>'
        + details("Errors as llama.cpp prints them", _token_errors(report)),
    )


def _token_errors(report: Report) -> str:
    """Both kinds of standard errors side by side."""
    body = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th><td class="num">{error_of(row)}</td>'
        f'<td class="num">{token_error_of(row)}</td></tr>'
        for row in rows(report)
        if row.estimate and row.estimate.token_error is not None
    )
    words = (
        "llama.cpp takes tokens as independent. Tokens of one document are alike, so its errors "
        "are too small where documents differ."
    )
    head = heads("Metric", "± here", "± with independent tokens", numbers=2)
    return f'<p class="words">{words}</p>{table(head, body)}'


def distribution_section(report: Report) -> str:
    kld, delta = report.kld, report.delta_p
    charts = figure(
        "KL divergence by token",
        f"Half of the tokens move less than {rough(kld.median)} nats, one in a hundred more than "
        f"{rough(kld.q99_0)}, the worst one {rough(kld.maximum)}. Further left is better."
        + (" Rounding leaves some at zero or below, which are not drawn." * (kld.minimum <= 0)),
        report_charts.kld_quantiles(report),
    ) + figure(
        "Change in the probability of the true token",
        f"For 90 % of the tokens it stays between {percent(delta.q5_0)} and "
        f"{percent(delta.q95_0)}. A steep line at zero is better.",
        report_charts.delta_p_quantiles(report),
    )
    cells = "".join(
        f'<tr><th scope="row">{name[0].upper() + name[1:]}</th><td class="num">'
        + datum(f"/kld/{name}", nats, number(nats or 0))
        + '</td><td class="num">'
        + datum(f"/delta_p/{name}", share, percent(share, 3), "%")
        + "</td></tr>"
        for name, nats, share in quantile_rows(report)
    )
    quantiles = table(heads("Percentile of tokens", "KLD, nats", "Δp", numbers=2), cells)
    return section(
        "Token by token",
        "Averages hide the tail, and the tail is what breaks code and long reasoning.",
        f'<div class="grid">{charts}</div>{details("All percentiles", quantiles)}',
    )


def weights_section(report: Report) -> str:
    model, reference = report.quantized, report.reference
    charts = figure("Size", _size_words(report), report_charts.sizes(report))
    schemes = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="num">{n:,}</td></tr>'
        for name, n in model.schemes.items()
    )
    if schemes:
        charts += figure(
            "Grids",
            "Bits, columns that share a scale, symmetry, and in brackets the method that rounded.",
            table(heads("Grid", "Matrices", numbers=1), schemes),
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
    names = ("Matrix", "Grid", "Method", "Weight error", "Output error", "Calibration tokens")
    return table(heads(*names, numbers=3), cells)


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
