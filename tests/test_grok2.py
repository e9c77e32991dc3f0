"""Grok-2: its equations once more in plain float64, and the whole way of a tiny random one."""

import json
import shutil
from os.path import relpath
from pathlib import Path

import grok_forms
import numpy as np
import pytest
import torch
from conftest import own_text
from grok_reference import gelu, rms_norm, rope, softmax
from safetensors.torch import load_file, save_file
from test_families import relative, streamed

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.families.grok2_model import Grok2Config, Grok2ForCausalLM
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.reporting.inspection import describe
from grokquant.reporting.terminal import print_description
from grokquant.runtime.load import load
from grokquant.toy import TOY_PATH

CONFIG = {
    "architectures": ["Grok1ForCausalLM"],
    "model_type": "git",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "residual_moe": True,
    "embedding_multiplier_scale": 8.0,
    "output_multiplier_scale": 0.5,
    "final_logit_softcapping": 2,
    "attn_logit_softcapping": 3.0,
    "router_logit_softcapping": 1.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 208533496,
    "attn_temperature_len": 6,
    "max_position_embeddings": 512,
    "rope_type": "original",
    "original_max_position_embeddings": 32,
    "scaling_factor": 16.0,
    "extrapolation_factor": 1.0,
    "attn_factor": 1.0,
    "beta_fast": 8,
    "beta_slow": 1,
    "sliding_window_size": -1,
    "global_attn_every_n": 1,
}
TOKENS = torch.randint(3, 2048, (3, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Weights of a size that makes every cap matter."""
    draw = torch.Generator().manual_seed(0)
    fields = {k: v for k, v in CONFIG.items() if k in Grok2Config().to_dict()}
    shapes = dict(Grok2ForCausalLM(Grok2Config(**fields)).named_parameters())
    tensors = {}
    for name, parameter in shapes.items():
        value = torch.randn(parameter.shape, generator=draw)
        if value.ndim == 1:
            value = 1 + 0.1 * value
        elif "embed" not in name:
            value = 2 * value / value.shape[-1] ** 0.5
        if value.ndim == 3:
            prefix = name.rpartition(".")[0]
            for expert, W in enumerate(value):
                parts = dict(zip(("w1", "w3"), W.chunk(2), strict=True))
                parts = parts if "gate_up" in name else {"w2": W}
                for part, matrix in parts.items():
                    tensors[f"{prefix}.{expert}.{part}.weight"] = matrix.bfloat16().contiguous()
        else:
            tensors[name] = value.bfloat16()
    path = grok_forms.write(tmp_path_factory.mktemp("grok2") / "x", tensors, CONFIG)
    shutil.copyfile(TOY_PATH / "tokenizer.model", path / "tokenizer.model")
    return path


def cap(x, limit):
    return limit * np.tanh(x / limit)


def attention(x, w):
    """Of x [time, hidden], with the matrices w [out, in] of a layer."""
    time, out = len(x), np.zeros((len(x), 4, 16))
    q, k, v = ((x @ w[f"self_attn.{p}_proj"].T).reshape(time, -1, 16) for p in "qkv")
    q, k = rope(q, CONFIG["rope_theta"]), rope(k, CONFIG["rope_theta"])
    for head in range(4):
        logits = cap(q[:, head] @ k[:, head // 2].T * 16**-0.5, 3.0)
        for t in range(time):
            heat = np.log2(t) / np.log2(6) if t > 6 else 1.0
            out[t, head] = softmax(heat * logits[t, : t + 1]) @ v[: t + 1, head // 2]
    return out.reshape(time, -1) @ w["self_attn.o_proj"].T


def gated(x, gate, up, down):
    return (gelu(x @ gate.T) * (x @ up.T)) @ down.T


def block(h, w):
    a = attention(rms_norm(h, w["pre_attn_norm"]), w)
    h = h + rms_norm(a, w["post_attn_norm"])
    x = rms_norm(h, w["pre_moe_norm"])
    y = gated(x, w["mlp.gate_proj"], w["mlp.up_proj"], w["mlp.down_proj"])
    gates = softmax(cap(x @ w["block_sparse_moe.gate"].T, 1.5))
    for t in range(len(x)):
        for e in np.argsort(-gates[t])[:2]:
            matrices = (w[f"block_sparse_moe.experts.{e}.{p}"] for p in ("w1", "w3", "w2"))
            y[t] += gates[t, e] * gated(x[t], *matrices)
    return h + rms_norm(y / np.sqrt(2), w["post_moe_norm"])


def reference(path: Path, tokens) -> torch.Tensor:
    tensors = load_file(path / "model.safetensors")
    weights = {n.removesuffix(".weight"): t.double().numpy() for n, t in tensors.items()}
    h = weights["model.embed_tokens"][tokens] * 8.0
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        h = block(h, {n.removeprefix(prefix): w for n, w in weights.items() if prefix in n})
    logits = rms_norm(h, weights["model.norm"]) @ weights["lm_head"].T
    return torch.from_numpy(cap(logits * 0.5, 2.0))


@pytest.mark.parametrize("run", ["loaded", "streamed"])
@torch.no_grad()
def test_logits_equal_the_equations(tiny, run):
    wanted = torch.stack([reference(tiny, row) for row in TOKENS.numpy()])
    if run == "streamed":
        assert relative(streamed(tiny, torch.float32), wanted) < 1e-4
    else:
        assert relative(load(tiny, dtype=torch.float32)[0](TOKENS).logits, wanted) < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"attn_temperature_len": -1},
        {"router_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 30.0},
        {"final_logit_softcapping": 50},
        {"rope_theta": 10000},
    ],
)
@torch.no_grad()
def test_every_setting_matters(tiny, tmp_path, change):
    path = shutil.copytree(tiny, tmp_path / "x")
    (path / "config.json").write_text(json.dumps(CONFIG | change))
    found, wanted = (load(p, dtype=torch.float32)[0](TOKENS).logits for p in (path, tiny))
    assert relative(found, wanted) > 1e-3


@torch.no_grad()
def test_generating_uses_the_cache(tiny):
    model, _ = load(tiny, dtype=torch.float32)
    prompt = TOKENS[:, :5]  # the temperature begins to rise on the way
    cached = model.generate(prompt, max_new_tokens=8, do_sample=False)
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_evaluate_load_and_generate(tiny, text_file, tmp_path, method, capsys):
    rule = {"match": "layers.*", "method": method, "bits": 8, "group": 32}
    recipe = {
        "model": {"path": str(tiny)},
        "calibration": {"text": str(text_file), "samples": 8, "length": 64},
        "quantize": [rule],
        "max_fallbacks": 1,
        "output": {"path": str(tmp_path / "out")},
        "eval": {"text": relpath(text_file), "samples": 2, "length": 64},
    }
    output = pipeline.quantize(parse_recipe(recipe))
    units = dict(open_checkpoint(output).units())
    assert len(units) == 2 * (4 + 3 + 4 * 3) and all(ref.scheme for ref in units.values())
    assert 0 < grokquant.evaluate(output, tiny, text=own_text(output)).kld.mean.value < 0.05
    config = json.loads((output / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    model, _ = grokquant.load(output)
    assert model.generate(TOKENS[:1, :8], max_new_tokens=4).shape == (1, 12)


def test_it_says_that_it_is_experimental(tiny, capsys):
    description = describe(tiny)
    assert description["family"] == "grok-2"
    print_description(description)
    assert capsys.readouterr().err.startswith("grokquant: Grok-2 is experimental: ")
    print_description(describe("toy"))
    assert capsys.readouterr().err == ""


def test_what_a_model_does_not_say_has_no_line(capsys):
    print_description(describe("toy") | {"experts_per_token": None})
    assert "experts per token" not in capsys.readouterr().out


def test_files_of_ranks(tiny, tmp_path):
    """As published: eight ranks share all but the experts, of which each has an eighth."""
    path, files = tmp_path / "x", {}
    path.mkdir()
    for name, value in load_file(tiny / "model.safetensors").items():
        for rank, part in enumerate(value.chunk(8, 1 if ".w2." in name else 0)):
            split = ".experts." in name
            file = f"pytorch_model-00000-TP-{f'{rank:03d}' if split else 'common'}.safetensors"
            files.setdefault(file, {})[name] = part.contiguous() if split else value
    for file, tensors in files.items():
        save_file(tensors, path / file)
    shutil.copyfile(tiny / "config.json", path / "config.json")
    found, wanted = (open_checkpoint(p).source.tensors for p in (path, tiny))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].read(), wanted[name].read()) for name in wanted)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rope_type": "yarn_log"}, "rope_type is 'yarn_log', which is not supported yet"),
        ({"rope_scaling": {"type": "x"}}, "rope_scaling is"),
        ({"rope_rotate_half_dims": True}, "rope_rotate_half_dims is True"),
        ({"attn_logit_softcapping_method": "clip"}, "attn_logit_softcapping_method is 'clip'"),
        ({"sliding_window_size": 128}, "sliding_window_size is 128"),
        ({"global_attn_every_n": 4}, "global_attn_every_n is 4"),
        ({"hidden_act": "silu"}, 'hidden_act is "silu"'),
        ({"attn_temperature_len": 1}, "attn_temperature_len must be -1 or above 1, not 1"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size must be a positive whole number"),
        ({"router_logit_softcapping": -1}, "router_logit_softcapping must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"residual_moe": False}, "final_logit_softcapping is 2, which Grok-1 does not support"),
    ],
)
def test_what_is_not_understood_is_refused(tiny, tmp_path, changes, complaint):
    path = shutil.copytree(tiny, tmp_path / "x")
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(InputError) as caught:
        for ref in open_checkpoint(path).source.tensors.values():
            ref.read()
    assert complaint in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["rope_theta", "max_position_embeddings"])
def test_defaults_of_grok_1_are_not_taken(tiny, tmp_path, key):
    path = shutil.copytree(tiny, tmp_path / "x")
    content = {name: value for name, value in CONFIG.items() if name != key}
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"config.json: config.json must also give {key}"):
        open_checkpoint(path)


def test_gguf_is_refused(tiny, tmp_path):
    rule = {"match": "layers.*", "method": "rtn", "grid": "q8_0"}
    output = {"path": str(tmp_path / "out"), "format": "gguf"}
    recipe = {"model": {"path": str(tiny)}, "quantize": [rule], "output": output}
    with pytest.raises(InputError, match="residual_moe is True"):
        pipeline.quantize(parse_recipe(recipe))
