"""The toy is a sensitive instrument: trained well, hurt by int4, untouched by lossless int8."""

import re

import pytest
import torch
import train_toy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.families.grok_model import Grok1Config, Grok1ForCausalLM
from grokquant.families.grok_tokenizer import Grok1Tokenizer
from grokquant.runtime.load import build_model
from grokquant.text import python_docs
from grokquant.text.documents import load_documents, token_rows
from grokquant.text.tokenizer import load_tokenizer
from grokquant.toy import TOY_PATH
from grokquant.toy.release_writer import write_release

TEXTS = [
    "The quick brown fox\n\n    returns None",
    "  two leading spaces, é 日本 🙂\ttab",
    "def f(x):\n        return x ** 2\n\n\n",
    "1234567890 \\u0000 ''' \"\"\"",
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Reports of the toy as rtn int4 g128 and as lossless int8, on the same 48 windows."""
    reports = {}
    for name, rule in {
        "rtn": {"method": "rtn", "bits": 4, "group": 128, "scale": "absmax"},
        "int8": {"method": "copy"},
        "gptq": {"method": "gptq", "bits": 4, "group": 128},
    }.items():
        output = tmp_path_factory.mktemp(name) / "out"
        grokquant.quantize(
            {
                "model": {"path": "toy"},
                "calibration": {"samples": 64, "length": 256},
                "quantize": [
                    {"match": "layers.*.experts.*", **rule},
                    {"match": "layers.*.attention.*", "method": "copy"},
                ],
                "output": {"path": str(output)},
            }
        )
        reports[name] = grokquant.evaluate(output, "toy", samples=48, length=256)
    return reports


def test_it_is_a_small_grok_in_the_release_layout():
    toy = open_checkpoint("toy")
    assert toy.source.kind == "release"
    assert (toy.config.num_local_experts, toy.config.num_experts_per_tok) == (8, 2)
    assert toy.config.num_hidden_layers >= 4
    assert sum(f.stat().st_size for f in TOY_PATH.rglob("*") if f.is_file()) <= 10_000_000


def test_perplexity_is_a_tenth_of_a_unigram_model_s(evaluated):
    tokenizer = load_tokenizer(open_checkpoint("toy"))
    tokens = [
        token_rows(load_documents("python-docs", part), tokenizer, 10**6, 256, None).flatten()
        for part in ("train", "heldout")
    ]
    unigram = train_toy.unigram_perplexity(*tokens)
    assert evaluated["int8"].perplexity.reference.value <= unigram / 10


def test_int4_hurts_visibly_and_lossless_int8_does_not(evaluated):
    rtn, int8 = evaluated["rtn"], evaluated["int8"]
    assert rtn.kld.mean.value >= 0.003
    assert rtn.kld.mean.value >= 50 * rtn.noise_floor.mean_kld
    assert int8.kld.mean.value <= 1e-9
    assert all(layer.router_top2_set == 1 for layer in int8.layers)


def test_gptq_hurts_less_than_rtn(evaluated):
    assert evaluated["gptq"].kld.mean.value < 0.8 * evaluated["rtn"].kld.mean.value
    assert evaluated["gptq"].same_top_p.value > evaluated["rtn"].same_top_p.value


def test_no_document_is_in_two_parts():
    parts = [set(python_docs.documents(part)) for part in ("train", "calibration", "heldout")]
    assert all(len(part) > 20 for part in parts)
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    paragraphs = [
        {p for text in part for p in text.split("\n\n") if len(p) > 400} for part in parts
    ]
    shared = (paragraphs[0] | paragraphs[1]) & paragraphs[2]
    assert len(shared) < 0.02 * len(paragraphs[2])


def test_training_code_is_of_covered_modules_without_docstrings(tmp_path, monkeypatch):
    monkeypatch.setattr(train_toy.sysconfig, "get_path", lambda name: str(tmp_path))
    code = '"""Doc."""\ndef f():\n    """Doc."""\n    return 1\n'
    names = [f"{number}.py" for number in range(20)]
    (tmp_path / "test").mkdir()
    for name in names:
        (tmp_path / name).write_text(code)
        (tmp_path / "test" / name).write_text(code)
    count = sum(python_docs.part_of(f"module:{name}") == "train" for name in names)
    assert count and train_toy.train_code() == ["def f():\n    return 1\n"] * count


def test_the_export_is_the_model(tmp_path):
    """What the training script writes reads back as the model, up to its int8 rounding."""
    model = train_toy.new_model()
    write_release(tmp_path, train_toy.release_config(), train_toy.release_leaves(model))
    read = build_model(open_checkpoint(tmp_path), "cpu", torch.float32)
    for (name, own), (_, back) in zip(
        model.named_parameters(), read.named_parameters(), strict=True
    ):
        assert (own - back).norm() <= 0.01 * own.norm(), name


def test_tokenizer_is_sentencepiece_s_own():
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(TOY_PATH / "tokenizer.model"))
    tokenizer = load_tokenizer(open_checkpoint("toy"))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == model.encode(text)
        assert tokenizer.decode(ids) == text


def test_transformers_finds_config_model_and_tokenizer(tmp_path):
    output = grokquant.quantize(
        {
            "model": {"path": "toy"},
            "quantize": [{"match": "layers.*", "method": "copy"}],
            "output": {"path": str(tmp_path / "out")},
        }
    )
    config = AutoConfig.from_pretrained(output)
    assert isinstance(config, Grok1Config) and config.hidden_size == 256
    assert isinstance(AutoTokenizer.from_pretrained(output), Grok1Tokenizer)
    with torch.device("meta"):
        del config.quantization_config
        assert isinstance(AutoModelForCausalLM.from_config(config), Grok1ForCausalLM)


def test_it_speaks_python():
    model, tokenizer = grokquant.load("toy")
    prompt = tokenizer("Return the", add_special_tokens=False, return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(prompt, max_new_tokens=12, do_sample=False)[0])
    assert re.match(r"Return the \w+", text)
