"""The evaluation report: JSON and back, and a page that says the same and needs nothing else."""

import io
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from reports import (
    AWKWARD,
    Page,
    at,
    changed,
    content,
    contrast,
    estimate,
    read_number,
    report,
    with_suite,
)

from grokquant.errors import InputError
from grokquant.evaluation.report import Report, parse_report, read_report
from grokquant.humanize import count, number, percent, unbroken_size
from grokquant.reporting.html.anchors import ANCHORS
from grokquant.reporting.html.page import render_html, write_report
from grokquant.reporting.json_pointer import Datum, datum_at, find_datum
from grokquant.reporting.rows import bf16_bytes, markdown_table, terminal_table, verdict
from grokquant.reporting.suite_tables import suite_tables, tasks_markdown
from grokquant.reporting.terminal import PlainConsole

# Data model


def test_json_round_trip(tmp_path: Path) -> None:
    json_path, html_path = write_report(report(), tmp_path / "new" / "deep")
    assert (json_path.name, html_path.name) == ("report.json", "report.html")
    assert json.loads(json_path.read_text(encoding="utf-8")) == content()
    assert read_report(json_path) == read_report(json_path.parent) == report()


def test_earlier_words_of_a_report_make_no_other_protocol() -> None:
    """Reports of the same reference can still be compared."""
    former = "float32 on the stored weights, integers multiplied out to bf16"
    read = parse_report(changed("/protocol/arithmetic", former), "test")
    assert read.protocol.arithmetic == "float32 on the stored weights"


def test_json_keeps_the_order_and_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    paths = [write_report(report(), tmp_path / name) for name in ("a", "b")]
    for one, other in zip(*paths, strict=True):
        assert one.read_bytes() == other.read_bytes()
    written = json.loads(paths[0][0].read_text(encoding="utf-8"))
    assert list(written) == list(content())
    assert list(written["kld"]) == list(content()["kld"])
    assert list(written["delta_p"]) == list(content()["delta_p"])


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("/kld/99.9%", math.nan, "kld.99.9%"),
        ("/perplexity/ratio/value", math.inf, "perplexity.ratio.value"),
        ("/perplexity/ratio/error", -0.1, "perplexity.ratio.error"),
        ("/layers/2/router_top1", 1.5, "layers.2.router_top1"),
        ("/layers/1/tokens_per_expert", [1, 2], "layers.1"),
        ("/schema", "grokquant.evaluation/1", "schema"),
        ("/schema", 2, "schema"),
        ("/perplexity/ratio/low", 1.5, "perplexity.ratio"),
        ("/layers/1/forced/damage", [0.5] * 8, "layers.1.forced"),
        ("/documents/tokens", [1], "documents"),
        ("/kld/98%", 0.1, "kld.98%"),
        ("/same_top_p", None, "same_top_p"),
    ],
)
def test_bad_content_is_named_in_one_line(path: str, value: object, key: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_report(changed(path, value), "x/report.json")
    assert str(caught.value).startswith(f"x/report.json: {key}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": 1}', '{"kld": NaN}'])
def test_files_that_are_no_report(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"report\.json: ") as caught:
        read_report(path)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid JSON"):
        read_report(tmp_path)


def test_failed_rename_leaves_the_old_report(tmp_path: Path, monkeypatch) -> None:
    old = [path.read_bytes() for path in write_report(report(), tmp_path)]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="No space left"):
        write_report(report(2, 2), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("report.json", "report.html")] == old
    with pytest.raises(InputError):
        write_report(report(), tmp_path / "other")
    assert not list((tmp_path / "other").glob("report.*"))


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken: cannot be written"):
        write_report(report(), tmp_path / "taken")


# Numbers by JSON pointer


def test_a_pointer_finds_in_the_report_what_it_finds_in_the_json() -> None:
    for pointer in ("/kld/99.9%", "/perplexity/ratio/low", "/layers/2/tokens_per_expert/5"):
        found = datum_at(report(), pointer)
        assert found == datum_at(content(), pointer) == Datum(at(content(), pointer), pointer)


