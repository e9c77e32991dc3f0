"""Suites: their files, the protocols of texts, thresholds and what the command makes of them."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.cli import main
from grokquant.errors import GateError, InputError
from grokquant.evaluation import likelihoods, run
from grokquant.evaluation import suite as suites
from grokquant.evaluation.measure import Windows, compare_texts
from grokquant.evaluation.models import opened_models
from grokquant.evaluation.report import Report, read_report
from grokquant.evaluation.run import suite_for
from grokquant.evaluation.suite import Suite, TextSection, check_gates, load_suite, suite_of
from grokquant.evaluation.windows import read_text
from grokquant.recipe import EvalSection
from grokquant.recipe.of_output import origin_of_text
from grokquant.reporting.html.page import render_html
from grokquant.text.documents import load_documents, token_rows
from grokquant.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
SHIPPED = ("fidelity", "grok-1", "smoke", "tasks")


@pytest.fixture
def written(tmp_path, text_file):
    """Writes a suite over the text; the lines given replace its thresholds."""

    def write(*lines: str) -> Path:
        path = tmp_path / "mine.yaml"
        text = f"texts:\n  - {{text: {text_file}, samples: 3, length: 64}}\n"
        path.write_text(text + "thresholds:\n" + "".join(f"  {line}\n" for line in lines))
        return path

    return write


def evaluated(int4, reference, suite, *options: str, expect: int) -> str:
    args = ["eval", str(int4), "--reference", str(reference), "--suite", str(suite), *options]
    args += [] if "--output" in options else ["--overwrite"]
    run = CliRunner().invoke(main, args)
    assert run.exit_code == expect, run.output
    return run.stderr if expect else run.stdout


# Files


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_are_read_by_name(name):
    suite = load_suite(name)
    assert suite.texts and suite.thresholds.max_mean_kld
    text = (suites.SHIPPED / f"{name}.yaml").read_text()
    assert text.count("bos: ") == len(suite.texts)  # never left unsaid


def test_shipped_suites_lie_in_the_package():
    assert {p.stem for p in suites.SHIPPED.glob("*.yaml")} == set(SHIPPED)


def test_suites_and_tasks_go_into_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["grokquant"]
    packed = {path for pattern in patterns for path in (ROOT / "grokquant").glob(pattern)}
    for place in ("suites", "tasks"):
        inside = set((ROOT / "grokquant" / "evaluation" / place).iterdir())
        assert inside and inside <= packed


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "texts:\n- {sampels: 3}\n",
            "2:4: texts[0].sampels: unknown key, did you mean texts[0].sam",
        ),
        ("thresholds: {max_kld: 1}\n", "1:14: thresholds.max_kld: unknown key, did you mean thr"),
        ("tasks:\n- {items: 3}\n", "2:3: tasks[0].name: required, but missing"),
        (
            "texts:\n- protocol: hg\n",
            "2:13: texts[0].protocol: expected hf or llama",
        ),
        ("texts: []\n", "1:8: texts: expected at least one entry"),
        (
            "thresholds: {max_accuracy_drop: 0.1}\n",
            "1:13: thresholds: max_accuracy_drop needs tasks",
        ),
        ("max_length: 4\n", "1:13: max_length: should be greater than or equal to 8, not 4"),
        ("texts:\n  - samples: 1\n samples: 2\n", "3:2: "),
    ],
)
def test_errors_name_line_column_and_key(tmp_path, text, problem):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_suite(path)
    assert str(error.value).startswith(f"{path}:{problem}") and "\n" not in str(error.value)


def test_an_unknown_name_lists_the_known_ones(tiny_release):
    with pytest.raises(InputError, match=r"no suite 'fidelty', .* fidelity, grok-1, smoke, tasks$"):
        load_suite("fidelty")
    with pytest.raises(InputError, match=r"^samples: cannot be combined with suite smoke"):
        run.suite_for(tiny_release, "smoke", samples=3)


# Protocols


def test_protocols_cut_and_score_as_they_say(text_file):
    """Windows of llama.cpp score 255 of 512 tokens: those after the first half and one."""
    toy = open_checkpoint("toy")
    text = str(text_file)
    tokens = token_rows(load_documents(text, "heldout"), load_tokenizer(toy), 1, 4096, None)[0]
    hf = read_text(TextSection(text=text, samples=2), toy, "k")
    assert hf.windows.rows.tolist() == tokens.view(2, 2048).tolist()
    assert hf.windows.first == 1 and hf.protocol.tokens_scored == 2 * 2047
    llama = read_text(TextSection(text=text, samples=3, protocol="llama.cpp"), toy, "k")
    assert llama.windows.rows.tolist() == tokens[: 3 * 512].view(3, 512).tolist()
    assert llama.windows.first == 257 and llama.protocol.tokens_scored == 3 * 255
    assert not llama.protocol.bos and "second half" in llama.protocol.scored
    with_bos = read_text(TextSection(text=text, samples=3, bos=True), toy, "k")
    assert with_bos.windows.rows[:, 0].tolist() == [1] * len(with_bos.windows.rows)
    assert torch.equal(with_bos.windows.rows[:2, 1:], hf.windows.rows[:, 1:])
    assert with_bos.protocol.bos


def test_sequences_may_be_beginnings_of_documents(tmp_path):
    """Each is a cluster of its own for the bootstrap, and the protocol says so."""
    toy = open_checkpoint("toy")
    documents = [f"{word} " * count for word, count in zip("abcd", (40, 5, 40, 40), strict=True)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)))
    settings = EvalSection(text=str(path), samples=2, length=8, packed=False)
    found = read_text(suite_of(settings).texts[0], toy, "k")
    tokenizer = load_tokenizer(toy)
    assert found.windows.rows.tolist() == [
        tokenizer(documents[number]).input_ids[:8] for number in (0, 2)
    ]
    assert found.documents.tolist() == [[0] * 7, [2] * 7]
    assert found.protocol.sequences == "2 sequences of 8 tokens, each the beginning of a document"
    joined = read_text(suite_of(EvalSection(text=str(path), length=8)).texts[0], toy, "k")
    assert joined.protocol.packed and joined.windows.rows.shape[0] > 4
    with pytest.raises(InputError, match=r"^k\.text: .*a\.jsonl: the longest document has"):
        read_text(TextSection(text=str(path), packed=False), toy, "k")


def test_the_second_half_is_what_is_scored(int4, tiny_release, text_file):
    """The figures of `llama.cpp` are those of the last tokens of the windows of `hf`."""
    whole = TextSection(text=str(text_file), samples=3, length=64)
    half = whole.model_copy(update={"protocol": "llama.cpp"})
    base = open_checkpoint(tiny_release)
    texts = [read_text(text, base, "k").windows for text in (whole, half)]
    result = compare_texts(open_checkpoint(int4), base, texts)
    tokens = result.figures.nll.view(3, 63)[:, 32:].flatten()
    assert result.further[0].nll == pytest.approx(tokens, abs=1e-5)


def test_each_model_gives_its_own_answers(int4, tiny_release):
    """Beside a text, and a text of another length, in one pass over both."""
    draw = torch.Generator().manual_seed(0)
    context = tuple(torch.randint(4, 2000, (20,), generator=draw).tolist())
    pairs = [(context, (7 * n, 9, n)) for n in range(1, 5)]
    paths = (int4, tiny_release)
    texts = [Windows(torch.arange(n)[None]) for n in (40, 30)]
    both = [open_checkpoint(path) for path in paths]
    answers = compare_texts(*both, texts, likelihoods.pack(pairs, 64)).answers
    for path, found in zip(paths, answers, strict=True):
        model, _ = grokquant.load(path, dtype=torch.float32, packed=False)
        for pair in pairs:
            with torch.no_grad():
                logits = model(torch.tensor([context + pair[1]])).logits[0, 19:-1]
            wanted = logits.log_softmax(-1)[range(3), list(pair[1])].sum().item()
            assert found[pair][0] == pytest.approx(wanted, abs=1e-4)
    assert max(abs(answers[0][pair][0] - answers[1][pair][0]) for pair in pairs) > 0.01


# Thresholds


@pytest.fixture(scope="module")
def report(int4, tiny_release, text_file) -> Report:
    text = {"text": str(text_file), "samples": 3, "length": 64}
    suite = Suite.model_validate({"texts": [text, text | {"protocol": "llama.cpp"}]})
    return run.run_suite(opened_models(int4, tiny_release), suite, "mine").report


def test_thresholds_take_the_worst_of_all_texts_and_layers(report):
    limits = {"max_mean_kld": 1.0, "max_ppl_ratio": 9.0, "min_same_top_p": 0.1}
    thresholds = suites.Thresholds(**limits, min_router_top2=0.2, max_accuracy_drop=0.1)
    gates = {g.threshold: g for g in suites.judged(report, "mine", thresholds).gates}
    texts = (report, report.further_texts[0])
    assert gates["max_mean_kld"].value == max(t.kld.mean.value for t in texts)
    assert gates["max_ppl_ratio"].value == max(t.perplexity.ratio.value for t in texts)
    assert gates["min_same_top_p"].value == min(t.same_top_p.value for t in texts)
    assert gates["min_router_top2"].value == min(x.router_top2_set for x in report.layers)
    assert "max_accuracy_drop" not in gates  # there are no tasks
    assert all(gate.met and gate.limit in (1, 9, 0.1, 0.2) for gate in gates.values())


def test_accuracies_may_drop_so_far(report):
    def metric(name: str, own: float, base: float) -> dict:
        values = {"quantized": {"value": own}, "reference": {"value": base}}
        return {"metric": name, "filter": "none", "higher_is_better": True, "items": 9} | values

    rows = [metric("acc", 0.5, 0.52), metric("acc_norm", 0.5, 0.58), metric("perplexity", 1, 9)]
    task = {"name": "t", "version": "1", "fewshot": 0, "items": 9, "sha256": "", "metrics": rows}
    tasks = {"lm_eval": "1", "max_length": 8, "prefix_token": 1, "tasks": [task]}
    with_tasks = Report.model_validate(report.to_json() | {"tasks": tasks, "suite": None})
    for limit, met in ((0.1, True), (0.05, False)):
        (gate,) = suites.judged(with_tasks, "x", suites.Thresholds(max_accuracy_drop=limit)).gates
        assert gate.met == met and gate.where == "t (acc_norm)"
        assert gate.value == pytest.approx(0.08)


def test_what_is_met_passes(int4, tiny_release, written):
    suite = written("max_mean_kld: 5.0", "max_ppl_ratio: 50.0")
    shown = evaluated(int4, tiny_release, suite, expect=0)
    assert "met" in shown and "missed" not in shown
    gates = read_report(int4 / "evaluation").suite.gates
    assert [(g.threshold, g.limit, g.met) for g in gates] == [
        ("max_mean_kld", 5.0, True), ("max_ppl_ratio", 50.0, True),
    ]  # fmt: skip


def test_what_is_missed_is_named_and_the_report_is_there(int4, tiny_release, written, tmp_path):
    suite = written("max_mean_kld: 1.0e-9", "max_ppl_ratio: 0.5", "min_same_top_p: 0.0")
    place = tmp_path / "reports"
    said = evaluated(int4, tiny_release, suite, "--json", "--output", str(place), expect=1)
    line = said.splitlines()[-1]
    report = read_report(place)
    assert line.startswith(f"grokquant: suite {Path(suite).name}: mean_kld on ")
    assert f" is {report.kld.mean.value:.6g} (limit 1e-09)" in line
    assert f"; ppl_ratio on {report.protocol.text}" in line and "same_top_p" not in line
    assert [gate.met for gate in report.suite.gates] == [False, False, True]
    with pytest.raises(GateError):
        check_gates(report)


def test_the_page_shows_texts_tasks_and_thresholds(report):
    values = {"quantized": {"value": 0.25, "error": 0.125}, "reference": {"value": 0.5}}
    metric = {"metric": "<acc>", "filter": "none", "higher_is_better": True, "items": 9} | values
    task = {
        "name": "t",
        "version": "1",
        "fewshot": 0,
        "items": 9,
        "sha256": "",
        "metrics": [metric],
    }
    gate = {"threshold": "max_ppl_ratio", "where": "here", "value": 2.5, "limit": 2.0, "met": False}
    changes = {
        "tasks": {"lm_eval": "0.4.13", "max_length": 8, "prefix_token": 1, "tasks": [task]},
        "suite": {"name": "mine", "gates": [gate]},
    }
    page = render_html(Report.model_validate(report.to_json() | changes))
    content = report.to_json() | changes
    for path in (
        "/tasks/tasks/0/metrics/0/quantized/value",
        "/tasks/tasks/0/metrics/0/reference/value",
        "/suite/gates/0/limit",
        "/further_texts/0/kld/mean/value",
    ):
        value: object = content
        for key in path.strip("/").split("/"):
            value = value[int(key)] if isinstance(value, list) else value[key]
        assert f'data-path="{path}" data-value="{value!r}"' in page
    assert "&lt;acc&gt;" in page and "<b>✗ missed</b>" in page
    assert "Tasks" not in render_html(report)


def test_json_is_the_report_alone(int4, tiny_release, written):
    shown = evaluated(int4, tiny_release, written("max_ppl_ratio: 99.0"), "--json", expect=0)
    assert json.loads(shown)["suite"]["gates"][0]["met"] is True


# What may run code or name a private file


@pytest.mark.parametrize("name", ["mine.yaml", "/somewhere/mine.yml", "MINE.YAML"])
def test_a_task_s_file_is_used_only_if_that_is_allowed(tmp_path, name):
    path = tmp_path / "suite.yaml"
    path.write_text(f"tasks:\n  - {{name: {name}}}\n")
    with pytest.raises(InputError, match=f"task_files: needed for {name}: lm-eval runs the code"):
        suite_for("unused", str(path))
    assert suite_for("unused", str(path), task_files=True).tasks[0].name == name


@pytest.mark.parametrize("text", ["private.txt", "../../private.txt", "somebody/private:x:y"])
def test_a_recipe_in_a_result_names_no_private_text(tmp_path, text):
    (tmp_path / "private.txt").write_text("secret")
    recipe = {
        "model": {"path": "toy"},
        "quantize": [{"match": "*", "method": "rtn", "bits": 8}],
        "output": {"path": "out"},
        "eval": {"text": text, "samples": 3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=f"text: {tmp_path}/recipe.yaml names {text}, which is"):
        suite_for(tmp_path)
    assert suite_for(tmp_path, text="own.txt").texts[0].samples == 3
    recipe["eval"]["text"] = "Salesforce/wikitext:wikitext-2-raw-v1:test"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert suite_for(tmp_path).texts[0].text == recipe["eval"]["text"]
    assert origin_of_text(tmp_path, None) == f"named by {tmp_path}/recipe.yaml"
    assert origin_of_text("elsewhere", None) == "the default"
