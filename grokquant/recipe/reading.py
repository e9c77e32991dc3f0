"""Recipes from files, overrides and Python values. Every error is one line with the location, the
key and what was expected there."""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from grokquant.errors import InputError
from grokquant.files.regular import read_regular
from grokquant.recipe.located_yaml import Document, Loc, Mark, YamlProblem, read_yaml
from grokquant.recipe.schema import FORMER_KEYS, BudgetRecipe, Recipe, Section

# Recipes are short; a larger file was named by mistake, such as one with weights.
_MAX_BYTES = 250_000

S = TypeVar("S", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file. Each override is `key.sub=value` (`quantize[0].bits=8`), its value YAML.

    Raises InputError with one line: `file:line:column: key: problem`, or `override key: problem`.
    """
    return load_sections(path, Recipe, overrides)


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | BudgetRecipe:
    """As `load_recipe`, but the recipe may have a budget."""
    return _load(path, overrides, _schema_for)


def parse_any_recipe(mapping: Mapping[str, Any]) -> Recipe | BudgetRecipe:
    """As `parse_recipe`, but the recipe may have a budget."""
    if not isinstance(mapping, Mapping):
        return parse_recipe(mapping)
    return _validated(dict(mapping), _schema_for(mapping), _Origin("recipe"))


def _schema_for(values: Mapping[str, Any]) -> type[Recipe] | type[BudgetRecipe]:
    quantize = values.get("quantize")
    has_budget = isinstance(quantize, Mapping) and "budget" in quantize
    return BudgetRecipe if has_budget else Recipe


def load_sections(path: str | Path, schema: type[S], overrides: Sequence[str] = ()) -> S:
    """Reads a YAML file with the keys of `schema`; overrides and errors as in `load_recipe`."""
    return _load(path, overrides, lambda values: schema)


def _load(path: str | Path, overrides: Sequence[str], schema_for: Callable[[dict], type[S]]) -> S:
    document = _read_document(path)
    values = document.value
    overridden = tuple(_apply_override(values, override) for override in overrides)
    return _validated(values, schema_for(values), _Origin(str(path), document, overridden))


def load_values(path: str | Path) -> dict[str, Any]:
    """The keys and values of a recipe file as they stand there. Raises InputError."""
    return _read_document(path).value


def _read_document(path: str | Path) -> Document:
    """A YAML file whose value is a mapping, empty if the file is."""
    try:
        document = read_yaml(recipe_text(path))
    except YamlProblem as problem:
        raise _input_error(_at(str(path), problem.mark), problem.text) from None
    if document.value is None:
        return replace(document, value={})
    if not isinstance(document.value, dict):
        raise _input_error(_at(str(path), document.mark(())), "expected a mapping of keys")
    return document


def parse_recipe(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from Python values. Overrides are as in `load_recipe`. Raises InputError,
    `recipe: key: problem`."""
    if not isinstance(mapping, Mapping):
        raise InputError(f"recipe: expected a mapping of keys, not {type(mapping).__name__}")
    values = with_overrides(mapping, overrides)
    return _validated(values, Recipe, _Origin("recipe"))


def with_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with each override, as in `load_recipe`, applied. Raises InputError."""
    values = deepcopy(dict(mapping)) if overrides else dict(mapping)
    for override in overrides:
        _apply_override(values, override)
    return values


def recipe_text(path: str | Path) -> str:
    """The text of a recipe file. Raises InputError."""
    raw = read_regular(Path(path), _MAX_BYTES)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _input_error(f"{path}: ", f"not UTF-8 text (byte {error.start})") from None


def _apply_override(values: dict, override: str) -> Loc:
    """Sets one `key=value` in `values` and returns its location."""
    key, equals, text = override.partition("=")
    # quantize[0].bits and quantize.0.bits are the same key.
    parts = re.sub(r"\[(-?\d+)\]", r".\1", key.strip()).split(".")
    if not equals or "" in parts:
        raise _input_error(f"override {override}: ", "expected KEY=VALUE, as in quantize[0].bits=8")
    try:
        value = read_yaml(text).value
    except YamlProblem as problem:
        raise _input_error(f"override {key}: ", problem.text) from None
    container: Any = values
    loc: Loc = ()
    for part in parts[:-1]:
        step = _step(container, part, loc, key)
        if isinstance(container, dict) and container.get(step) is None:
            container[step] = {}
        container = container[step]
        loc = (*loc, step)
    last = FORMER_KEYS.get(parts[-1], parts[-1])
    for former, now in FORMER_KEYS.items():
        if now == last and isinstance(container, dict):
            container.pop(former, None)
    step = _step(container, last, loc, key)
    container[step] = value
    return (*loc, step)


def _step(container: Any, part: str, loc: Loc, key: str) -> Any:
    """`part` of the overridden `key` as a key or index of `container`, the value at `loc`."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise _input_error(f"override {key}: ", f"{_dotted(loc)} has no keys")
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(container):
        text = f"{_dotted(loc)} is a list with indices from 0 to {len(container) - 1}"
        raise _input_error(f"override {key}: ", text)
    return int(part)


@dataclass(frozen=True)
class _Origin:
    """Where a recipe's values came from: a file with overrides, or a Python mapping."""

    name: str
    document: Document | None = None
    overridden: tuple[Loc, ...] = ()

    def mark(self, loc: Loc, at_key: bool) -> Mark | None:
        """Line and column of `loc` in the file, None if it comes from an override or a mapping."""
        if self.document is None or self._is_overridden(loc, self.document):
            return None
        return self.document.mark(loc, at_key)

    def prefix(self, loc: Loc, at_key: bool) -> str:
        if self.document is not None and self._is_overridden(loc, self.document):
            return "override "
        return _at(self.name, self.mark(loc, at_key))

    def _is_overridden(self, loc: Loc, document: Document) -> bool:
        def covers(override: Loc) -> bool:
            # It set a key below `loc`, which the file does not have, or `loc` or a key above it.
            below = override[: len(loc)] == loc and loc not in document.values
            return below or loc[: len(override)] == override

        return any(covers(override) for override in self.overridden)


def _validated(values: dict, schema: type[S], origin: _Origin) -> S:
    try:
        return schema.model_validate(values)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)

    def rank(error: ErrorDetails) -> tuple[bool, Mark]:
        """Wrong keys come before missing ones, because a typo causes both."""
        missing = error["type"] in ("missing", "too_short")
        return missing, origin.mark(_loc(error), _is_unknown(error)) or (0, 0)

    first = min(errors, key=rank)
    loc = _loc(first)
    key = f"{_dotted(loc)}: " if loc else ""
    where = origin.prefix(loc, _is_unknown(first)) + key
    raise _input_error(where, _explanation(first, loc, schema))


