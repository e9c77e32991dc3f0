"""Recipes made for a model: what each family and source gets, and where a named model is."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import saved_model
from test_families import FOUR, MODELS, SIZES

import grokquant
from grokquant import checkpoint, recipe_for
from grokquant.checkpoint import open_checkpoint
from grokquant.cli import main
from grokquant.errors import InputError
from grokquant.files.atomic import sha256
from grokquant.grids import GRIDS
from grokquant.job import default_recipe
from grokquant.job.goals import GOALS, goal_of, is_recipe
from grokquant.job.plan import Plan, build_plan
from grokquant.sources import open_source
from grokquant.sources.located import located

SPARSE = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss"}
# As in real models, and multiples of 32, 128 or 256 as there.
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_local_experts": 4}


def saved(place: Path, family: str, **sizes: object) -> Path:
    return saved_model(place, family, **SIZES | MODELS[family] | sizes)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = saved(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("wide") / "Mixtral-tiny", "mixtral", **WIDE)


def methods_of(plan: Plan) -> dict[str, set[str]]:
    """role -> grids and methods of its matrices."""
    found: dict[str, set[str]] = {}
    for unit in plan.units.values():
        role = unit.kind.partition(".")[0]
        found.setdefault(role, set()).add(f"{plan.format.grid_name(unit.scheme)} ({unit.method})")
    return found


def rules_of(model: Path | str, **wanted: object) -> list[tuple[str, str]]:
    recipe = recipe_for(model, **wanted)
    return [(rule.match, rule.method) for rule in recipe.quantize]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("goal", ["int4", "int8", "gptq", "nf4"])
def test_every_family_gets_rules_that_all_its_matrices_take(model_of, family, goal):
    model = model_of(family)
    plan = build_plan(recipe_for(model, goal))
    if (family, goal) == ("deepseek_v2", "gptq"):  # 48 rows are no whole words of its zero points
        assert {name.split(".", 2)[2] for name in plan.kept} == {"attention.kv_a"}
        return
    assert not plan.kept and len(plan.units) == len(list(plan.checkpoint.matrices()))
    found = methods_of(plan)
    if goal == "int4" and family in SPARSE:
        assert {grid.split()[0] for grid in found["experts"]} == {"int4"}
        assert {grid.split()[0] for grid in found["attention"]} == {"int8"}
    elif goal == "int4":
        assert {grid.split()[0] for grids in found.values() for grid in grids} == {"int4"}
    else:
        grids = {grid for grids in found.values() for grid in grids}
        assert {grid.split()[0] for grid in grids} == {{"gptq": "int4"}.get(goal, goal)}


@pytest.mark.parametrize("family", sorted(SPARSE | {"llama", "gemma2"}))
def test_more_effort_rounds_by_two_sides_in_place_of_gptq(model_of, family):
    low, normal, high = (
        build_plan(recipe_for(model_of(family), effort=effort)).units
        for effort in ("low", "normal", "high")
    )
    for name, unit in low.items():
        methods = unit.method, normal[name].method, high[name].method
        if unit.method == "gptq" and not unit.part.startswith("shared."):
            assert methods == ("gptq", "two-sided", "two-sided")
            keys = [(u.settings.metric, u.settings.descent) for u in (normal[name], high[name])]
            assert keys == [("head", False), ("gradients", True)]
        else:
            assert len({*methods}) == 1
        assert unit.scheme == normal[name].scheme == high[name].scheme


def test_two_sides_are_no_default_where_they_take_long(mixtral, model_of, monkeypatch, tmp_path):
    monkeypatch.setattr(default_recipe, "_WIDE", 300)  # the experts have 384 hidden units
    wide = build_plan(recipe_for(mixtral)).units.values()
    assert {unit.method for unit in wide if unit.expert is not None} == {"gptq"}
    assert build_plan(recipe_for(mixtral, effort="high")).needs_reference
    derived = saved_model(tmp_path / "derived", "phimoe", **SIZES, **FOUR)
    assert not build_plan(recipe_for(derived)).needs_reference
    llama = model_of("llama")
    assert build_plan(recipe_for(llama)).needs_reference
    tokens, hidden = 128 * 128, 64
    monkeypatch.setattr(default_recipe, "total_bytes", lambda: 1.4 * tokens * hidden * 30)
    assert not build_plan(recipe_for(llama)).needs_reference
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert {rule.method for rule in recipe_for(model_of("llama")).quantize} == {"gptq"}


def test_an_effort_that_changes_nothing_is_refused(mixtral, model_of):
    for model, wanted in ((model_of("llama"), {"bits": 8}), (mixtral, {"bits": 8})):
        with pytest.raises(InputError, match="high changes nothing: no matrices .* calibrated"):
            recipe_for(model, effort="high", **wanted)
    with pytest.raises(InputError, match="expected low, normal or high, not most"):
        recipe_for(mixtral, effort="most")


def test_nothing_asked_for_is_int4(model_of):
    assert recipe_for(model_of("mixtral")) == recipe_for(model_of("mixtral"), "int4")
    assert recipe_for(model_of("mixtral")) == recipe_for(model_of("mixtral"), bits=4)


def test_the_largest_group_that_divides_the_columns(mixtral):
    plan = build_plan(recipe_for(mixtral))
    assert methods_of(plan) == {
        "experts": {"int4 g128 sym (two-sided)"},
        "attention": {"int8 g128 sym (rtn)"},
    }
    assert plan.recipe.output.path == "Mixtral-tiny-int4"


def test_integers_of_the_source_are_copied_where_nothing_smaller_is_asked_for():
    assert rules_of("toy") == [
        ("layers.*.experts.*", "two-sided"),
        ("layers.*.attention.*", "copy"),
    ]
    assert rules_of("toy", bits=8) == [("layers.*", "copy")]
    # float16 cannot hold all scales of the release.
    assert rules_of("toy", grid="q8_0") == [("layers.*", "rtn")]


def test_a_quantized_source_is_not_rounded_to_the_same_bits_again(mixtral, tmp_path):
    small = recipe_for(mixtral, bits=8, output=tmp_path / "q")
    made = grokquant.quantize(small)
    assert {ref.stored_as for _, ref in open_checkpoint(made).units()} == {"int8 g128 sym"}
    assert rules_of(made, bits=8) == [("layers.*", "copy")]
    assert [rule.method for rule in recipe_for(made, bits=4).quantize] == ["two-sided", "copy"]


@pytest.mark.parametrize("grid", [name for name, grid in GRIDS.items() if grid.ggml_type])
def test_grids_of_llama_cpp_have_another_beside_them_where_they_do_not_fit(mixtral, grid):
    """down has 384 input features, which is no multiple of 256."""
    recipe = recipe_for(mixtral, grid=grid)
    assert recipe.output.format == "gguf"
    plan = build_plan(recipe)
    assert not plan.kept
    types = {unit.kind: plan.format.grid_name(unit.scheme) for unit in plan.units.values()}
    assert types["experts.gate"] == grid.upper()
    assert types["attention.q"] == "Q8_0"
    beside = "IQ4_NL" if GRIDS[grid].bits <= 4 else "Q8_0"
    fits = GRIDS[grid].block_columns == 32
    assert types["experts.down"] == (grid.upper() if fits else beside)
    count = sum(unit.kind == "experts.down" for unit in plan.units.values())
    told = [line for line in plan.notes if "K types" in line]
    words = (
        f"{count} of {len(plan.units)} matrices have 384 input features, which the blocks of 256"
    )
    assert told == ([] if fits else [f"{words} of K types do not divide: {beside}"])


def test_without_a_tokenizer_nothing_is_calibrated(mixtral, tmp_path):
    bare = shutil.copytree(mixtral, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert {method for _, method in rules_of(bare)} == {"rtn"}
    assert not build_plan(recipe_for(bare)).needs_calibration


def test_a_model_without_fitting_columns_is_left_as_it_is(tmp_path):
    heads = {"head_dim": 10, "num_attention_heads": 2, "num_key_value_heads": 1}
    odd = saved(tmp_path, "llama", hidden_size=60, intermediate_size=100, **heads)
    recipe = recipe_for(odd)
    assert [rule.method for rule in recipe.quantize] == ["unquantized"]


def test_wide_matrices_limit_the_hessian(monkeypatch, mixtral):
    monkeypatch.setattr("grokquant.job.default_recipe._WIDE", 300)
    experts, attention = recipe_for(mixtral).quantize
    assert (experts.hessian_block, attention.method) == (4096, "rtn")


def test_one_rule_for_experts_whose_parts_differ(tmp_path):
    """Engines fuse gate and up, and take experts of one grid only."""
    model = saved(tmp_path, "olmoe", **FOUR, hidden_size=256, intermediate_size=128)
    experts, _ = recipe_for(model).quantize
    assert (experts.match, experts.group) == ("layers.*.experts.*", 64)
    found = methods_of(build_plan(recipe_for(model)))
    assert found["experts"] == {"int4 g64 sym (two-sided)"}  # 128 would be whole rows of down


@pytest.mark.parametrize("goal", GOALS)
def test_each_shipped_recipe_fits_the_toy(goal):
    plan = build_plan(recipe_for("toy", goal))
    assert plan.recipe.output.path == f"toy-{goal}"
    assert bool(plan.units) == (goal != "bf16")


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"bits": 7}, "bits: expected 2, 3, 4, 5, 6 or 8, not 7"),
        ({"bits": 5}, "bits: only format gguf has 5, in q5_k"),
        ({"bits": 3, "format": "compressed-tensors"}, "bits: only formats gptq and gguf have 3"),
        ({"bits": 2, "format": "bitsandbytes"}, "bits: format bitsandbytes has 4 or 8, not 2"),
        ({"bits": 4, "format": "bf16"}, "bits: not allowed with format bf16"),
        ({"bits": 4, "grid": "q4_k"}, "bits: cannot be combined with grid q4_k"),
        ({"grid": "q4_k", "format": "gptq"}, "format: grid q4_k is held by gguf, not gptq"),
        ({"grid": "q4_k_m"}, "grid: no grid 'q4_k_m', expected one of nf4"),
        ({"grid": "int4"}, "grid: int4 is no grid of its own: give bits instead"),
        ({"grid": "integer"}, "grid: integer is no grid of its own: give bits instead"),
        ({"recipe": "int5"}, "recipe: no recipe 'int5', expected a .yaml file or one of int4"),
        ({"recipe": "nf4", "format": "gguf"}, "format: recipe nf4 cannot be written as gguf"),
    ],
)
def test_what_cannot_be_is_refused(wanted, complaint):
    given = {"recipe": None, "bits": None, "grid": None, "format": None} | wanted
    with pytest.raises(InputError) as error:
        goal_of(**given)
    assert str(error.value).startswith(complaint)


# --- where a model is


def test_a_file_of_weights_stands_for_its_directory(mixtral, tmp_path):
    (file,) = mixtral.glob("*.safetensors")
    assert located(file) == mixtral
    model = shutil.copytree(mixtral, tmp_path / "model")
    shutil.copyfile(file, model / "other.safetensors")
    with pytest.raises(InputError, match=f"one of 2 .safetensors files .* the model, {model}"):
        located(model / file.name)
    lone = tmp_path / "lone.gguf"
    lone.write_bytes(b"GGUF")
    assert located(lone) == lone  # it describes its model itself


def test_recipes_and_models_are_told_apart(mixtral, tmp_path):
    for name in ("mine.yaml", "mine.yml", "mine.json"):
        assert is_recipe(name)  # also where it is missing, so that the error is about the file
    (tmp_path / "plain").write_text("model: {path: toy}")
    assert is_recipe(tmp_path / "plain")
    (tmp_path / "dir.yaml").mkdir()
    for model in ("toy", "org/name", mixtral, tmp_path / "dir.yaml"):
        assert not is_recipe(model)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 10)
    with pytest.raises(InputError, match="is a file, expected the directory of a checkpoint"):
        grokquant.plan(tmp_path / "pytorch_model.bin")


@pytest.fixture
def hub(mixtral, tmp_path, monkeypatch) -> Path:
    """The cache of the hub, with somebody/Mixtral-tiny in it as `hf download` leaves it."""
    place = tmp_path / "hub"
    model = place / "models--somebody--Mixtral-tiny"
    snapshot = model / "snapshots" / ("1" * 40)
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text("1" * 40)
    for file in mixtral.iterdir():
        blob = model / "blobs" / sha256(file)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    return snapshot


def test_a_downloaded_model_of_the_hub_is_called_by_its_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for("somebody/Mixtral-tiny")
    assert recipe.model.path == "somebody/Mixtral-tiny"
    assert recipe.output.path == "Mixtral-tiny-int4"
    assert build_plan(recipe).checkpoint.source.origin.base_model == "somebody/Mixtral-tiny"
    assert recipe_for(hub).output.path == "Mixtral-tiny-int4"
    for file in hub.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="none of its weights.*hf download somebody/Mixtral-tiny"):
        located("somebody/Mixtral-tiny")
    with pytest.raises(InputError, match="no such directory; .*: hf download somebody/Else$"):
        recipe_for("somebody/Else")


# --- commands


def run(*arguments: object) -> tuple[str, str]:
    """stdout and stderr of a command that ends well."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


