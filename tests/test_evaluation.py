"""The figures of an evaluation, held to plain numpy and to whole models in memory."""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from os.path import relpath
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ATTENTION, EXPERTS, own_text, run_stored_layer, saved_model
from make_release import write_hollow_grok_1, write_random_release
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationMixin

import grokquant
from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.evaluation import continuation, measure, models, statistics
from grokquant.evaluation.continuation import continuations
from grokquant.evaluation.estimates import noise_floor
from grokquant.evaluation.measure import Windows, compare_texts
from grokquant.evaluation.models import dtype_of_products, opened_models
from grokquant.evaluation.report import Report, read_report
from grokquant.evaluation.run import run_suite
from grokquant.evaluation.statistics import TokenFigures
from grokquant.evaluation.suite import suite_of
from grokquant.families.grok_model import GrokDecoderLayer, GrokRouter
from grokquant.humanize import unbroken_size
from grokquant.job.verify import verify
from grokquant.recipe import EvalSection, load_recipe
from grokquant.recipe.of_output import settings_of
from grokquant.reporting.html.page import render_html
from grokquant.reporting.publish import publish
from grokquant.reporting.rows import markdown_table, notes, verdict
from grokquant.streaming.blocks import BlockwiseModel
from grokquant.text import python_docs
from grokquant.text.documents import load_documents, token_rows
from grokquant.text.tokenizer import load_tokenizer

LAYERS, EXPERT_COUNT = 2, 4
# More tokens than one forward pass takes, so that windows run in several batches.
WINDOWS, LENGTH = 11, 200


@pytest.fixture(scope="module")
def settings(text_file) -> EvalSection:
    return EvalSection(text=relpath(text_file), samples=WINDOWS, length=LENGTH)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny_release, settings) -> dict[str, Path]:
    """The tiny release with its experts in int4, and as a lossless copy."""
    rules = {
        "int4": [EXPERTS | {"method": "rtn"}, ATTENTION],
        "copy": [{"match": "layers.*", "method": "copy"}],
    }
    return {
        name: grokquant.quantize(
            {
                "model": {"path": str(tiny_release)},
                "quantize": rule,
                "output": {"path": str(tmp_path_factory.mktemp("out") / name)},
                "eval": settings.model_dump(),
            }
        )
        for name, rule in rules.items()
    }


@pytest.fixture(scope="module")
def report(outputs, tiny_release) -> Report:
    return grokquant.evaluate(outputs["int4"], tiny_release, text=own_text(outputs["int4"]))


@pytest.fixture
def output(outputs, tmp_path) -> Path:
    """A copy of the int4 output that a test may change."""
    return Path(shutil.copytree(outputs["int4"], tmp_path / "int4"))


def rows_of(settings: EvalSection, checkpoint: Checkpoint) -> Tensor:
    documents = load_documents(settings.text, "heldout")
    tokenizer = load_tokenizer(checkpoint)
    return token_rows(documents, tokenizer, settings.samples, settings.length, None)


# Figures of tokens


def naive_log_softmax(logits: NDArray) -> NDArray:
    top = logits.max()
    return logits - top - math.log(sum(math.exp(x - top) for x in logits))


def naive_figures(logits: NDArray, reference: NDArray, target: int) -> dict[str, float]:
    """The figures of one token, from the definitions."""
    log_q, log_p = naive_log_softmax(logits), naive_log_softmax(reference)
    return {
        "nll": -log_q[target],
        "nll_reference": -log_p[target],
        "kld": sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)),
        "delta_p": math.exp(log_q[target]) - math.exp(log_p[target]),
        "same_top": float(logits.argmax() == reference.argmax()),
    }


