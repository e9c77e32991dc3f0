"""The sections of the page about the whole model: metrics, tokens, sizes."""

from collections.abc import Iterable

from grokquant.escaping import html_text
from grokquant.evaluation.report import Report, UnitRow
from grokquant.humanize import NBSP, number, percent, rough, unbroken_size
from grokquant.reporting.html import layer_sections, report_charts
from grokquant.reporting.html.anchors import scale_of_divergence
from grokquant.reporting.html.markup import (
    card,
    details,
    error_of,
    figure,
    grid,
    heads,
    interval_of,
    number_at,
    section,
    table,
    table_row,
    token_error_of,
    value_of,
)
from grokquant.reporting.rows import (
    KLD_QUANTILES,
    QUANTILES,
    Row,
    bf16_bytes,
    errors_words,
    name_of,
    noise_rows,
    rows,
    stored_quantized,
)

# Longer lists are cut here; report.json has all of it.
_WORST_MATRICES = 10
_MOST_FALLBACKS = 40
# Rows in bold: the three numbers to look at first.
_LEAD = {"Mean PPL(Q)/PPL(base)", "Mean KLD", "Same top p"}


def metrics_section(report: Report) -> str:
    parts = []
    block = ""
    for row in [*rows(report), *noise_rows(report)]:
        if row.block != block:
            head = f'<th colspan="6" scope="rowgroup">{row.block}</th>'
            parts.append(f'<tr class="block">{head}</tr>')
            block = row.block
        parts.append(_metric(row))
    head = (
        '<tr><th>Metric</th><th class="num">Value</th><th class="num">±</th>'
        f'<th class="num">95{NBSP}% interval</th><th>Better</th><th>In plain words</th></tr>'
    )
    return section(
        "How far from the reference",
        f"Metric names are those of llama.cpp. {errors_words(report)}",
        card(table(head, "".join(parts), "metrics"))
        + details("Standard errors as in llama.cpp", card(_token_errors(report))),
    )


def _metric(row: Row) -> str:
    kind = "lead" if row.name in _LEAD else "plain"
    unit = f"{NBSP}{row.unit}" if row.unit else ""
    return (
        f'<tr class="{kind}">'
        f'<th scope="row">{html_text(row.name)}</th><td class="num">{value_of(row)}{unit}</td>'
        f'<td class="num err">{error_of(row)}</td><td class="num ends">{interval_of(row)}</td>'
        f'<td class="better">{row.better}</td><td class="words">{html_text(row.words)}</td></tr>'
    )


def _token_errors(report: Report) -> str:
    """Both kinds of standard errors side by side."""
    body = "".join(
        table_row(html_text(row.name), error_of(row), token_error_of(row))
        for row in rows(report)
        if row.estimate and row.estimate.token_error is not None
    )
    words = (
        "llama.cpp treats tokens as independent. Tokens within a document are correlated, so its "
        "standard errors are too small."
    )
    head = heads("Metric", "± here", "± with independent tokens", numeric=2)
    return f'<p class="words">{words}</p>{table(head, body)}'


def distribution_section(report: Report) -> str:
    return section(
        "Token by token",
        "Averages hide the tail, and the tail is what breaks code and long reasoning.",
        grid([kld_by_token(report), delta_p_by_token(report), scale_of_divergence(report)])
        + details("All percentiles", card(_percentiles(report))),
    )


def kld_by_token(report: Report) -> str:
    kld = report.kld
    not_drawn = " Values at or below zero, from rounding, are not drawn." * (kld.minimum <= 0)
    return figure(
        "KL divergence by token",
        f"The median is {rough(kld.median)} nats. One token in a hundred is above "
        f"{rough(kld.q99_0)}, the worst is at {rough(kld.maximum)}. Further left is better."
        f"{not_drawn}",
        report_charts.kld_quantiles(report),
    )


