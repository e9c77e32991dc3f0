"""Gradients layer by layer: against the whole model in autograd, and in runs that are resumed."""

from collections.abc import Callable

import pytest
import torch
from conftest import ATTENTION, EXPERTS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.families.family import set_parameter
from grokquant.job import gradients as job_gradients
from grokquant.job import pipeline
from grokquant.job.budget import timing
from grokquant.job.budget.memory import peak_step
from grokquant.job.division import Division
from grokquant.job.gradients import GradientFiles, make_gradients
from grokquant.job.plan import build_plan
from grokquant.job.workdir import WorkDirectory
from grokquant.methods.output_metric import metric_of_sum
from grokquant.parallel import ALONE
from grokquant.streaming.gradients import (
    DifferentiableModel,
    Draws,
    Kept,
    differentiated_tokens,
    output_gradients,
)

TWO_SIDED = EXPERTS | {"method": "two-sided", "metric": "gradients"}
ROWS = torch.randint(3, 512, (9, 40), generator=torch.Generator().manual_seed(2))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def drawn(seed: int) -> Draws:
    return Draws(seed, tuple(ROWS.shape), slice(0, len(ROWS)))


class Memory(dict[int, Kept]):
    def put(self, index: int, kept: Kept) -> None:
        self[index] = kept

    def take(self, index: int) -> Kept:
        return self.pop(index)


@pytest.fixture
def checkpoint(request, tmp_path, tiny_release) -> Checkpoint:
    """A Grok with a norm after its experts, or a small random model of transformers."""
    if request.param == "grok":
        return open_checkpoint(tiny_release)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return open_checkpoint(tmp_path)


def whole_model(checkpoint: Checkpoint) -> nn.Module:
    """All parameters in memory, float32, experts fused."""
    family = checkpoint.family
    model = family.empty_model(checkpoint.config)
    model.config._experts_implementation = "eager"

    def read(name: str) -> Tensor:
        return checkpoint.source.tensors[name].read().float()

    for name, _ in list(model.named_parameters()):
        if family.tensor_name(name) in checkpoint.source.tensors:
            set_parameter(model, name, read(family.tensor_name(name)))
    for index, layer in enumerate(family.layers(model)):
        numbers = range(family.num_experts(checkpoint.config, index))
        names = [family.expert_tensors(index, number) for number in numbers]
        if names:
            both = [torch.cat((read(n["gate"]), read(n["up"]))) for n in names]
            set_parameter(family.experts_of(layer), "gate_up_proj", torch.stack(both))
            down = torch.stack([read(n["down"]) for n in names])
            set_parameter(family.experts_of(layer), "down_proj", down)
    model.tie_weights()
    return model


Watch = Callable[[nn.Module], object]


def settled_seed(checkpoint: Checkpoint) -> int:
    """One whose draws are further from where a label ends than sums in float32 are wrong."""
    logits = whole_model(checkpoint)(input_ids=ROWS, use_cache=False).logits
    ends = logits.detach().double().softmax(-1).cumsum(-1)
    for seed in range(100):
        distances = ends - drawn(seed).labels().unsqueeze(-1)
        if distances.abs().min() > 2e-6:
            return seed
    raise AssertionError("no seed is settled")


def naive_gradients(
    checkpoint: Checkpoint, seed: int, watch: Watch = lambda model: None
) -> dict[int, tuple[Tensor, Tensor]]:
    """layer -> the outputs of its experts, or of its MLP [tokens, hidden], and the gradients by
    them. `watch` sees the model before it runs."""
    model = whole_model(checkpoint)
    watch(model)
    seen: list[Tensor] = []
    losses: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        index = len(seen)
        seen.append(output if output.requires_grad else output.detach().requires_grad_())
        seen[-1].retain_grad()
        if len(given) == 1:  # a dense MLP
            return seen[-1]
        x, experts = given[0].flatten(0, -2), given[1]
        router = checkpoint.source.tensors[checkpoint.family.router(checkpoint.config, index)[0]]
        best = (x @ router.read().float().T).sort(descending=True).values
        margin = best[:, experts.shape[-1] - 1] - best[:, experts.shape[-1]]
        draws = torch.rand(len(x), generator=torch.Generator().manual_seed(seed + 1 + index))
        side = torch.where(draws < torch.sigmoid(4 * margin.detach()), 1.0, -1.0)
        losses.append(-0.25 * nn.functional.logsigmoid(4 * side * margin).sum())
        return seen[-1]

    for layer in checkpoint.family.layers(model):
        experts = checkpoint.family.experts_of(layer)
        (layer.mlp if experts is None else experts).register_forward_hook(note)
    logits = model(input_ids=ROWS, use_cache=False).logits
    draws = torch.rand(ROWS.shape, generator=torch.Generator().manual_seed(seed))
    reached = logits.detach().softmax(-1).cumsum(-1) < draws.unsqueeze(-1)
    labels = reached.sum(-1)  # the first token at which the draw is reached
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (loss + sum(losses)).backward()
    return {i: (y.detach().flatten(0, -2), y.grad.flatten(0, -2)) for i, y in enumerate(seen)}


