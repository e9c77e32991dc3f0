"""A budget of bits: the solver is exact, and a recipe comes out that a format can hold."""

import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ATTENTION
from members import together
from test_default_recipe import saved

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.cli import main
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.files.atomic import sha256
from grokquant.job.allocation import allocate as step
from grokquant.job.allocation import measure
from grokquant.job.allocation.allocate import Allocation, allocate, budget_path
from grokquant.job.allocation.choices import Choice, Option, choices_of, options_of
from grokquant.job.allocation.measure import Errors, LayerErrors, Probe, costs
from grokquant.job.allocation.solver import solve
from grokquant.job.plan import build_plan
from grokquant.methods.rtn import quantize_rtn
from grokquant.recipe import BudgetRecipe, load_any_recipe, parse_any_recipe, to_yaml
from grokquant.streaming.blocks import BlockwiseModel, Outputs, Routed
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer

GRIDS = [{"bits": bits, "group": 32} for bits in (2, 3, 4)]
BUDGET = {"bits_per_weight": 3.5, "grids": GRIDS, "unit": "projection", "method": "rtn"}


def cheapest(costs, sizes, budget: int) -> float:
    """By trying everything."""
    sums = []
    for taken in itertools.product(*(range(len(row)) for row in sizes)):
        if sum(row[option] for row, option in zip(sizes, taken, strict=True)) <= budget:
            sums.append(sum(row[option] for row, option in zip(costs, taken, strict=True)))
    return min(sums)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_cheaper_fits(seed):
    draw = np.random.default_rng(seed)
    sizes = [draw.integers(1, 50, draw.integers(1, 5)).tolist() for _ in range(6)]
    # Divergences of very different units, some of them tiny.
    costs = [(draw.exponential(10.0 ** -draw.integers(1, 6), len(row))).tolist() for row in sizes]
    budget = sum(map(min, sizes)) + int(draw.integers(0, 60))
    taken = solve(costs, sizes, budget)
    assert sum(row[option] for row, option in zip(sizes, taken, strict=True)) <= budget
    found = sum(row[option] for row, option in zip(costs, taken, strict=True))
    assert found == pytest.approx(cheapest(costs, sizes, budget), rel=1e-9)


def test_as_many_units_as_grok_1_has_fill_their_budget():
    draw = np.random.default_rng(0)
    bits = np.array([2.6, 3.4, 4.25, 4.5, 5.5, 6.6])
    scale = draw.lognormal(0, 1.5, 1536)[:, np.newaxis]
    costs = (scale * 4.0**-bits).tolist()
    sizes = [(bits * 25_165_824 / 8).astype(int).tolist()] * 1536
    budget = int(3.5 * 25_165_824 / 8 * 1536)
    used = sum(sizes[0][option] for option in solve(costs, sizes, budget))
    assert 0.9999 * budget < used <= budget


def test_costs_of_a_kind_add_up_to_its_divergence():
    errors = {
        "a": Errors(outputs={0: 8.0, 1: 2.0}, weights={0: 0.4, 1: 0.1}),
        "b": Errors(outputs={0: 0.0, 1: 0.0}, weights={0: 0.4, 1: 0.1}),  # no token reached it
    }
    found = costs(errors, [Probe(0, "experts.up", {"a": 1, "b": 1})], [0.5])
    assert found["a"][1] + found["b"][1] == pytest.approx(0.5, rel=0.05)
    assert found["a"][0] == pytest.approx(4 * found["a"][1])
    assert 0 < found["b"][1] < found["b"][0] < found["a"][1]


