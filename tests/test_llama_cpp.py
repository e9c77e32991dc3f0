"""llama.cpp itself runs our GGUF files: `make test-readers`."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_gguf import TEXTS, YARN
from reader_envs import only_with_readers, run_reader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.containers.gguf_vocabulary import CUTS, DIGITS, GPT_2
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.text.documents import load_documents, token_rows
from grokquant.text.tokenizer import load_tokenizer
from grokquant.toy import TOY_PATH

pytestmark = only_with_readers
EXPERTS, ATTENTION = "layers.*.experts.*", "layers.*.attention.*"
COPY = {"match": ATTENTION, "method": "copy"}


def run(
    tmp_path: Path, output: Path, rows: torch.Tensor, texts: Sequence[str] = ()
) -> tuple[torch.Tensor, list[list[int]], list[str]]:
    """llama.cpp's logits [rows, time, vocabulary], the tokens of texts and what it says after."""
    (tmp_path / "asked.json").write_text(json.dumps({"rows": rows.tolist(), "texts": list(texts)}))
    first = min(output.glob("*.gguf"))
    run_reader("llama-cpp", "read_gguf.py", first, tmp_path / "asked.json", tmp_path / "found.npz")
    found = np.load(tmp_path / "found.npz")
    tokens = [found[f"tokens{number}"].tolist() for number in range(len(texts))]
    after = [str(found[f"after{number}"]) for number in range(len(texts))]
    return torch.from_numpy(found["logits"]), tokens, after


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence of two sets of logits, nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


def perplexity(logits: torch.Tensor, rows: torch.Tensor) -> float:
    scored = logits[:, :-1].flatten(0, 1).double()
    return math.exp(F.cross_entropy(scored, rows[:, 1:].flatten()).item())