@pytest.mark.parametrize("checkpoint", ["grok", "mixtral", "llama", "gemma2"], indirect=True)
def test_gradients_are_those_of_the_whole_model(checkpoint):
    model = DifferentiableModel(checkpoint, torch.float32, pieces=True)
    for index in range(2):
        if checkpoint.family.lone_expert(checkpoint.config, index):
            model.take_as_expert(index)
    seed = settled_seed(checkpoint)
    found = dict(output_gradients(model, ROWS, drawn(seed), Memory()))
    naive = naive_gradients(checkpoint, seed)
    assert found.keys() == naive.keys() == {0, 1}
    for index, (y, g) in naive.items():
        if model.mixture_norm(index):
            g = g * y.square().mean(1, keepdim=True).sqrt()
        wanted = g.double().T @ g.double()
        assert (found[index].of_sum - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("checkpoint", ["grok", "mixtral", "qwen2"], indirect=True)
def test_gradients_by_matrices_of_attention_are_those_of_the_whole_model(checkpoint):
    """q, k and v as they come out of their products; o times the rms that a norm divides by."""
    seen: dict[str, Tensor] = {}

    def watch(model: nn.Module) -> None:
        for part in "qkvo":

            def note(_: nn.Module, given: object, y: Tensor, part: str = part) -> None:
                y.retain_grad()
                seen[part] = y

            linear = model.model.layers[0].self_attn.get_submodule(f"{part}_proj")
            linear.weight.requires_grad_()
            linear.register_forward_hook(note)

    seed = settled_seed(checkpoint)
    naive_gradients(checkpoint, seed, watch)
    model = DifferentiableModel(checkpoint, torch.float32, pieces=True)
    if checkpoint.family.lone_expert(checkpoint.config, 0):
        model.take_as_expert(0)
    tensors = checkpoint.family.matrix_tensors(checkpoint.config, 0)
    sites = {"attention.q": ["q", "k", "v"], "attention.o": ["o"]}
    asked = {r: [tensors[f"attention.{part}"] for part in parts] for r, parts in sites.items()}
    found = dict(output_gradients(model, ROWS, drawn(seed), Memory(), {0: asked}))[0].of_sites
    assert found.keys() == sites.keys()
    for reads, parts in sites.items():
        g = torch.cat([seen[part].grad.flatten(0, -2) for part in parts], 1)
        if reads == "attention.o" and checkpoint.family.attention_norm:
            g = g * seen["o"].detach().flatten(0, -2).square().mean(1, keepdim=True).sqrt()
        for block, own in zip(
            found[reads], g.double().split(found[reads].shape[1], 1), strict=True
        ):
            wanted = own.T @ own
            assert (block - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("checkpoint", ["llama"], indirect=True)
def test_gradients_pass_dense_layers(checkpoint):
    model = DifferentiableModel(checkpoint, torch.float32, pieces=True)
    assert not dict(output_gradients(model, ROWS, drawn(5), memory := Memory()))
    assert not memory
    h = model.embed(ROWS)
    gradient = torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    model.load_layer(0)
    found = model.back(0, Kept(h, None), gradient, drawn(0)).inputs
    h.requires_grad_()
    (wanted,) = torch.autograd.grad(model.run_part(0, h, 0), h, gradient)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_labels_follow_the_predictions(tiny_release):
    """The mean gradient over many draws is that of a sure prediction: nothing."""
    model = DifferentiableModel(open_checkpoint(tiny_release), torch.float32)
    hidden = model.embed(ROWS[:1, :8])
    rows = slice(0, 1)
    draws = [model.label_gradients(hidden, Draws(seed, (1, 8), rows)) for seed in range(200)]
    assert sum(draws).norm() < 3 * torch.stack(draws).norm()  # as of a random walk
    assert torch.equal(draws[3], model.label_gradients(hidden, Draws(3, (1, 8), rows)))
    assert not torch.equal(draws[3], draws[4])


def test_the_metric_is_that_of_the_gradients(tiny_recipe):
    class LastLayer:
        mixture_gain = torch.full((16,), 7.0)  # the gradients have passed it already
        output_gradients = torch.randn(16, 16).square().diag_embed().sum(0)

        def later_routers(self):
            return iter(())

    M = metric_of_sum(LastLayer(), 16, gradients=True)  # type: ignore[arg-type]
    P = LastLayer.output_gradients / LastLayer.output_gradients.diagonal().mean()
    wanted = (P + 0.05 * torch.eye(16)) / 1.05 + 0.1 * torch.eye(16)
    assert torch.allclose(M, wanted, atol=1e-6)


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def make(name: str):
        sections = {"path": str(tmp_path / name), "shard": "20KB"}
        return tiny_recipe(TWO_SIDED, ATTENTION, output=sections)

    return make


@pytest.mark.parametrize("where", ["layer 1", "backward pass", "first matrices"])
def test_a_run_stopped_in_the_gradients_is_resumed_with_the_same_bytes(recipe, where, monkeypatch):
    whole = pipeline.quantize(recipe("whole"))
    again = recipe("again")
    places = {
        "layer 1": (GradientFiles, "put"),
        "backward pass": (GradientFiles, "take"),
        "first matrices": (pipeline.Run, "emit"),
    }

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*places[where], fail)
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(again)
    resumed = pipeline.quantize(again)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (resumed / path.name).read_bytes()
    assert not (resumed / "gradients").exists()


def test_gradients_are_made_once_and_again_if_damaged(recipe, tmp_path, monkeypatch):
    plan = build_plan(recipe("out"))
    work = WorkDirectory(tmp_path, tmp_path / "out")
    made: list[str] = []
    files = GradientFiles(work, made.append)
    make_gradients(Division(plan, ALONE), files, ROWS)
    assert made[0].endswith("forward: layer 0") and made[-1].endswith("backward: layer 0")
    metrics = [files.metrics(index).of_sum for index in range(2)]
    assert sorted(path.name for path in files.path.iterdir()) == [
        "metric-0",
        "metric-1",
        "record.json",
    ]
    with monkeypatch.context() as patch:
        patch.delattr(job_gradients, "output_gradients")
        make_gradients(Division(plan, ALONE), files, ROWS)  # they are there
    damaged = files.path / "metric-1"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\7")
    make_gradients(Division(plan, ALONE), files, ROWS)
    assert all(torch.equal(metrics[index], files.metrics(index).of_sum) for index in range(2))


def test_a_plan_counts_the_metrics_of_attention(tiny_recipe):
    everything = TWO_SIDED | {"match": "layers.*"}
    plans = [build_plan(tiny_recipe(*rules)) for rules in ((TWO_SIDED, ATTENTION), (everything,))]
    q, k, v, o = (plans[1].units[f"layers.0.attention.{part}"].shape[0] for part in "qkvo")
    assert (q, k, v, o) == (128, 64, 64, 128)
    blocks = (q + k + v) * 64 + o * o
    assert plans[1].gradient_bytes - plans[0].gradient_bytes == 2 * blocks * 4


def test_a_plan_counts_the_backward_pass(tiny_recipe, monkeypatch):
    head = TWO_SIDED | {"metric": "head"}
    plans = [build_plan(tiny_recipe(rule, ATTENTION)) for rule in (head, TWO_SIDED)]
    assert [plan.needs_gradients for plan in plans] == [False, True]
    states = 2 * 16 * 64 * 128 * 2  # two layers, all 16 rows of 64 tokens, bfloat16
    assert plans[0].gradient_bytes == 0
    assert plans[1].gradient_bytes == 2 * states + 2 * 128 * 128 * 4
    assert peak_step(plans[1]).bytes >= peak_step(plans[0]).bytes
    assert differentiated_tokens(1000, 512) == 16 * 512 and differentiated_tokens(2, 9999) == 9999
    assert timing._differentiating(plans[1]) > 0
