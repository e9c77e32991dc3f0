"""The report as a page: one file, no script, nothing fetched, readable on a phone and on paper.

Every number taken from the report carries its JSON pointer and its full precision in
`data-path` and `data-value`.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from grokquant.errors import InputError
from grokquant.evaluation import figures
from grokquant.evaluation.report import JSON_NAME, Checkpoint, Report, UnitRow
from grokquant.evaluation.style import CSS
from grokquant.evaluation.tables import (
    LOWER,
    NBSP,
    Row,
    bf16_bytes,
    count,
    name_of,
    number,
    percent,
    quantile_rows,
    rough,
    rows,
    size,
    verdict,
    with_unit,
)
from grokquant.output import write_json, write_text

HTML_NAME = "report.html"
# Longer lists are cut here; report.json has all of it.
_WORST_UNITS, _MOST_FALLBACKS = 10, 40


def render_html(report: Report) -> str:
    """The whole page."""
    title = escape(f"{name_of(report.quantized)}: evaluation")
    body = "".join(
        (
            _header(report),
            _tiles(report),
            _metrics(report),
            _distribution(report),
            _layers(report),
            _experts(report),
            _weights(report),
            _protocol(report),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}"
        f"<footer>grokquant {escape(report.grokquant)}. The same numbers, in full precision, "
        "are in report.json beside this page.</footer>\n</main>\n</body>\n</html>\n"
    )


def write_report(report: Report, directory: Path) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `directory`, each whole or not at all.

    Returns both paths. Raises InputError where the directory cannot be written.
    """
    json_path, html_path = directory / JSON_NAME, directory / HTML_NAME
    page = render_html(report)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(html_path, page)
        write_json(json_path, report.to_json())
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error
    return json_path, html_path


def _header(report: Report) -> str:
    return (
        '<header><p class="eyebrow">What quantization cost</p>'
        f"<h1>{escape(name_of(report.quantized))}</h1>"
        f'<p class="against">{_kind(report.quantized)}, compared with '
        f"<b>{escape(name_of(report.reference))}</b></p>"
        f'<p class="verdict">{escape(verdict(report))}</p></header>\n'
    )


def _kind(model: Checkpoint) -> str:
    experts = f" × {model.experts} experts" if model.experts > 1 else ""
    return escape(
        f"{model.family}, {count(model.parameters)} weights, {model.layers} layers{experts}"
    )


