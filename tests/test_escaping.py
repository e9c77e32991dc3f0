"""Names from files and generated tokens are shown; they do nothing to whoever looks at them."""

import io
import json
import re
import shutil
import unicodedata
from contextlib import redirect_stdout
from html.parser import HTMLParser
from os.path import relpath
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.table import Table

import grokquant
from grokquant.cli import main
from grokquant.escaping import (
    html_text,
    json_text,
    lines,
    markdown_code,
    markdown_text,
    one_line,
    python_string,
)
from grokquant.files.published import published_path
from grokquant.reporting.terminal import PlainConsole
from grokquant.runtime.generate import Generated

# Each does something somewhere: moves a cursor, names a window, reorders, breaks a line, is markup.
NAMES = {
    "colour": "a\x1b[31mred\x1b[0m",
    "title of the window": "a\x1b]0;owned\x07b",
    "hyperlink": "a\x1b]8;;http://x.example\x1b\\b\x1b]8;;\x1b\\",
    "one byte of control": "a\x9b2Jb\x90c",
    "erased": "a\x08\x08\rok\x7f",
    "a line of its own": "a\ngrokquant: ok\n",
    "other lines": "a\x0bb\x0cc\x85d\u2028e\u2029f",
    "reordered": "a\u202efdp.exe\u2066b\u200f",
    "invisible": "a\u200b\u00ad\ufeff\U000e0041b",
    "half a character": "a\udce9",
    "markup of rich": "[red]a[/red][link=file://x]b[/link][/]:smile:",
    "closing tag of rich": "[/bold]",
    "element": "<img src=x onerror=alert(1)>",
    "attribute": "\" onload=alert(1) x='",
    "entity": "&lt;b&gt; &amp;",
    "cells": "a|b|\\|c",
    "code": "a`b``c```",
    "only backticks": "```",
    "emphasis": "_a_ *b* ~~c~~ $d$",
    "image": "![a](http://x.example/pixel.png) [b](c)",
    "end of a string": 'a") or open("b") #\\',
}
ACTS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def acting(text: str) -> list[str]:
    """The characters of a text of several lines that a terminal would act on."""
    return ACTS.findall(text.replace("\n", ""))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_every_medium_shows_a_name_and_no_more(name):
    assert ACTS.search(one_line(name)) is None and one_line(name).isprintable()
    assert acting(lines(name)) == [] and lines(name).count("\n") == name.count("\n")
    assert eval(python_string(name)) == name and ACTS.search(python_string(name)) is None
    shown = json_text(json.dumps({"name": name}, indent=2, ensure_ascii=False))
    assert json.loads(shown) == {"name": name} and acting(shown) == []


class Texts(HTMLParser):
    """The words of a page and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.tags = "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        self.words += data


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_pages_hold_the_name_as_text(name):
    page = Texts(f'<p title="{html_text(name)}">{html_text(name)}</p>')
    assert page.tags == [("p", [("title", one_line(name))])]
    assert page.words == one_line(name)


def rendered(cell: str) -> str:
    """What CommonMark and GitHub's tables make of text without markup: escapes are resolved."""
    bare = re.sub(r"\\([!-/:-@\[-`{-~])", "", cell)
    assert not re.search(r"[`*\[\]|~$]|<|(?<!\w)_|_(?!\w)|&(?!lt;)", bare), cell
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", re.sub(r"(?<!\\)&lt;", "<", cell))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_markdown_holds_no_markup_of_a_name(name):
    assert rendered(markdown_text(name)) == one_line(name.replace("\n", " "))
    code = markdown_code(name)
    fence = re.match("`+", code)[0]
    inner = code.removeprefix(fence).removesuffix(fence)
    assert not re.search(f"(?<!`){fence}(?!`)", inner)
    assert inner.strip(" ") == one_line(name).strip(" ")


def test_plain_names_stay_as_they_are():
    for name in ("grok-1_int4 (2)", "Größe 5", "模型", "a\u00a0b", "layers.0.experts.3.up", "✓ 🙂"):
        assert one_line(name) == lines(name) == html_text(name) == markdown_text(name) == name
        assert markdown_code(name) == f"`{name}`" and python_string(name) == f'"{name}"'


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_terminal_shows_names_in_lines_and_tables(name):
    stream = io.StringIO()
    console = PlainConsole(file=stream, force_terminal=True, width=300, legacy_windows=False)
    console.print(f"{name} -> out")
    table = Table(name, "bytes", title=name, caption=name)
    table.add_row(name, "1")
    console.print(table)
    styled = stream.getvalue()
    text = re.sub(r"\x1b\[[\d;]*m", "", styled)  # colours of the table itself
    assert acting(text) == []
    assert text.startswith(f"{one_line(name)} -> out\n")
    assert text.count(f" {one_line(name)} ") >= 2  # in the head and in the row


