"""The small parts that the sections of the page are put together from."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from grokquant.evaluation.report import Estimate
from grokquant.reporting.html.style import CSS
from grokquant.reporting.rows import NBSP, Row, number


def document(title: str, body: str, version: str, data: str) -> str:
    """A whole page; `data` is the name of the file that has the same numbers."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}"
        f"<footer>grokquant {escape(version)}. The same numbers, in full precision, "
        f"are in {data} beside this page.</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, words: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{escape(words)}</p>{body}</section>\n"


def figure(title: str, words: str, drawing: str) -> str:
    caption = f"<figcaption><h3>{title}</h3><p>{escape(words)}</p></figcaption>"
    return f"<figure>{caption}{drawing}</figure>"


def details(summary: str, body: str, card: bool = True) -> str:
    """Folded on a screen, open on paper."""
    body = f'<div class="card">{body}</div>' if card else body
    return f"<details><summary>{summary}</summary>{body}</details>"


def table(head: str, body: str, kind: str = "") -> str:
    """A table; `head` and `body` are rows of cells."""
    name = f' class="{kind}"' if kind else ""
    return f"<table{name}><thead>{head}</thead><tbody>{body}</tbody></table>"


def heads(*names: str, numbers: int = 0) -> str:
    """A row of column heads, the last `numbers` of which stand over numbers."""
    first = len(names) - numbers
    kinds = ['<th scope="col">'] * first + ['<th scope="col" class="num">'] * numbers
    cells = (f"{kind}{name}</th>" for kind, name in zip(kinds, names, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def wide_table(names: Sequence[str], rows: Iterable[Sequence[str]], last_in_words: bool) -> str:
    """A table whose rows become cards on a phone, where each cell carries its head.

    `names` are heads, `rows` cells; the first column names the row, the `last_in_words` perhaps.
    """
    count = len(names) - last_in_words
    kinds = [""] + [' class="num"'] * (count - 1) + [""] * last_in_words
    head = "".join(f'<th scope="col"{k}>{name}</th>' for k, name in zip(kinds, names, strict=True))
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(
            f'<td{kind} data-label="{re.sub("<.*", "", name)}">{cell}</td>'
            for kind, name, cell in zip(kinds[1:], names[1:], cells, strict=True)
        )
        + "</tr>"
        for first, *cells in rows
    )
    return f'<div class="card">{table(f"<tr>{head}</tr>", body, "runs")}</div>'


def value_of(row: Row) -> str:
    return datum(row.path, row.value, row.bare(row.value), row.unit)


def error_of(row: Row) -> str:
    if row.estimate is None:
        return ""
    return datum(_beside(row, "error"), row.estimate.error, row.shown_error, row.unit)


def token_error_of(row: Row) -> str:
    """The error with tokens taken as independent."""
    error = row.estimate.token_error if row.estimate else None
    scale = 100 if row.unit == "%" else 1
    shown = number((error or 0) * scale, (error or 0) * scale)
    return datum(_beside(row, "token_error"), error, shown, row.unit)


def interval_of(row: Row) -> str:
    """The 95 % interval."""
    if row.estimate is None:
        return ""
    ends = (("low", row.estimate.low), ("high", row.estimate.high))
    shown = (datum(_beside(row, key), end, row.bare(end), row.unit) for key, end in ends)
    return " to ".join(shown)


def _beside(row: Row, key: str) -> str:
    return row.path.removesuffix("value") + key


def estimate_of(path: str, estimate: Estimate, unit: str = "") -> str:
    """An estimate above its 95 % interval; `path` is that of the estimate."""
    scale = 100 if unit else 1

    def shown(field: str) -> str:
        value = getattr(estimate, field)
        text = number(value * scale, estimate.error * scale)
        return datum(f"{path}/{field}", value, text, unit)

    ends = f"{shown('low')} to {shown('high')}"
    after = f"{NBSP}{unit}" if unit else ""
    return f'<b>{shown("value")}</b>{after}<br><span class="ends">{ends}</span>'


def datum(path: str, value: float | None, shown: str, unit: str = "") -> str:
    """A number of the report: where it is found and in full, and as people read it."""
    if value is None:
        return "–"
    if not path:
        return shown
    unit = f' data-unit="{unit}"' if unit else ""
    return f'<span data-path="{path}" data-value="{value!r}"{unit}>{shown}</span>'


def better(words: str) -> str:
    return f'<span class="better">{words}</span>'
