"""Page parts generated from the code: keys, fields, commands, formats, families, rooms.

A page holds `<!-- generated: NAME -->`; a function of PARTS puts Markdown in its place when the
site is built, so that none of it can fall behind.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import grokquant
from grokquant.cli import main
from grokquant.engines import CONSUMERS
from grokquant.evaluation.report import Report
from grokquant.evaluation.suite import SHIPPED
from grokquant.families import FAMILIES
from grokquant.formats import FORMATS, Format
from grokquant.grids import GRIDS, Scheme
from grokquant.job.goals import GOALS
from grokquant.methods import METHODS
from grokquant.recipe import BudgetSection, Recipe, Rule

ROOT = Path(__file__).parents[1]
COMPARE = ROOT / "eval" / "compare"
DOWN = (6144, 32768)  # the largest matrix of an expert of Grok-1, [out, in]


# --- keys of pydantic models


def fields_of(model: type[BaseModel], label: str, required: str = "") -> str:
    """The fields of a model, then a section for each model inside it."""
    schema = model.model_json_schema(by_alias=True)
    return _Reference(schema, label, required).markdown()


@dataclass(frozen=True)
class _Reference:
    """A JSON schema in words. Its sections are called `label`-something where links go."""

    schema: dict
    label: str
    required: str

    def markdown(self) -> str:
        text = [self._fields(self.schema)]
        for name in self._uses():
            part = self.schema["$defs"][name]
            head = f"({self._anchor(name)})=\n\n### {self._title(name)}"
            text += [f"{head}\n\n{part.get('description', '')}\n", self._fields(part)]
        return "\n".join(text)

    def _uses(self) -> dict[str, list[str]]:
        """Inner models in the order in which fields name them, with those fields."""
        uses: dict[str, list[str]] = {}
        waiting = [self.schema]
        for part in waiting:
            for key, field in part["properties"].items():
                for name in re.findall(r'"#/\$defs/(\w+)"', json.dumps(field)):
                    if name not in uses:
                        waiting.append(self.schema["$defs"][name])
                    many = "[]" if field.get("type") == "array" else ""
                    uses.setdefault(name, []).append(f"`{key}{many}`")
        return uses

    def _title(self, name: str) -> str:
        """The one field that leads to an inner model, else the model's name."""
        fields = set(self._uses()[name])
        return fields.pop() if len(fields) == 1 else name

    def _anchor(self, name: str) -> str:
        return f"{self.label}-{name.lower()}"

    def _fields(self, part: dict) -> str:
        return "\n".join(
            self._entry(key, field, key in part.get("required", ()))
            for key, field in part["properties"].items()
        )

    def _entry(self, key: str, field: dict, required: bool) -> str:
        kind = self._kind(field)
        if "default" in field and not isinstance(field["default"], dict) and "const" not in field:
            kind += f"; default {_value(field['default'])}"
        elif required:
            kind += self.required
        about = " ".join(field.get("description", "").split())
        return f"`{key}`\n: {kind}\n" + (f"\n  {about}\n" if about else "")

    def _kind(self, field: dict) -> str:
        """The type of a field."""
        if "$ref" in field:
            name = field["$ref"].rpartition("/")[2]
            return f"[{self._title(name)}](#{self._anchor(name)})"
        if "anyOf" in field:
            return ", or ".join(self._kind(option) for option in field["anyOf"])
        if values := field.get("enum") or ("const" in field and [field["const"]]):
            return ", ".join(map(_value, values))
        if field.get("type") == "array" and "items" in field:
            return f"list of {self._kind(field['items'])}"
        if isinstance(inner := field.get("additionalProperties"), dict):
            return f"mapping of names to {self._kind(inner)}"
        kind = field.get("type", "anything")
        return _TYPES.get(kind, kind) + _bounds(field)


