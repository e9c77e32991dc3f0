"""Several reports side by side: who is ahead, by more than chance, and who cannot be compared."""

import copy
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from mutations import changed, mutations
from test_report import content, estimate

from grokquant.errors import InputError
from grokquant.evaluation.bootstrap import Resampler
from grokquant.reporting.html.ranking_page import write_ranking
from grokquant.reporting.ranking import Ranking, Standing, difference, rank_models
from grokquant.reporting.ranking_tables import markdown, terminal_tables
from grokquant.reporting.terminal import PlainConsole

DOCUMENTS = 60
TOKENS = np.random.default_rng(0).integers(100, 900, DOCUMENTS)
# How hard each document is: shared by all models, and far larger than their differences.
HARD = np.random.default_rng(1).lognormal(0, 0.8, DOCUMENTS)


def write(
    directory: Path, name: str, bits: float, kld: float, salt: int = 0, **changes: object
) -> Path:
    """A result with a report of a mean KLD of `kld`, most of it from hard documents."""
    draw = np.random.default_rng(salt)
    tree = copy.deepcopy(content())
    sums = HARD * draw.normal(1, 0.02, DOCUMENTS) * TOKENS
    sums *= kld * TOKENS.sum() / sums.sum()
    nll = 3 * TOKENS + 0.2 * sums
    tree["quantized"] |= {"path": f"/somewhere/{name}", "bits_per_weight": bits}
    tree["kld"]["mean"] = estimate(kld, kld / 5)
    tree["bootstrap"] |= {"clusters": DOCUMENTS, "resamples": 1000}
    tree["documents"] = {
        "tokens": TOKENS.tolist(),
        "nll": nll.tolist(),
        "nll_reference": (3.0 * TOKENS).tolist(),
        "kld": sums.tolist(),
        "same_top": [0] * DOCUMENTS,
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for key in parents:
            node = node[key]
        node[last] = value
    place = directory / name / "evaluation" / "report.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(tree))
    return directory / name


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A front of three sizes, one run that ties with the front and one that is surely behind."""
    return [
        write(tmp_path, "four", 4.1, 0.0020, salt=1),
        write(tmp_path, "eight", 8.1, 0.0001, salt=2),
        write(tmp_path, "three", 3.1, 0.0080, salt=3),
        write(tmp_path, "nearly", 4.2, 0.00201, salt=9),
        write(tmp_path, "poor", 4.5, 0.0030, salt=5),
    ]


@pytest.fixture
def found(runs) -> Ranking:
    return rank_models(runs)


def test_runs_are_ranked_and_ties_share_their_rank(found):
    ranks = {model.name: model.rank for model in found.models}
    assert found.models[0].name == "eight"
    assert ranks == {"eight": 1, "four": 2, "nearly": 2, "poor": 4, "three": 5}


def test_the_front_is_what_nothing_is_smaller_and_better_than(found):
    for loss in ("kld", "perplexity"):
        standings = {model.name: getattr(model, loss) for model in found.models}
        assert standings["eight"] == standings["three"] == standings["four"] == Standing("front")
        assert standings["nearly"] == Standing("tied")
        assert standings["poor"] == Standing("behind", "four")


def test_pairs_tell_apart_what_single_intervals_do_not(found):
    four, poor = (next(m for m in found.models if m.name == name) for name in ("four", "poor"))
    alone = [
        Resampler(np.stack((TOKENS.astype(float), r.report.documents.kld), -1)).estimate(
            lambda s: s[..., 1] / s[..., 0]
        )
        for r in (four, poor)
    ]
    assert alone[0].high > alone[1].low
    paired = difference(poor, four, "kld")
    assert paired.low > 0 and paired.error < alone[0].error
    assert paired.value == pytest.approx(alone[1].value - alone[0].value)


def test_equal_runs_are_both_on_the_front(tmp_path):
    found = rank_models([write(tmp_path, name, 4.0, 0.002) for name in ("a", "b")])
    assert [(m.rank, m.kld.status) for m in found.models] == [(1, "front"), (1, "front")]


def test_json_holds_what_the_reports_hold(found):
    tree = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert tree["schema"] == "grokquant.comparison/1"
    assert [run["name"] for run in tree["runs"]] == ["eight", "four", "nearly", "poor", "three"]
    poor = tree["runs"][3]
    assert poor["kld_standing"] == {"place": "behind", "beaten_by": "four"}
    assert poor["bits_per_weight"] == 4.5 and len(poor["layers"]) == 4
    assert poor["kld"] == found.models[3].report.kld.mean.model_dump()
    assert poor["layers"][2]["router_set_forced"] == content()["layers"][2]["forced"]["router_set"]


def test_tables_have_a_row_for_each_run_and_each_layer(found):
    text = markdown(found)
    assert "| four | 2 | 4.100 | 4.11\u00a0MB | 0.0" in text and "behind four" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + 5 + 2 + 4
    assert {line.count("|") for line in tables[:7]} == {12}
    assert {line.count("|") for line in tables[7:]} == {7}
    console = PlainConsole(width=200, record=True, file=io.StringIO())
    for table in terminal_tables(found):
        console.print(table)
    shown = console.export_text()
    for words in ("eight", "behind four", "Layer", "noise floor"):
        assert words in shown


def test_dense_models_have_no_table_of_routing(tmp_path):
    layers = [{"layer": 0, "relative_error": 0.1}]
    found = rank_models([write(tmp_path, "dense", 4, 0.002, layers=layers, routing=None)])
    assert "same experts" not in markdown(found) and len(terminal_tables(found)) == 1


def ranks(ranking: Ranking) -> list[int]:
    return [model.rank for model in ranking.models]


@pytest.mark.parametrize("form", ["evaluation", "evaluation/report.json"])
def test_reports_may_be_given_themselves(runs, form):
    assert ranks(rank_models([run / form for run in runs])) == ranks(rank_models(runs))


def test_runs_of_one_name_go_by_what_was_given(tmp_path):
    paths = [write(tmp_path / side, "same", 4, 0.002) for side in ("a", "b")]
    assert {model.name for model in rank_models(paths).models} == {str(path) for path in paths}
    with pytest.raises(InputError, match="same: is given twice"):
        rank_models([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ("protocol__length", 512, "protocol.length is 512, but 256 in .*four"),
        ("protocol__text_sha256", "ab", "protocol.text_sha256 is ab"),
        ("protocol__packed", False, "protocol.packed is False"),
        ("protocol__bos", True, "protocol.bos is True"),
        ("protocol__arithmetic", "bfloat16", "protocol.arithmetic is bfloat16"),
        ("reference__family", "mixtral", "reference.family is mixtral"),
        ("perplexity__reference", estimate(19.9, 0.2), "the reference’s perplexity is 19.9"),
        ("bootstrap__unit", "sequence", "bootstrap.unit is sequence"),
        ("documents__tokens", [7] * DOCUMENTS, "documents.tokens is not that of .*four"),
    ],
)
def test_reports_of_other_kinds_are_refused_by_name(tmp_path, runs, change, value, words):
    other = write(tmp_path, "other", 4, 0.002, **{change: value})
    with pytest.raises(InputError, match=f"other: {words}.*cannot be compared") as error:
        rank_models([runs[0], other])
    assert "\n" not in str(error.value)


def test_another_name_of_the_same_text_and_reference_is_no_matter(tmp_path, runs):
    other = write(tmp_path, "o", 4, 0.002, protocol__text="a/b.txt", reference__path="/elsewhere")
    assert len(rank_models([runs[0], other]).models) == 2


def test_a_directory_that_was_not_evaluated_is_told_how(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="new: the directory is empty"):
        rank_models([tmp_path / "new"])
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"new: has no evaluation/report.json; `grokquant eval"):
        rank_models([tmp_path / "new"])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="notes.txt: is a file, expected the directory"):
        rank_models([tmp_path / "notes.txt"])
    with pytest.raises(InputError, match="nowhere: no such directory"):
        rank_models([tmp_path / "nowhere"])


def test_changed_reports_end_in_one_line(tmp_path):
    good = write(tmp_path, "good", 4.1, 0.002)
    other = write(tmp_path, "other", 3.1, 0.004, salt=1) / "evaluation" / "report.json"
    content = json.loads(other.read_text())
    for place, value in random.Random(0).sample(mutations(content), 150):
        other.write_text(json.dumps(changed(content, place, value)))
        try:
            ranking = rank_models([good, other])
            markdown(ranking)
            write_ranking(ranking, tmp_path / "page")
        except InputError as error:
            message = str(error)
            assert str(other) in message and "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bootstrap__resamples": 10**12}, "bootstrap.resamples: Input should be less than or eq"),
        ({"bootstrap__resamples": 0}, "bootstrap.resamples: Input should be greater than or eq"),
        ({"documents__tokens": [0] * DOCUMENTS}, "documents: Value error, a cluster without tok"),
        ({"documents__kld": [1e308] * DOCUMENTS}, "documents.kld.0: Input should be less than"),
        ({"layers": []}, "the number of layers is 0, but 4 in"),
    ],
)
def test_reports_that_would_be_computed_without_end_are_refused(tmp_path, change, complaint):
    good = write(tmp_path, "good", 4.1, 0.002)
    with pytest.raises(InputError) as caught:
        rank_models([good, write(tmp_path, "bad", 4.1, 0.002, **change)])
    assert complaint in str(caught.value)


def test_a_report_of_more_draws_than_minutes_take_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("grokquant.evaluation.report._MOST_DRAWS", 1000 * DOCUMENTS - 1)
    with pytest.raises(InputError, match="more than 59999 draws in the bootstrap"):
        rank_models([write(tmp_path, "good", 4.1, 0.002)])
