"""What commands print: lines, tables and JSON, whatever the names in them hold."""

from typing import TYPE_CHECKING

import click

from grokquant import escaping
from grokquant.escaping import one_line

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST_LINE = 2000  # of an error: names and values in it come from files


def say(*lines: str, err: bool = False) -> None:
    """Prints each of `lines` as one line, whatever the names in it hold."""
    for line in lines:
        click.echo(one_line(line), err=err)


def say_error(line: str) -> None:
    say(line, err=True)


def say_own(line: str) -> None:
    say_error(f"grokquant: {line}")


def say_nothing(line: str) -> None: ...


def bounded(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."


def print_tables(*tables: "Table") -> None:
    from grokquant.reporting.terminal import text_console

    console = text_console()
    for table in tables:
        console.print(table)


def print_json(value: object) -> None:
    import json

    click.echo(escaping.json_text(json.dumps(value, indent=2, ensure_ascii=False)))