_TYPES = {"string": "text", "boolean": "`true` or `false`", "null": "unset", "object": "mapping"}
_BOUNDS = {
    "minimum": "at least",
    "ge": "at least",  # pydantic's own name, where a validator comes first
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def _bounds(field: dict) -> str:
    return "".join(f", {word} {field[key]}" for key, word in _BOUNDS.items() if key in field)


def _value(value: object) -> str:
    if value is None:
        return "unset"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


# --- tables


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def keys_by_method() -> str:
    """Which keys each method takes, and what it takes where they are unset."""
    taken: dict[str, dict] = {}
    for method in Rule.model_json_schema()["properties"]["method"]["enum"]:
        given = {"match": "*", "method": method}
        if "bits" in METHODS[method].grid_keys:
            given["bits"] = 4  # the one key that must be given
        taken[method] = Rule.model_validate(given).model_dump()
    rows = [
        [f"`{key}`", *(_default(keys, key) for keys in taken.values())]
        for key in Rule.model_fields
        if key not in ("match", "method")
    ]
    return _table(["key", *(f"`{method}`" for method in taken)], rows)


def _default(keys: dict, key: str) -> str:
    if key not in keys:
        return "–"
    return "needed" if key == "bits" else _value(keys[key])


def grids_by_format() -> str:
    """Which grids each format holds, as its own `refusal` says of a matrix of Grok-1."""
    groups = (32, 64, 128, 256, None)
    rows = []
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            sign = "symmetric" if symmetric else "with zero points"
            cells = [
                _held(output_format, [Scheme(bits, group, symmetric) for group in groups])
                for output_format in FORMATS.values()
            ]
            rows.append([f"{bits} bits, {sign}", *cells])
    for name, grid in GRIDS.items():
        if name != "integer":
            cells = [_held(output_format, [grid.scheme]) for output_format in FORMATS.values()]
            rows.append([f"`{name}`", *cells])
    return _table(["grid", *(f"`{name}`" for name in FORMATS)], rows)


def _held(output_format: Format, schemes: list[Scheme]) -> str:
    """Groups of `schemes` that a format holds with scales as it stores them."""
    held = []
    for scheme in schemes:
        dtype = scheme.scale_dtype if len(schemes) == 1 else output_format.scale_dtype
        fitting = Scheme(scheme.bits, scheme.group_size, scheme.symmetric, dtype, scheme.grid)
        if output_format.refusal(fitting, DOWN) is None:
            held.append(str(scheme.group_size or "channel"))
    if len(schemes) == 1:
        return "yes" if held else "–"
    return "any group" if len(held) == len(schemes) else ", ".join(held) or "–"


def engines() -> str:
    """Each program with the version that was tried, and what it does not take."""
    rows = []
    for consumer in CONSUMERS:
        limits = [
            f"**{limit.reason}: wrong results without an error**" if limit.wrong else limit.reason
            for limit in consumer.limits
        ]
        limits += [f"{newer.reason} before {newer.version}" for newer in consumer.newer]
        tried = (", ".join(consumer.families) or "all") if consumer.ran else "not tried"
        name = f"{consumer.title} (`{consumer.name}`)"
        rows.append([name, consumer.version, tried, "; ".join(limits) or "–"])
    return _table(["program (`--for`)", "tried", "families tried", "does not take"], rows)


def shipped() -> str:
    """The recipes that fit any model."""
    rows = [[f"`{name}`", f"`{goal.format}`", goal.text] for name, goal in GOALS.items()]
    return _table(["recipe", "format", "result"], rows)


def families() -> str:
    """Architectures that can be read."""
    rows = [[f"`{name}`", f"`{family.name}`"] for name, family in FAMILIES.items()]
    return _table(["architecture in config.json", "family"], rows)


def tried_families() -> str:
    """What `eval/try_families.py` found, an architecture a row; then those that it has no result
    for."""
    found = json.loads((ROOT / "eval" / "baselines" / "families.json").read_text())
    refused = {kind: one["refused"] for kind, one in found.items() if "refused" in one}
    untried = {kind: one["untried"] for kind, one in found.items() if "untried" in one}
    tried = {kind: one for kind, one in found.items() if kind not in refused | untried}
    passed = [one for one in tried.values() if one["passes"]]
    mixtures = sum(one["experts"] > 0 for one in passed)
    heads = ["experts", "runs", "rtn int4", "gptq int4", "default", "transformers alone"]
    text = (
        f"Of {len(found)} values of `model_type`, {len(passed)} passed everything: {mixtures} with "
        f"experts and {len(passed) - mixtures} without.\n\n"
        + _table(["model_type", *heads], [_tried(kind, one) for kind, one in tried.items()])
    )
    return text + _whys("Not read", refused) + _whys("Not tried", untried)


def _whys(title: str, whys: dict[str, str]) -> str:
    rows = [[f"`{kind}`", _cell(why)] for kind, why in whys.items()]
    return f"\n\n{title}:\n\n{_table(['model_type', 'why'], rows)}" if rows else ""


def _tried(kind: str, one: dict) -> list[str]:
    experts = str(one["experts"] or "")
    outputs = [one["rtn"], one["gptq"]]
    marks = [_cell(o) if isinstance(o, str) else _mark(one, o) for o in outputs]
    if one["experts"] and not one["one_by_one"]:
        marks[1] += ", its experts rtn"
    alone = [o.get("alone") for o in outputs if isinstance(o, dict)]
    reads = "yes" if alone and all(isinstance(a, float) and a < 0.01 for a in alone) else "no"
    return [f"`{kind}`", experts, one["runs"], *marks, _by_default(one), reads]


def _by_default(one: dict) -> str:
    """The methods of the default recipe, where its output was tried and is right."""
    output = one.get("default")
    if output is None:
        return ""
    if isinstance(output, str):
        return _cell(output)
    return ", ".join(output["methods"]) if _mark(one, output) == "yes" else "**no**"


def _mark(one: dict, output: dict) -> str:
    exact = (one["loaded"], one["streamed"], output["streamed"])
    return "yes" if all(isinstance(x, float) and x < 1e-5 for x in exact) else "**no**"


def _cell(text: str) -> str:
    """An error in a cell, without the directory of a run."""
    return re.sub(r"/tmp/\S+/", "", text).replace("|", "\\|")[:240]


# --- commands, suites, rooms


def commands() -> str:
    """Every command with its arguments and options, from the help that it prints itself."""
    return "\n\n".join(_command(name, command) for name, command in main.commands.items())


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"grokquant {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    records = [parameter.get_help_record(context) or ("", "") for parameter in command.params]
    options = "\n".join(f"`{term}`\n: {about}\n" for term, about in records if about)
    about = inspect.cleandoc(command.help or "")
    return f"## {name}\n\n```text\ngrokquant {name} {usage}\n```\n\n{about}\n\n{options}"


def python() -> str:
    """Every function of the package with its signature and docstring."""
    names = [name for name in grokquant.__all__ if callable(getattr(grokquant, name))]
    return "\n\n".join(_function(name, getattr(grokquant, name)) for name in names)


def _function(name: str, function: Callable) -> str:
    parameters = inspect.signature(function).parameters.values()
    given = "".join(f"    {_parameter(parameter)},\n" for parameter in parameters)
    about = inspect.getdoc(function) or ""
    return f"## {name}\n\n```python\ngrokquant.{name}(\n{given})\n```\n\n{about}"


def _parameter(parameter: inspect.Parameter) -> str:
    kind = inspect.formatannotation(parameter.annotation).strip("'")
    default = parameter.default
    return f"{parameter.name}: {kind}" + ("" if default is parameter.empty else f" = {default!r}")


def suites() -> str:
    """The evaluation suites that are shipped, as they stand."""
    return "\n\n".join(
        f"## {path.stem}\n\n`{path.relative_to(ROOT)}`\n\n```yaml\n{path.read_text()}\n```"
        for path in sorted(SHIPPED.glob("*.yaml"))
    )


def rooms() -> str:
    """The rooms of the package as a picture, highest first: imports point down."""
    floors = "".join(
        f"<li>{''.join(f'<code>{room}</code>' for room in sorted(floor - {'__main__'}))}</li>"
        for floor in reversed(_rooms())
    )
    return f'<ol class="rooms" reversed>{floors}</ol>'


def _rooms() -> list[set[str]]:
    """ROOMS of the test that holds the package to them."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            return ast.literal_eval(node.value)
    raise ExtensionError("tests/test_architecture.py has no ROOMS")


def comparison() -> str:
    """What `eval/compare/compare.py` found, a table for each model."""
    sys.path.insert(0, str(COMPARE))
    from comparison import table

    lines = (ROOT / "eval" / "baselines" / "compare.jsonl").read_text().splitlines()
    models: dict[str, list[dict]] = {}
    for row in map(json.loads, lines):
        models.setdefault(row["model"], []).append(row)
    return "\n\n".join(f"### {model}\n\n{table(rows)}" for model, rows in models.items())


PARTS = {
    "recipe": lambda: fields_of(Recipe, "recipe", "; required"),
    "budget": lambda: fields_of(BudgetSection, "budget", "; required"),
    "methods": keys_by_method,
    "report": lambda: fields_of(Report, "report"),
    "grids": grids_by_format,
    "shipped": shipped,
    "families": families,
    "tried-families": tried_families,
    "engines": engines,
    "commands": commands,
    "python": python,
    "suites": suites,
    "rooms": rooms,
    "comparison": comparison,
}
MARK = re.compile(r"<!-- generated: ([\w-]+) -->")


def fill(text: str) -> str:
    """`text` with every mark replaced. Raises ExtensionError for one that is not known."""

    def part(mark: re.Match) -> str:
        if mark[1] not in PARTS:
            raise ExtensionError(f"no part {mark[1]!r}, only {', '.join(PARTS)}")
        return PARTS[mark[1]]()

    return MARK.sub(part, text)


def setup(app: Sphinx) -> dict:
    def fill_source(app: Sphinx, docname: str, content: list[str]) -> None:
        content[0] = fill(content[0])

    app.connect("source-read", fill_source)
    return {"parallel_read_safe": True}
