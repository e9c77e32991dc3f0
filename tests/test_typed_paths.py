"""Paths as people type them, and results whose runs are unfinished."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from grokquant.cli import main
from grokquant.errors import InputError
from grokquant.files.typed_paths import expanded
from grokquant.recipe import load_recipe, parse_recipe

RECIPE = """model:
  path: {model}
quantize:
  - {{match: "*", method: copy}}
output:
  path: out
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/models/x", "{home}/models/x"),
        ("~", "{home}"),
        ("$DATA/x", "/data/x"),
        ("${DATA}x/$DATA", "/datax//data"),
        ("a/~/b", "a/~/b"),
        ("price$5", "price$5"),
        ("plain name", "plain name"),
    ],
)
def test_paths_are_expanded_as_a_shell_does(home, typed, meant):
    assert expanded(typed) == meant.format(home=home)


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("$NOWHERE/x", r"\$NOWHERE/x: the environment variable NOWHERE is not set"),
        ("a${NOWHERE}", "the environment variable NOWHERE is not set"),
        ("~nobody-at-all/x", "no home directory is known for ~nobody-at-all"),
    ],
)
def test_what_cannot_be_expanded_is_named(home, typed, complaint):
    with pytest.raises(ValueError, match=complaint):
        expanded(typed)


def test_paths_of_a_recipe_and_of_overrides(home):
    path = home / "recipe.yaml"
    path.write_text(RECIPE.format(model="~/model"))
    overrides = ["output.path=$DATA/out", "calibration.text=~/text.jsonl", "eval.text=$DATA/t.txt"]
    recipe = load_recipe(path, overrides)
    assert recipe.model.path == f"{home}/model" and recipe.output.path == "/data/out"
    assert recipe.calibration.text == f"{home}/text.jsonl" and recipe.eval.text == "/data/t.txt"
    values = {"model": {"path": Path("~/m")}, "quantize": [{"match": "*", "method": "copy"}]}
    assert parse_recipe(values | {"output": {"path": "o"}}).model.path == f"{home}/m"
    path.write_text(RECIPE.format(model="$NOWHERE/model"))
    complaint = r"recipe.yaml:2:9: model\.path: \$NOWHERE/model: the environment variable NOWHERE"
    with pytest.raises(InputError, match=complaint):
        load_recipe(path)
    with pytest.raises(InputError, match=r"override output\.path: .* variable NOWHERE is not set"):
        load_recipe(path, ["model.path=x", "output.path=$NOWHERE"])


def test_no_variable_becomes_the_name_of_a_data_set(home, monkeypatch):
    """A recipe of somebody else could send it to the hub."""
    monkeypatch.setenv("TOKEN", "secret")
    with pytest.raises(InputError, match="expected a file or an absolute path") as refused:
        parse_recipe(
            {
                "model": {"path": "x"},
                "quantize": [{"match": "*", "method": "copy"}],
                "output": {"path": "o"},
                "eval": {"text": "hub/$TOKEN"},
            }
        )
    assert "secret" not in str(refused.value)


def complaint_of(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("grokquant: ")


COMMANDS = [
    ["inspect", "{}"],
    ["verify", "{}"],
    ["generate", "{}", "--prompt", "x"],
    ["eval", "{}", "--reference", "toy"],
    ["eval", "toy", "--reference", "{}"],
    ["convert", "{}", "--format", "bf16"],
    ["compare", "{}"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_expands_its_paths(home, command):
    def complaint(path: str) -> str:
        return complaint_of(*(part.format(path) for part in command))

    assert complaint("~/nothing").partition(";")[0] == f"{home}/nothing: no such directory"
    assert complaint("$NOWHERE/x") == "$NOWHERE/x: the environment variable NOWHERE is not set"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_unfinished_run_is_named(tmp_path, command):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    (work / "journal").mkdir(parents=True)
    (work / "run.json").write_text("{}")

    def complaint(path: Path) -> str:
        return complaint_of(*(part.format(path) for part in command))

    text = (
        f": the run is unfinished, {work} is its work directory; the command that began it also "
        "resumes it"
    )
    assert complaint(out) == f"{out}{text}"
    assert complaint(work) == f"{work}{text}"
    out.mkdir()
    assert complaint(out) == f"{out}{text}"
    (work / "run.json").unlink()
    assert complaint(out) == f"{out}: the directory is empty"
