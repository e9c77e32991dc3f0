"""Text of others, such as names in files and generated tokens, shown without doing anything.

One function for each medium, called where text is shown. What a reader could not see, and what
moves the cursor, reorders letters or breaks the line, appears as Python writes it: \\x1b, \\u202e.
"""

import json
import re
import unicodedata
from html import escape

# Python counts all spaces but the common one as not printable; they harm nobody.
_SPACE = "Zs"
# Begins or ends something in Markdown as GitHub reads it; an underscore does not within a word.
_MARKUP = re.compile(r"[\\`*\[\]|&~$]|(?<!\w)_|_(?!\w)")
_BACKTICKS = re.compile("`+")


def one_line(text: str) -> str:
    """For a line of a terminal."""
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def lines(text: str) -> str:
    """For text of several lines on a terminal: newlines and tabs stay."""
    return "".join(c if c in "\n\t" else _visible(c) for c in text)


def json_text(text: str) -> str:
    """For JSON on a terminal: the same value, with what would act written as JSON escapes it."""
    return "".join(c if _harmless(c) or c == "\n" else json.dumps(c)[1:-1] for c in text)


def html_text(text: str) -> str:
    """For an element or a quoted attribute of a page."""
    return escape(one_line(text))


def markdown_text(text: str) -> str:
    """For a line or a table cell of Markdown: no markup, no tag, no end of the cell."""
    plain = _MARKUP.sub(r"\\\g<0>", one_line(text.replace("\n", " ")))
    return plain.replace("<", "&lt;")


def markdown_code(text: str) -> str:
    """`text` as code within a line of Markdown, between more backticks than are in it."""
    plain = one_line(text)
    longest = max(map(len, _BACKTICKS.findall(plain)), default=0)
    fence = "`" * (longest + 1)
    room = " " if longest else ""  # parts a backtick at either end from the fence
    return f"{fence}{room}{plain}{room}{fence}"


def python_string(text: str) -> str:
    """`text` as a literal in Python code, between double quotes."""
    return one_line(json.dumps(text, ensure_ascii=False))


def _visible(character: str) -> str:
    return character if _harmless(character) else repr(character)[1:-1]


def _harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == _SPACE