@pytest.mark.parametrize("scale", [0.1, 5.0, 60.0])
def test_token_figures_are_those_of_the_definitions(scale):
    generator = torch.Generator().manual_seed(int(scale))
    reference = torch.randn((40, 33), generator=generator) * scale
    logits = reference + torch.randn((40, 33), generator=generator) * 0.3 * scale
    targets = torch.randint(0, 33, (40,), generator=generator)
    figures = statistics.compare_logits(logits, reference, targets)
    for token in range(40):
        expected = naive_figures(
            logits[token].double().numpy(), reference[token].double().numpy(), int(targets[token])
        )
        for name, value in expected.items():
            assert getattr(figures, name)[token].item() == pytest.approx(value, abs=1e-12), name
    assert 0 < figures.same_top.mean() < 1


def test_divergence_weighs_by_the_reference():
    """KL(reference || quantized): missing what the reference thinks likely costs most."""
    certain, torn = torch.tensor([[30.0, 0, 0]]), torch.tensor([[30.0, 30.0, 0]])
    target = torch.tensor([0])
    half = statistics.compare_logits(torn, certain, target).kld.item()
    assert half == pytest.approx(math.log(2), abs=1e-9)
    assert statistics.compare_logits(certain, torn, target).kld.item() > 10


def test_equal_logits_differ_in_nothing():
    logits = torch.randn((8, 50)).bfloat16()
    figures = statistics.compare_logits(logits, logits, torch.arange(8))
    assert figures.kld.abs().max() == 0 and figures.delta_p.abs().max() == 0
    assert figures.same_top.min() == 1


# Statistics over tokens


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).gamma(0.7, 2.0, count) - 0.5)


def standard_error(x: NDArray) -> float:
    return x.std(ddof=1) / math.sqrt(len(x))


def test_means_and_their_errors():
    x = draws(1001)
    mean, error = statistics.mean_and_error(x)
    assert mean == pytest.approx(x.numpy().mean())
    assert error == pytest.approx(standard_error(x.numpy()))
    rms, rms_error = statistics.rms_and_error(x)
    assert rms == pytest.approx(math.sqrt((x.numpy() ** 2).mean()))
    assert rms_error == pytest.approx(standard_error(x.numpy() ** 2) / (2 * rms))
    ppl, ppl_error = statistics.perplexity(x)
    assert ppl == pytest.approx(np.exp(x.numpy().mean()))
    assert ppl_error == pytest.approx(ppl * standard_error(x.numpy()))


def test_errors_of_nothing_and_of_one_token_are_zero():
    assert statistics.mean_and_error(torch.tensor([2.5], dtype=torch.float64)) == (2.5, 0.0)
    assert statistics.rms_and_error(torch.zeros(5, dtype=torch.float64)) == (0.0, 0.0)
    constant = torch.full((1000,), 0.1, dtype=torch.float64)
    assert statistics.mean_and_error(constant)[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 10, 1001])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.75, 0.999, 1.0])
def test_quantiles(count, share):
    x = draws(count)
    assert statistics.quantile(x, share) == pytest.approx(np.quantile(x.numpy(), share))


def test_correlation():
    x, noise = draws(500), draws(500, seed=1)
    expected = np.corrcoef(x.numpy(), (x + noise).numpy())[0, 1]
    assert statistics.correlation(x, x + noise) == pytest.approx(expected)
    assert statistics.correlation(x, x.clone()) == 1.0


# The streamed evaluation against whole models in memory