def _tiles(report: Report) -> str:
    by_name = {row.name: row for row in rows(report)}
    ratio, kld = by_name["Mean PPL(Q)/PPL(base)"], by_name["Mean KLD"]
    top, noise = by_name["Same top p"], by_name["Noise floor"]
    model, plain = report.quantized, bf16_bytes(report.quantized)
    bits = f"{model.bits_per_weight:.2f}"
    tiles = (
        _tile("Perplexity ratio", ratio, "quantized over reference"),
        _tile("Mean KL divergence", kld, f"noise floor {noise.shown}"),
        _tile("Same top token", top, "greedy choice unchanged"),
        _tile_of(
            "Bits per weight",
            _datum("/quantized/bits_per_weight", model.bits_per_weight, bits),
            f"{size(model.bytes)}, {_better(LOWER)}",
            f"{percent(model.bytes / max(plain, 1), 3)} of {size(plain)} as bf16",
        ),
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n'


def _tile(name: str, row: Row, words: str) -> str:
    unit = f'<span class="unit">{NBSP}{row.unit}</span>' if row.unit else ""
    error = with_unit(row.shown_error, "%" if row.unit == "%" else "")
    return _tile_of(name, _value(row) + unit, f"±{NBSP}{error}, {_better(row.better)}", words)


def _tile_of(name: str, value: str, *notes: str) -> str:
    return (
        f'<div class="tile"><dt>{name}</dt><dd class="big">{value}</dd>'
        f'<dd class="note">{"<br>".join(notes)}</dd></div>'
    )


def _metrics(report: Report) -> str:
    lead = {"Mean PPL(Q)/PPL(base)", "Mean KLD", "Same top p"}
    parts, block = [], ""
    for row in rows(report):
        if row.block != block:
            head = f'<th colspan="5" scope="rowgroup">{row.block}</th>'
            parts.append(f'<tr class="block">{head}</tr>')
            block = row.block
        unit = f"{NBSP}{row.unit}" if row.unit else ""
        parts.append(
            f'<tr{_class("lead" if row.name in lead else "")}><th scope="row">{escape(row.name)}'
            f'</th><td class="num">{_value(row)}{unit}</td><td class="num err">{_error(row)}</td>'
            f'<td class="better">{row.better}</td><td class="words">{escape(row.words)}</td></tr>'
        )
    return _section(
        "How far from the reference",
        "Names as in llama.cpp. ± is one standard error, with tokens taken as independent.",
        '<div class="card"><table class="metrics"><thead><tr><th>Metric</th>'
        '<th class="num">Value</th><th class="num">±</th><th>Better</th><th>In plain words</th>'
        f"</tr></thead><tbody>{''.join(parts)}</tbody></table></div>",
    )


def _distribution(report: Report) -> str:
    kld, delta = report.kld, report.delta_p
    charts = _figure(
        "KL divergence by token",
        f"Half of the tokens move less than {rough(kld.median)} nats, one in a hundred more than "
        f"{rough(kld.q99_0)}, the worst one {rough(kld.maximum)}. Further left is better."
        + (" Rounding leaves some at zero or below, which are not drawn." * (kld.minimum <= 0)),
        figures.kld_quantiles(report),
    ) + _figure(
        "Change in the probability of the true token",
        f"For 90 % of the tokens it stays between {percent(delta.q5_0)} and "
        f"{percent(delta.q95_0)}. A steep line at zero is better.",
        figures.delta_p_quantiles(report),
    )
    cells = "".join(
        f'<tr><th scope="row">{name[0].upper() + name[1:]}</th><td class="num">'
        + ("–" if nats is None else _datum(f"/kld/{name}", nats, number(nats)))
        + f'</td><td class="num">{_datum(f"/delta_p/{name}", share, percent(share, 3), "%")}</td></tr>'
        for name, nats, share in quantile_rows(report)
    )
    table = (
        '<table><thead><tr><th>Percentile of tokens</th><th class="num">KLD, nats</th>'
        f'<th class="num">Δp</th></tr></thead><tbody>{cells}</tbody></table>'
    )
    return _section(
        "Token by token",
        "Averages hide the tail, and the tail is what breaks code and long reasoning.",
        f'<div class="grid">{charts}</div>{_details("All percentiles", table)}',
    )


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    worst, last = max(report.layers, key=lambda x: x.relative_error), report.layers[-1]
    charts = _figure(
        "Relative error of the hidden state",
        f"‖quantized − reference‖ / ‖reference‖ after each layer. Largest: "
        f"{percent(worst.relative_error)} after layer {worst.layer}; the last layer ends at "
        f"{percent(last.relative_error)}. Lower is better.",
        figures.layer_errors(report),
    )
    routed = [layer for layer in report.layers if layer.router_top1 is not None]
    if routed:
        least = min(routed, key=lambda x: x.router_top1 or 0)
        charts += _figure(
            "Same experts chosen",
            "Share of tokens for which the router picks the same first expert, and the same two "
            f"in any order. Least: {percent(least.router_top1 or 0, 3)} for the first, in layer "
            f"{least.layer}. Higher is better.",
            figures.router_agreement(report),
        )
    return _section(
        "Layer by layer",
        "Each model goes its own way through the text, so the errors of earlier layers count.",
        f'<div class="grid">{charts}</div>{_details("Numbers by layer", _layer_table(report))}',
    )


def _layer_table(report: Report) -> str:
    def cell(path: str, value: float | None) -> str:
        return "–" if value is None else _datum(path, value, percent(value, 4), "%")

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


def _experts(report: Report) -> str:
    charts = []
    if any(layer.routed for layer in report.layers):
        charts.append(
            _figure(
                "Load of each expert",
                "What each expert of the quantized model gets of the tokens routed in a layer. "
                f"{figures.least_fed(report)}",
                figures.load_map(report),
            )
        )
        charts.append(
            _figure(
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
            charts.append(_figure(title, caption, drawn))
    if not charts:
        return ""
    return _section(
        "Expert by expert",
        "A column for each layer, a row for each expert.",
        f'<div class="grid">{"".join(charts)}</div>',
    )


def _weights(report: Report) -> str:
    model, reference = report.quantized, report.reference
    charts = _figure("Size", _size_words(report), figures.sizes(report))
    schemes = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="num">{n:,}</td></tr>'
        for name, n in model.schemes.items()
    )
    if schemes:
        charts += _figure(
            "Grids",
            "Bits, group, symmetry and the method that rounded; the rest is as in the source.",
            '<table><thead><tr><th>Grid (method)</th><th class="num">Matrices</th></tr></thead>'
            f"<tbody>{schemes}</tbody></table>",
        )
    worst = sorted(report.units, key=lambda unit: -unit.relative_error)[:_WORST_UNITS]
    return _section(
        "What was quantized",
        f"{name_of(model)} at {model.bits_per_weight:.2f} bits per weight, "
        f"{name_of(reference)} at {reference.bits_per_weight:.2f}, all tensors counted.",
        f'<div class="grid">{charts}</div>{_fallbacks(report)}'
        + (_details("The matrices with the largest error", _unit_table(worst)) if worst else ""),
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


def _protocol(report: Report) -> str:
    protocol = report.protocol
    facts = (
        ("Text", escape(protocol.text)),
        ("SHA-256 of the text", f"<code>{escape(protocol.text_sha256)}</code>"),
        ("Windows", f"{protocol.windows:,} of {protocol.length:,} tokens"),
        ("Scored", f"{protocol.tokens_scored:,} tokens: {escape(protocol.scored)}"),
        ("Beginning-of-sequence token", "at the start of each window" if protocol.bos else "none"),
        ("Arithmetic", escape(protocol.arithmetic)),
        ("Noise floor", escape(report.noise_floor.how)),
        ("Quantized", f'<span class="path">{escape(report.quantized.path)}</span>'),
        ("Reference", f'<span class="path">{escape(report.reference.path)}</span>'),
    )
    listed = "".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in facts)
    return _section(
        "How it was measured",
        "Numbers of another text, window or arithmetic cannot be compared with these.",
        f'<div class="card"><dl class="facts">{listed}</dl></div>',
    )


def _section(title: str, words: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{escape(words)}</p>{body}</section>\n"


def _figure(title: str, words: str, drawing: str) -> str:
    caption = f"<figcaption><h3>{title}</h3><p>{escape(words)}</p></figcaption>"
    return f"<figure>{caption}{drawing}</figure>"


def _details(summary: str, table: str) -> str:
    return f'<details><summary>{summary}</summary><div class="card">{table}</div></details>'


def _value(row: Row) -> str:
    shown = row.shown.removesuffix(f"{NBSP}{row.unit}") if row.unit else row.shown
    return _datum(row.path, row.value, shown, row.unit)


def _error(row: Row) -> str:
    if row.error is None:
        return ""
    path = row.path.removesuffix("value") + "error"
    return _datum(path, row.error, row.shown_error, row.unit)


def _datum(path: str, value: float, shown: str, unit: str = "") -> str:
    unit = f' data-unit="{unit}"' if unit else ""
    return f'<span data-path="{path}" data-value="{value!r}"{unit}>{shown}</span>'


def _better(words: str) -> str:
    return f'<span class="better">{words}</span>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
