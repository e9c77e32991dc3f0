"""Tasks of lm-eval on streamed models: what lm-eval's own model of transformers finds."""

import json
import math
import runpy
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import grokquant
from grokquant import evaluation
from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.errors import InputError
from grokquant.evaluation import items, likelihoods, run, task_data, task_requests
from grokquant.evaluation.measure import Windows, compare_texts
from grokquant.evaluation.models import opened_models
from grokquant.evaluation.report import read_report
from grokquant.evaluation.suite import Suite, TaskSection
from grokquant.reporting.publish import publish
from grokquant.streaming.blocks import BlockwiseModel
from grokquant.streaming.stream import Stream
from grokquant.text import python_docs
from grokquant.text.tokenizer import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
lm_tasks = pytest.importorskip("grokquant.evaluation.lm_tasks")

TASKS = [
    TaskSection(name="python_docs_choice", items=6, fewshot=1),
    TaskSection(name="python_docs_cloze", items=8),
    TaskSection(name="python_docs_perplexity", items=2),
]
LONGEST = 128  # shorter than some documents, and than some contexts


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    asked_for = []

    def refuse(*where):
        asked_for.append(where)
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked_for == []


@pytest.fixture(scope="module", autouse=True)
def short_docs():
    """Few documents, so that the standard library is not read."""
    texts = [
        f"Document {n} tells of the number {n}, of what it adds to {n + 1}, and nothing else.\n\n"
        + " ".join(
            f"The value {(n * k) % 7} comes before the value {(n * k) % 5} in list {n} of {k}."
            for k in range(8)
        )
        + " Again the same value comes before the value\n"
        for n in range(40)
    ]
    texts.append(" ".join(texts[:3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "documents", lambda part: texts if part == "heldout" else [])
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    tokenizer = load_tokenizer(open_checkpoint("toy"))
    return lm_tasks.open_tasks(TASKS, tokenizer, LONGEST, tmp_path_factory.mktemp("data"))


def streamed(path, pairs, longest=LONGEST) -> dict:
    """Answers of a checkpoint by itself."""
    model = BlockwiseModel(open_checkpoint(path))
    batches = likelihoods.pack(pairs, longest)
    stream = Stream(model, [batch.rows for batch in batches])
    for index in range(len(model.layers)):
        stream.run_layer(index)
    found: dict = {}
    for batch, hidden in zip(batches, stream.hidden, strict=True):
        found |= likelihoods.likelihoods(model, batch, hidden)
    return found


# Against lm-eval's own model


@pytest.fixture(scope="module")
def hflm():
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = grokquant.load("toy", dtype=torch.float32, packed=False)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=LONGEST)


def test_every_request_gets_the_answer_of_hflm(opened, hflm, monkeypatch):
    """Log-likelihoods and greedy flags of all tasks, and the metrics that come of them."""
    own: dict = {}
    plain = type(hflm)._loglikelihood_tokens

    def noting(self, requests, **settings):
        answers = plain(self, requests, **settings)
        for (_, context, rest), answer in zip(requests, answers, strict=True):
            kept = LONGEST + 1 - len(rest)
            own[tuple(context[-kept:]), tuple(rest)] = answer
        return answers

    monkeypatch.setattr(type(hflm), "_loglikelihood_tokens", noting)
    wanted = {}
    for loaded, limit in opened.loaded:
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(1234)
        wanted |= lm_eval.evaluate(hflm, loaded, limit=limit, bootstrap_iters=0)["results"]

    answers = streamed("toy", opened.pairs)
    assert own.keys() == answers.keys() == opened.pairs.keys()
    assert any(len(context) == 1 for context, _ in own)  # the prefix token alone
    assert any(len(context) + len(rest) == LONGEST + 1 for context, rest in own)  # cut
    for pair, (value, greedy) in answers.items():
        assert value == pytest.approx(own[pair][0], abs=1e-4)
        assert greedy == own[pair][1]
    scores = opened.scores(answers, {})
    assert scores.keys() == wanted.keys()
    for task, found in scores.items():
        assert len(found.values) == len(found.items) >= 2
        for (metric, name), value in found.values.items():
            assert value == pytest.approx(wanted[task][f"{metric},{name}"], rel=1e-5)
    for result in items.paired_items(scores, scores):
        assert result.value(result.reference) == pytest.approx(
            wanted[result.task][f"{result.metric},{result.filter}"], rel=1e-5
        )
        if result.kind == "mean":
            theirs = lm_eval.api.metrics.mean_stderr(result.reference.tolist())
            assert result.error(result.reference) == pytest.approx(theirs)


def test_greedy_continuations_are_those_of_hflm(hflm):
    generator = torch.Generator().manual_seed(2)
    contexts = torch.randint(4, 2000, (6, 12), generator=generator)
    greedy = hflm.model.generate(contexts, max_new_tokens=3, do_sample=False)[:, 12:].tolist()
    pairs = [(tuple(c), tuple(g)) for c, g in zip(contexts.tolist(), greedy, strict=True)]
    pairs += [(context, (*rest[:2], (rest[2] + 1) % 2000)) for context, rest in pairs]
    wanted = hflm._loglikelihood_tokens([(("", ""), list(c), list(r)) for c, r in pairs])
    found = streamed("toy", pairs)
    assert [found[pair][1] for pair in pairs] == [w[1] for w in wanted] == [True] * 6 + [False] * 6
    assert [found[pair][0] for pair in pairs] == pytest.approx([w[0] for w in wanted], abs=1e-4)


def test_generated_text_is_that_of_hflm(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    task = written_task(tmp_path)
    suite = Suite(tasks=(TaskSection(name=str(task)),), max_length=64)
    checkpoint = open_checkpoint("toy")
    with task_requests.opened_tasks(suite, checkpoint, checkpoint, torch.device("cpu")) as tasks:
        own, same = tasks.texts
        rows, found = tasks.results({}, {})
    assert own == same and len(own) == 2 and all(own.values())
    model, tokenizer = grokquant.load("toy", packed=False)
    whole = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=64)
    for (prompt, _), text in own.items():
        request = lm_eval.api.instance.Instance(
            "generate_until", {}, (prompt, {"until": ["\n"], "max_gen_toks": 8}), 0
        )
        assert whole.generate_until([request], disable_tqdm=True) == [text]
    assert rows.tasks[0].metrics[0].metric == "exact_match" and len(found) == 1

    monkeypatch.setattr("grokquant.evaluation.generation.available_bytes", lambda device: 1000)
    with (
        pytest.raises(InputError, match=r"generated: generates text, .* 1.00 kB are free"),
        task_requests.opened_tasks(suite, checkpoint, checkpoint, torch.device("cpu")),
    ):
        pass


def written_task(directory: Path) -> Path:
    """A task of somebody else's, in a YAML file, that generates."""
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"Return the {w}", "a": "x"}) + "\n" for w in "ab"))
    path = directory / "generated.yaml"
    path.write_text(
        f"task: generated\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {directory}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\n'
        "metric_list: [{metric: exact_match}]\nmetadata: {version: 3}\n"
    )
    return path