FEW = ("--set", "calibration.samples=4", "--set", "calibration.length=32")


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """The sources that were opened."""
    paths: list[Path] = []

    def counted(path: Path, config: Path | None) -> object:
        paths.append(path)
        return open_source(path, config)

    monkeypatch.setattr(checkpoint, "open_source", counted)
    return paths


def test_one_line_quantizes_a_model_and_its_recipe_makes_the_same(
    mixtral, tmp_path, monkeypatch, text_file, opened
):
    monkeypatch.chdir(tmp_path)
    few = (*FEW, "--set", f"calibration.text={text_file}", "--set", "max_fallbacks=1")
    told, plan = run("quantize", mixtral, *few)
    assert opened.count(mixtral) == 1
    assert "int4 g128 sym (two-sided)" in plan and "match: layers.*.experts.*" in plan
    place = Path("Mixtral-tiny-int4")
    last = told.splitlines()[-1]
    assert last == (
        f"recipe: {place}/recipe.yaml; the same from it: grokquant quantize {place}/recipe.yaml "
        f"--set model.path={mixtral} --output DIR"
    )
    again = ("--set", f"model.path={mixtral}", "--set", f"calibration.text={text_file}")
    run("quantize", place / "recipe.yaml", *again, "--output", "again")
    for file in place.glob("*.safetensors"):
        assert sha256(file) == sha256(Path("again") / file.name)
    assert "already finished" in run("quantize", mixtral, *few)[0]