def test_a_pointer_through_null_finds_nothing_and_a_mistyped_one_is_refused() -> None:
    unforced = parse_report(changed("/layers/1/forced", None), "test")
    assert find_datum(unforced, "/layers/1/forced/block_error") is None
    with pytest.raises(ValueError, match="/layers/1/forced/block_error is null"):
        datum_at(unforced, "/layers/1/forced/block_error")
    for pointer in ("/kld/q99_9", "/layers/9/load_shift", "/perplexity/ratios"):
        with pytest.raises((KeyError, IndexError)):
            find_datum(unforced, pointer)


# The page

_FIELDS = ("value", "error", "low", "high", "token_error")


def test_numbers_on_the_page_are_those_of_the_json() -> None:
    page, tree = Page(render_html(report())), content()
    paths = set()
    for path, value, unit, text, tag in page.data:
        assert float(value) == at(tree, path), path
        paths.add(path)
        if tag == "span":
            shown, slack = read_number(text)
            exact = float(value) * (100 if unit == "%" else 1)
            assert abs(shown - exact) <= slack * 1.000001, (path, text, value)
    expected = {f"/{part}/{key}/{field}" for part, keys in (
        ("perplexity", ("reference", "quantized", "ratio", "ln_ratio", "difference")),
        ("kld", ("mean",)), ("delta_p", ("mean", "rms")),
    ) for key in keys for field in _FIELDS}  # fmt: skip
    expected |= {f"/{part}/{key}" for part in ("kld", "delta_p") for key in tree[part]}
    expected -= {"/kld/mean", "/delta_p/mean", "/delta_p/rms"}
    routers = ("router_top1", "router_set")
    expected |= {f"/layers/{i}/{key}" for i in range(4)
                 for key in ("relative_error", "load_shift", *routers)}  # fmt: skip
    expected |= {f"/layers/{i}/forced/{key}" for i in range(4)
                 for key in ("block_error", "attention_error", "experts_error",
                             *routers)}  # fmt: skip
    expected |= {f"/layers/{i}/{key}/{e}" for i in range(4) for e in range(8)
                 for key in ("tokens_per_expert", "forced/damage")}  # fmt: skip
    expected |= {f"/same_top_p/{field}" for field in _FIELDS} | {"/perplexity/correlation"}
    expected |= {f"/noise_floor/{key}" for key in ("mean_kld", "perplexity_ratio", "same_top_p")}
    expected |= {f"/routing/{group}/mean_kld" for group in ("changed", "unchanged")}
    expected |= {f"/routing/first_change/{i}/mean_kld" for i in range(4)}
    expected |= {"/quantized/bits_per_weight", "/quantized/bytes"}
    assert not expected - paths


@pytest.mark.parametrize("shape", [(4, 8), (64, 8), (3, 1), (1, 2), (2, 128)])
def test_page_needs_nothing_else(shape: tuple[int, int]) -> None:
    text = render_html(report(*shape))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\son[a-z]+=", text)
    assert "src" not in {name for _, attributes in page.tags for name in attributes}
    assert "prefers-color-scheme:dark" in text and "@media print" in text
    assert "nan" not in re.findall(r"[a-z]+", text.lower())


@pytest.mark.parametrize("shape", [(4, 8), (64, 8), (3, 1), (1, 2), (2, 128)])
def test_every_drawing_is_well_formed_named_and_inside_its_box(shape: tuple[int, int]) -> None:
    drawings = re.findall(r"<svg.*?</svg>", render_html(report(*shape)), re.S)
    routed = 9 if shape[0] > 1 else 8  # the first change of routing needs a choice of layers
    assert len(drawings) == 6 + routed * (shape[1] > 1)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("aria-label") == root.findtext("title") and root.findtext("title")
        _, _, width, height = map(float, root.get("viewBox", "").split())
        for rect in root.iter("rect"):
            x, y, w, h = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
            assert x >= 0 and y >= 0 and w > 0 and h > 0
            assert x + w <= width + 0.2 and y + h <= height + 0.2
        for circle in root.iter("circle"):
            assert 0 <= float(circle.get("cx", "nan")) <= width
            assert 0 <= float(circle.get("cy", "nan")) <= height


def test_grok_1_fits_in_600_kilobytes() -> None:
    assert len(render_html(report(64, 8)).encode()) < 600_000


def test_dense_model_is_not_told_of_experts() -> None:
    text = Page(render_html(report(3, 1))).text.lower()
    assert "expert" not in text and "router" not in text and "routing" not in text
    page = render_html(report())
    for words in ("Expert by expert", "Same experts chosen", "Share of the damage", "Load shift"):
        assert words in page