class InMemory:
    """A whole model over `rows` at once: logits, hidden states by layer, experts by layer."""

    @torch.no_grad()
    def __init__(self, path: Path, rows: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.entered: list[Tensor] = []  # what each layer reads, [rows, time, hidden]
        self.left: list[Tensor] = []
        self.chosen: list[Tensor] = []  # [tokens, k]
        model, _ = grokquant.load(path, dtype=dtype, packed=False)
        for module in model.modules():
            if isinstance(module, GrokRouter):
                module.register_forward_hook(lambda _, args, out: self.chosen.append(out[2]))
            if isinstance(module, GrokDecoderLayer):
                module.register_forward_hook(self._note)
        self.logits = model(input_ids=rows).logits

    def _note(self, module: torch.nn.Module, args: tuple, out: Tensor) -> None:
        self.entered.append(args[0])
        self.left.append(out)


@pytest.fixture(scope="module")
def pair(outputs, tiny_release, settings) -> tuple[InMemory, InMemory, Tensor]:
    rows = rows_of(settings, open_checkpoint(tiny_release))
    assert rows.shape == (WINDOWS, LENGTH)
    return InMemory(outputs["int4"], rows), InMemory(tiny_release, rows), rows


def log_softmax(logits: Tensor) -> NDArray:
    """Log-probabilities of all but the last token of each window [tokens, vocabulary]."""
    x = logits[:, :-1].flatten(0, 1).double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_streaming_gives_the_figures_of_whole_models(report, pair):
    log_q, log_p = (log_softmax(model.logits) for model in pair[:2])
    targets = pair[2][:, 1:].flatten().numpy()
    tokens = np.arange(len(targets))
    kld = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    delta = np.exp(log_q)[tokens, targets] - np.exp(log_p)[tokens, targets]
    close = partial(pytest.approx, rel=1e-5, abs=1e-7)

    assert report.protocol.tokens_scored == len(targets) == WINDOWS * (LENGTH - 1)
    assert report.kld.mean.value == close(kld.mean())
    assert report.kld.mean.token_error == close(standard_error(kld))
    assert report.delta_p.mean.value == close(delta.mean())
    assert report.delta_p.rms.value == close(math.sqrt((delta**2).mean()))
    assert report.same_top_p.value == close((log_q.argmax(-1) == log_p.argmax(-1)).mean())
    for part, values in ((report.kld, kld), (report.delta_p, delta)):
        shown = part.model_dump(by_alias=True)
        shares = {"maximum": 1, "median": 0.5, "minimum": 0}
        shares |= {name: float(name[:-1]) / 100 for name in shown if name.endswith("%")}
        assert len(shares) > 10
        for name, share in shares.items():
            assert shown[name] == close(np.quantile(values, share)), name


def test_perplexities_and_their_errors_are_those_of_llama_cpp(report, pair):
    targets = pair[2][:, 1:].flatten().numpy()
    own, base = (-log_softmax(m.logits)[np.arange(len(targets)), targets] for m in pair[:2])
    ppl, ppl_base = np.exp(own.mean()), np.exp(base.mean())
    error, error_base = standard_error(own), standard_error(base)
    covariance = np.cov(own, base)[0, 1] / len(own)
    ln_error = math.sqrt(error**2 + error_base**2 - 2 * covariance)
    spread = (ppl * error) ** 2 + (ppl_base * error_base) ** 2 - 2 * ppl * ppl_base * covariance
    close = partial(pytest.approx, rel=1e-5)

    found = report.perplexity
    assert (found.quantized.value, found.quantized.token_error) == close((ppl, ppl * error))
    assert (found.reference.value, found.reference.token_error) == close(
        (ppl_base, ppl_base * error_base)
    )
    assert (found.ratio.value, found.ratio.token_error) == close(
        (ppl / ppl_base, ppl / ppl_base * ln_error)
    )
    assert (found.ln_ratio.value, found.ln_ratio.token_error) == close(
        (math.log(ppl / ppl_base), ln_error)
    )
    assert found.difference.value == pytest.approx(ppl - ppl_base, rel=1e-4)
    assert found.difference.token_error == pytest.approx(math.sqrt(spread), rel=1e-4)
    assert found.correlation == close(covariance / (error * error_base))


def test_layers_are_those_of_whole_models(report, pair):
    own, base, _ = pair
    assert [layer.layer for layer in report.layers] == list(range(LAYERS))
    for i, layer in enumerate(report.layers):
        error = (own.left[i] - base.left[i]).norm() / base.left[i].norm()
        assert layer.relative_error == pytest.approx(error.item(), rel=1e-5)
        chosen = list(zip(own.chosen[i].tolist(), base.chosen[i].tolist(), strict=True))
        first = [mine[0] == theirs[0] for mine, theirs in chosen]
        both = [set(mine) == set(theirs) for mine, theirs in chosen]
        assert layer.router_top1 == pytest.approx(np.mean(first), abs=1e-12)
        assert layer.router_top2_set == pytest.approx(np.mean(both), abs=1e-12)
        for model, loads in (
            (own, layer.tokens_per_expert),
            (base, layer.reference_tokens_per_expert),
        ):
            counted = Counter(expert for pair in model.chosen[i].tolist() for expert in pair)
            assert loads == tuple(counted[expert] for expert in range(EXPERT_COUNT))
    assert 0.5 < report.layers[1].router_top2_set < report.layers[1].router_top1 < 1


@pytest.mark.parametrize("at_once", [1, 50, 199])
def test_logits_may_be_taken_in_pieces(report, outputs, tiny_release, monkeypatch, at_once):
    monkeypatch.setattr(measure, "_LOGITS_AT_ONCE", at_once * 2048)
    text = own_text(outputs["int4"])
    pieces = grokquant.evaluate(outputs["int4"], tiny_release, text, samples=2, quick=True)
    monkeypatch.undo()
    whole = grokquant.evaluate(outputs["int4"], tiny_release, text, samples=2, quick=True)
    assert pieces.protocol == whole.protocol
    assert pieces.kld.mean.value == pytest.approx(whole.kld.mean.value, rel=1e-6)
    assert pieces.perplexity.ratio.value == pytest.approx(whole.perplexity.ratio.value, rel=1e-6)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_each_tensor_is_read_once(outputs, tiny_release, products):
    reads: Counter[str] = Counter()

    def counting(checkpoint: Checkpoint, side: str) -> Checkpoint:
        def load(ref):
            reads[f"{side} {ref.name}"] += 1
            return ref.load()

        tensors = {
            name: replace(ref, load=partial(load, ref))
            for name, ref in checkpoint.source.tensors.items()
        }
        return replace(checkpoint, source=replace(checkpoint.source, tensors=tensors))

    both = [counting(open_checkpoint(path), str(path)) for path in (outputs["int4"], tiny_release)]
    compare_texts(*both, [Windows(torch.arange(120).view(4, 30))], products=products)
    assert set(reads.values()) == {1}
    assert len(reads) == sum(len(checkpoint.source.tensors) for checkpoint in both)


def test_layers_are_told_as_they_are_done(outputs, tiny_release, settings):
    told = []
    run_suite(
        opened_models(outputs["int4"], tiny_release),
        suite_of(settings),
        layer_done=lambda layer, total: told.append((layer, total)),
    )
    assert [(layer.layer, total) for layer, total in told] == [(0, LAYERS), (1, LAYERS)]


def test_a_lossless_copy_costs_nothing(outputs, tiny_release):
    report = grokquant.evaluate(outputs["copy"], tiny_release, text=own_text(outputs["copy"]))
    assert report.kld.maximum <= 1e-9 and report.kld.mean.value <= 1e-9
    # On a busy machine libraries may share a sum among fewer threads, and so round it otherwise.
    assert report.perplexity.ratio.value == pytest.approx(1, abs=1e-7)
    assert report.same_top_p.value == 1
    for layer in report.layers:
        assert (layer.router_top1, layer.router_top2_set) == (1, 1)
        assert layer.relative_error <= 1e-6
        assert layer.tokens_per_expert == layer.reference_tokens_per_expert


def test_a_model_against_itself(tiny_release, settings):
    report = grokquant.evaluate(tiny_release, tiny_release, **settings.model_dump())
    assert report.kld.maximum <= 1e-9 and report.delta_p.maximum <= 1e-6
    assert report.perplexity.correlation == pytest.approx(1)
    assert report.perplexity.difference.value == pytest.approx(0, abs=1e-3)
    assert report.units == () and report.quantized == report.reference
    assert report.quantized.schemes == {
        "int8 channel sym": 22,
        "int8 g16 sym": 2,
        "int8 g32 sym": 8,
    }


def test_the_noise_floor_is_far_below_what_int4_costs(report):
    noise = report.noise_floor.mean_kld
    assert math.isfinite(noise) and abs(noise) < 1e-9
    assert report.kld.mean.value > 1e-3 > 1000 * abs(noise)


def test_the_noise_floor_is_measured(outputs, tiny_release, monkeypatch):
    """A reference that is not the same twice has a floor."""
    plain = BlockwiseModel.logits

    def shaky(self, hidden):
        logits = plain(self, hidden)
        return logits + 0.01 * torch.randn(logits.shape)

    monkeypatch.setattr(BlockwiseModel, "logits", shaky)
    text = own_text(outputs["copy"])
    report = grokquant.evaluate(outputs["copy"], tiny_release, text, 4, 32, quick=True)
    assert 1e-5 < report.noise_floor.mean_kld < 1e-3


def test_products_of_experts_in_bfloat16(outputs, tiny_release):
    """Their floor is the reference's distance from itself in float32, on some of the tokens."""
    both = open_checkpoint(outputs["int4"]), open_checkpoint(tiny_release)
    texts = [Windows(torch.arange(1200).view(12, 100) % 500)]
    exact = compare_texts(*both, texts, forced=False)
    found = compare_texts(*both, texts, products=torch.bfloat16)
    some = slice(0, 63)  # of the beginning of the first window
    assert torch.equal(found.noise.nll_reference, found.figures.nll_reference[some])
    assert torch.allclose(found.noise.nll, exact.figures.nll_reference[some], rtol=0, atol=1e-4)
    kld, exact_kld, floor = (
        figures.kld.mean().item() for figures in (found.figures, exact.figures, found.noise)
    )
    assert kld == pytest.approx(exact_kld, rel=0.02)
    assert 1e-8 < floor < kld / 100


def test_products_in_bfloat16_are_refused_where_experts_do_not_run_one_by_one(
    tiny_release, tmp_path, monkeypatch
):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "vocab_size": 2048}
    dense = open_checkpoint(saved_model(tmp_path, "llama", **sizes))
    at_once = open_checkpoint(tiny_release)
    monkeypatch.setattr(type(at_once.family), "runs_experts", False)
    for checkpoint in (dense, at_once):
        with pytest.raises(InputError, match="^dtype: only experts that run one by one"):
            dtype_of_products(checkpoint, "bfloat16", CPU)
        assert dtype_of_products(checkpoint, "auto", CPU) == torch.float32


