"""Every family: what transformers saves is read, run, quantized, evaluated and loaded."""

import shutil
from os.path import relpath
from pathlib import Path

import pytest
import torch
from conftest import own_text, run_stored_layer
from safetensors.torch import load_file, save_file
from shipped_tokenizers import json_with_config, write_json
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.evaluation import likelihoods
from grokquant.families import FAMILIES
from grokquant.job import pipeline
from grokquant.job.verify import verify
from grokquant.recipe import parse_recipe
from grokquant.reporting.publish import publish
from grokquant.runtime.load import load
from grokquant.streaming.blocks import BlockwiseModel
from grokquant.streaming.stream import Stream
from grokquant.toy import TOY_PATH

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FOUR = {"num_experts_per_tok": 2, "num_experts": 4}
MODELS = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4},
    "qwen2_moe": FOUR
    | {"intermediate_size": 96, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": FOUR
    | {"intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16}
    | {"decoder_sparse_step": 2, "norm_topk_prob": True},
    "olmoe": FOUR | {"intermediate_size": 32},
    "deepseek_v2": {"intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 4}
    | {"num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}
    | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    | {"v_head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 4, "head_dim": 16}
    | {"num_experts_per_tok": 2, "sliding_window": 16},
    "llama": {"intermediate_size": 96},
    "mistral": {"intermediate_size": 96, "sliding_window": 16, "head_dim": 16},
    "gemma2": {"intermediate_size": 96, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"intermediate_size": 96, "head_dim": 16, "sliding_window": 16}
    | {"layer_types": ["sliding_attention", "full_attention"]},
}
FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")  # else only one form
SPARSE = (*FUSED, "gpt_oss")
TOKENS = torch.randint(3, 2048, (3, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> (a random model in bf16, the directory that transformers saved it to)."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(family: str) -> tuple[PreTrainedModel, Path]:
        if family not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **SIZES | MODELS[family])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            for parameter in model.parameters():  # norms and biases of their own, too
                parameter.data += 0.02 * torch.randn_like(parameter)
            path = tmp_path_factory.mktemp(family)
            model.save_pretrained(path)
            shutil.copyfile(TOY_PATH / "tokenizer.model", path / "tokenizer.model")
            made[family] = model, path
        return made[family]

    return make


def streamed(path: Path, dtype: torch.dtype) -> torch.Tensor:
    model = BlockwiseModel(open_checkpoint(path), dtype)
    hidden = model.embed(TOKENS)
    for index in range(len(model.layers)):
        model.load_layer(index)
        hidden = run_stored_layer(model, index, hidden)
        model.free_layer(index)
    return model.logits(hidden)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_all_families_are_here():
    types = {family.config_class.model_type for family in FAMILIES.values()}
    assert types == {AutoConfig.for_model(f).model_type for f in MODELS} | {"grok-1"}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_streamed_logits_are_those_of_transformers(saved, family):
    _, path = saved(family)
    wanted, in_bf16 = (
        AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, experts_implementation="eager" if family in SPARSE else None
        )(TOKENS).logits
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert relative(streamed(path, torch.float32), wanted) < 1e-5
    assert relative(load(path, dtype=torch.float32)[0](TOKENS).logits, wanted) < 1e-5
    rounding = relative(in_bf16, wanted)
    assert relative(streamed(path, torch.bfloat16), in_bf16) < 1.5 * rounding
    assert torch.equal(load(path)[0](TOKENS).logits, in_bf16)


@pytest.mark.parametrize("family", MODELS)
def test_quantize_evaluate_load_and_generate(saved, family, text_file, tmp_path):
    _, path = saved(family)
    method = "gptq" if family in ("mixtral", "deepseek_v2", "gemma3_text", "gpt_oss") else "rtn"
    recipe = parse_recipe(
        {
            "model": {"path": str(path)},
            "calibration": {"text": str(text_file), "samples": 8, "length": 64},
            "quantize": [{"match": "layers.*", "method": method, "bits": 8, "group": 32}],
            "max_fallbacks": 1,
            "output": {"path": str(tmp_path / "out")},
            "eval": {"text": relpath(text_file), "samples": 2, "length": 64},
        }
    )
    output = pipeline.quantize(recipe)
    schemes = {name: ref.scheme for name, ref in open_checkpoint(output).units()}
    assert all(schemes.values()) and len(schemes) == len(dict(open_checkpoint(path).units()))
    report = grokquant.evaluate(output, path, text=own_text(output))
    assert 0 < report.kld.mean.value < 0.02
    assert report.passage.generated is not None, report.passage.not_generated
    sparse = [layer for layer in report.layers if layer.router_top1 is not None]
    assert bool(sparse) == (open_checkpoint(path).num_experts > 0)
    publish(report, output)
    model, tokenizer = grokquant.load(output)
    assert tokenizer is not None
    assert model.generate(TOKENS[:1, :8], max_new_tokens=4).shape == (1, 12)


# What quantization changes in a config, and what transformers adds when it loads one.
CHANGED = ("quantization_config", "transformers_version", "_name_or_path")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_lies_beside_the_weights_comes_along(saved, family, dtype, tmp_path):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(saved(family)[1], dtype=dtype).save_pretrained(source)
    json_with_config(source)
    wanted = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    write_json(source / "generation_config.json", wanted)
    for name in ("LICENSE", "NOTICE.txt", "preprocessor_config.json", "LICENSE.py"):
        (source / name).write_text("{}")
    rule = {"match": "layers.*", "method": "rtn", "bits": 8, "group": 32}
    output = {"path": str(tmp_path / "out")}
    content = {"model": {"path": str(source)}, "quantize": [rule], "output": output}
    made = pipeline.quantize(parse_recipe(content))
    verify(made)
    configs = [AutoConfig.from_pretrained(path).to_dict() for path in (source, made)]
    for config in configs:
        for key in CHANGED:
            config.pop(key, None)
    assert configs[0] == configs[1]
    assert f"torch.{configs[1]['dtype']}" == str(dtype)
    assert open_checkpoint(made).source.tensors["model.embed_tokens.weight"].dtype == dtype
    loaded = [GenerationConfig.from_pretrained(path).to_dict() for path in (source, made)]
    assert loaded[0] == loaded[1] == grokquant.load(made)[0].generation_config.to_dict()
    assert wanted.items() <= loaded[1].items()
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (source, made)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    assert vocabularies[0] == vocabularies[1]
    settings = [tokenizer.init_kwargs | {"name_or_path": ""} for tokenizer in tokenizers]
    assert settings[0] == settings[1] and tokenizers[0].chat_template == tokenizers[1].chat_template
    for name in ("LICENSE", "NOTICE.txt", "preprocessor_config.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert not (made / "LICENSE.py").exists()


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_single_experts_are_the_same_tensors(saved, family, tmp_path):
    """transformers 5 in memory against what it writes: experts one by one."""
    model, path = saved(family)
    fused = {name: value.contiguous() for name, value in model.bfloat16().state_dict().items()}
    if not any("gate_up_proj" in name for name in load_file(path / "model.safetensors")):
        assert any("gate_up_proj" in name for name in fused)
    save_file(fused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(path / "config.json", tmp_path / "config.json")
    single, other = (open_checkpoint(place).source.tensors for place in (path, tmp_path))
    assert single.keys() == other.keys()
    for name, ref in single.items():
        assert ref.shape == other[name].shape and torch.equal(ref.read(), other[name].read()), name


def test_routers_stay_as_they_are(saved, tmp_path):
    for family in ("mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss"):
        checkpoint = open_checkpoint(saved(family)[1])
        units = dict(checkpoint.units())
        gates = checkpoint.family.routers(checkpoint.config)
        assert gates and set(gates) <= checkpoint.source.tensors.keys()
        assert not {ref.name for ref in units.values()} & set(gates)


def test_an_unknown_architecture_names_the_known_ones(saved, tmp_path):
    shutil.copytree(saved("llama")[1], tmp_path / "x")
    config = tmp_path / "x" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "FalconForCausalLM"))
    with pytest.raises(InputError, match=r"'FalconForCausalLM' is not known \(known: Grok1For"):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_continuations_on_branches_are_as_alone(saved, family):
    """Several continuations beside one context, longer than a sliding window, in one row."""
    _, path = saved(family)
    model = BlockwiseModel(open_checkpoint(path))
    texts = [(*TOKENS[0, :24].tolist(),)] * 4 + [(*TOKENS[1, :48].tolist(),)]
    pairs = [(text, tuple(TOKENS[2, 3 * i : 8 * i + 1].tolist())) for i, text in enumerate(texts)]
    pairs[0] = (texts[0], (5,))
    batches = likelihoods.pack(pairs, longest=128)
    assert [batch.rows.branches is None for batch in batches].count(False) == 1
    stream = Stream(model, [batch.rows for batch in batches])
    for index in range(len(model.layers)):
        stream.run_layer(index)
    found: dict = {}
    for batch, hidden in zip(batches, stream.hidden, strict=True):
        found |= likelihoods.likelihoods(model, batch, hidden)
    whole = load(path, dtype=torch.float32)[0]
    assert found.keys() == set(pairs)
    for (context, continuation), (value, greedy) in found.items():
        logits = whole(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        targets = torch.tensor(continuation)
        wanted = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum().item()
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == torch.equal(logits.argmax(-1), targets)