@pytest.fixture
def budgeted(tiny_release, text_file, tmp_path) -> Callable[..., BudgetRecipe]:
    """A recipe with a budget for the tiny release; keywords replace keys of the budget."""

    def make(
        format: str = "gptq", rules: Sequence[dict] = (ATTENTION,), **keys: object
    ) -> BudgetRecipe:
        recipe = parse_any_recipe(
            {
                "model": {"path": str(tiny_release)},
                "calibration": {"text": str(text_file), "samples": 8, "length": 32},
                "quantize": {"budget": BUDGET | keys, "rules": list(rules)},
                "output": {"path": str(tmp_path / "out"), "format": format},
            }
        )
        assert isinstance(recipe, BudgetRecipe)
        return recipe

    return make


def solved(recipe: BudgetRecipe) -> Allocation:
    return allocate(recipe, lambda line: None)


def test_a_budget_becomes_a_recipe_for_people(budgeted, tmp_path):
    found = solved(budgeted())
    assert found.path == tmp_path / "out.budget" / "recipe.yaml"
    assert load_any_recipe(found.path) == found.recipe
    assert found.text == found.path.read_text()
    plan = build_plan(found.recipe)
    units = [unit for unit in plan.units.values() if unit.expert is not None]
    weights = sum(unit.shape[0] * unit.shape[1] for unit in units)
    stored = sum(map(plan.packed_bytes, units))
    assert found.bits_per_weight == 8 * stored / weights <= 3.5
    assert len({unit.scheme for unit in units}) > 1
    of_projection = {}
    for unit in units:
        grids = of_projection.setdefault((unit.layer, unit.part), set())
        grids.add(unit.scheme)
    assert all(len(grids) == 1 for grids in of_projection.values())
    # What was given stays as it was given, and nothing else is written down.
    assert found.recipe.quantize[0].match == ATTENTION["match"]
    assert "max_fallbacks" not in found.text


def test_the_recipe_says_why_it_takes_less_than_the_budget(budgeted):
    reason = "# not all is used: "
    assert reason not in solved(budgeted(bits_per_weight=3.505, unit="expert")).text
    text = solved(budgeted(bits_per_weight=8)).text
    assert reason + "all matrices have the largest grid" in text


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (29, "the next larger grid of one unit takes 0.8 bits more; a smaller unit fills it"),
        (30, "larger grids that would fit are expected to cost more"),
    ],
)
def test_what_is_left_is_too_little_or_better_not_used(given, reason):
    choice = Choice("layers.0.*", "*", 50, (Option(0, (), 10), Option(1, (), 20)))
    assert step._why_left([choice, choice], [0, 0], given) == reason


def test_the_recipe_and_the_budget_give_the_same_bytes(budgeted, tmp_path):
    made = grokquant.quantize(budgeted())
    recipe = load_any_recipe(tmp_path / "out.budget" / "recipe.yaml", [f"output.path={tmp_path}/b"])
    again = grokquant.quantize(recipe)
    weights = sorted(made.glob("*.safetensors"))
    assert len(weights) > 1
    assert [sha256(path) for path in weights] == [sha256(again / path.name) for path in weights]


def test_one_of_several_processes_measures_for_all(budgeted, monkeypatch):
    measured = []
    measure = step._measure
    monkeypatch.setattr(step, "_measure", lambda *given: measured.append(1) or measure(*given))
    recipe = budgeted()
    first, second = together(2, lambda team: grokquant._solved(recipe, CPU, team, open_checkpoint))
    assert first == second and not isinstance(first, BudgetRecipe)
    assert len(measured) == 1
    assert solved(recipe).recipe == first


def test_the_command_prints_the_recipe(budgeted, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(budgeted().model_dump(mode="json", exclude_unset=True)))
    done = CliRunner().invoke(main, ["budget", str(path)])
    assert done.exit_code == 0, done.output
    assert done.stdout == (tmp_path / "out.budget" / "recipe.yaml").read_text()
    planned = CliRunner().invoke(main, ["plan", str(path)])
    assert planned.exit_code == 2
    assert f"grids are to be chosen first: grokquant budget {path}" in planned.output
    other = CliRunner().invoke(main, ["budget", str(tmp_path / "out.budget" / "recipe.yaml")])
    assert other.exit_code == 2 and "has no budget" in other.output


