"""Pages that are made from the code say all that the code has."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import grokquant
from grokquant.cli import main
from grokquant.evaluation.report import Report
from grokquant.formats import FORMATS
from grokquant.job.goals import GOALS
from grokquant.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generated():
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(generated, name: str) -> str:
    return generated.fill((DOCS / f"{name}.md").read_text())


def fields(model) -> list[tuple[str, dict]]:
    """Every key with its part of the JSON schema, those of inner models too."""
    schema = model.model_json_schema()
    parts = [schema, *schema["$defs"].values()]
    return [field for part in parts for field in part["properties"].items()]


def test_every_key_of_a_recipe_is_described():
    bare = [key for key, field in fields(Recipe) if "description" not in field]
    assert bare == ["model", "calibration", "quantize", "experts", "output", "eval"]  # sections


@pytest.mark.parametrize(("name", "model"), [("recipes", Recipe), ("report", Report)])
def test_the_reference_has_every_key(generated, name, model):
    text = page(generated, name)
    for key, _ in fields(model):
        assert f"\n`{key}`\n: " in text


def test_the_reference_tells_values_bounds_and_defaults(generated):
    text = page(generated, "recipes")
    for entry in (
        "`method`\n: `unquantized`, `copy`, `rtn`, `gptq`, `two-sided`; required\n",
        "`bits`\n: `2`, `3`, `4`, `8`, or unset; default unset\n",
        "`length`\n: integer, at least 8; default `2048`\n",
        "`quantize`\n: list of [`quantize[]`](#recipe-rule); required\n",
    ):
        assert entry in text
    assert "| `group` | – | `release` | `128` | `128` |" in text


def test_every_option_is_shown(generated):
    text = page(generated, "commands")
    for name, command in main.commands.items():
        assert f"## {name}\n" in text
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert parameter.help in text


def test_every_format_is_shown(generated):
    text = page(generated, "formats")
    for name in FORMATS:
        assert f"| `{name}` |" in text
    assert "| `q4_k` | " in text


def test_every_function_is_shown_with_its_parameters(generated):
    text = page(generated, "python")
    for name in set(grokquant.__all__) - {"__version__"}:
        function = getattr(grokquant, name)
        assert f"## {name}\n" in text and inspect.getdoc(function) in text
        assert all(
            f"    {parameter}" in text for parameter in inspect.signature(function).parameters
        )


def test_a_mark_that_is_not_known_ends_the_build(generated):
    with pytest.raises(Exception, match="no part 'rooom'"):
        generated.fill("<!-- generated: rooom -->")


def test_every_shipped_recipe_is_shown(generated):
    text = page(generated, "recipes")
    for name, goal in GOALS.items():
        assert f"| `{name}` | `{goal.format}` | {goal.text} |" in text


def test_troubleshooting_quotes_what_the_code_says():
    """A line of an error that is shown there is one that the package prints."""
    source = " ".join(path.read_text() for path in (DOCS.parent / "grokquant").rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", source)  # literals that go on in the next line
    quoted = re.findall(r"^`(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 25
    assert [text for text in quoted if text not in source] == []
