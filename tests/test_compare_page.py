"""The page that compares runs: what it says is what the comparison says."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from reports import AWKWARD, Page, at, content, estimate, read_number

from grokquant.errors import InputError
from grokquant.evaluation.report import parse_report
from grokquant.reporting.html.page import write_report
from grokquant.reporting.html.ranking_page import render_ranking, write_ranking
from grokquant.reporting.ranking import rank_models

RUNS = {"int3": (3.3, 0.05), "rtn4": (4.3, 0.021), "gptq4": (4.3, 0.012), "int8": (8.6, 0.0004)}
RUNS |= {f"mixed{i}": (5 + i / 3, 0.008 / (i + 1)) for i in range(8)}


def run(place: Path, name: str, layers: int = 4, experts: int = 8) -> Path:
    """An evaluated model of a known size and loss, the same in all ten documents."""
    bits, kld = RUNS[name]
    tree = content(layers, experts)
    tree["quantized"] |= {"path": f"/models/{name}", "bits_per_weight": bits}
    tree["kld"]["mean"] = estimate(kld, kld / 30)
    tree["perplexity"]["ratio"] = estimate(math.exp(kld), kld / 10)
    tokens, base = [3264] * 10, [3264 * (3 + i / 20) for i in range(10)]
    tree["documents"] = {
        "tokens": tokens,
        "nll": [
            n + t * kld * (1 + i / 30) for i, (n, t) in enumerate(zip(base, tokens, strict=True))
        ],
        "nll_reference": base,
        "kld": [t * kld * (1 + i / 30) for i, t in enumerate(tokens)],
        "same_top": [3100] * 10,
    }
    write_report(parse_report(tree, name), place / name / "evaluation")
    return place / name


@pytest.fixture
def few(tmp_path: Path) -> list[Path]:
    return [run(tmp_path, name) for name in ("int8", "rtn4", "gptq4")]


def test_numbers_on_the_page_are_those_of_the_json(few: list[Path], tmp_path: Path) -> None:
    json_path, html_path = write_ranking(rank_models(few), tmp_path / "new")
    tree = json.loads(json_path.read_text(encoding="utf-8"))
    page = Page(html_path.read_text(encoding="utf-8"))
    paths = set()
    for path, value, unit, text, tag in page.data:
        assert float(value) == at(tree, path), path
        paths.add(path)
        if tag == "span" and not path.endswith("/bytes"):
            shown, slack = read_number(text)
            exact = float(value) * (100 if unit == "%" else 1)
            assert abs(shown - exact) <= slack * 1.000001, (path, text, value)
    expected = {f"/runs/{i}/{key}" for i in range(3) for key in ("bits_per_weight", "bytes")}
    expected |= {f"/runs/{i}/{key}/{end}" for i in range(3) for end in ("value", "low", "high")
                 for key in ("kld", "perplexity_ratio", "same_top_p")}  # fmt: skip
    expected |= {f"/runs/{i}/layers/{j}/{key}" for i in range(3) for j in range(4)
                 for key in ("router_set", "router_set_forced")}  # fmt: skip
    assert not expected - paths


def test_the_smallest_comes_first_and_the_beaten_is_named(few: list[Path]) -> None:
    page = render_ranking(rank_models(few))
    table = page[page.index('<table class="runs">') : page.index("</table>")]
    assert re.findall(r'</svg>(\w+)</span><span class="ends">', table) == ["gptq4", "rtn4", "int8"]
    standings = re.findall(r'data-label="Pareto front \(KLD\)">(?:<b>)?([\w ]+)', table)
    assert standings == ["on the front", "behind gptq4", "on the front"]
    text = Page(page).text
    assert "int8 is closest to the reference, with a mean KL divergence of 0.00040" in text
    assert "smaller and closer: int8 and gptq4." in text


def test_filled_marks_are_the_front_and_the_stairs_pass_through_them(few: list[Path]) -> None:
    drawings = re.findall(r"<svg.*?</svg>", render_ranking(rank_models(few)), re.S)
    (plot,) = (d for d in drawings if "Mean KLD against bits" in d)
    root = ElementTree.fromstring(plot)
    marks = {
        (mark.findtext("title") or "").partition(":")[0]: (mark.get("class") or "").split()
        for mark in root.iter("path")
    }
    assert [name for name, kinds in marks.items() if "open" in kinds] == ["rtn4"]
    assert len(marks) == 3
    (stairs,) = (line for line in root.iter("polyline") if "front" in (line.get("class") or ""))
    corners = [tuple(map(float, xy.split(","))) for xy in (stairs.get("points") or "").split()]
    assert len(corners) == 5  # down to gptq4, along, down to int8, along
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)
    assert [y for _, y in corners] == sorted(y for _, y in corners)


@pytest.mark.parametrize("count", [2, 12])
def test_runs_have_marks_of_their_own_and_all_names_stand_beside_them(
    count: int, tmp_path: Path
) -> None:
    names = list(RUNS)[:count]
    page = render_ranking(rank_models([run(tmp_path, name) for name in names]))
    table = page[page.index('<table class="runs">') : page.index("</table>")]
    marks = re.findall(r'<path class="([^"]*)" d="([^"]*)"', table)
    assert len(set(marks)) == count
    for drawing in re.findall(r'<svg viewBox="0 0 440.*?</svg>', page, re.S):
        root = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, root.get("viewBox", "").split())
        labels = [t for t in root.iter("text") if "ink" in (t.get("class") or "").split()]
        assert sorted(t.text or "" for t in labels) == sorted(names)
        for label in labels:
            assert 0 <= float(label.get("x", "nan")) <= width
            assert 0 <= float(label.get("y", "nan")) <= height
        for mark in root.iter("path"):
            for number in re.findall(r"-?[\d.]+", mark.get("d") or ""):
                assert -1 <= float(number) <= max(width, height) + 1


def test_dense_models_are_not_told_of_experts(tmp_path: Path) -> None:
    found = rank_models([run(tmp_path, name, experts=1) for name in ("int8", "rtn4")])
    text = Page(render_ranking(found)).text.lower()
    assert "expert" not in text and "rout" not in text


def test_lossless_runs_and_single_layers_are_drawn(tmp_path: Path) -> None:
    RUNS["same"] = (16.0, 0.0)
    found = rank_models([run(tmp_path, name, layers=1) for name in ("same", "rtn4")])
    page = render_ranking(found)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)
    assert "nan" not in re.findall(r"[a-z]+", page.lower())


def test_page_needs_nothing_else_and_escapes_names(tmp_path: Path) -> None:
    place = run(tmp_path, "rtn4")
    path = place / "evaluation" / "report.json"
    tree = json.loads(path.read_text())
    tree["quantized"]["path"] = AWKWARD
    path.write_text(json.dumps(tree))
    text = render_ranking(rank_models([place, run(tmp_path, "int8")]))
    page = Page(text)
    assert AWKWARD not in text and AWKWARD in page.text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\son[a-z]+=", text)


def test_directory_that_is_a_file(few: list[Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken: cannot be written"):
        write_ranking(rank_models(few), tmp_path / "taken")
