"""What the cell of a notebook shows: parts of pages with their own stylesheet.

The stylesheet is nested below one class, so that it changes nothing else in the notebook.
"""

from collections.abc import Iterable, Sequence

from grokquant.escaping import html_text
from grokquant.reporting.html.markup import card, facts, heads, table
from grokquant.reporting.html.style import CELL_CSS


def cell(body: str) -> str:
    return f'<div class="grokquant"><style>{CELL_CSS}</style>{body}</div>'


def title(words: str) -> str:
    return f"<h3>{html_text(words)}</h3>"


def note(words: str) -> str:
    return f'<p class="note">{html_text(words)}</p>'


def fact_list(pairs: Iterable[tuple[str, str]]) -> str:
    return facts((html_text(name), html_text(fact)) for name, fact in pairs)


def cell_table(names: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns hold words, the others numbers."""
    head = heads(*map(html_text, names), numeric=len(names) - words)
    return card(table(head, "".join(_row(row, words) for row in rows)))


def _row(row: Sequence[str], words: int) -> str:
    kinds = [""] * (words - 1) + [' class="num"'] * (len(row) - words)
    shown = [html_text(text) for text in row]
    cells = "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, shown[1:], strict=True))
    return f'<tr><th scope="row">{shown[0]}</th>{cells}</tr>'