def test_layers_that_were_not_measured_alone_leave_no_gap() -> None:
    tree = content()
    for layer in tree["layers"]:
        layer["forced"] = None
    tree["routing"] = None
    page = render_html(parse_report(tree, "test"))
    assert "Accumulated error" in page and "Same experts chosen" in page
    for words in (
        "Error of each layer in isolation",
        "Share of the damage",
        "this layer in isolation",
    ):
        assert words not in page


def test_layers_in_which_no_routing_changes_have_no_bar() -> None:
    tree = content()
    tree["routing"]["first_change"][1] = {"layer": 1, "tokens": 0}
    page = Page(render_html(parse_report(tree, "test")))
    drawn = {path for path, *_ in page.data if path.startswith("/routing/first_change")}
    assert drawn == {f"/routing/first_change/{i}/mean_kld" for i in (0, 2, 3)}


def test_parts_without_any_error_are_said_to_have_none() -> None:
    tree = content()
    for layer in tree["layers"]:
        layer["forced"]["attention_error"] = 0.0
    assert "attention: 0 throughout" in render_html(parse_report(tree, "test"))


def test_first_two_experts_are_shown_only_where_there_are_more() -> None:
    assert "top-2" not in render_html(report())
    tree = changed("/layers/1/router_set", 0.25)
    assert "top-2" in render_html(parse_report(tree, "test"))


def test_heat_map_has_a_cell_for_each_expert_and_darkest_is_busiest() -> None:
    drawings = re.findall(r"<svg.*?</svg>", render_html(report()), re.S)
    load = next(d for d in drawings if "Share of tokens by layer and expert" in d)
    cells = [r for r in ElementTree.fromstring(load).iter("rect") if r.get("data-path")]
    assert len(cells) == 32
    shares = {}
    for cell in cells:
        _, _, layer, _, _ = (cell.get("data-path") or "").split("/")
        total = sum(content()["layers"][int(layer)]["tokens_per_expert"])
        shares[float(cell.get("data-value", "nan")) / total] = cell.get("class")
    assert shares[max(shares)] == "c q7" and shares[min(shares)] == "c q0"
    written = re.findall(
        r'class="c q(\d)"[^>]*><title>[^<]*</title></rect><text class="([^"]*)', load
    )
    assert len(written) == 32
    assert all(("hi" in text.split()) == (int(shade) >= 4) for shade, text in written)


def test_tokens_gained_are_blue_and_lost_are_orange() -> None:
    tree = content(1, 3)
    tree["layers"][0] |= {"tokens_per_expert": [130, 100, 70]}
    tree["layers"][0] |= {"reference_tokens_per_expert": [100] * 3}
    drawings = re.findall(r"<svg.*?</svg>", render_html(parse_report(tree, "test")), re.S)
    shift = next(d for d in drawings if "Tokens gained or lost" in d)
    cells = [r for r in ElementTree.fromstring(shift).iter("rect") if r.findtext("title")]
    assert [(r.findtext("title"), r.get("class")) for r in cells] == [
        ("layer 0, expert 0: +30", "c d6"),
        ("layer 0, expert 1: 0", "c d3"),
        ("layer 0, expert 2: −30", "c d0"),
    ]


def test_every_shade_has_a_colour_in_both_themes_and_readable_text() -> None:
    page = render_html(report())
    style = page[page.index("<style>") : page.index("</style>")]
    for theme in re.findall(r":root\{([^}]*--ink[^}]*)\}", style):
        colours = dict(re.findall(r"--(\w+):(#\w+)", theme))
        for palette, strong in (("q", {4, 5, 6, 7}), ("e", {4, 5, 6, 7}), ("d", {0, 6})):
            for i in range(7 if palette == "d" else 8):
                ink = colours["strong" if i in strong else "ink"]
                assert contrast(colours[f"{palette}{i}"], ink) >= 4.5, (palette, i, ink)
        for text in ("ink", "soft", "accent"):
            assert min(contrast(colours[text], colours[on]) for on in ("card", "page")) >= 4.5