def test_matrices_of_a_dense_model_share_a_budget(budgeted, tmp_path):
    model = saved(tmp_path / "llama", "llama")
    keys = {"bits_per_weight": 4.2, "match": "layers.*", "method": "gptq"}
    values = budgeted(rules=[], **keys).model_dump(mode="json", exclude_unset=True)
    recipe = parse_any_recipe(values | {"model": {"path": str(model)}})
    found = solved(recipe)
    plan = build_plan(found.recipe)
    assert len(plan.units) == len(list(plan.checkpoint.matrices()))
    assert found.bits_per_weight <= 4.2 and found.kld > 0


def test_more_bits_cost_less_and_need_no_other_pass(budgeted, monkeypatch):
    few = solved(budgeted())
    monkeypatch.setattr(step, "BlockwiseModel", None)
    more = solved(budgeted(bits_per_weight=4.2))
    finer = solved(budgeted(unit="expert"))
    assert few.bits_per_weight < more.bits_per_weight <= 4.2
    assert more.kld < few.kld
    assert finer.kld <= few.kld


def test_a_measurement_goes_on_where_it_was_interrupted(budgeted, monkeypatch, tmp_path):
    whole = solved(budgeted())
    place = budget_path(tmp_path / "out")
    record = json.loads((place / "measured.json").read_text())
    for path in place.iterdir():
        path.unlink()
    layers = []

    def interrupted(line: str) -> None:
        layers.append(line)
        if len(layers) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate(budgeted(), interrupted)
    assert [path.name for path in place.glob("hidden-*")] == ["hidden-1"]
    lines: list[str] = []
    resumed = allocate(budgeted(), lines.append)
    assert lines == ["budget: measuring layer 1 of 2"]
    assert resumed.text == whole.text
    assert json.loads((place / "measured.json").read_text()) == record
    assert not list(place.glob("hidden-*"))


def test_measurements_of_other_settings_are_refused(budgeted):
    solved(budgeted())
    with pytest.raises(InputError, match=r"measurements of something else \(budget.grids"):
        solved(budgeted(grids=GRIDS[1:], bits_per_weight=4.2))


def test_a_recipe_changed_by_hand_is_kept(budgeted):
    path = solved(budgeted()).path
    path.write_text(path.read_text().replace("bits: 3", "bits: 4"))
    changed = path.read_text()
    with pytest.raises(InputError, match="changed by hand"):
        solved(budgeted())
    assert path.read_text() == changed


@pytest.mark.parametrize(
    ("keys", "format", "line"),
    [
        ({"bits_per_weight": 2.0}, "gptq", "bits_per_weight: the smallest of the grids take 2."),
        (
            {"match": "layers.7.*"},
            "gptq",
            "'layers.7.*' matches no matrix that the rules leave, such",
        ),
        ({"match": "*attention*"}, "gptq", "matches no matrix that the rules leave"),
        ({"unit": "expert", "grids": ["q8_0", "q4_0"]}, "gguf", "for each expert; use projection"),
        ({"grids": ["iq4_nl", "q4_1"]}, "gptq", "none fits layers.0.experts"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_anything_is_read(
    budgeted, keys, format, line, monkeypatch
):
    monkeypatch.setattr(step, "calibration_rows", None)
    with pytest.raises(InputError, match="recipe: quantize.budget") as error:
        solved(budgeted(format, **keys))
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"bits_per_weight": 0}, "quantize.budget.bits_per_weight: should be greater than 0"),
        ({"bits": 3}, "quantize.budget.bits: unknown key, expected one of bits_per_weight"),
        ({"grids": ["q4_k"]}, "quantize.budget.grids: "),
        ({"grids": ["q4_k", "q9_k"]}, "quantize.budget.grids: entry 1: expected one of integer"),
        ({"grids": [{"bits": 3}, {"bits": 5}]}, "quantize.budget.grids: entry 1: bits: "),
        ({"grids": [{"bits": 3}, {"bit": 3}]}, "quantize.budget.grids: entry 1: bit: unknown key"),
        (
            {"grids": [{"bits": 3}, {"bits": 3}]},
            "quantize.budget.grids: {'bits': 3} is named twice",
        ),
        (
            {"grids": [{"bits": 3}, 4]},
            "quantize.budget.grids: entry 1: expected the name of a grid",
        ),
        ({"method": "copy"}, "quantize.budget.method: expected one of rtn, gptq, two-sided"),
        ({"unit": "rows"}, "quantize.budget.unit: expected expert, projection or layer"),
    ],
)
def test_mistakes_name_their_key(budgeted, keys, line):
    with pytest.raises(InputError) as error:
        budgeted(**keys)
    assert str(error.value).startswith(f"recipe: {line}")