def delta_p_by_token(report: Report) -> str:
    delta = report.delta_p
    return figure(
        "Change in the probability of the true token",
        f"For 90 % of the tokens it is between {percent(delta.q5_0)} and "
        f"{percent(delta.q95_0)}. A steep line at zero is better.",
        report_charts.delta_p_quantiles(report),
    )


def _percentiles(report: Report) -> str:
    body = "".join(
        table_row(
            name[0].upper() + name[1:],
            number_at(report, f"/kld/{name}", number) if name in KLD_QUANTILES else "–",
            number_at(report, f"/delta_p/{name}", lambda share: percent(share, 3), "%"),
        )
        for name in QUANTILES
    )
    return table(heads("Percentile of tokens", "KLD, nats", "Δp", numeric=2), body)


def weights_section(report: Report) -> str:
    model = report.quantized
    reference = report.reference
    charts = [size_figure(report)]
    if model.schemes:
        grids = (table_row(html_text(name), f"{n:,}") for name, n in model.schemes.items())
        charts.append(
            figure(
                "Grids",
                "Bits, group size and symmetry; in brackets the rounding method.",
                table(heads("Grid", "Matrices", numeric=1), "".join(grids)),
            )
        )
    of_experts = {unit.bits_per_weight for unit in report.units if unit.expert is not None}
    if len(of_experts) > 1:
        drawn = (layer_sections.bits_by_kind(report.units), layer_sections.bits(report.units))
        charts += filter(None, drawn)
    worst = sorted(report.units, key=lambda unit: -unit.relative_error)[:_WORST_MATRICES]
    folded = details("Matrices with the largest error", card(_matrix_table(worst)))
    return section(
        "What was quantized",
        f"{name_of(model)} at {model.bits_per_weight:.2f} bits per weight, "
        f"{name_of(reference)} at {reference.bits_per_weight:.2f}, counting all of their files.",
        grid(charts) + (folded if worst else ""),
    )


def size_figure(report: Report) -> str:
    return figure("Size", _size_words(report), report_charts.sizes(report))


def _size_words(report: Report) -> str:
    bf16 = unbroken_size(bf16_bytes(report.quantized))
    words = f"All weight files, against the same weights in bf16 ({bf16})."
    if stored_quantized(report.reference):
        words += " The reference is stored quantized, too; it was dequantized for the comparison."
    return words


def _matrix_table(units: Iterable[UnitRow]) -> str:
    names = ("Matrix", "Grid", "Method", "Weight error", "Output error", "Calibration tokens")
    return table(heads(*names, numeric=3), "".join(map(_matrix, units)))


def _matrix(unit: UnitRow) -> str:
    output_error = "–" if unit.output_error is None else percent(unit.output_error)
    if unit.held_out_error is not None:
        output_error += f" ({percent(unit.held_out_error)} held out)"
    tokens = "–" if unit.tokens is None else f"{unit.tokens:,}"
    return (
        f'<tr><th scope="row"><code>{html_text(unit.name)}</code></th>'
        f"<td>{html_text(unit.scheme)}</td><td>{html_text(unit.method)}</td>"
        f'<td class="num">{percent(unit.relative_error)}</td>'
        f'<td class="num">{output_error}</td><td class="num">{tokens}</td></tr>'
    )


def fallbacks(report: Report) -> str:
    """A warning that names the matrices that were not quantized as planned, if there are any."""
    fallen = [unit for unit in report.units if unit.fallback]
    if not fallen:
        return ""
    items = "".join(
        f"<li><code>{html_text(unit.name)}</code>: {html_text(unit.fallback or '')}</li>"
        for unit in fallen[:_MOST_FALLBACKS]
    )
    if len(fallen) > _MOST_FALLBACKS:
        items += f"<li>and {len(fallen) - _MOST_FALLBACKS} more, see report.json</li>"
    noun = "matrix was" if len(fallen) == 1 else "matrices were"
    return (
        f'<div class="warn"><h3>{len(fallen)} {noun} not quantized as planned</h3>'
        f"{details('Which, and why', f'<ul>{items}</ul>')}</div>\n"
    )