@torch.no_grad()
def check_logits(theirs: torch.Tensor, output: Path, rows: torch.Tensor, limit: float) -> None:
    ours = grokquant.load(output, dtype=torch.float32, packed=False)[0](rows).logits
    assert divergence(ours, theirs) < limit
    assert perplexity(theirs, rows) == pytest.approx(perplexity(ours, rows), rel=0.01)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Held-out text of the toy [rows, time]."""
    toy = open_checkpoint("toy")
    return token_rows(load_documents("python-docs", "heldout"), load_tokenizer(toy), 8, 128, None)


def quantized(model: str, rules: list[dict], shard: str, path: Path) -> Path:
    values = {
        "model": {"path": model},
        "calibration": {"samples": 16, "length": 128},
        "quantize": rules,
        "output": {"path": str(path), "format": "gguf", "shard": shard},
        "max_fallbacks": 1.0,
    }
    return pipeline.quantize(parse_recipe(values))


@pytest.mark.parametrize(
    ("rule", "shard"),
    [
        ({"method": "keep"}, "500MB"),
        ({"method": "copy"}, "2MB"),
        ({"method": "rtn", "grid": "q8_0"}, "2MB"),
        ({"method": "rtn", "grid": "q4_1"}, "500MB"),
        ({"method": "rtn", "grid": "q5_k"}, "500MB"),
        ({"method": "rtn", "grid": "q6_k"}, "500MB"),
        ({"method": "rtn", "grid": "iq4_nl"}, "500MB"),
        ({"method": "rtn", "grid": "q3_k"}, "500MB"),
        ({"method": "gptq", "grid": "q4_0"}, "500MB"),
        ({"method": "gptq", "grid": "q4_k"}, "3MB"),
        ({"method": "gptq", "grid": "iq4_xs"}, "2MB"),
        ({"method": "gptq", "grid": "q2_k"}, "500MB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_llama_cpp_computes_what_we_do(rows, tmp_path, rule, shard):
    output = quantized("toy", [{"match": EXPERTS} | rule, COPY], shard, tmp_path / "out")
    theirs, _, _ = run(tmp_path, output, rows)
    check_logits(theirs, output, rows, 4e-3)  # llama.cpp rounds activations to 8 bits


def test_all_in_bf16_is_the_same_model(rows, tmp_path):
    output = quantized("toy", [{"match": "*", "method": "keep"}], "500MB", tmp_path / "out")
    theirs, tokens, after = run(tmp_path, output, rows, TEXTS)
    check_logits(theirs, output, rows, 1e-4)  # and rounds them to bf16
    tokenizer = load_tokenizer(open_checkpoint("toy"))
    assert tokens == [tokenizer(text).input_ids for text in TEXTS]
    model, _ = grokquant.load(output, dtype=torch.float32, packed=False)
    same = []
    for text, theirs in zip(TEXTS, after, strict=True):
        prompt = torch.tensor([tokenizer(text).input_ids])
        whole = model.generate(prompt, max_new_tokens=8, do_sample=False)[0]
        ours = tokenizer.decode(whole[prompt.shape[1] :]).replace("\ufffd", "")  # half a letter
        same.append(ours.strip() == theirs.strip())
    assert sum(same) >= len(TEXTS) - 1  # two tokens may be as likely


SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
MODELS = {
    "llama": {},
    "mistral": {"head_dim": 128, "sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    | {"head_dim": 128, "norm_topk_prob": True, "rms_norm_eps": 1e-5},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 512},
    "olmoe": _EXPERTS | {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64}
    | {"num_hidden_layers": 6},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4, "head_dim": 64}
    | {"sliding_window": 64, "rope_parameters": YARN},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    | {"moe_intermediate_size": 256, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    | {"q_lora_rank": 256, "kv_lora_rank": 256, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64}
    | {"v_head_dim": 64, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
}
MIXED = [
    {"match": "*.v", "method": "rtn", "grid": "q6_k"},
    {"match": "layers.0.*", "method": "rtn", "grid": "q4_k"},
    {"match": "layers.1.*.down", "method": "rtn", "grid": "q5_k"},
    {"match": "layers.1.*.up", "method": "rtn", "grid": "iq4_xs"},
    {"match": "*", "method": "rtn", "grid": "q8_0"},
]


@torch.no_grad()
def rounding(output: Path, rows: torch.Tensor) -> float:
    """Ten times what bfloat16 changes here: some tokens are routed to other experts."""
    wide, narrow = (
        grokquant.load(output, dtype=dtype, packed=False)[0](rows).logits
        for dtype in (torch.float32, torch.bfloat16)
    )
    return 10 * divergence(wide, narrow)


@pytest.mark.parametrize(
    "rules", [[{"match": "*", "method": "keep"}], MIXED], ids=["bf16", "mixed"]
)
@pytest.mark.parametrize("family", MODELS)
def test_other_families_run_too(family, rules, rows, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | MODELS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():  # away from where logits hardly differ
        factor = 1 if parameter.ndim == 1 or name.endswith("mlp.gate.weight") else 3
        parameter.data.mul_(factor).add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "in")
    shutil.copyfile(TOY_PATH / "tokenizer.model", tmp_path / "in" / "tokenizer.model")
    latent = family == "deepseek_v2"  # no matrix makes values alone
    used = [rule for rule in rules if rule["match"] != "*.v" or not latent]
    output = quantized(str(tmp_path / "in"), used, "2MB", tmp_path / "out")
    theirs, _, _ = run(tmp_path, output, rows[:2])
    check_logits(theirs, output, rows[:2], 2e-2 if rules is MIXED else rounding(output, rows[:2]))


CASES = (CUTS["tekken"], CUTS["gpt-4o"])


def byte_level(cut: tuple[str, ...], path: Path) -> None:
    """A small byte-level BPE tokenizer that cuts texts as models do, in these steps."""
    tokenizer = Tokenizer(models.BPE())
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut[-1] == GPT_2)
    steps = [
        pre_tokenizers.Digits(True)
        if step == DIGITS
        else pre_tokenizers.Split(Regex(step), "isolated")
        for step in cut
        if step != GPT_2
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, alone])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*load_documents("python-docs", "heldout")[:200], *TEXTS], trainer
    )
    tokenizer.save(str(path))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_byte_level_tokenizers_are_theirs_too(cut, rows, tmp_path):
    config = AutoConfig.for_model("llama", **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    byte_level(cut, tmp_path / "in" / "tokenizer.json")
    rules = [{"match": "*", "method": "keep"}]
    output = quantized(str(tmp_path / "in"), rules, "500MB", tmp_path / "out")
    # Letters of two cases are told apart there without marks that combine with them.
    texts = [text for text in TEXTS if cut not in CASES or "\u0301" not in text]
    _, tokens, _ = run(tmp_path, output, rows[:1, :8], texts)
    tokenizer = Tokenizer.from_file(str(tmp_path / "in" / "tokenizer.json"))
    assert tokens == [tokenizer.encode(text).ids for text in texts]
