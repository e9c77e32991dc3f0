"""Models that llama.cpp runs are written to GGUF files that describe them wholly: such a file alone
is the same model again. `make test-readers` has llama.cpp itself compute some of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign_gguf import MODELS, YARN, random_model, rows
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM

import grokquant
from grokquant.containers.gguf_tokenizer import with_tokenizer
from grokquant.containers.gguf_vocabulary import CUTS, DIGITS, GPT_2, vocabulary
from grokquant.errors import InputError
from grokquant.families.tokenizer import read_tokenizer
from grokquant.files.gguf_header import read_metadata
from grokquant.job import pipeline
from grokquant.job.plan import build_plan
from grokquant.recipe import Recipe, parse_recipe
from grokquant.types import Source

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
VARIANTS: dict[str, tuple[str, dict]] = {name: (name, {}) for name in MODELS} | {
    "llama3 positions": ("llama", {"rope_parameters": LLAMA_3}),
    "yarn": ("mixtral", {"rope_parameters": YARN, "head_dim": 16}),
    "yarn with attention": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}},
    ),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "attention biases": ("llama", {"attention_bias": True}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("qwen3_moe", {"tie_word_embeddings": True}),
}


def recipe_of(model: Path, output: Path, rule: dict) -> Recipe:
    written = {"path": str(output), "format": "gguf", "tokenizer": "none"}
    return parse_recipe({"model": {"path": str(model)}, "quantize": [rule], "output": written})


def saved(directory: Path, name: str, **more: object) -> Path:
    random_model(name, **more).bfloat16().save_pretrained(directory)
    return directory


KEEP = {"match": "*", "method": "keep"}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_alone_is_the_model_again(variant, tmp_path):
    name, more = VARIANTS[variant]
    source = saved(tmp_path / "in", name, **more)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    output = pipeline.quantize(recipe_of(source, tmp_path / "out", KEEP))
    (file,) = output.glob("*.gguf")
    alone = shutil.copyfile(file, tmp_path / "alone.gguf")
    for written in (output, alone):
        loaded, _ = grokquant.load(written, dtype=torch.float32, packed=False)
        assert (loaded(rows()).logits - model(rows()).logits).abs().max() < 1e-5


def test_the_context_ends_where_a_window_that_llama_cpp_does_not_have_would_begin(tmp_path):
    source = saved(tmp_path / "in", "mixtral", sliding_window=128)
    plan = build_plan(recipe_of(source, tmp_path / "out", KEEP))
    path = tmp_path / "x.gguf"
    path.write_bytes(plan.files[0].layout.header)
    assert read_metadata(path)["llama.context_length"] == 128


@pytest.mark.parametrize(
    ("name", "more", "complaint"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, but llama.cpp computes"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("qwen3_moe", {"rope_parameters": LLAMA_3}, "no positions of type 'llama3' for qwen3moe"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "layer_types has another pattern"),
        ("deepseek_v2", {"q_lora_rank": None}, "q_lora_rank is None.*26 or 27 layers"),
        ("llama", {"hidden_act": "relu"}, "its activation is relu"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_in_the_plan(name, more, complaint, tmp_path):
    source = saved(tmp_path / "in", name, **more)
    with pytest.raises(InputError, match=complaint):
        build_plan(recipe_of(source, tmp_path / "out", KEEP))


# --- tokenizers: what is written is read again

TEXTS = [
    "def read(path):\n    with open(path) as file:\n\treturn file.read()\n\n\n",
    "In 1998, 3.14159 and 2_000_000 were numbers: 0x7F, -12e-3. It's what WE'LL see.",
    "Zażółć gęślą jaźń — 漢字かな交じり文 🦙🚀 ½ µ \u00a0 é e\u0301",
    "  two   spaces  and a tab\tend  ",
    "<bos><eos> <pad><think> camelCase HTTPServer /a/b//c",
]


def byte_level(cut: tuple[str, ...], path: Path, begins: bool) -> None:
    """A small byte-level tokenizer that cuts texts in these steps."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut[-1] == GPT_2)
    steps: list = [pre_tokenizers.Digits(True)] if DIGITS in cut else []
    patterns = [step for step in cut if step not in (DIGITS, GPT_2)]
    steps += [pre_tokenizers.Split(Regex(step), "isolated") for step in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, alone])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    config = names | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ x }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_byte_level_tokenizer_is_the_same_again(cut, begins, tmp_path):
    byte_level(cut, tmp_path, begins)
    files = tuple(sorted(tmp_path.iterdir()))
    config = {"vocab_size": 512, "model_type": "llama"}
    source = Source(tmp_path, "safetensors", config, {}, tokenizer_files=files)
    again = with_tokenizer(Source(tmp_path / "x.gguf", "gguf", {}, {}, metadata=vocabulary(source)))
    theirs, ours = read_tokenizer(source), read_tokenizer(again)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert ours.chat_template == "{{ x }}" and ours.eos_token == "<eos>"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokenizer.ggml.pre": "somebody's"}, 'pre is "somebody\'s"'),
        ({"tokenizer.ggml.model": "rwkv"}, "model is 'rwkv'"),
        ({"tokenizer.ggml.tokens": ["a"] * 512}, "has a token twice"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_named(change, complaint, tmp_path):
    byte_level(CUTS["gpt-2"], tmp_path, False)
    files = tuple(sorted(tmp_path.iterdir()))
    config = {"vocab_size": 512, "model_type": "llama"}
    metadata = vocabulary(Source(tmp_path, "safetensors", config, {}, tokenizer_files=files))
    again = with_tokenizer(Source(tmp_path / "x.gguf", "gguf", {}, {}, metadata=metadata | change))
    assert not again.tokenizer_files
    assert complaint in again.notes[0]