def test_strings_are_escaped() -> None:
    tree = content()
    tree["units"][3]["fallback"] = f"too few tokens {AWKWARD}"
    tree["units"][3]["name"] = f"layers.0.{AWKWARD}"
    for where in ("text", "text_sha256", "scored", "arithmetic"):
        tree["protocol"][where] = AWKWARD
    tree["noise_floor"]["how"] = tree["quantized"]["family"] = tree["grokquant"] = AWKWARD
    tree["quantized"]["path"] = f"/x/{AWKWARD}"
    tree["quantized"]["schemes"] = {AWKWARD: 1}
    text = render_html(parse_report(tree, "test"))
    assert "<b>a&b" not in text and AWKWARD not in text
    page = Page(text)
    assert page.text.count(AWKWARD) > 12
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)


def test_fallbacks_are_listed_with_their_reason() -> None:
    tree = content()
    assert "not quantized as planned" not in render_html(parse_report(tree, "test"))
    tree["units"][5]["fallback"] = "3 tokens are too few for a Hessian of 128 columns"
    page = Page(render_html(parse_report(tree, "test")))
    assert "1 matrix was not quantized as planned" in page.text
    assert f"{tree['units'][5]['name']}: 3 tokens are too few" in page.text


@pytest.mark.parametrize("change", ["lossless", "no layers", "one kind", "still", "idle"])
def test_extremes_are_drawn(change: str) -> None:
    tree = content()
    zero = dict.fromkeys(("value", "error", "low", "high", "token_error"), 0.0)
    if change == "lossless":
        for part in ("kld", "delta_p"):
            tree[part] = {k: zero if isinstance(v, dict) else 0.0 for k, v in tree[part].items()}
        tree["perplexity"] |= {
            "ratio": zero | dict.fromkeys(("value", "low", "high"), 1.0),
            "ln_ratio": zero,
        }
        tree["noise_floor"]["mean_kld"] = 0.0
        for unit in tree["units"]:
            unit |= {"relative_error": 0.0, "output_error": None}
        for layer in tree["layers"]:
            routers = {"router_top1": 1.0, "router_top2_set": 1.0, "router_set": 1.0}
            layer |= {"relative_error": 0.0, "load_shift": 0.0} | routers
            layer["forced"] |= {"block_error": 0.0, "attention_error": 0.0, "experts_error": 0.0}
            layer["forced"] |= {"damage": [0.0] * 8} | routers
    if change == "no layers":
        tree["layers"], tree["units"] = [], []
    if change == "one kind":
        tree["units"] = tree["units"][:1]
        tree["layers"][1] |= {"router_top1": None, "router_top2_set": None, "router_set": None}
        tree["layers"][1] |= {"load_shift": None, "forced": None}
        tree["layers"][1] |= {"tokens_per_expert": [], "reference_tokens_per_expert": []}
    if change == "still":
        for layer in tree["layers"]:
            layer["tokens_per_expert"] = layer["reference_tokens_per_expert"] = [5] * 8
    if change == "idle":
        for layer in tree["layers"]:
            layer["tokens_per_expert"] = [0] * 8
    page = render_html(parse_report(tree, "test"))
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)
    assert "nan" not in re.findall(r"[a-z]+", page.lower())


# What a suite adds


def test_numbers_of_a_suite_are_those_of_the_json() -> None:
    tree = with_suite()
    assert parse_report(tree, "test").to_json() == tree
    page, paths = Page(render_html(parse_report(tree, "test"))), set()
    for path, value, unit, text, tag in page.data:
        assert float(value) == at(tree, path), path
        paths.add(path)
        if tag == "span":
            shown, slack = read_number(text)
            exact = float(value) * (100 if unit == "%" else 1)
            assert abs(shown - exact) <= slack * 1.000001, (path, text, value)
    first = "/tasks/tasks/0/metrics/0"
    ends = ("value", "low", "high")
    expected = {f"/suite/gates/{i}/{key}" for i in range(3) for key in ("value", "limit")}
    expected |= {f"{first}/{side}/value" for side in ("quantized", "reference")}
    expected |= {f"{first}/paired/{key}" for key in ("lost", "gained", "p_value")}
    expected |= {f"{first}/paired/difference/{end}" for end in ends}
    expected |= {f"/further_texts/0/{key}/{end}" for end in ends
                 for key in ("perplexity/ratio", "kld/mean", "same_top_p")}  # fmt: skip
    assert not expected - paths