@pytest.fixture
def measured(budgeted, monkeypatch) -> tuple[LayerErrors, torch.Tensor, torch.Tensor]:
    """The first layer measured on all tokens of its experts, the states before it and after it."""
    monkeypatch.setattr(measure, "_held_out", lambda tokens: (torch.arange(tokens),) * 2)
    recipe = budgeted(match="layers.0.*", bits_per_weight=8, rules=[])
    checkpoint = open_checkpoint(recipe.model.path)
    rows = calibration_rows(recipe.calibration, load_tokenizer(checkpoint), checkpoint)
    model = BlockwiseModel(checkpoint, torch.float32)
    layer = LayerErrors(model, 0, options_of(choices_of(recipe, checkpoint)), min_tokens=0)
    with torch.no_grad():
        hidden = model.embed(rows)
        after = layer.run(hidden, len(hidden), 2)
    return layer, hidden, after


def run_with(layer: LayerErrors, hidden: torch.Tensor, values: dict) -> torch.Tensor:
    """The states after the layer with other values of some tensors."""
    model = layer.model
    model.load_layer(0)
    for tensor, value in values.items():
        if "self_attn" in tensor:
            model.replace(0, tensor, value)

    def expert(number: int, routed: Routed) -> Outputs:
        names = model.family.expert_tensors(0, number)
        W = {part: values.get(t, model.expert_weight(t)) for part, t in names.items()}
        inner = model.hidden_units(0, number, W["gate"], W["up"])
        return model.on_routed(lambda x: inner(x) @ W["down"].T, routed)

    after = model.run_layer(0, hidden, model.combine_experts(0, expert))
    model.free_layer(0)
    return after


def rounded(layer: LayerErrors, name: str, grid: int) -> dict[str, torch.Tensor]:
    unit = layer.options[name][grid]
    W = layer.model.source.tensors[unit.tensor].read().float()
    return {unit.tensor: quantize_rtn(W, unit.scheme).dequantize().float()}


def test_errors_and_probes_are_those_of_the_layer_with_matrices_rounded(measured):
    layer, hidden, after = measured
    before = run_with(layer, hidden, {})
    for name in (f"layers.0.experts.1.{part}" for part in ("gate", "up", "down")):
        for grid, error in layer.errors[name].outputs.items():
            lost = (run_with(layer, hidden, rounded(layer, name, grid)) - before).flatten(0, 1)
            naive = ((lost @ layer._metric) * lost).sum().item() / len(lost)
            assert error == pytest.approx(naive, rel=1e-2)
    rows = len(hidden)
    assert len(after) == rows + 2 * len(layer.probes) == rows + 2 * 7
    torch.testing.assert_close(after[:rows], before)
    for place, probe in enumerate(layer.probes):
        values: dict[str, torch.Tensor] = {}
        for name, grid in probe.grids.items():
            values |= rounded(layer, name, grid)
        ours = after[rows + 2 * place : rows + 2 * place + 2]
        torch.testing.assert_close(ours, run_with(layer, hidden[:2], values))