def test_a_printed_recipe_is_the_one_of_the_command(mixtral, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed, stderr = run("recipes", mixtral, "--bits", 8)
    assert stderr == ""
    Path("mine.yaml").write_text(printed)
    plan = json.loads(run("plan", "mine.yaml", "--json")[0])
    assert plan == plan | {"output": "Mixtral-tiny-int8", "model": str(mixtral), "kept": []}
    asked = json.loads(run("plan", mixtral, "--bits", 8, "--json")[0])
    assert asked["units"] == plan["units"]
    assert [line.split()[0] for line in run("recipes")[0].splitlines()] == list(GOALS)


def test_the_rules_of_a_file_are_taken_for_another_model(mixtral, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rules = [{"match": "layers.*", "method": "rtn", "bits": 4, "group": 64}]
    Path("my.yaml").write_text(json.dumps({"quantize": rules}))
    planned = json.loads(run("plan", mixtral, "--recipe", "my.yaml", "--json")[0])
    assert planned["output"] == "Mixtral-tiny-my"
    assert {unit["scheme"] for unit in planned["units"]} == {"int4 g64 sym"}


def test_options_change_a_recipe_file_too(mixtral, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(run("recipes", mixtral, "--bits", 8)[0])
    made = json.loads(run("plan", "my.yaml", "--format", "GPTQ", "--output", "x", "--json")[0])
    assert (made["output"], made["units"][0]["scheme"]) == ("x", "int8 g128 sym")
    result = CliRunner().invoke(main, ["plan", "my.yaml", "--bits", "4"])
    assert result.exit_code == 2
    assert result.stderr == (
        "grokquant: --bits: my.yaml is a recipe, whose rules decide it: change them, as with "
        "--set quantize[0].bits=8\n"
    )


def test_python_takes_a_model_as_well(mixtral, tmp_path, monkeypatch, opened):
    monkeypatch.chdir(tmp_path)
    planned = grokquant.plan(mixtral)
    assert opened == [mixtral]
    assert planned.recipe == grokquant.recipe_for(mixtral)
    assert grokquant.plan(str(mixtral)).recipe == grokquant.recipe_for(mixtral, bits=4)


def test_what_is_not_quantized_cannot_be_converted(mixtral):
    result = CliRunner().invoke(main, ["convert", str(mixtral), "--format", "gptq"])
    assert result.exit_code == 2
    assert f"; grokquant quantize {mixtral} --format gptq quantizes it" in result.stderr


def test_several_kinds_of_text_calibrate_all_but_the_toy(mixtral):
    mixed = recipe_for(mixtral).calibration
    assert mixed.samples_of == {"python-docs": 32, "python-code": 32, "package-docs": 64}
    assert recipe_for("toy").calibration.text == "python-docs"
