"""Two-sided rounding against naive versions, and its runs: resumed, starved, better than GPTQ."""

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ATTENTION, EXPERTS, saved_model
from jobs import interrupt_after
from torch import Tensor

from grokquant.calibration.site import Site
from grokquant.checkpoint import open_checkpoint
from grokquant.grids import Scheme
from grokquant.job import pipeline
from grokquant.job.attention import missing_of_attention
from grokquant.job.budget import timing
from grokquant.job.budget.memory import peak_step
from grokquant.job.layer import LayerQuantizer
from grokquant.job.mixture import Mixture, Original
from grokquant.job.plan import build_plan
from grokquant.job.workdir import States
from grokquant.methods import output_metric, targets, two_sided
from grokquant.methods.gptq import factorize
from grokquant.methods.ldl import permute_, restore_
from grokquant.methods.method import Aim
from grokquant.methods.rtn import quantize_rtn
from grokquant.recipe import Recipe
from grokquant.streaming.blocks import CALIBRATION_DTYPE, BlockwiseModel, Combine, Keep, Routed
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer
from grokquant.types import QTensor, Unit, UnitReport

TWO_SIDED = EXPERTS | {"method": "two-sided"}
EVERYTHING = {"match": "layers.*", "metric": "gradients"}
MLP = EXPERTS | {"match": "layers.*.mlp.*"}
DENSE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 2048,
}
DEEPSEEK = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def site_of(X: Tensor, aim: Aim) -> Site:
    """A site whose inputs come in two parts."""
    return Site(len(X), X.shape[1], lambda: iter(X.split(200)), aim=aim)


def weights_of(tokens: int) -> Tensor:
    weights = random(tokens, seed=9).square() + 0.1
    return weights / weights.mean()


def test_a_factorised_hessian_is_restored():
    X = random(700, 600)
    H = X.T @ X
    before = H.clone()
    feedback = factorize([H], 0.1, act_order=True)
    (factor,) = feedback.factors
    restore_(H, feedback.importance[factor.columns])
    permute_(H, factor.columns.argsort())
    assert torch.equal(H, before)


def test_targets_are_those_of_ridge_regression():
    """W* minimizes sum of w |wanted - W* x|^2 + ridge |W* - W|^2."""
    X, W = random(300, 64), random(32, 64, seed=1)
    wanted = random(300, 32, seed=2)
    aim = Aim(weights_of(300), outputs=lambda: wanted)
    site = site_of(X, aim)
    S = targets.missing_outputs(W, site, aim)
    (H,) = site.hessian(None, weighted=True)
    ridge = 0.2 * H.diagonal().mean()
    (factor,) = factorize([H], 0.2, act_order=True).factors
    target = W + targets.solve_(S, factor)
    roots = aim.weights.sqrt()[:, None]
    rows = torch.cat((X * roots, ridge.sqrt() * torch.eye(64)))
    values = torch.cat((wanted * roots, ridge.sqrt() * W.T))
    naive = torch.linalg.lstsq(rows.double(), values.double()).solution.T
    assert torch.allclose(target.double(), naive, atol=1e-4)


def test_inputs_of_the_original_move_targets():
    """For gate and up the wanted outputs are W x_f."""
    X, reference, W = random(300, 64), random(300, 64, seed=3), random(32, 64, seed=1)
    aim = Aim(weights_of(300), reference=lambda: iter(reference.split(200)))
    moved = targets.moved_inputs(site_of(X, aim), aim)
    wanted = Aim(aim.weights, outputs=lambda: reference @ W.T)
    missing = targets.missing_outputs(W, site_of(X, wanted), wanted)
    assert torch.allclose(targets.times(W, moved), missing, atol=1e-3)


def test_interleaved_rows_come_back():
    gate, up = random(24, 5), random(24, 5, seed=1)
    both = output_metric.interleave([gate, up], 8)
    assert torch.equal(both[8:16], up[:8]) and torch.equal(both[16:24], gate[8:16])
    assert torch.equal(output_metric.part_of(both, 0, 2, 8), gate)
    assert torch.equal(output_metric.part_of(both, 1, 2, 8), up)