def test_a_floor_too_high_for_what_was_measured_is_a_note():
    noise = TokenFigures(*torch.full((5, 7), 0.001).double())
    low, high = (noise_floor(noise, kld, torch.bfloat16) for kld in (0.011, 0.009))
    assert low.note is None and "dtype float32" in str(high.note)
    assert "7 tokens" in low.how
    assert noise_floor(noise, 0.0, torch.float32).note is None


def test_products_are_in_bfloat16_where_that_pays(tiny_release, tmp_path, monkeypatch):
    write_hollow_grok_1(tmp_path, layers=1)
    large, small = open_checkpoint(tmp_path), open_checkpoint(tiny_release)
    dtypes = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    monkeypatch.setattr(models, "multiplies_bfloat16", lambda _: True)
    for name, dtype in dtypes.items():
        assert dtype_of_products(large, name, CPU) == dtype
    assert dtype_of_products(small, "auto", CPU) == torch.float32
    monkeypatch.setattr(models, "multiplies_bfloat16", lambda _: False)
    assert dtype_of_products(large, "auto", CPU) == torch.float32
    with pytest.raises(InputError, match="^dtype: expected auto, float32 or bfloat16"):
        dtype_of_products(large, "float16", CPU)


# What is evaluated on which text


def test_settings_are_those_of_the_recipe_unless_given(outputs, settings, tiny_release):
    assert settings_of(outputs["int4"]) == settings
    changed = settings_of(outputs["int4"], text="python-docs", samples=3, length=99)
    assert changed == EvalSection(text="python-docs", samples=3, length=99)
    assert settings_of(tiny_release) == EvalSection()
    assert settings_of(tiny_release, length=64) == EvalSection(length=64)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"samples": 0}, "greater than or equal to 1"),
        ({"length": 4}, "greater than or equal to 8"),
        ({"text": "nonsense"}, "not 'nonsense'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(outputs, given, words):
    with pytest.raises(InputError, match=words) as error:
        settings_of(outputs["int4"], **given)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{next(iter(given))}: ")


def test_windows_and_length_are_what_the_protocol_says(outputs, tiny_release, text_file):
    text = own_text(outputs["int4"])
    report = grokquant.evaluate(outputs["int4"], tiny_release, text, 3, 40, quick=True)
    assert (report.protocol.samples, report.protocol.length) == (3, 40)
    assert report.protocol.tokens_scored == 3 * 39
    assert report.protocol.text == relpath(text_file)
    for layer in report.layers:
        assert sum(layer.tokens_per_expert) == 3 * 40 * 2


def test_windows_are_no_longer_than_the_model_has_positions(outputs, tiny_release):
    text = own_text(outputs["int4"])
    report = grokquant.evaluate(outputs["int4"], tiny_release, text, 1, 100_000, quick=True)
    assert (report.protocol.samples, report.protocol.length) == (1, 512)
    assert report.protocol.asked_length == 100_000
    (line,) = notes(report)
    assert line.endswith(
        "have 512 tokens and not the 100,000 asked for: the model has no more positions."
    )
    assert line in markdown_table(report) and line in render_html(report)


def test_windows_of_the_length_asked_for_need_no_words(report):
    assert report.protocol.asked_length is None and notes(report) == []


def test_other_texts_can_be_given(outputs, tiny_release, text_file, tmp_path):
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"text": text_file.read_text()}) + "\n")
    evaluate = partial(
        grokquant.evaluate, outputs["int4"], tiny_release, samples=2, length=32, quick=True
    )
    same, other = evaluate(text=str(text_file)), evaluate(text=str(lines))
    assert other.kld == same.kld
    assert other.protocol.text == lines.name
    assert other.protocol.text_sha256 == same.protocol.text_sha256


