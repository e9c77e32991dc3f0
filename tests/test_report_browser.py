"""Both pages in a real Chromium: two widths, two themes, paper. Run by `make test-browser`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from reports import at, report, with_suite
from test_compare_page import run

from grokquant.evaluation.report import parse_report
from grokquant.reporting.html.page import write_report
from grokquant.reporting.html.ranking_page import write_ranking
from grokquant.reporting.ranking import rank_models

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path, nor in $CHROMIUM"),
]

PAGES = ("moe", "dense", "grok-1", "suite", "compare", "compare-12")
WIDTHS = (390, 1280)

# Texts that are narrower or lower than the element that holds them lets them be.
CUT_OFF = """[...document.querySelectorAll('.tile *, figure *, td, th, h1, h2, h3, p')]
  .filter(e => !e.closest('details:not([open])') && e.textContent.trim() && !e.closest('title'))
  .filter(e => { const r = e.getBoundingClientRect(), box = e.closest('.card') ||
      document.documentElement, b = box.getBoundingClientRect();
    return r.width > 0 && !(box.scrollWidth > box.clientWidth) &&
      (r.left < b.left - 1 || r.right > b.right + 1); })
  .map(e => e.tagName + ': ' + e.textContent.slice(0, 60))"""

# [text, colour, colour below it] of every element that has text of its own.
COLOURS = """(() => {
  const solid = c => c && c !== 'transparent' && !/, 0\\)$/.test(c);
  const below = e => { for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor; if (solid(c)) return c; } };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll('body *')].filter(e => own(e) && !e.closest('title, style'))
    .map(e => { const style = getComputedStyle(e), svg = e.tagName === 'text';
      const cell = svg && e.classList.contains('pass') ? e.previousElementSibling : null;
      return [e.textContent.trim().slice(0, 40), svg ? style.fill : style.color,
        cell ? getComputedStyle(cell).fill : below(e)]; }); })()"""

NUMBERS = """[...document.querySelectorAll('[data-path]')]
  .map(e => [e.dataset.path, e.dataset.value])"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM
    found = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(json, html) by name."""
    place = tmp_path_factory.mktemp("pages")
    shapes = {"moe": (4, 8), "dense": (32, 1), "grok-1": (64, 8)}
    found = {name: write_report(report(*shape), place / name) for name, shape in shapes.items()}
    found["suite"] = write_report(parse_report(with_suite(), "test"), place / "suite")
    few = [run(place, name) for name in ("int8", "rtn4", "gptq4")]
    many = [run(place, name) for name in ("int3", *(f"mixed{i}" for i in range(8)))]
    found["compare"] = write_ranking(rank_models(few), place / "compare")
    found["compare-12"] = write_ranking(rank_models([*few, *many]), place / "compare-12")
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_the_width_without_errors_and_fetches_nothing(
    browser: Browser, pages: dict, name: str, width: int
) -> None:
    browser.open(pages[name][1], width)
    for opened in (False, True):
        browser.evaluate(f"document.querySelectorAll('details').forEach(d => d.open = {opened:d})")
        wide, room = browser.evaluate(
            "(e => [e.scrollWidth, e.clientWidth])(document.documentElement)"
        )
        assert wide <= room <= width
        assert browser.evaluate(CUT_OFF) == []
    said = [e for e in browser.events if e["method"] in
            ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]  # fmt: skip
    assert said == []
    asked = [e["params"]["request"]["url"] for e in browser.events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert asked == [pages[name][1].resolve().as_uri()]


@pytest.mark.parametrize("name", PAGES)
def test_numbers_in_the_document_are_those_of_the_json(
    browser: Browser, pages: dict, name: str
) -> None:
    tree = json.loads(pages[name][0].read_text(encoding="utf-8"))
    browser.open(pages[name][1], WIDTHS[0])
    found = browser.evaluate(NUMBERS)
    assert len(found) > 40
    assert [pair for pair in found if float(pair[1]) != at(tree, pair[0])] == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["suite", "compare"])
def test_all_text_stands_out(
    browser: Browser, pages: dict, name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name][1], width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.evaluate(COLOURS)
    assert len(found) > 100
    page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(page) < 0.1) == dark
    assert [row for row in found if ratio(*row[1:]) < 4.5] == []


@pytest.mark.parametrize("name", PAGES)
def test_print_has_whole_pages_and_what_was_folded(
    browser: Browser, pages: dict, name: str
) -> None:
    browser.open(pages[name][1], WIDTHS[1], dark=True)
    sheets = len(re.findall(rb"/Type\s*/Page\b", browser.pdf()))
    assert 2 <= sheets <= 12
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        hidden = browser.evaluate(
            "[...document.querySelectorAll('details table, details svg')]"
            ".filter(e => !e.checkVisibility({contentVisibilityAuto: true}) ||"
            " !e.getBoundingClientRect().height).length"
        )
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    assert background == "rgb(255, 255, 255)" and hidden == 0


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ratio(one: str, other: str) -> float:
    """WCAG's, of two colours as a browser computes them."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)
