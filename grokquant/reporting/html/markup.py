"""Elements that pages are put together from: sections, figures, tables, numbers with pointers."""

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence

from grokquant.escaping import html_text
from grokquant.humanize import NBSP, number
from grokquant.reporting.html.style import CSS
from grokquant.reporting.json_pointer import Datum, JsonDocument, datum_at, find_datum
from grokquant.reporting.rows import Row


def document(title: str, body: str, version: str, json_name: str) -> str:
    """A whole page; `json_name` is the file that has the same numbers."""
    made = f"{_today()}, grokquant {html_text(version)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}"
        f"<footer>{made}. {json_name}, next to this page, has the same "
        "numbers in full precision.</footer>\n</main>\n</body>\n</html>\n"
    )


def _today() -> str:
    """The day on which a page is written, in UTC, or that of SOURCE_DATE_EPOCH."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def section(title: str, words: str, body: str) -> str:
    anchor = _anchor(title)
    return f'<section><h2 id="{anchor}">{title}</h2><p>{html_text(words)}</p>{body}</section>\n'


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def contents(body: str) -> str:
    """A list of links to the sections of `body`."""
    titles = re.findall(r"<section><h2 id=[^>]*>([^<]*)</h2>", body)
    links = "".join(f'<li><a href="#{_anchor(title)}">{title}</a></li>' for title in titles)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'


def grid(figures: Iterable[str]) -> str:
    """Figures in two columns, in one on a phone."""
    return f'<div class="grid">{"".join(figures)}</div>'


def figure(title: str, words: str, drawing: str) -> str:
    caption = f"<figcaption><h3>{title}</h3><p>{html_text(words)}</p></figcaption>"
    return f"<figure>{caption}{drawing}</figure>"


def card(body: str) -> str:
    return f'<div class="card">{body}</div>'


def details(summary: str, body: str) -> str:
    """Folded on a screen, open on paper."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A card of (name, fact)."""
    listed = "".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in pairs)
    return card(f'<dl class="facts">{listed}</dl>')


def file_path(text: str) -> str:
    """A path of the file system."""
    return f'<span class="path">{html_text(text)}</span>'


def table(head: str, body: str, kind: str = "") -> str:
    """A table; `head` and `body` are rows of cells."""
    name = f' class="{kind}"' if kind else ""
    return f"<table{name}><thead>{head}</thead><tbody>{body}</tbody></table>"


def heads(*names: str, numeric: int = 0) -> str:
    """A row of column heads, the last `numeric` of which stand over numbers."""
    words = len(names) - numeric
    cells = [f'<th scope="col">{name}</th>' for name in names[:words]]
    cells += [f'<th scope="col" class="num">{name}</th>' for name in names[words:]]
    return f"<tr>{''.join(cells)}</tr>"


def table_row(name: str, *numbers: str) -> str:
    """A row of numbers, named by its first cell."""
    cells = "".join(f'<td class="num">{shown}</td>' for shown in numbers)
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def wide_table(names: Sequence[str], rows: Iterable[Sequence[str]], in_words: int) -> str:
    """A table whose rows become cards on a phone, where each cell carries its head.

    `names` are heads, `rows` cells; the first column names the row, the last `in_words` hold words.
    """
    numeric = len(names) - 1 - in_words
    kinds = ["", *[' class="num"'] * numeric, *[""] * in_words]
    cells = zip(kinds, names, strict=True)
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for kind, name in cells)
    body = "".join(_wide_row(names, kinds, row) for row in rows)
    return card(table(f"<tr>{head}</tr>", body, "runs"))


def _wide_row(names: Sequence[str], kinds: Sequence[str], row: Sequence[str]) -> str:
    labels = [re.sub("<.*", "", name) for name in names]
    cells = "".join(
        f'<td{kind} data-label="{label}">{cell}</td>'
        for kind, label, cell in zip(kinds[1:], labels[1:], row[1:], strict=True)
    )
    return f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'


def value_of(row: Row) -> str:
    shown = row.bare(row.value)
    return _tagged(Datum(row.value, row.pointer), shown, row.unit) if row.pointer else shown


def error_of(row: Row) -> str:
    if row.estimate is None:
        return ""
    return _tagged(row.part("error"), row.shown_error, row.unit)


def token_error_of(row: Row) -> str:
    """The error with tokens taken as independent."""
    if row.estimate is None or row.estimate.token_error is None:
        return "–"
    error = row.part("token_error")
    shown = number(error.value * row.scale, error.value * row.scale)
    return _tagged(error, shown, row.unit)


def interval_of(row: Row) -> str:
    """The 95 % interval."""
    if row.estimate is None:
        return ""
    ends = (row.part("low"), row.part("high"))
    return " to ".join(_tagged(end, row.bare(end.value), row.unit) for end in ends)


def estimate_at(document: JsonDocument, pointer: str, unit: str = "") -> str:
    """The estimate at `pointer` above its 95 % interval; `unit` is "" or "%"."""
    scale = 100 if unit else 1
    error = datum_at(document, f"{pointer}/error").value

    def shown(part: str) -> str:
        found = datum_at(document, f"{pointer}/{part}")
        return _tagged(found, number(found.value * scale, error * scale), unit)

    ends = f"{shown('low')} to {shown('high')}"
    after = f"{NBSP}{unit}" if unit else ""
    return f'<b>{shown("value")}</b>{after}<br><span class="ends">{ends}</span>'


def number_at(
    document: JsonDocument,
    pointer: str,
    show: Callable[[float], str],
    unit: str = "",
) -> str:
    """The number at `pointer` as people read it, or a dash where there is none.

    `unit` is "%" if `show` multiplies by 100.
    """
    found = find_datum(document, pointer)
    return "–" if found is None else _tagged(found, show(found.value), unit)


def better(words: str) -> str:
    return f'<span class="better">{words}</span>'


def _tagged(datum: Datum, shown: str, unit: str) -> str:
    """A number as people read it, with its pointer and full precision."""
    kind = f' data-unit="{unit}"' if unit else ""
    return f'<span data-path="{datum.pointer}" data-value="{datum.value!r}"{kind}>{shown}</span>'