def test_python_docs_is_the_held_out_part(outputs, tiny_release, monkeypatch):
    texts = {"heldout": ["A text that is held out. " * 20], "train": [], "calibration": []}
    monkeypatch.setattr(python_docs, "documents", texts.__getitem__)
    report = grokquant.evaluate(
        outputs["int4"], tiny_release, text="python-docs", samples=2, length=16, quick=True
    )
    assert report.protocol.text == "python-docs, held-out part"
    assert report.protocol.samples == 2


def test_a_text_too_short_is_named(outputs, tiny_release, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(InputError, match=r"eval.text: .*short.txt: the text has \d+ tokens"):
        grokquant.evaluate(outputs["int4"], tiny_release, text=str(short))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layers": 1}, "num_hidden_layers is 1, the reference has 2"),
        ({"experts": 8}, "num_local_experts is 8, the reference has 4"),
        ({"hidden": 64}, "hidden_size is 64, the reference has 128"),
        ({"vocab": 128}, "vocab_size is 128, the reference has 2048"),
    ],
)
def test_models_of_other_shapes_are_not_compared(tiny_release, settings, tmp_path, change, field):
    shape = dict(layers=2, hidden=128, ffn=64, heads=1, kv_heads=1, experts=4, vocab=2048)
    write_random_release(tmp_path, **shape | change)
    with pytest.raises(InputError, match=field):
        grokquant.evaluate(tmp_path, tiny_release, **settings.model_dump())


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"units": [3]}', '{"units": [{"name": "a"}]}']
)
def test_a_broken_quantization_report_is_named_at_once(output, tiny_release, settings, content):
    (output / "quantization-report.json").write_text(content)

    def too_late(*_):
        raise AssertionError

    with pytest.raises(InputError, match=r"quantization-report.json: ") as error:
        run_suite(opened_models(output, tiny_release), suite_of(settings), layer_done=too_late)
    assert "\n" not in str(error.value)