# Packing


def draw(generator: torch.Generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(4, 2000, (length,), generator=generator).tolist())


def test_answers_are_those_of_single_sequences():
    """Branches of any shape, one-token continuations, rows that are full, repeated pairs."""
    generator = torch.Generator().manual_seed(0)
    contexts = [draw(generator, n) for n in (1, 5, 5, 30)]
    pairs = [(c, draw(generator, n)) for c in contexts for n in (1, 1, 2, 7, 7, 25)]
    pairs += [pairs[3], (contexts[1], pairs[6][1]), (draw(generator, 70), draw(generator, 3))]
    model, _ = grokquant.load("toy", dtype=torch.float32, packed=False)
    packed, alone = streamed("toy", pairs, longest=60), {}
    for context, rest in set(pairs):
        with torch.no_grad():
            logits = model(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1]
        found = logits.log_softmax(-1)[range(len(rest)), list(rest)].sum().item()
        alone[context, rest] = found, torch.equal(logits.argmax(-1), torch.tensor(rest))
    assert packed.keys() == alone.keys()
    for pair, (value, greedy) in alone.items():
        assert packed[pair][0] == pytest.approx(value, abs=1e-4) and packed[pair][1] == greedy


def test_contexts_and_sequences_are_computed_once():
    context = tuple(range(100))
    pairs = [(context, (n, n)) for n in range(4)] * 3 + [(context, (9,))]
    (batch,) = likelihoods.pack(pairs, longest=200)
    assert batch.rows.tokens.shape == (1, 104)
    assert len(batch.pairs) == 5 and len(batch.positions.unique()) == 5
    assert batch.rows.positions.tolist() == [[*range(100), 100, 100, 100, 100]]
    several = likelihoods.pack(pairs, longest=102)
    assert sum(b.rows.tokens.numel() for b in several) == 102 + 102
    assert all(b.rows.tokens.shape[1] <= 102 for b in several)


def test_rows_of_one_length_run_together_without_padding():
    generator = torch.Generator().manual_seed(1)
    pairs = [(draw(generator, n % 3 + 2), draw(generator, 2)) for n in range(30)]
    batches = likelihoods.pack(pairs, longest=64)
    assert sorted(tuple(b.rows.tokens.shape) for b in batches) == [(10, 3), (10, 4), (10, 5)]


