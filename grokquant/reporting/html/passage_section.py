"""The section of the page with a passage of text and what both models would say next."""

from grokquant.escaping import html_text
from grokquant.evaluation.report import NextToken, Passage, Report
from grokquant.humanize import percent
from grokquant.reporting.html.markup import card, details, section, table, wide_table
from grokquant.reporting.rows import name_of

_BREAK = "\u21b5"  # in place of a newline, which a page would show as a space


def passage_section(report: Report) -> str:
    found = report.passage
    if found is None or not found.tokens:
        return ""
    differing = [token for token in found.tokens if token.quantized != token.reference]
    words = (
        "The end of the first window, and what each model ranks first in place of each of its last "
        f"{len(found.tokens)} tokens. In {len(differing)} places, which are marked, they differ. "
        "This is no generated text: both models always go on from the true text. "
        "`grokquant generate` writes some."
    )
    return section("What they would say next", words, _texts(report, found) + _places(differing))


def _texts(report: Report, found: Passage) -> str:
    """The text, and the choices of both models in its place."""
    names = (
        ("The text", ""),
        ("Reference", name_of(report.reference)),
        ("Quantized", name_of(report.quantized)),
    )
    tokens = found.tokens
    shown = (
        f'<span class="soft">{_text(found.before)}</span>' + "".join(_text(t.text) for t in tokens),
        "".join(_marked(t.reference, t) for t in tokens),
        "".join(_marked(t.quantized, t) for t in tokens),
    )
    rows = (
        f'<tr><th scope="row">{head}<br><span class="ends">{html_text(name)}</span></th>'
        f'<td class="passage">{text}</td></tr>'
        for (head, name), text in zip(names, shown, strict=True)
    )
    return card(table("", "".join(rows), "said"))


def _places(differing: list[NextToken]) -> str:
    if not differing:
        return ""
    heads = ("True token", "Reference", "Its probability", "Quantized", "Its probability")
    rows = [
        (
            _text(token.text),
            _text(token.reference),
            percent(token.reference_p),
            _text(token.quantized),
            percent(token.quantized_p),
        )
        for token in differing
    ]
    return details("Where they differ", wide_table(heads, rows, len(heads) - 1))


def _marked(text: str, token: NextToken) -> str:
    shown = _text(text)
    return shown if token.quantized == token.reference else f"<mark>{shown}</mark>"


def _text(text: str) -> str:
    return html_text(text.replace("\n", _BREAK)) or "∅"