# What is written


def test_a_size_is_the_same_everywhere(report, output, tiny_release):
    """That of the weight files on disk, and bits per weight follow from it."""
    files = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    plan = grokquant.plan(load_recipe(output / "recipe.yaml", [f"model.path={tiny_release}"]))
    written = json.loads((output / "quantization-report.json").read_text())
    checkpoint = open_checkpoint(output)
    sizes = (plan.output_bytes, written["output_bytes"], checkpoint.file_bytes)
    assert {*sizes, report.quantized.bytes} == {files}
    bits = (plan.bits_per_weight, written["bits_per_weight"], checkpoint.bits_per_weight)
    assert {*bits, report.quantized.bits_per_weight} == {8 * files / checkpoint.parameters}
    shown = unbroken_size(files)
    for text in (verdict(report), markdown_table(report), render_html(report)):
        assert shown in text


def test_dequantized_is_said_of_a_reference_that_is_stored_quantized(report):
    """Mixtral in bf16 beside it, see `test_source_model.py`."""
    assert report.protocol.arithmetic == "float32 on the stored weights"
    assert "dequantized; float32 on the stored weights;" in markdown_table(report)
    assert "it was dequantized for the comparison" in render_html(report)


def test_grids_come_with_their_methods(report, outputs, tiny_release):
    assert report.quantized.schemes == {
        "int4 g32 sym (rtn)": 24,
        "int8 channel sym (copy)": 6,
        "int8 g16 sym (copy)": 2,
    }
    assert set(report.reference.schemes) == {"int8 channel sym", "int8 g16 sym", "int8 g32 sym"}
    assert {unit.method for unit in report.units} == {"rtn", "copy"}
    assert len(report.units) == LAYERS * (4 + 3 * EXPERT_COUNT)