def _loc(error: ErrorDetails) -> Loc:
    """Where the error is; the schema's own checks of a rule name a key in their context."""
    if error["type"] == "rule":
        return (*error["loc"], error["ctx"]["key"])
    return error["loc"]


def _is_unknown(error: ErrorDetails) -> bool:
    return error["type"] == "extra_forbidden"


def _explanation(error: ErrorDetails, loc: Loc, schema: type[Section]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return _suggestion(loc, schema)
        case "missing":
            return _missing(error, schema)
        case "model_type":
            return "expected a mapping of keys"
        case "tuple_type" if isinstance(error["input"], dict) and "budget" in error["input"]:
            return "expected a list of rules; `grokquant budget` makes one of a budget"
        case "tuple_type":
            return "expected a list, each entry of which begins with a dash"
        case "too_short":
            return "expected at least one entry"
        case "value_error":
            return str(error["ctx"]["error"])
        case "rule" | "invalid_key":
            return error["msg"]
        case "literal_error":
            return _choice(error)
    return f"{error['msg'].removeprefix('Input ')}, not {_quote(error['input'])}"


def _missing(error: ErrorDetails, schema: type[Section]) -> str:
    """What to do about a required key; an empty file lacks all of them."""
    if error["input"] or len(error["loc"]) > 1:
        return "required, but missing"
    needed = [key for key, field in schema.model_fields.items() if field.is_required()]
    return f"required, but the file is empty; it needs {', '.join(needed)}"


def _choice(error: ErrorDetails) -> str:
    """The values that a key may have, and the one that was perhaps meant."""
    expected = error["ctx"]["expected"]
    text = f"expected {expected.replace(chr(39), '')}, not {_quote(error['input'])}"
    names = re.findall("'(.+?)'", expected)
    near = difflib.get_close_matches(str(error["input"]), names, n=1)
    return f"{text}; did you mean {near[0]}?" if near else text


def _section_at(loc: Loc, schema: type[Section]) -> type[Section]:
    """The section that holds the keys at `loc`: (), ("model",) or ("quantize", 1)."""
    section = schema
    for key in loc:
        if isinstance(key, str):  # a number is a place in a list of sections
            annotation = section.model_fields[key].annotation
            kinds = (annotation, *get_args(annotation))
            section = next(k for k in kinds if isinstance(k, type) and issubclass(k, Section))
    return section


def _suggestion(loc: Loc, schema: type[Section]) -> str:
    """Suggests a known key for the unknown key at `loc`."""
    known = list(_section_at(loc[:-1], schema).model_fields)
    if near := difflib.get_close_matches(str(loc[-1]).lower(), known, n=1):
        return f"unknown key, did you mean {_dotted((*loc[:-1], near[0]))}?"
    if elsewhere := list(_places_of(str(loc[-1]), schema)):
        return f"unknown key here, did you mean {' or '.join(elsewhere)}?"
    return f"unknown key, expected one of {', '.join(known)}"


def places_of(key: str) -> list[str]:
    """Where a recipe has a key of this name: quantize[0].bits, output.format."""
    field = Recipe.model_fields.get(key)
    kind = field.annotation if field else None
    is_plain = isinstance(kind, type) and not issubclass(kind, Section)
    return [*([key] if is_plain else []), *_places_of(key, Recipe)]


def _places_of(key: str, schema: type[Section]) -> Iterator[str]:
    """The same in any section."""
    for name, field in schema.model_fields.items():
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, Section):
                place = name if section is field.annotation else f"{name}[0]"
                if key in section.model_fields:
                    yield f"{place}.{key}"


def _quote(value: object) -> str:
    """A value as YAML would show it, if it is short enough for an error line."""
    if isinstance(value, (str, int, float)) or value is None:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:57] + "..."
    kinds: dict[type, str] = {dict: "mapping", list: "list"}
    return f"a {kinds.get(type(value), type(value).__name__)}"


def _dotted(loc: Loc) -> str:
    """A location as people write it: quantize[1].bits."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _at(name: str, mark: Mark | None) -> str:
    return f"{name}: " if mark is None else f"{name}:{mark[0]}:{mark[1]}: "


def _input_error(prefix: str, text: str) -> InputError:
    return InputError(" ".join((prefix + text).split()))  # YAML's own texts have several lines
