"""Routers and projections in floating point are fitted to the quantized model's inputs."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ATTENTION, EXPERTS, saved_model
from torch import Tensor

from grokquant.calibration.site import Site
from grokquant.checkpoint import open_checkpoint
from grokquant.job import pipeline
from grokquant.job.plan import build_plan
from grokquant.job.verify import verify
from grokquant.methods.method import Aim
from grokquant.methods.refit import refit

TWO_SIDED = EXPERTS | {"method": "two-sided"}
COARSE = {"match": "layers.*.attention.*", "method": "rtn", "bits": 4, "group": 64}
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_refit_is_ridge_regression():
    """W' minimizes sum of |W x_f - W' x|^2 + ridge |W' - W|^2."""
    X, X_f = random(300, 64), random(300, 64, seed=1)
    aim = Aim(torch.ones(300), reference=lambda: iter(X_f.split(200)))
    site = Site(300, 64, lambda: iter(X.split(200)), aim=aim)
    matrices = [random(8, 64, seed=2), random(24, 64, seed=3)]
    ridge = 0.01 * X.square().sum(0).mean()
    rows = torch.cat((X, ridge.sqrt() * torch.eye(64))).double()
    for W, found in zip(matrices, refit(matrices, site), strict=True):
        values = torch.cat((X_f @ W.T, ridge.sqrt() * W.T)).double()
        naive = torch.linalg.lstsq(rows, values).solution.T
        assert torch.allclose(found.double(), naive, atol=1e-4)


def test_a_refitted_router_is_in_the_result_and_named_in_its_report(tiny_recipe, tiny_release):
    output = pipeline.quantize(tiny_recipe(TWO_SIDED, COARSE))
    assert verify(output)  # the number of matrices
    routers = [ROUTER.format(layer) for layer in range(2)]
    report = json.loads((output / "quantization-report.json").read_text())
    assert report["refitted"] == routers
    source = open_checkpoint(tiny_release).source.tensors
    result = open_checkpoint(output).source.tensors
    for name in routers:
        before, after = source[name].read(), result[name].read()
        assert before.dtype == after.dtype and not torch.equal(before, after)
        assert (before - after).norm() < 0.5 * before.norm()


def test_without_errors_before_it_a_router_stays(tiny_recipe, tiny_release):
    """With attention as it is, that of the first layer reads what it reads in the original."""
    output = pipeline.quantize(tiny_recipe(TWO_SIDED, ATTENTION))
    source = open_checkpoint(tiny_release).source.tensors
    result = open_checkpoint(output).source.tensors
    first, second = (ROUTER.format(layer) for layer in range(2))
    assert torch.equal(source[first].read(), result[first].read())
    assert not torch.equal(source[second].read(), result[second].read())


def test_routers_stay_if_asked(tiny_recipe, tiny_release):
    output = pipeline.quantize(tiny_recipe(TWO_SIDED | {"refit": False}, COARSE))
    report = json.loads((output / "quantization-report.json").read_text())
    assert "refitted" not in report
    source = open_checkpoint(tiny_release).source.tensors
    result = open_checkpoint(output).source.tensors
    assert all(
        torch.equal(source[ROUTER.format(i)].read(), result[ROUTER.format(i)].read())
        for i in range(2)
    )


@pytest.fixture
def mixtral(tmp_path) -> Path:
    path = tmp_path / "mixtral"
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "vocab_size": 2048,
    }
    return saved_model(path, "mixtral", **sizes)


def test_projections_in_floating_point_are_refitted(tiny_recipe, mixtral):
    kept = {"match": "layers.*.attention.[qko]", "method": "unquantized"}
    v = {"match": "layers.*.attention.v", "method": "rtn", "bits": 8, "group": 32}
    recipe = tiny_recipe(TWO_SIDED, kept, v, model={"path": str(mixtral)})
    router = build_plan(recipe).checkpoint.family.router(open_checkpoint(mixtral).config, 1)
    assert router is not None
    changed = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk"} | {router[0]}
    source = open_checkpoint(mixtral).source.tensors
    result = open_checkpoint(pipeline.quantize(recipe)).source.tensors
    both = [n for n in source if n in result and result[n].scheme is None and ".experts." not in n]
    assert {n for n in both if not torch.equal(source[n].read(), result[n].read())} >= changed
    first = {n for n in both if ".layers.0." in n and "_proj" in n}
    assert all(torch.equal(source[n].read(), result[n].read()) for n in first)