def test_kept_matrices_are_counted_by_their_dtype(tiny_release, settings, tmp_path):
    output = grokquant.quantize(
        {
            "model": {"path": str(tiny_release)},
            "quantize": [{"match": "layers.1.*", "method": "copy"}],
            "output": {"path": str(tmp_path / "half")},
        }
    )
    report = grokquant.evaluate(output, tiny_release, **settings.model_dump(), quick=True)
    assert report.quantized.schemes == {
        "bfloat16": 16,
        "int8 channel sym (copy)": 11,
        "int8 g16 sym (copy)": 1,
        "int8 g32 sym (copy)": 4,
    }


def test_publish_writes_the_report_and_fills_the_card(report, output):
    sums, card = ((output / name).read_bytes() for name in ("SHA256SUMS", "README.md"))
    json_path, html_path = publish(report, output)
    assert json_path.parent == html_path.parent == output / "evaluation"
    assert read_report(json_path) == report
    assert "int4 g32 sym (rtn)" in html_path.read_text()
    filled = (output / "README.md").read_text()
    assert markdown_table(report).strip() in filled
    assert "Not evaluated yet" in card.decode() and "Not evaluated yet" not in filled
    assert (output / "SHA256SUMS").read_bytes() == sums
    assert verify(output) == LAYERS * (4 + 3 * EXPERT_COUNT)


def test_publishing_again_replaces_the_table(report, output, tiny_release):
    publish(report, output)
    first = (output / "README.md").read_text()
    fewer = grokquant.evaluate(output, tiny_release, own_text(output), samples=2, quick=True)
    publish(fewer, output)
    second = (output / "README.md").read_text()
    assert markdown_table(report).strip() not in second
    replaced = first.replace(markdown_table(report).strip(), markdown_table(fewer).strip())
    assert _unsealed(replaced) == _unsealed(second)
    assert second.count("| Mean KLD |") == 1
    assert read_report(output / "evaluation") == fewer
    verify(output)


def _unsealed(card: str) -> str:
    """The card without the checksum of its table."""
    return re.sub("<!-- sha256 .* -->", "", card)