class Gelu:
    """A layer whose experts multiply gelu(gate) by up, as far as a metric sees it."""

    def slopes(self, expert: int, gate: Tensor, up: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = gate.requires_grad_(), up.requires_grad_()
            units = torch.nn.functional.gelu(gate) * up
            return torch.autograd.grad(units.sum(), inputs)  # type: ignore[return-value]


def test_the_metric_of_gate_and_up_is_what_their_errors_do_to_the_sum():
    """To first order, for errors in the units of one block."""
    hidden, inner, tokens = 16, 24, 50
    gate, up = random(inner, hidden), random(inner, hidden, seed=1)
    down, X = random(hidden, inner, seed=2), random(tokens, hidden, seed=3)
    A = random(hidden, hidden, seed=4)
    M = A @ A.T
    aim = Aim(weights_of(tokens), reference=lambda: iter(X.split(20)))
    moments = output_metric.slope_moments(Gelu(), 0, gate, up, aim, 8)  # type: ignore[arg-type]
    G = output_metric.metric_of_inner(M, down, moments)
    size = G.diagonal(dim1=1, dim2=2).mean() - 0.1
    block = slice(8, 16)
    e = random(16, seed=5)  # the same errors of gate and up for all tokens

    def sums(scale: float) -> Tensor:
        pre_gate, pre_up = (X @ gate.T).double(), (X @ up.T).double()
        pre_gate[:, block] += scale * e[:8]
        pre_up[:, block] += scale * e[8:]
        return (torch.nn.functional.gelu(pre_gate) * pre_up) @ down.T.double()

    change = (sums(1e-5) - sums(-1e-5)) / 2e-5
    naive = (aim.weights.double()[:, None] * (change @ M.double()) * change).sum()
    ratios = []
    for scale in (1.0, 2.0):
        own = (e * scale) @ (G[1] - 0.1 * torch.eye(16)) @ (e * scale)
        ratios.append(naive * scale**2 / own)
    whole = (
        moments
        * (down.T.unflatten(0, (3, 8)) @ M @ down.T.unflatten(0, (3, 8)).mT)[:, None, :, None, :]
    )
    factor = whole.flatten(3, 4).flatten(1, 2).diagonal(dim1=1, dim2=2).mean() / size
    assert torch.allclose(torch.stack(ratios).float(), factor.expand(2), rtol=1e-3)


@pytest.mark.parametrize("with_norm", [False, True])
def test_experts_that_give_what_they_should_restore_the_output(with_norm):
    """Rounded experts whose sum is y* make the layer's output that of the original."""
    tokens, hidden = 40, 16
    gain = random(hidden, seed=1) if with_norm else None
    y, before, quantized_before, stored = (random(tokens, hidden, seed=s) for s in range(2, 6))
    original = Original(random(tokens, hidden), y, before)
    mixture = Mixture(original, quantized_before.unsqueeze(0), stored, gain)
    everyone = Routed(torch.zeros(0), torch.arange(tokens), torch.full((tokens, 1), 0.5), 0 * y)
    wanted = 0.5 * mixture.outputs_for(everyone, stored / 0.5)
    if gain is None:
        assert torch.allclose(quantized_before + wanted, before + y, atol=1e-5)
        assert torch.equal(mixture.weights, torch.ones(tokens))
    else:
        rms = y.square().mean(1, keepdim=True).sqrt()
        output = quantized_before + wanted / rms * gain
        small = gain.abs() < 0.01 * gain.abs().mean()
        assert torch.allclose(output[:, ~small], (before + y / rms * gain)[:, ~small], atol=1e-4)
        weights = rms.squeeze(1) ** -2
        assert torch.allclose(mixture.weights, weights / weights.mean(), rtol=1e-3)


def test_the_second_expert_makes_good_for_the_first():
    tokens, hidden = 10, 4
    y, before = random(tokens, hidden), random(tokens, hidden, seed=1)
    first, second = random(tokens, hidden, seed=2), random(tokens, hidden, seed=3)
    mixture = Mixture(Original(y, y, before), before.unsqueeze(0), first + second, None)
    token, gate = torch.arange(tokens), torch.ones(tokens, 1)
    wanted = mixture.outputs_for(Routed(y, token, gate, torch.zeros_like(y)), first)
    assert torch.allclose(wanted, y - second, atol=1e-5)
    rounded = wanted + 0.1
    wanted = mixture.outputs_for(Routed(y, token, gate, rounded), second)
    assert torch.allclose(wanted, second - 0.1, atol=1e-5)


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory) -> Callable[[str], Path]:
    """A small random dense model of a family."""

    @cache
    def make(family: str) -> Path:
        return saved_model(tmp_path_factory.mktemp(family), family, **DENSE)

    return make


