"""Grok in transformers' form equals the equations; the known ways to get it wrong are caught."""

import numpy as np
import pytest
import torch
from grok_reference import logits as reference_logits
from make_release import random_leaf, write_random_release

from grokquant.checkpoint import open_checkpoint
from grokquant.families.grok_model import Grok1Config, Grok1ForCausalLM
from grokquant.runtime.load import build_model, load
from grokquant.sources import release
from grokquant.types import QTensor

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
SIZES = dict(V=128, D=64, E=4, F=128, Q=64, K=32)


@pytest.fixture(scope="module")
def twelve_layers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("release12")
    return directory, write_random_release(directory, layers=12)


def naive_weights(layers: int, groups: int = 8, seed: int = 0) -> dict:
    """The leaves that `write_random_release` drew, in float64, dequantized by the plain formula."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict = {"layers": [{} for _ in range(layers)]}
    for name in release.leaf_names(layers):
        slot = name if name in release.TOP else name.split("/", 2)[2]
        leaf = random_leaf(slot, SIZES, groups, generator)
        value = dequantize(*leaf) if isinstance(leaf, tuple) else leaf.numpy().astype(np.float64)
        if name in release.TOP:
            weights["embeddings" if name == release.EMBEDDING else "rms_norm"] = value
        else:
            layer = int(name.split("/")[1].removeprefix("decoder_layer_"))
            weights["layers"][layer][slot.removeprefix("multi_head_attention/")] = value
    return weights


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """[.., K, N] int8, [.., G, N] scales; group g covers rows g*K/G .. (g+1)*K/G; bf16 product."""
    rows, groups = codes.shape[-2], scales.shape[-2]
    wide = scales.repeat_interleave(rows // groups, dim=-2)
    return (codes.bfloat16() * wide).double().numpy()


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def logits_of(directory) -> np.ndarray:
    model, _ = load(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits.double().numpy()


@pytest.fixture(scope="module")
def golden(twelve_layers) -> np.ndarray:
    weights = naive_weights(12)
    return np.stack([reference_logits(row, weights, twelve_layers[1]) for row in TOKENS.numpy()])


def test_logits_equal_the_equations(twelve_layers, golden):
    assert relative_error(logits_of(twelve_layers[0]), golden) < 1e-4


def test_bf16_stays_near_the_equations(twelve_layers, golden):
    model, _ = load(twelve_layers[0])
    with torch.no_grad():
        found = model(TOKENS).logits.double().numpy()
    per_token = np.linalg.norm(found - golden, axis=-1) / np.linalg.norm(golden, axis=-1)
    assert np.median(per_token) < 0.03


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_transformers_expert_implementations_agree(twelve_layers, golden, experts):
    model, _ = load(twelve_layers[0], dtype=torch.float32)
    model.set_experts_implementation(experts)
    with torch.no_grad():
        assert relative_error(model(TOKENS).logits.double().numpy(), golden) < 1e-4


def test_swapping_linear_and_linear_v_is_noticed(twelve_layers, golden, monkeypatch):
    gate, up = release.LAYER["moe/linear"], release.LAYER["moe/linear_v"]
    monkeypatch.setitem(release.LAYER, "moe/linear", up)
    monkeypatch.setitem(release.LAYER, "moe/linear_v", gate)
    assert relative_error(logits_of(twelve_layers[0]), golden) > 0.05


def test_numeric_layer_order_is_noticed(twelve_layers, golden, monkeypatch):
    def numeric(layers: int) -> list[str]:
        per_layer = [f"transformer/decoder_layer_{n}" for n in range(layers)]
        return [*release.TOP, *(f"{p}/{slot}" for p in per_layer for slot in release.LAYER)]

    assert release.leaf_names(10) == numeric(10)  # with fewer than 11 layers nobody could tell
    monkeypatch.setattr(release, "leaf_names", numeric)
    assert relative_error(logits_of(twelve_layers[0]), golden) > 0.05


def test_grouped_scales_applied_per_channel_are_noticed(twelve_layers, golden, monkeypatch):
    per_channel = lambda q, dtype=None: q.codes.to(q.scales.dtype) * q.scales[:, :1]  # noqa: E731
    monkeypatch.setattr(QTensor, "dequantize", per_channel)
    assert relative_error(logits_of(twelve_layers[0]), golden) > 1e-3


def test_generate_uses_the_cache(twelve_layers):
    model, _ = load(twelve_layers[0], dtype=torch.float32)
    cached = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    plain = model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain) and cached.shape == (2, 30)


def test_left_padding_changes_nothing(twelve_layers):
    model, _ = load(twelve_layers[0], dtype=torch.float32)
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), TOKENS), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long().expand_as(padded)
    with torch.no_grad():
        plain = model(TOKENS).logits
        with_padding = model(padded, attention_mask=mask, position_ids=mask.cumsum(1) - 1).logits
    assert torch.allclose(plain, with_padding[:, 5:], atol=1e-4)


def test_gates_are_not_renormalised():
    config = Grok1Config(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)
    from grokquant.families.grok_model import GrokRouter

    router = GrokRouter(config)
    torch.nn.init.zeros_(router.weight)
    _, gates, _ = router(torch.ones(5, 8))
    assert (gates == 0.25).all()


def test_saved_by_transformers_loads_back(twelve_layers, tmp_path):
    model = build_model(open_checkpoint(twelve_layers[0]), "cpu", torch.float32)
    assert isinstance(model, Grok1ForCausalLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        sum(p.numel() for p in model.parameters()) == open_checkpoint(twelve_layers[0]).parameters
    )
