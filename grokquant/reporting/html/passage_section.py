"""The section of the page with a passage of text, what both models would say next in it, and what
they write in its place."""

from collections.abc import Sequence

from grokquant.escaping import html_text
from grokquant.evaluation.report import ComparedModel, Generated, NextToken, Passage, Report
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
        "The end of the first sequence, and what each model ranks first in place of each of its "
        f"last {len(found.tokens)} tokens. In {len(differing)} places, which are marked, they "
        f"differ. Both models always go on from the true text. {_about_generated(found)}"
    )
    marked = {
        role: "".join(_marked(getattr(token, role), token) for token in found.tokens)
        for role in ("reference", "quantized")
    }
    said = {
        "The text": "".join(_text(token.text) for token in found.tokens),
        _model("Reference", report.reference): marked["reference"],
        _model("Quantized", report.quantized): marked["quantized"],
    }
    body = _texts(found.before, said) + _places(differing)
    if found.generated is not None:
        body += _generated(report, found.before, found.generated)
    return section("What they would say next", words, body)


def _about_generated(found: Passage) -> str:
    if found.generated is not None:
        return "Below it, each goes on from its own."
    if found.not_generated is not None:
        return f"No text was generated: {found.not_generated}."
    return ""


def _generated(report: Report, before: str, found: Generated) -> str:
    """What both models write, with the first token that differs marked in each."""
    first = found.same
    count = max(len(found.reference), len(found.quantized))
    words = f"Both write the same {count} tokens."
    if first < count:
        words = f"The first {first} tokens are the same in both; the next one is marked."
    written = {
        _model("Reference", report.reference): _with_mark(found.reference, first),
        _model("Quantized", report.quantized): _with_mark(found.quantized, first),
    }
    intro = f"<h3>What they write</h3><p>{words} Each token is the likeliest one.</p>"
    return intro + _texts(before, written)


def _with_mark(tokens: Sequence[str], place: int) -> str:
    shown = [_text(token) for token in tokens]
    if place < len(shown):
        shown[place] = f"<mark>{shown[place]}</mark>"
    return "".join(shown)


def _model(role: str, model: ComparedModel) -> str:
    return f'{role}<br><span class="ends">{html_text(name_of(model))}</span>'


def _texts(before: str, rows: dict[str, str]) -> str:
    """Texts by their heads, the first one after what stands before all of them."""
    shown = dict(rows)
    first = next(iter(shown))
    shown[first] = f'<span class="soft">{_text(before)}</span>{shown[first]}'
    body = "".join(
        f'<tr><th scope="row">{head}</th><td class="passage">{text}</td></tr>'
        for head, text in shown.items()
    )
    return card(table("", body, "said"))


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