def test_missed_thresholds_come_first_and_the_head_says_so() -> None:
    tree = with_suite()
    text = Page(render_html(parse_report(tree, "test"))).text
    assert "✗ 1 of 3 thresholds of the suite smoke is missed." in text
    assert text.index("Accuracy drop") < text.index("Mean KL divergence, nats")
    tree["suite"]["gates"].pop()
    text = Page(render_html(parse_report(tree, "test"))).text
    assert "✓ All 2 thresholds of the suite smoke are met." in text
    plain = Page(render_html(report())).text
    for title in ("Is it good enough?", "Tasks", "Other texts"):
        assert title in text and title not in plain


def test_tables_of_a_suite() -> None:
    suite = parse_report(with_suite(), "test")
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in tasks_markdown(suite)[:4]]
    assert {len(row) for row in rows} == {9}
    assert rows[2] == [
        "docs_choice", "acc ↑", "71.9\u00a0%", "70.2\u00a0%", "−1.72", "−3.26 to −0.01",
        "19, 8", "0.052", "640",
    ]  # fmt: skip
    assert rows[3][:5] == ["docs_text", "word_perplexity ↓", "40.11", "41.21", "1.100"]
    console = PlainConsole(width=160, record=True, file=io.StringIO())
    for table in suite_tables(suite):
        console.print(table)
    text = console.export_text()
    for words in ("at most 1\u00a0%", "missed", "19, 8", "the second half of each sequence"):
        assert words in text
    assert list(suite_tables(report())) == [] and tasks_markdown(report()) == []


# Plain tables and words


def test_markdown_table() -> None:
    lines = markdown_table(report()).splitlines()
    assert lines[0] == "| Metric | Value | ± | 95 % interval | Noise floor | Better |"
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {7}
    cells = {
        row[0]: row[1:] for row in ([c.strip() for c in line.split("|")[1:-1]] for line in table)
    }
    ratio = ["1.00410", "0.00081", "1.00256 to 1.00581", "1.0000", "→ near 1"]
    assert cells["Mean PPL(Q)/PPL(base)"] == ratio
    kld = ["0.004123\u00a0nats", "0.000061", "0.004007 to 0.004252"]
    assert cells["Mean KLD"] == [*kld, "1.3\u00a0×\u00a010⁻⁹", "↓ lower"]
    top = ["96.23\u00a0%", "0.11", "96.03 to 96.45", "99.99", "↑ higher"]
    assert cells["Same top p"] == top
    assert cells["Same experts, worst layer"][0] == "85.11\u00a0%"
    assert cells["Bits per weight"][0] == "4.26" and cells["Size"][0] == "4.11\u00a0MB"
    assert "&lt;b>" in lines[-1] and "\\|" in lines[-1] and "32,640 tokens" in lines[-1]


def test_terminal_table_shows_every_metric_and_no_markup_of_names() -> None:
    console = PlainConsole(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(report()))
    text = console.export_text()
    for name in ("Mean PPL(Q)/PPL(base)", "Mean KLD", "99.9% KLD", "RMS Δp", "Same top p", "[red]"):
        assert name in text