def test_generated_text_does_not_act_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    generated = "x\n\ty" + "".join(NAMES.values())

    def generate_text(*given: object) -> Generated:
        *_, write = given
        write(generated)
        return Generated(generated, 1, 0, 1.0)

    monkeypatch.setattr("grokquant.runtime.generate.generate_text", generate_text)
    screen = Terminal()
    with redirect_stdout(screen):
        main(["generate", "toy", "--prompt", "x"], standalone_mode=False)
    assert screen.getvalue() == lines(generated) + "\n"


# A name of a directory, so without half characters and slashes, of at most 255 bytes.
AWKWARD = (
    "m\x1b[2J\x07\x9b1m\u202eb\u2028[red]:smile:<img src=x>&lt;\"'|`c``*d*[e](f)$\ngrokquant: ok"
)


@pytest.fixture(scope="module")
def awkward(tmp_path_factory, smallest_release, text_file) -> Path:
    """A folder whose `source` and `out` have an awkward name, with a recipe to make the one from
    the other."""
    root = tmp_path_factory.mktemp("names")
    shutil.copytree(smallest_release, root / f"source{AWKWARD}")
    recipe = {
        "model": {"path": str(root / f"source{AWKWARD}")},
        "quantize": [{"match": "*", "method": "rtn", "bits": 4, "group": 32}],
        "output": {"path": str(root / f"out{AWKWARD}")},
        "eval": {"text": relpath(text_file), "samples": 2, "length": 32},
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return root


def test_commands_and_papers_show_awkward_names(awkward, text_file):
    source, out = awkward / f"source{AWKWARD}", awkward / f"out{AWKWARD}"
    recipe, ranking = awkward / "recipe.yaml", awkward / "ranking"
    line, value = one_line(AWKWARD), json_text(json.dumps(AWKWARD, ensure_ascii=False))[1:-1]
    for command, name in (
        (["plan", recipe], line),
        (["plan", recipe, "--json"], value),
        (["inspect", source], line),
        (["inspect", source, "--json"], value),
        (["quantize", recipe], line),
        (["inspect", out], line),
        (["verify", out], line),
        (["eval", out, "--reference", source, "--text", text_file, "--quick"], line),
        (["compare", out], line),
        (["compare", out, "--markdown"], markdown_text(AWKWARD)),
        (["compare", out, "--output", ranking], line),
        (["verify", source], line),  # refused
        (["convert", out, "--format", "gguf", "--output", source], line),  # refused
    ):
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        refused = command[0] == "convert" or command == ["verify", source]
        assert (result.exit_code == 0) is not refused, result.output
        shown = result.stdout + result.stderr
        assert acting(shown) == [] and name in shown, command
        assert "grokquant: ok" not in shown.splitlines(), command
    check_card((out / "README.md").read_text())
    for page in (out / "evaluation" / "report.html", ranking / "compare.html"):
        check_page(page.read_text())


def check_card(card: str) -> None:
    body = card.split("\n---\n", 1)[1]
    assert acting(body) == []
    assert f"# {markdown_text('out' + AWKWARD)}" in body.splitlines()
    assert markdown_code(f"source{AWKWARD}") in body
    call = re.search(r"^model, tokenizer = grokquant\.load\((.*)\)$", body, re.M)[1]
    assert eval(call) == f"out{AWKWARD}"
    protocol = next(line for line in body.splitlines() if "reference: source" in line)
    assert markdown_text(f"source{AWKWARD}") in protocol


def check_page(text: str) -> None:
    assert acting(text) == []
    page = Texts(text)
    assert one_line(AWKWARD) in page.words
    assert not {tag for tag, _ in page.tags} & {"img", "script"}
    links = [dict(attributes)["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(re.fullmatch(r"#[a-z-]+", str(link)) for link in links)


def test_spaces_of_all_widths_are_no_danger():
    spaces = [chr(c) for c in range(0x3001) if unicodedata.category(chr(c)) == "Zs"]
    assert one_line("".join(spaces)) == "".join(spaces)


def test_reports_name_files_whose_names_are_not_utf8():
    for path in ("/a/b\udce9.txt", "b\udce9.txt"):
        assert published_path(path) == "b\\udce9.txt"


def test_text_of_others_passes_through_these_functions_alone():
    """No module makes pages, rich tables or consoles around them."""
    shortcuts = re.compile(
        r"from html import|rich\.markup|(?<!Plain)Console\(|Text\.from_|\bprint\("
    )
    program = "evaluation/task_data.py"  # prints what it wrote, when run by itself
    package = Path(grokquant.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if shortcuts.search(re.sub(r"console\.print\(", "", path.read_text()))
    }
    assert found - {program} == {"escaping.py", "reporting/terminal.py"}