def test_publish_writes_where_it_is_told(report, output, tmp_path):
    paths = publish(report, output, tmp_path / "elsewhere")
    assert {path.parent for path in paths} == {tmp_path / "elsewhere"}
    assert not (output / "evaluation").exists()


def test_the_card_of_a_model_that_is_not_ours_is_left_alone(report, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("<!-- evaluation -->mine<!-- /evaluation -->")
    publish(report, tmp_path)
    assert card.read_text() == "<!-- evaluation -->mine<!-- /evaluation -->"


# Running block by block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (17, 33), (9, 256), (2, 512)])
def test_block_by_block_is_the_model(tiny_release, shape, dtype):
    rows = torch.randint(0, 2048, shape, generator=torch.Generator().manual_seed(0))
    whole = InMemory(tiny_release, rows, dtype)
    model = BlockwiseModel(open_checkpoint(tiny_release), dtype)

    def same(found: Tensor, expected: Tensor) -> None:
        assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
        error = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
        if dtype == torch.float32:
            assert error.max() < 1e-5
        assert error.median() < 1e-3  # a bf16 router may see a tie where another rounding does not

    hidden = model.embed(rows)
    same(hidden, whole.entered[0])
    for index in range(LAYERS):
        model.load_layer(index)
        hidden = run_stored_layer(model, index, hidden)
        model.free_layer(index)
        same(hidden, whole.left[index])
    same(model.logits(hidden), whole.logits)


# What both would say next


@torch.no_grad()
def test_a_passage_is_the_end_of_the_first_window(report, outputs, tiny_release, settings):
    base = open_checkpoint(tiny_release)
    row = rows_of(settings, base)[0]
    tokenizer = load_tokenizer(base)
    found = report.passage
    start = len(row) - len(found.tokens)
    assert start == max(1, len(row) - 48)
    whole = found.before + "".join(token.text for token in found.tokens)
    assert whole.endswith(tokenizer.decode(row[start + 4 :]).strip("�"))
    model, _ = grokquant.load(tiny_release, dtype=torch.float32)
    p = model(row[None]).logits[0].softmax(-1)[start - 1 : -1]
    expected = p.max(-1)
    assert [t.reference_p for t in found.tokens] == pytest.approx(expected.values, abs=1e-4)
    assert found.tokens[-1].reference == tokenizer.decode(
        [*row[-5:-1], expected.indices[-1]]
    ).removeprefix(tokenizer.decode(row[-5:-1]))
    assert found.generated.reference[0] == found.tokens[0].reference
    assert found.generated.quantized[0] == found.tokens[0].quantized


@torch.no_grad()
def test_each_model_writes_its_likeliest_tokens(outputs):
    prompt = [100, 120, 90]
    paths = (outputs["int4"], "toy")
    found = continuations(*map(open_checkpoint, paths), prompt, 4, torch.device("cpu"))
    for path, written in zip(paths, found, strict=True):
        model, _ = grokquant.load(path, dtype=torch.float32, packed=False)
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert written == tokens[3:]
    assert len({*found[1]}) > 1


def test_models_that_are_too_large_write_nothing(outputs, tiny_release, monkeypatch):
    models = open_checkpoint(outputs["int4"]), open_checkpoint(tiny_release)
    needed = 4 * models[1].parameters
    monkeypatch.setattr(continuation, "available_bytes", lambda device: 4 * needed - 1)
    found = continuations(*models, [5], 2, torch.device("cpu"))
    assert found.endswith("in float32, more than a quarter of the memory that was free")
    monkeypatch.setattr(continuation, "available_bytes", lambda device: 4 * needed)
    assert len(continuations(*models, [5], 2, torch.device("cpu"))) == 2


def test_a_model_that_generates_no_text_costs_no_figures(outputs, tiny_release, monkeypatch):
    models = open_checkpoint(outputs["int4"]), open_checkpoint(tiny_release)
    monkeypatch.setattr(GenerationMixin, "generate", lambda *_, **__: 1 / 0)
    found = continuations(*models, [5], 2, torch.device("cpu"))
    assert found == "grok-1 generates no text in transformers: division by zero"
