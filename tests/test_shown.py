"""What a notebook shows of plans, reports, rankings and models; what a terminal prints of them."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from reports import AWKWARD, Page, content, report

import grokquant
from grokquant.errors import InputError
from grokquant.evaluation.report import Report, parse_report
from grokquant.files.atomic import write_json
from grokquant.job import pipeline
from grokquant.reporting import notebook_progress, plots
from grokquant.reporting.html.style import CELL_CSS
from grokquant.reporting.shown import ShownQuantization, ShownRanking, ShownReport

EXPERTS = {"match": "layers.*.experts.*", "method": "gptq", "bits": 4, "group": 32}
FIRST = {"match": "layers.0.experts.*", "method": "gptq", "bits": 8, "group": 32}
ATTENTION = {"match": "layers.*.attention.*", "method": "copy"}
# Other than this, an element of a page does something.
HARMLESS = {
    "div", "style", "h2", "h3", "p", "b", "br", "span", "dl", "dt", "dd", "table", "thead", "tbody",
    "tr", "th", "td", "details", "summary", "section", "figure", "figcaption", "svg", "title",
    "line", "text", "rect", "circle", "path", "polyline", "progress", "code",
}  # fmt: skip


@pytest.fixture(scope="module")
def output(tiny_release, text_file, tmp_path_factory):
    """A calibrated result with experts of 8 and of 4 bits, and its recipe."""
    recipe = {
        "model": {"path": str(tiny_release)},
        "calibration": {"text": str(text_file), "samples": 8, "length": 64},
        "quantize": [FIRST, EXPERTS, ATTENTION],
        "output": {"path": str(tmp_path_factory.mktemp("shown") / "out")},
    }
    return grokquant.quantize(recipe), recipe


def evaluated(path: str = "int4", layers: int = 4, experts: int = 8) -> ShownReport:
    tree = content(layers, experts)
    tree["quantized"]["path"] = path
    return ShownReport.of(parse_report(tree, "test"))


def with_plots(thing: ShownReport) -> list[object]:
    """Everything that a cell can be given of a report."""
    return [thing, *(thing.plot(name) for name in plots.EVALUATION)]


def drawings(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]


def test_every_repr_is_a_line(output):
    path, recipe = output
    things = [
        grokquant.plan(recipe),
        grokquant.quantization_report(path),
        grokquant.inspect(path),
        evaluated(layers=64),
        ShownRanking.of([evaluated("a"), evaluated("b")]),
        evaluated().plot("layers"),
    ]
    for thing in things:
        assert len(repr(thing)) < 300 and "\n" not in repr(thing), type(thing)
        assert str(thing) == repr(thing)
    checkpoint = grokquant.plan(recipe).checkpoint
    assert len(repr(checkpoint).splitlines()) < 20 and len(repr(checkpoint)) < 2000


def test_a_plan_shows_grids_sizes_and_time(output):
    plan = grokquant.plan(output[1])
    assert plan.units and plan == grokquant.plan(output[1])
    page = Page(plan._repr_html_())
    for part in ("experts.gate", "int8 g32 sym (gptq)", "int4 g32 sym (gptq)", "on this machine"):
        assert part in page.text
    assert f"{plan.bits_per_weight:.3f}" in page.text


def test_a_quantization_report_shows_errors_by_kind_and_layer(output):
    found = grokquant.quantization_report(output[0])
    assert len(found.units) == 2 * (4 + 4 * 3) and found.fallbacks == ()
    text = Page(found._repr_html_()).text
    assert "8 sequences of 64 tokens" in text and "experts.down" in text
    first, second = (found.bits_of(rows) for rows in found.by_layer().values())
    assert first > second + 3 and f"{first:.3f}" in text and f"{second:.3f}" in text


def test_plots_of_a_quantization_have_a_cell_for_each_expert(output):
    found = grokquant.quantization_report(output[0])
    for name in ("weight_error", "output_error", "bits", "load"):
        (drawing,) = drawings(found.plot(name)._repr_html_())
        cells = [rect for rect in drawing.iter("rect") if rect.findtext("title")]
        assert len(cells) == 2 * 4, name
    (bits,) = drawings(found.plot("bits").html)
    shades = {
        title[: title.index(",")]: rect.get("class")
        for rect in bits.iter("rect")
        if (title := rect.findtext("title"))
    }
    assert shades == {"layer 0": "c q7", "layer 1": "c q0"}
    (kinds,) = drawings(found.plot("bits_by_kind").html)
    titles = [title for rect in kinds.iter("rect") if (title := rect.findtext("title"))]
    # Four matrices of attention, and gate, up and down of all experts.
    assert len(titles) == 2 * 7
    assert "layer 0, down: 8.50" in titles and "layer 1, down: 4.50" in titles
    (layers,) = drawings(found.plot().html)
    assert len([rect for rect in layers.iter("rect") if rect.findtext("title")]) == 2


def test_no_report_beside_a_model_is_said_in_a_line(tiny_release, output, tmp_path):
    with pytest.raises(InputError, match=r"has no quantization-report\.json: it is not a result"):
        grokquant.quantization_report(tiny_release)
    with pytest.raises(InputError, match=r"has no evaluation/report\.json"):
        grokquant.evaluation_report(output[0])
    write_json(tmp_path / "report.json", content())
    assert grokquant.evaluation_report(tmp_path) == evaluated(content()["quantized"]["path"])


def test_an_evaluation_shows_verdict_thresholds_and_errors():
    found = evaluated()
    text = Page(found._repr_html_()).text
    for part in ("Mean KLD", "±", "95 % interval", "bits per weight", "int4 against"):
        assert part in text
    plain = parse_report(found.to_json(), "test")  # showing it changes nothing in it
    assert type(plain) is Report and plain == found and found == plain
    assert found != evaluated("other")


@pytest.mark.parametrize("name", plots.EVALUATION)
def test_every_plot_of_an_evaluation_is_drawn(name):
    plot = evaluated().plot(name)
    assert len(drawings(plot.html)) == 1 and "<figcaption>" in plot.html
    assert plot._repr_html_().startswith('<div class="grokquant">')


@pytest.mark.parametrize("name", plots.RANKING)
def test_every_plot_of_a_ranking_is_drawn(name):
    ranking = grokquant.compare([evaluated("a"), evaluated("b")])
    assert drawings(ranking.plot(name)._repr_html_())
    assert [model.name for model in ranking.models] == ["a", "b"]
    assert Page(ranking._repr_html_()).text.count("Mean KLD, nats") >= 1


@pytest.mark.parametrize(
    ("shown", "names", "call"),
    [
        (ShownReport, plots.EVALUATION, "evaluate(output, reference)"),
        (ShownQuantization, plots.QUANTIZATION, "quantization_report(output)"),
        (ShownRanking, plots.RANKING, "compare([report, other])"),
    ],
)
def test_every_plot_is_documented(shown, names, call):
    assert [name for name in names if not re.search(rf"\b{name}\b", shown.plot.__doc__)] == []
    page = Path(__file__).parents[1] / "docs" / "quick-start.md"
    row = next(line for line in page.read_text().splitlines() if line.startswith(f"| `{call}`"))
    assert re.findall(r"`(\w+)`", row.split("|")[3]) == list(names)


def test_a_plot_that_is_not_there_is_refused_by_name():
    with pytest.raises(InputError, match=r"^name: 'layer' is no plot; there are: kld, delta_p,"):
        evaluated().plot("layer")
    dense = ShownReport.of(report(experts=1))
    with pytest.raises(InputError, match=r"^name: routing: was not measured; there are: kld, "):
        dense.plot("routing")
    assert drawings(dense.plot("layers").html)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)


def test_names_are_text(output):
    path = output[0]
    awkward = AWKWARD + "<img src=x onerror=alert(1)>\x1b[31m\u202e"
    tree = content()
    tree["quantized"]["path"] = tree["reference"]["path"] = awkward
    tree["units"][0]["name"] = tree["units"][0]["fallback"] = awkward
    found = ShownReport.of(parse_report(tree, "test"))
    quantized = grokquant.quantization_report(path)
    changed = {"path": awkward, "source": awkward, "findings": (awkward,), "fallbacks": (awkward,)}
    summary = grokquant.inspect(path)
    summary.update(path=awkward, family=awkward, notes=[awkward], matrices={awkward: 3})
    things = [*with_plots(found), quantized.model_copy(update=changed), summary]
    for thing in things:
        html = thing._repr_html_()
        assert Tags(html).tags <= HARMLESS
        assert "\x1b" not in html + repr(thing) and "\u202e" not in html + repr(thing)
    assert awkward[:8] in Page(things[-1]._repr_html_()).text


def test_the_stylesheet_of_a_cell_reaches_nothing_else():
    """Every rule is nested below our class; the others would restyle the notebook."""
    depth, start, outside = 0, 0, []
    for i, letter in enumerate(CELL_CSS):
        if letter == "{":
            if depth == 0:
                outside += CELL_CSS[start:i].split(",")
            depth += 1
        elif letter == "}":
            depth -= 1
            start = i + 1
    assert depth == 0 and outside
    assert all(selector.endswith(".grokquant") for selector in outside)
    assert "</style" not in CELL_CSS


def test_nothing_is_shown_outside_a_notebook():
    assert not notebook_progress.in_notebook()
    assert type(notebook_progress.run_progress()) is pipeline.Silence
    assert notebook_progress.evaluation_progress() is None