def counting(checkpoint: Checkpoint, reads: Counter) -> Checkpoint:
    def load(ref):
        reads[ref.name] += 1
        return ref.load()

    tensors = {
        name: replace(ref, load=partial(load, ref))
        for name, ref in checkpoint.source.tensors.items()
    }
    return replace(checkpoint, source=replace(checkpoint.source, tensors=tensors))


def test_texts_and_tasks_share_one_pass(tiny_release, opened):
    reads = Counter(), Counter()
    both = [counting(open_checkpoint(tiny_release), read) for read in reads]
    texts = [Windows(torch.arange(120).view(4, 30)), Windows(torch.arange(64).view(1, 64), 33)]
    asked_of_both = likelihoods.pack(opened.pairs, LONGEST)
    result = compare_texts(*both, texts, asked_of_both)
    assert all(set(read.values()) == {1} for read in reads)
    assert len(result.figures.nll) == 4 * 29 and len(result.further[0].nll) == 31
    own, base = result.answers
    alone = streamed(tiny_release, opened.pairs)
    assert own.keys() == base.keys() == alone.keys()
    assert all(own[p][0] == pytest.approx(alone[p][0], abs=1e-4) for p in alone)


# Shipped tasks


def test_shipped_tasks_are_those_that_have_data():
    assert {path.stem for path in task_data.SHIPPED.glob("*.yaml")} == task_data.MAKERS.keys()
    for path in task_data.SHIPPED.glob("*.yaml"):
        assert f"task: {path.stem}\n" in path.read_text() and "!function" not in path.read_text()


def test_items_are_made_of_the_text():
    documents = python_docs.documents("heldout")
    whole = "\x00".join(documents)
    cloze, choice = (list(m(documents)) for m in (task_data.cloze_items, task_data.choice_items))
    assert len(cloze) > 8 and len(choice) > 40
    for item in cloze:
        assert item["context"] + item["word"] in whole
        assert item["word"].strip() in item["context"].split()
    for item in choice:
        true = [item["context"] + c in whole for c in item["choices"]]
        assert true[item["answer"]] and len(item["choices"]) == 4
    assert len({item["answer"] for item in choice}) == 4


def test_items_are_the_same_each_time(tmp_path):
    first = task_data.write_items("python_docs_choice", tmp_path).read_text()
    assert task_data.write_items("python_docs_choice", tmp_path).read_text() == first


@pytest.fixture
def output(tmp_path):
    rule = {"match": "*", "method": "rtn", "bits": 4, "group": 32, "scale": "absmax"}
    place = {"path": str(tmp_path / "out"), "format": "gptq"}
    values = {"model": {"path": "toy"}, "quantize": [rule], "output": place}
    return grokquant.quantize(values)


def test_the_command_line_of_lm_eval_takes_outputs(output, opened, tmp_path, monkeypatch):
    """A gptq Grok, which transformers alone cannot open; tasks that need no network."""
    pytest.importorskip("accelerate")
    names = [task.name for task in TASKS]
    for name in names:
        task_data.write_task(name, tmp_path)
    arguments = ["run", "--model", "hf", "--tasks", ",".join(names[1:]), "--limit", "2"]
    arguments += ["--model_args", f"pretrained={output},dtype=float32,max_length={LONGEST}"]
    arguments += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runpy.run_module("grokquant.lm_eval", run_name="__main__")
    (found,) = tmp_path.glob("found*.json")
    results = json.loads(found.read_text())["results"]

    loaded = [(tasks, 2) for tasks, _ in opened.loaded[1:]]
    own = replace(opened, loaded=loaded, pairs={}, prompts={})
    own.record_requests()
    scores = own.scores(streamed(output, own.pairs), {})
    assert results.keys() == scores.keys() == set(names[1:])
    for task, wanted in scores.items():
        for key, value in wanted.values.items():
            assert results[task][",".join(key)] == pytest.approx(value, rel=1e-3)


