"""The report as a page: one file, no script, nothing fetched, readable on a phone and on paper.

Every number taken from the report carries its JSON pointer and its full precision in
`data-path` and `data-value`.
"""

from contextlib import suppress
from pathlib import Path

from grokquant.errors import InputError
from grokquant.escaping import html_text
from grokquant.evaluation.report import JSON_NAME, ComparedModel, Report
from grokquant.files.atomic import check_writable, write_json, write_text
from grokquant.humanize import NBSP, count, percent, unbroken_size
from grokquant.reporting.html.layer_sections import (
    experts_section,
    layers_section,
    routing_section,
)
from grokquant.reporting.html.markup import (
    better,
    contents,
    document,
    facts,
    file_path,
    interval_of,
    number_at,
    section,
    value_of,
)
from grokquant.reporting.html.passage_section import passage_section
from grokquant.reporting.html.sections import (
    distribution_section,
    fallbacks,
    metrics_section,
    weights_section,
)
from grokquant.reporting.html.suite_sections import (
    gate_line,
    suite_section,
    tasks_section,
    texts_section,
)
from grokquant.reporting.rows import (
    LOWER,
    Row,
    bf16_bytes,
    name_of,
    noise_rows,
    notes,
    rows,
    verdict,
)

HTML_NAME = "report.html"


def render_html(report: Report) -> str:
    """The whole page."""
    sections = "".join(
        (
            suite_section(report),
            metrics_section(report),
            tasks_section(report),
            texts_section(report),
            distribution_section(report),
            passage_section(report),
            routing_section(report),
            layers_section(report),
            experts_section(report),
            weights_section(report),
            _protocol(report),
        )
    )
    first = _header(report) + fallbacks(report) + _tiles(report)
    body = first + contents(sections) + sections
    title = f"{name_of(report.quantized)}: evaluation"
    return document(title, body, report.grokquant, JSON_NAME)


def write_report(report: Report, directory: Path) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `directory`, each whole or not at all.

    Returns both paths. Raises InputError where the directory cannot be written.
    """
    page = (HTML_NAME, render_html(report))
    return write_page(directory, (JSON_NAME, report.to_json()), page)


def write_page(
    directory: Path, numbers: tuple[str, dict], page: tuple[str, str]
) -> tuple[Path, Path]:
    """Writes numbers as JSON and the page that shows them, each given with the name of its file.

    Returns both paths, as `write_report` does.
    """
    json_name, content = numbers
    html_name, html = page
    json_path = directory / json_name
    html_path = directory / html_name
    check_writable(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(html_path, html)
        write_json(json_path, content)
    except OSError as error:
        with suppress(OSError):  # nothing is left of what could not be begun
            directory.rmdir()
        raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error
    return json_path, html_path


def _header(report: Report) -> str:
    first = "".join(f"<p><b>{html_text(note)}</b></p>" for note in notes(report))
    return (
        f"<header>{first}"
        '<p class="eyebrow">Cost of quantization</p>'
        f"<h1>{html_text(name_of(report.quantized))}</h1>"
        f'<p class="against">{_kind(report.quantized)}, compared with '
        f"<b>{html_text(name_of(report.reference))}</b></p>"
        f'<p class="verdict">{html_text(verdict(report))}</p>{gate_line(report)}</header>\n'
    )


def _kind(model: ComparedModel) -> str:
    experts = f" × {model.experts} experts" if model.experts > 1 else ""
    return html_text(
        f"{model.family}, {count(model.parameters)} weights, {model.layers} layers{experts}"
    )


def _tiles(report: Report) -> str:
    by_name = {row.name: row for row in [*rows(report), *noise_rows(report)]}
    noise = by_name["Mean KLD, noise floor"].shown
    tiles = [
        _tile("Perplexity ratio", by_name["Mean PPL(Q)/PPL(base)"], "quantized over reference"),
        _tile("Mean KL divergence", by_name["Mean KLD"], f"noise floor {noise}"),
        _tile("Same top token", by_name["Same top p"], "top-1 agreement"),
    ]
    if worst := by_name.get("Same experts, worst layer"):
        mean = by_name["Same experts, mean"]
        tiles.append(_tile("Same experts", worst, f"in the worst layer; mean {mean.shown}"))
    tiles.append(_bits_tile(report))
    unit = report.bootstrap.unit
    note = f"Ranges are 95{NBSP}% confidence intervals from a bootstrap over {unit}s."
    return (
        f'<dl class="tiles n{len(tiles)}">{"".join(tiles)}</dl>\n<p class="tilenote">{note}</p>\n'
    )


def _bits_tile(report: Report) -> str:
    model = report.quantized
    plain = bf16_bytes(model)
    return _tile_of(
        "Bits per weight",
        number_at(report, "/quantized/bits_per_weight", lambda bits: f"{bits:.2f}"),
        f"{unbroken_size(model.bytes)}, {better(LOWER)}",
        f"{percent(model.bytes / max(plain, 1), 3)} of {unbroken_size(plain)} in bf16",
    )


def _tile(name: str, row: Row, words: str) -> str:
    unit = f'<span class="unit">{NBSP}{row.unit}</span>' if row.unit else ""
    ends = [interval_of(row)] if row.estimate else []
    return _tile_of(name, value_of(row) + unit, better(row.better), *ends, words)


def _tile_of(name: str, value: str, *notes: str) -> str:
    return (
        f'<div class="tile"><dt>{name}</dt><dd class="big">{value}</dd>'
        f'<dd class="note">{"<br>".join(notes)}</dd></div>'
    )


def _protocol(report: Report) -> str:
    protocol = report.protocol
    body = facts(
        (
            ("Text", html_text(protocol.text)),
            ("SHA-256 of the text", f"<code>{html_text(protocol.text_sha256)}</code>"),
            ("Samples", protocol.sequences),
            ("Scored", f"{protocol.tokens_scored:,} tokens: {html_text(protocol.scored)}"),
            (
                "Beginning-of-sequence token",
                "at the start of each sequence" if protocol.bos else "none",
            ),
            ("Arithmetic", html_text(protocol.arithmetic)),
            ("Noise floor", html_text(report.noise_floor.how)),
            ("Quantized", file_path(report.quantized.path)),
            ("Reference", file_path(report.reference.path)),
        )
    )
    words = (
        "Numbers from another text, sequence length or arithmetic cannot be compared with these."
    )
    return section("How it was measured", words, body)
