"""A calibrated layer computes nothing twice: hidden units of experts, attention."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import EXPERTS, saved_model
from torch import Tensor

from grokquant.job import hidden_units, pipeline
from grokquant.job.plan import build_plan
from grokquant.streaming.blocks import CALIBRATION_DTYPE, BlockwiseModel

ROUTED = 16 * 64 * 2  # tokens of the recipe times the experts of a token


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """Numbers of tokens that passed gate and up of an expert."""
    counts: list[int] = []
    whole = BlockwiseModel.hidden_units

    def counted(model: BlockwiseModel, *given):
        make = whole(model, *given)

        def count(x: Tensor) -> Tensor:
            counts.append(len(x))
            return make(x)

        return count

    monkeypatch.setattr(BlockwiseModel, "hidden_units", counted)
    return counts


@pytest.mark.parametrize(("kept", "passes"), [(ROUTED, 1), (0, 2)])
def test_kept_hidden_units_are_computed_once(tiny_recipe, monkeypatch, passed, kept, passes):
    monkeypatch.setattr("grokquant.job.layer.kept_tokens", lambda plan: kept)
    recipe = tiny_recipe(experts={"blend_tokens": 0})  # no expert asks for those of all tokens
    pipeline.quantize(recipe)
    assert sum(passed) == passes * 2 * ROUTED  # of two layers


def test_bytes_do_not_depend_on_what_is_kept(tiny_recipe, monkeypatch):
    sums = []
    for kept in (ROUTED, 256, 0):
        monkeypatch.setattr("grokquant.job.layer.kept_tokens", lambda plan, kept=kept: kept)
        output = pipeline.quantize(tiny_recipe())
        sums.append((output / "SHA256SUMS").read_text())
        shutil.rmtree(output)
    assert sums[1] == sums[0] and sums[2] == sums[0]


def test_as_many_tokens_are_kept_as_an_expert_has(tiny_recipe):
    plan = build_plan(tiny_recipe())
    average = ROUTED // plan.checkpoint.num_experts
    assert average <= hidden_units.kept_tokens(plan) < average + hidden_units.TOKENS_AT_ONCE


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """Experts whose sum is added to the residual as it is."""
    path = tmp_path_factory.mktemp("mixtral")
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 2048,
    }
    return saved_model(path, "mixtral", **sizes)


@pytest.fixture(params=["tiny_release", "mixtral"])
def loaded(request, tiny_recipe) -> tuple[BlockwiseModel, Tensor]:
    """A model with its first layer loaded, and the states that enter it."""
    source = request.getfixturevalue(request.param)
    checkpoint = build_plan(tiny_recipe(EXPERTS, model={"path": str(source)})).checkpoint
    model = BlockwiseModel(checkpoint, CALIBRATION_DTYPE, pieces=True)
    hidden = model.embed(torch.arange(8 * 64).view(8, 64))
    model.load_layer(0)
    return model, hidden


def calls_of(module: torch.nn.Module) -> list[int]:
    """Grows by the number of rows in each call of `module`."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, args, output: calls.append(1))
    return calls


def test_attention_runs_once_for_the_same_states(loaded):
    model, hidden = loaded
    combine = model.combine_stored(0)
    twice = model.run_layer(0, hidden, combine)
    calls = calls_of(model.attention_output(0))
    once = model.run_layer_over(0, hidden.clone(), combine)
    assert torch.equal(once, twice)
    assert len(calls) == len(hidden) * 64 // 256  # pieces of 256 tokens


def test_a_capture_ends_the_pass(loaded):
    model, hidden = loaded
    calls = calls_of(model.attention_output(0))
    tensor = next(name for name in model.source.tensors if name.endswith("self_attn.q_proj.weight"))
    inputs = model.inputs_of(0, tensor, hidden)
    assert inputs.shape == (8 * 64, 128)
    assert calls == []
