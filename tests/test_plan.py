"""Plans: every shipped recipe fits its model, sizes add up, what cannot be is refused by name."""

import shutil
import time
from pathlib import Path

import pytest
from conftest import ATTENTION, EXPERTS
from make_release import write_hollow_grok_1

from grokquant.errors import InputError
from grokquant.job.plan import build_plan, check_disk
from grokquant.recipe import load_recipe
from grokquant.reporting.terminal import print_plan
from grokquant.toy import TOY_PATH

RECIPES = Path(__file__).parent.parent / "recipes"
EXPERT_WEIGHTS, ATTENTION_WEIGHTS = 309_237_645_312, 5_637_144_576
REST_BYTES = 4 * (315_684_820_992 - EXPERT_WEIGHTS - ATTENTION_WEIGHTS)  # float32 as released
SHAPE_BYTES = 16  # weight_shape of each matrix
MATRICES = 64 * (4 + 8 * 3)


@pytest.fixture(scope="module")
def grok_1(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("grok-1")
    write_hollow_grok_1(directory)
    shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "tokenizer.model")
    return directory


@pytest.fixture(autouse=True)
def huge_disk(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("toy-*.yaml")), ids=lambda p: p.stem)
def test_toy_recipes_plan(recipe):
    plan = build_plan(load_recipe(recipe))
    assert len(plan.units) == 4 * (4 + 8 * 3) and plan.kept == ()


@pytest.mark.parametrize(
    ("recipe", "expert_bits"), [("grok-1-int4-g128", 4.125), ("grok-1-int8-lossless", 8.125)]
)
def test_grok_1_recipes_plan_the_real_shapes_in_seconds(grok_1, recipe, expert_bits):
    loaded = load_recipe(RECIPES / f"{recipe}.yaml", [f"model.path={grok_1}"])
    start = time.process_time()
    plan = build_plan(loaded)
    assert time.process_time() - start < 60  # ten times what is usual
    quantized = EXPERT_WEIGHTS * expert_bits + ATTENTION_WEIGHTS * 8.125
    assert plan.tensor_bytes == quantized / 8 + REST_BYTES + MATRICES * SHAPE_BYTES
    assert plan.output_bytes == sum(file.layout.size for file in plan.files)
    assert 0 < plan.output_bytes - plan.tensor_bytes < 1_000_000  # headers
    sizes = [sum(t.bytes for t in file.tensors) for file in plan.files]
    assert all(size <= 5e9 for size in sizes) and sum(sizes) == plan.tensor_bytes
    layers = [{layer_of(tensor.name) for tensor in file.tensors} for file in plan.files]
    assert all(len(found) == 1 for found in layers)  # no file is of two layers
    order = [file.layer for file in plan.files]
    assert order == [layer for (layer,) in layers]
    assert order == sorted(order, key=lambda layer: -1 if layer is None else layer)


def layer_of(tensor: str) -> int | None:
    parts = tensor.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def test_a_small_disk_refuses_before_the_run(tiny_recipe, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="out: needs .* MB, but only 1.00 kB are free"):
        check_disk(build_plan(tiny_recipe()))


def test_what_an_interrupted_run_has_written_needs_no_space(tiny_recipe, tmp_path, monkeypatch):
    plan = build_plan(tiny_recipe())
    done = plan.files[1]
    (tmp_path / "out.partial" / "files").mkdir(parents=True)
    (tmp_path / "out.partial" / "files" / done.name).write_bytes(bytes(done.layout.size))
    left = plan.output_bytes - done.layout.size
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left))
    check_disk(build_plan(tiny_recipe()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left - 1))
    with pytest.raises(InputError, match=r"out: needs 1\.\d\d MB, "):
        check_disk(build_plan(tiny_recipe()))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            EXPERTS | {"match": "layers.*.expert.*"},
            "quantize\\[0\\].match: 'layers.\\*.expert.\\*'",
        ),
        (EXPERTS | {"match": "layers.*.router"}, "matches no matrix"),
        (EXPERTS | {"match": "layers.2.*"}, "matches no matrix"),
        (ATTENTION | {"group": "channel"}, "layers.0.attention.o: copy to int8 channel sym is not"),
        ({"match": "layers.*", "method": "keep"}, "nothing to quantize"),
    ],
)
def test_rules_that_cannot_be_are_named(tiny_recipe, rule, words):
    with pytest.raises(InputError, match=words):
        build_plan(tiny_recipe(rule))


def test_a_rule_in_the_shadow_of_others_is_named(tiny_recipe):
    everything = EXPERTS | {"match": "layers.*"}
    with pytest.raises(InputError, match=r"quantize\[1\].match: .* never applies: earlier rules"):
        build_plan(tiny_recipe(everything, EXPERTS | {"bits": 8}))
    with pytest.raises(InputError, match=r"quantize\[2\].match: .* never applies"):
        build_plan(tiny_recipe(EXPERTS, ATTENTION, EXPERTS))


def test_groups_must_divide_the_input(tmp_path, tiny_recipe):
    from make_release import write_random_release

    write_random_release(tmp_path / "odd", hidden=96, heads=3, kv_heads=1, head_dim=32)
    recipe = tiny_recipe(EXPERTS | {"group": 64}, model={"path": str(tmp_path / "odd")})
    with pytest.raises(InputError, match=r"gate: 96 input features are not divisible by group 64"):
        build_plan(recipe)


def test_copy_takes_the_largest_group_that_both_allow(tiny_recipe):
    units = build_plan(tiny_recipe(ATTENTION | {"match": "layers.*", "group": 64})).units
    groups = {name.rpartition(".")[2]: unit.scheme.group_size for name, unit in units.items()}
    # Stored: one group per row, but 8 groups in o (of 128 features) and down (of 256).
    assert groups == {"q": 64, "k": 64, "v": 64, "o": 16, "gate": 64, "up": 64, "down": 32}


def test_first_rule_wins_and_the_rest_is_kept(tiny_recipe):
    plan = build_plan(tiny_recipe(EXPERTS | {"match": "*.experts.3.*", "bits": 8}, EXPERTS))
    assert plan.units["layers.1.experts.3.up"].scheme.bits == 8
    assert plan.units["layers.1.experts.2.up"].scheme.bits == 4
    assert len(plan.kept) == 2 * 4 and all(".attention." in name for name in plan.kept)


def test_the_table_says_what_becomes_of_integers_that_no_rule_matches(tiny_recipe, capsys):
    print_plan(build_plan(tiny_recipe(EXPERTS)))
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "attention" in line]
    assert {row[2].strip() for row in rows} == {"bfloat16 (dequantized)"}