@pytest.fixture(params=["grok", "gemma2"])
def small_recipe(request, tiny_recipe, dense_model) -> Callable[..., Recipe]:
    """Recipes for a model with experts, or a dense one: a rule for its experts, and others."""

    def make(keys: dict, *others: dict, **sections: object) -> Recipe:
        if request.param == "grok":
            return tiny_recipe(EXPERTS | keys, *others, **sections)
        model = {"path": str(dense_model(request.param))}
        return tiny_recipe(MLP | keys, *others, model=model, **sections)

    return make


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_dense_mlp_runs_as_the_only_expert(dense_model, family):
    checkpoint = open_checkpoint(dense_model(family))
    plain, taken = BlockwiseModel(checkpoint), BlockwiseModel(checkpoint)
    taken.take_as_expert(1)
    rows = torch.arange(40).view(2, 20) + 7
    hidden, _ = (model.embed(rows) for model in (plain, taken))
    for model in (plain, taken):
        model.load_layer(1)
    before: list[Tensor] = []
    sums: list[Tensor] = []

    def combine(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        sums.append(taken.combine_stored(1)(x, experts, gates))
        return sums[0]

    output = taken.run_layer(1, hidden, combine, before.append)
    assert torch.allclose(output, plain.run_layer(1, hidden, combine), atol=1e-5)
    y, gain = sums[0].view_as(hidden), taken.mixture_gain(1)
    if gain is not None:
        y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain
    assert torch.allclose(before[0] + y, output, atol=1e-5)


@pytest.mark.parametrize("family", ["grok", "llama", "gemma2", "qwen2"])
def test_what_attention_lacks_restores_the_states_after_it(tiny_release, dense_model, family):
    """If attention.o gives it, they are those of the original, whatever came before."""
    checkpoint = open_checkpoint(tiny_release if family == "grok" else dense_model(family))
    model = BlockwiseModel(checkpoint, CALIBRATION_DTYPE)
    if family != "grok":
        model.take_as_expert(1)
    h_f = model.embed(torch.arange(40).view(2, 20) + 7)
    h_q = h_f + 0.1 * random(*h_f.shape).to(h_f)
    model.load_layer(1)
    after: list[Tensor] = []  # attention of the original, before experts or the MLP
    model.run_layer(1, h_f, model.combine_stored(1), after.append)
    tensor = checkpoint.family.attention_output(checkpoint.config, 1)
    given = model.inputs_of(1, tensor, h_f)
    y, sizes = missing_of_attention(model, 1, given, h_f, h_q)
    gain = model.attention_gain(1)
    if gain is not None:
        y_f = given.float() @ model.expert_weight(tensor).float().T
        rms = y_f.square().mean(1, keepdim=True).sqrt()
        y = y / rms * gain
        assert torch.allclose(sizes, rms.squeeze(1), rtol=0.02)
    wanted = after[0].flatten(0, 1).float()
    assert (h_q.flatten(0, 1) + y - wanted).norm() < 0.01 * (wanted - h_q.flatten(0, 1)).norm()


Quantize = Callable[..., tuple[dict[str, QTensor], States, dict[str, UnitReport]]]


@pytest.fixture
def first_layer() -> Quantize:
    """Quantizes layer 0 of a recipe's model, except for the units that are `known`."""

    def run(recipe: Recipe, known: dict[str, QTensor] | None = None) -> tuple:
        plan = build_plan(recipe)
        checkpoint = plan.checkpoint
        rows = calibration_rows(recipe.calibration, load_tokenizer(checkpoint), checkpoint)
        model = BlockwiseModel(plan.checkpoint, CALIBRATION_DTYPE, pieces=True)
        hidden = model.embed(rows)
        made: dict[str, QTensor] = {}
        reports: dict[str, UnitReport] = {}

        def emit(unit: Unit, quantized: QTensor, report: UnitReport) -> None:
            made[unit.name] = quantized
            reports[unit.name] = report

        committed = (known or {}).get
        layer = LayerQuantizer(plan, model, 0, emit, lambda unit: committed(unit.name))
        return made, layer.run(States(hidden, hidden)), reports

    return run


def parts_of(quantized: QTensor) -> Iterator[Tensor]:
    yield from (t for t in vars(quantized).values() if isinstance(t, Tensor))


@pytest.mark.parametrize("known", ["gate", "up", "down", "experts.0"])
def test_what_is_already_rounded_changes_nothing(tiny_recipe, first_layer, known):
    """A resumed run has some matrices of an expert, or some experts."""
    recipe = tiny_recipe(TWO_SIDED, ATTENTION)
    whole, states, _ = first_layer(recipe)
    there = {name: Q for name, Q in whole.items() if known in name}
    again, same_states, _ = first_layer(recipe, there)
    assert again.keys() == whole.keys() - there.keys()
    assert torch.equal(same_states.hidden, states.hidden)
    for name, quantized in again.items():
        assert all(map(torch.equal, parts_of(quantized), parts_of(whole[name])))


@pytest.mark.parametrize("keys", [{}, EVERYTHING], ids=["experts", "everything"])
def test_an_interrupted_run_is_resumed_with_the_same_bytes(
    small_recipe, keys, tmp_path, monkeypatch
):
    output = {"path": str(tmp_path / "whole"), "shard": "20KB"}
    recipe = small_recipe({"method": "two-sided"} | keys, output=output)
    whole = pipeline.quantize(recipe)
    changed = recipe.output.model_copy(update={"path": str(tmp_path / "again")})
    again = recipe.model_copy(update={"output": changed})
    interrupt_after(3 * len(build_plan(recipe).units) // 4, again, monkeypatch)  # in layer 1
    resumed = pipeline.quantize(again)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (resumed / path.name).read_bytes()


def test_experts_with_too_few_tokens_are_rounded_to_nearest(tiny_recipe, first_layer):
    recipe = tiny_recipe(TWO_SIDED, experts={"min_tokens": 10**6}, max_fallbacks=1.0)
    made, _, reports = first_layer(recipe)
    name = "layers.0.experts.1.up"
    plan = build_plan(recipe)
    W = plan.checkpoint.source.tensors[plan.units[name].tensor].read().float()
    assert torch.equal(made[name].codes, quantize_rtn(W, plan.units[name].scheme).codes)
    assert "fewer than" in (reports[name].fallback or "")


def test_the_output_of_a_layer_is_closer_to_the_original(small_recipe, first_layer):
    errors = {}
    attention = {"match": "layers.*.attention.*", "method": "rtn", "bits": 4, "group": 32}
    for method in ("gptq", "two-sided"):
        recipe = small_recipe({"method": method}, attention)
        _, states, reports = first_layer(recipe)
        if states.reference is not None:
            reference = states.reference.float()
        errors[method] = states.hidden.float()
        output_errors = [report.output_error for report in reports.values() if report.output_error]
        assert output_errors and max(output_errors) < 0.5
    distance = {method: (hidden - reference).norm() for method, hidden in errors.items()}
    assert distance["two-sided"] < 0.9 * distance["gptq"]


def test_attention_is_closer_to_the_original(small_recipe, first_layer):
    """Its last matrix makes good for the others."""
    errors = {}
    for method in ("gptq", "two-sided"):
        attention = {"match": "layers.*.attention.*", "method": method, "bits": 4, "group": 32}
        recipe = small_recipe({"method": "rtn"}, attention)
        _, states, _ = first_layer(recipe)
        errors[method] = states.hidden.float()
        reference = states.reference
    distance = {m: (hidden - reference.float()).norm() for m, hidden in errors.items()}
    assert distance["two-sided"] < 0.95 * distance["gptq"], distance


@pytest.mark.parametrize("noise", [0.02, 3.0])
@pytest.mark.parametrize("by_outputs", [False, True])
def test_the_ridge_is_the_best_for_tokens_that_are_held_out(noise, by_outputs):
    W, X = random(32, 64, seed=1), random(160, 64)
    X_f = X + X @ random(64, 64, seed=3) / 16 + noise * random(160, 64, seed=2)

    def site(part: slice) -> Site:
        x, x_f = X[part], X_f[part]
        if by_outputs:
            return site_of(x, Aim(weights_of(len(x)), outputs=lambda: x_f @ W.T))
        return site_of(x, Aim(weights_of(len(x)), reference=lambda: iter(x_f.split(200))))

    own = site(slice(0, 96))
    own.held_out = held_out = site(slice(96, 160))
    (H,) = own.hessian(None, weighted=True)
    S = ((X_f - X)[:96] @ W.T * own.aim.weights[:, None]).T @ X[:96]
    feedback = factorize(H, two_sided._RIDGE, act_order=True)
    found = two_sided._best_ridge(W, S, feedback, own)
    losses = []
    for ridge in two_sided._RIDGES:
        shift = ridge * H.diagonal().mean() * torch.eye(64)
        target = W + torch.linalg.solve(H + shift, S.T).T
        lost = X[96:] @ target.T - X_f[96:] @ W.T
        losses.append((lost.square().sum(1) * held_out.aim.weights).sum())
    assert found == two_sided._RIDGES[int(torch.stack(losses).argmin())]
    assert two_sided._best_ridge(W, S, feedback, held_out) == 0.2  # it has no tokens held out
    assert (found > 0.05) == (noise > 1)  # targets of few tokens would fit the noise


def test_the_held_out_error_is_that_of_weighted_outputs():
    X, W = random(300, 64), random(32, 64, seed=1)
    quantized = quantize_rtn(W, Scheme(4, 32))
    held_out = site_of(X, Aim(weights_of(300)))
    site = Site(0, 64, lambda: iter(()), held_out=held_out)
    energies = [
        ((X @ A.T).square().sum(1) * weights_of(300)).sum() for A in (W - quantized.dequantize(), W)
    ]
    naive = (energies[0] / energies[1]).sqrt().item()
    assert two_sided._held_out_error(W, quantized, site) == pytest.approx(naive, rel=1e-4)
    assert two_sided._held_out_error(W, quantized, held_out) is None


def test_an_eighth_of_the_rows_is_held_out(tiny_recipe, first_layer, monkeypatch):
    """The Hessians of gate, up and down are of the other rows."""
    seen: list[tuple[Site, int]] = []
    hessian = Site.hessian

    def note(site: Site, *given: object, **options: object) -> list[Tensor]:
        seen.append((site, sum(len(X) for X in site.inputs())))
        return hessian(site, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Site, "hessian", note)
    _, _, reports = first_layer(tiny_recipe(TWO_SIDED, ATTENTION))
    experts = [report for name, report in reports.items() if ".experts." in name]
    assert all(report.held_out_error and report.output_error for report in experts)
    sites = [(site, tokens) for site, tokens in seen if site.held_out is not None]
    assert len(sites) == 2 * 4  # two for each expert
    assert all(site.tokens == tokens + site.held_out.tokens for site, tokens in sites)
    held_out = sum(site.held_out.tokens for site, _ in sites)
    assert held_out == 2 * 2 * 2 * 64  # two of 16 rows of 64 tokens, two experts a token


def test_few_rows_are_all_used(tiny_recipe, first_layer, text_file):
    calibration = {"text": str(text_file), "samples": 7, "length": 64}
    _, _, reports = first_layer(tiny_recipe(TWO_SIDED, ATTENTION, calibration=calibration))
    assert all(report.held_out_error is None for report in reports.values())


def test_gate_alone_may_be_rounded(tiny_recipe, first_layer):
    only_gate = TWO_SIDED | {"match": "layers.*.experts.*.gate"}
    made, _, _ = first_layer(tiny_recipe(only_gate, {"match": "*", "method": "copy"}))
    assert any(name.endswith("gate") for name in made)


def test_head_and_later_routers_are_those_of_the_checkpoint(tiny_recipe):
    plan = build_plan(tiny_recipe(TWO_SIDED, ATTENTION))
    tensors = plan.checkpoint.source.tensors
    model = BlockwiseModel(plan.checkpoint, CALIBRATION_DTYPE)
    rows = tensors["model.embed_tokens.weight"].read().double()
    rows *= tensors["model.norm.weight"].read().double()
    naive = torch.cov(rows.T, correction=0) * len(rows)
    assert (model.head_directions - naive).norm() < 0.01 * naive.norm()
    first, last = (LayerQuantizer(plan, model, i, lambda *_: None, lambda _: None) for i in (0, 1))
    prefix = "model.layers.1."
    router = tensors[f"{prefix}block_sparse_moe.gate.weight"].read().float()
    gain = tensors[f"{prefix}pre_moe_norm.weight"].read().float()
    assert torch.equal(next(first.later_routers()), router * gain)
    assert not list(last.later_routers())


def test_a_plan_counts_the_original_model(small_recipe, monkeypatch):
    plans = [build_plan(small_recipe({"method": name})) for name in ("gptq", "two-sided")]
    gptq, two_sided = (peak_step(plan) for plan in plans)
    states = 16 * 64 * plans[0].checkpoint.config.hidden_size * 2
    assert two_sided.bytes - gptq.bytes > 5 * states and two_sided.knob == "calibration.samples"
    assert timing.expected_seconds(plans[1]) > 0


def test_shared_experts_and_low_rank_attention_have_an_aim(tiny_recipe, tmp_path):
    model = saved_model(tmp_path / "deepseek", "deepseek_v2", **DENSE | DEEPSEEK)
    recipe = tiny_recipe(EXPERTS | EVERYTHING | {"method": "two-sided"}, model={"path": str(model)})
    output = pipeline.quantize(recipe)
    reports = json.loads((output / "quantization-report.json").read_text())["units"]
    apart = [r for r in reports if ".experts." not in r["name"]]
    assert {"kv_a", "kv_b", "o", "down"} < {r["name"].rsplit(".", 1)[1] for r in apart}
    assert all(r["held_out_error"] for r in apart), apart


def test_a_plan_names_what_is_rounded_as_gptq_does(tiny_recipe, tmp_path):
    """Granite multiplies the outputs of attention and of its MLP."""
    model = saved_model(tmp_path / "granite", "granite", **DENSE)
    recipe = tiny_recipe(MLP | {"method": "two-sided"}, model={"path": str(model)})
    (note,) = build_plan(recipe).notes
    assert note.startswith("two-sided rounds mlp.gate, mlp.up, mlp.down as gptq does")


def test_one_factorization_solves_for_all_ridges():
    X = random(200, 96) @ random(96, 96, seed=1)
    H = X.T @ X
    mean = H.diagonal().mean()
    S = random(40, 96, seed=2) @ H
    (factor,) = factorize(H, 0.5, act_order=True).factors
    ridges = [share * mean for share in (0.05, 0.2, 0.8, 3.2)]
    found = targets.solve_for(S, factor, [ridge.item() for ridge in ridges])
    for ridge, solution in zip(ridges, found, strict=True):
        exact = torch.linalg.solve(H + ridge * torch.eye(96), S.T).T
        assert (solution - exact).norm() < 0.02 * exact.norm()


def test_a_layer_that_is_done_keeps_no_states(tiny_recipe, monkeypatch):
    """Nor what its experts gave: with 64 layers, either is more than a machine has."""
    layers: list[weakref.ref] = []
    sums: list[weakref.ref] = []
    alive: list[bool] = []
    run = LayerQuantizer.run
    run_layer = BlockwiseModel.run_layer

    def noted_run(self: LayerQuantizer, states: States) -> States:
        alive.extend(ref() is not None for ref in (*layers, *sums))
        layers.append(weakref.ref(self))
        return run(self, states)

    def noted_run_layer(
        self: BlockwiseModel, index: int, hidden: Tensor, combine: Combine, *keep: Keep
    ) -> Tensor:
        def combine_and_note(*routed: Tensor) -> Tensor:
            outputs = combine(*routed)
            sums.append(weakref.ref(outputs))
            return outputs

        return run_layer(self, index, hidden, combine_and_note, *keep)

    monkeypatch.setattr(LayerQuantizer, "run", noted_run)
    monkeypatch.setattr(BlockwiseModel, "run_layer", noted_run_layer)
    recipe = tiny_recipe(TWO_SIDED, ATTENTION)
    gc.disable()  # which might not come in time
    try:
        pipeline.quantize(recipe)
    finally:
        gc.enable()
    assert len(alive) >= 3  # the first layer, and what its experts gave in two passes
    assert not any(alive)