def test_verdict_says_which_way_and_what_may_be_chance() -> None:
    assert verdict(report()) == (
        "Perplexity rises by 0.410\u00a0% (95\u00a0% confidence interval 0.256 to 0.581\u00a0%), "
        "the mean KL divergence is 0.0041\u00a0nats, and both models agree on the top token "
        "96.2\u00a0% of the time. 4.26 bits per weight: 4.11\u00a0MB instead of 15.4\u00a0MB in "
        "bf16."
    )
    fallen = changed("/perplexity/ratio", estimate(0.9995, 0.0008))
    assert verdict(parse_report(fallen, "test")).startswith(
        "Perplexity falls by 0.050\u00a0% (95\u00a0% confidence interval −0.118 to 0.202\u00a0%: "
        "not distinguishable from zero), "
    )
    same = changed("/perplexity/ratio", estimate(1.0, 0.0))
    assert verdict(parse_report(same, "test")).startswith("Perplexity is unchanged,")
    assert bf16_bytes(report().quantized) == 2 * 7_712_345


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.0041234, 0.0000612), "0.004123"),
        (number(19.8374, 0.2419), "19.84"),
        (number(1234.5, 98), "1234"),
        (number(-0.0, 0.0), "0"),
        (number(1.3123e-9), "1.3 × 10⁻⁹"),
        (number(-2e-9, 1e-3), "0.0000"),
        (percent(0.00412), "0.41 %"),
        (percent(-0.125, 3), "−12.5 %"),
        (unbroken_size(999), "999 B"),
        (unbroken_size(999_999), "1,000 kB"),
        (unbroken_size(4_106_824), "4.11 MB"),
        (unbroken_size(158_400_000_000), "158 GB"),
        (count(314_071_000_000), "314 billion"),
        (count(12), "12"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected


# The schema


def test_other_versions_are_refused_by_name() -> None:
    with pytest.raises(InputError) as caught:
        parse_report(changed("/schema", "grokquant.evaluation/1"), "x/report.json")
    assert str(caught.value) == (
        "x/report.json: schema: is 'grokquant.evaluation/1', this program reads "
        "grokquant.evaluation/2: evaluate again"
    )


def test_every_field_of_the_schema_is_described() -> None:
    schema = Report.model_json_schema(by_alias=True)
    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        for name, field in part["properties"].items():
            assert field.get("description"), f"{part['title']}.{name}"


def test_contents_lead_to_every_section() -> None:
    text = render_html(report())
    titles = re.findall(r'<h2 id="([^"]+)">([^<]+)</h2>', text)
    links = re.findall(r'<li><a href="#([^"]+)">([^<]+)</a></li>', text)
    assert links == titles and len({anchor for anchor, _ in titles}) == len(titles) > 4


def test_fallbacks_stand_above_the_first_figure() -> None:
    text = render_html(parse_report(changed("/units/0/fallback", "too few tokens"), "test"))
    assert text.index("not quantized as planned") < text.index('<dl class="tiles')


def test_the_divergence_lies_among_anchors() -> None:
    page = render_html(report())
    (scale,) = re.findall(r'<svg[^>]*aria-label="Mean KLD among others".*?</svg>', page)
    places = {t.text: float(t.get("x", "nan")) for t in ElementTree.fromstring(scale).iter("text")}
    names = [name for name, _ in ANCHORS]
    assert [places[name] for name in names] == sorted(places[name] for name in names)


def test_a_page_says_when_it_was_made(monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert "<footer>1970-01-02, grokquant" in render_html(report())


def test_reports_that_say_windows_are_still_read() -> None:
    tree = content()
    protocol = dict(tree["protocol"])
    protocol["windows"] = protocol.pop("samples")
    protocol["scored"] = "every token but the first of each window"
    assert parse_report(tree | {"protocol": protocol}, "test") == report()


def test_a_passage_marks_where_the_models_differ() -> None:
    page = render_html(report())
    assert page.count("<mark>") == 6  # two tokens, each in both rows, and the first one generated
    assert "<mark> &lt;b&gt;</mark>" in page and "<mark> \u21b5</mark>" in page
    assert "In 2 places, which are marked, they differ." in page
    without = parse_report(content() | {"passage": None}, "test")
    assert "What they would say next" not in render_html(without)
    assert "passage" not in without.to_json()


def with_passage(**changes: object) -> str:
    tree = content()
    return render_html(parse_report(tree | {"passage": tree["passage"] | changes}, "test"))


def test_the_first_difference_of_what_both_models_write_is_marked() -> None:
    page = render_html(report())
    assert "The first 1 tokens are the same in both; the next one is marked." in page
    assert "with<mark> open</mark>(path)" in page
    assert "with<mark> &lt;i&gt;</mark>\u21b5\u21b5" in page
    alike = {"reference": ["a", "b"], "quantized": ["a", "b"], "same": 2}
    assert "Both write the same 2 tokens." in with_passage(generated=alike)
    shorter = {"reference": ["a", "b"], "quantized": ["a"], "same": 1}
    assert "a<mark>b</mark>" in with_passage(generated=shorter)


def test_the_page_says_why_nothing_was_generated() -> None:
    page = with_passage(generated=None, not_generated="too <large>")
    assert "No text was generated: too &lt;large&gt;." in page
    assert "What they write" not in page
    earlier = with_passage(generated=None)
    assert "generated" not in earlier and "What they write" not in earlier