def test_without_lm_eval_its_command_line_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("grokquant.lm_eval", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# In a report


def test_tasks_are_in_the_report(tiny_release, tmp_path):
    suite = Suite.model_validate(
        {
            "texts": [{"samples": 2, "length": 32}, {"samples": 1, "protocol": "llama.cpp"}],
            "tasks": [t.model_dump(exclude_none=True) for t in TASKS[1:]],
            "max_length": LONGEST,
        }
    )
    done = run.run_suite(opened_models("toy", "toy"), suite, "mine")
    report = done.report
    assert report.tasks.lm_eval == lm_eval.__version__
    assert (report.tasks.max_length, report.tasks.prefix_token) == (LONGEST, 1)
    cloze, rolling = report.tasks.tasks
    assert (cloze.name, cloze.items, cloze.version, cloze.fewshot) == (TASKS[1].name, 8, "1.0", 0)
    assert [m.metric for m in rolling.metrics] == [
        "word_perplexity", "byte_perplexity", "bits_per_byte",
    ]  # fmt: skip
    for task in report.tasks.tasks:
        assert len(task.sha256) == 64
        for metric in task.metrics:
            # Tokens of a probe run beside those of the quantized model: sums end differently.
            value, error = metric.reference.value, metric.reference.error
            assert metric.quantized.value == pytest.approx(value, rel=1e-6)
            assert metric.quantized.error == pytest.approx(error, rel=1e-6)
    word = next(i for i in done.items if i.metric == "word_perplexity")
    assert word.kind == "perplexity" and word.weights.min() > 10
    (second,) = report.further_texts
    assert second.protocol.tokens_scored == 255 and second.protocol.length == 512
    _, page = publish(report, tmp_path, tmp_path / "reports")
    assert read_report(tmp_path / "reports") == report and page.is_file()


def test_errors_of_perplexities_are_of_first_order():
    """The delta method against the spread of a bootstrap."""
    generator = np.random.default_rng(0)
    weights = generator.integers(20, 200, 400).astype(float)
    values = -weights * generator.gamma(4, 0.5, 400)
    result = items.ItemResults(
        "t", "word_perplexity", "none", "perplexity", np.arange(400), values, values, weights
    )
    draws = generator.integers(0, 400, (4000, 400))
    spread = np.exp(-values[draws].sum(1) / weights[draws].sum(1)).std()
    assert result.error(values) == pytest.approx(spread, rel=0.1)
    assert result.value(values) == pytest.approx(math.exp(-values.sum() / weights.sum()))


def test_what_is_right_or_wrong_is_compared_item_by_item():
    draw = np.random.default_rng(0)
    base = (draw.random(200) < 0.7).astype(float)
    own = np.where(draw.random(200) < 0.1, 1 - base, base)
    both = {"quantized": own, "reference": base}
    found = {
        name: {
            "t": items.Scores(
                "1", 0, "", {("acc", "none"): right.mean()},
                {("acc", "none"): dict(enumerate(right))}, {"acc": True},
            )
        }
        for name, right in both.items()
    }  # fmt: skip
    (task,) = items.task_rows(**found, items=list(items.paired_items(**found)))
    paired = task.metrics[0].paired
    assert (paired.quantized, paired.reference) == (own.mean(), base.mean())
    assert paired.lost == ((base == 1) & (own == 0)).sum()
    assert paired.gained == ((base == 0) & (own == 1)).sum()
    assert paired.difference.value == pytest.approx(own.mean() - base.mean())
    likelihoods = items.ItemResults(
        "t", "word_perplexity", "none", "perplexity", np.arange(200), -own, -base, np.ones(200)
    )
    assert items._paired(likelihoods) is None


# What cannot be used


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("arc_chalenge", "lm-eval has no task of this name, did you mean arc_challenge[?]$"),
        ("arc_challenge", "cannot be loaded: Couldn't reach 'allenai/ai2_arc' on the Hub"),
        ("missing.yaml", "cannot be loaded: "),
    ],
)
def test_a_task_without_data_is_named(name, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match=rf"^tasks: {name}: {reason}") as error:
        lm_tasks.open_tasks([TaskSection(name=name)], None, 64, tmp_path)
    assert "\n" not in str(error.value)


def test_a_continuation_longer_than_the_model_is_refused(tmp_path):
    tokenizer = load_tokenizer(open_checkpoint("toy"))
    with pytest.raises(InputError, match=r"tokens to predict .* at most max_length \(8\)"):
        lm_tasks.open_tasks(TASKS[:1], tokenizer, 8, tmp_path)


def test_nothing_of_lm_eval_is_imported_without_tasks(text_file):
    code = (
        "import sys, grokquant.cli\n"
        "from grokquant.evaluation.models import opened_models\n"
        "from grokquant.evaluation.run import run_suite, suite_for\n"
        "run_suite(opened_models('toy', 'toy'), suite_for('toy', None, sys.argv[1], 1, 16))\n"
        "sys.exit(any(name in sys.modules for name in ('lm_eval', 'datasets')))"
    )
    run = [sys.executable, "-c", code, str(text_file)]
    assert subprocess.run(run, check=False).returncode == 0


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "grokquant.evaluation.lm_tasks")
    monkeypatch.delattr(evaluation, "lm_tasks")
    suite = Suite(tasks=(TaskSection(name="python_docs_cloze"),))
    toy = open_checkpoint("toy")
    with (
        pytest.raises(
            InputError, match=r'tasks: need .*"grokquant\[eval\]" \(lm_eval is missing\)'
        ),
        task_requests.opened_tasks(suite, toy, toy, torch.device("cpu")),
    ):
        pass
