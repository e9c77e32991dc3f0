"""The small parts that the sections of the page are put together from."""

from html import escape

from grokquant.evaluation.tables import NBSP, Row


def section(title: str, words: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{escape(words)}</p>{body}</section>\n"


def figure(title: str, words: str, drawing: str) -> str:
    caption = f"<figcaption><h3>{title}</h3><p>{escape(words)}</p></figcaption>"
    return f"<figure>{caption}{drawing}</figure>"


def details(summary: str, table: str) -> str:
    return f'<details><summary>{summary}</summary><div class="card">{table}</div></details>'


def value_of(row: Row) -> str:
    shown = row.shown.removesuffix(f"{NBSP}{row.unit}") if row.unit else row.shown
    return datum(row.path, row.value, shown, row.unit)


def error_of(row: Row) -> str:
    if row.error is None:
        return ""
    path = row.path.removesuffix("value") + "error"
    return datum(path, row.error, row.shown_error, row.unit)


def datum(path: str, value: float, shown: str, unit: str = "") -> str:
    unit = f' data-unit="{unit}"' if unit else ""
    return f'<span data-path="{path}" data-value="{value!r}"{unit}>{shown}</span>'


def better(words: str) -> str:
    return f'<span class="better">{words}</span>'
