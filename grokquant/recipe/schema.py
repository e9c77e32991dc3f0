"""The keys of a recipe: what to make, never how to run.

No key names a device, rank or work directory: a recipe means the same on every machine.
"""

import io
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from dataclasses import Field as DataclassField
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from grokquant.files.published import is_repository, published_path
from grokquant.files.typed_paths import expanded
from grokquant.grids import GRIDS, named_grid
from grokquant.methods import METHODS
from grokquant.types import BudgetUnit

# Texts of every installation, see `text/installed.py`.
BUILT_IN_TEXTS = ("python-docs", "python-code", "package-docs")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
# Of compressed texts; parquet files are compressed inside.
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

_SIZE_UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}

# Keys that each method takes besides match and method, with their defaults.
_METHOD_KEYS: dict[str, dict[str, Any]] = {
    name: {**method.grid_keys, **{key.name: key.default for key in fields(method.settings)}}
    for name, method in METHODS.items()
}
# Former names of keys, which are still accepted, and their present names.
FORMER_KEYS = {"data": "text"}
# The same of methods: what was kept, integers of the source, became floats.
FORMER_METHODS = {"keep": "unquantized"}

# Groups that a recipe may choose; grids with other groups have just the one.
_CHOSEN_GROUPS = {
    size for grid in GRIDS.values() if grid.other_groups for size in grid.groups if size is not None
}
if TYPE_CHECKING:
    GridName: TypeAlias = str
    GroupSize: TypeAlias = int | str
else:  # values that pydantic lists in errors and in the schema
    GridName = Literal[tuple(GRIDS)]
    GroupSize = Literal[(*sorted(_CHOSEN_GROUPS), "channel", "release")]


def check_text(text: str) -> str:
    """Returns `text`, its `~` and variables replaced, if it is a valid name of a text.

    That is one of BUILT_IN_TEXTS, a .txt, .json, .jsonl or .parquet file, or
    `hub/name[:config[:split]]` of the datasets library. Raises ValueError otherwise.
    """
    as_typed = text
    text = expanded(text)
    if text != as_typed and not is_file(text) and not Path(text).is_absolute():
        # The value of a variable must not be asked for at the hub.
        raise ValueError(f"expected a file or an absolute path after expansion of {as_typed!r}")
    if text in BUILT_IN_TEXTS or is_file(text) or "/" in text.partition(":")[0]:
        return text
    if near := get_close_matches(text, BUILT_IN_TEXTS, n=1):
        raise ValueError(f"no such text {text!r}, did you mean {near[0]}?")
    raise ValueError(
        f"expected {', '.join(BUILT_IN_TEXTS)}, a .txt, .json, .jsonl or .parquet file, or a "
        f"datasets name such as hub/name:config:split, not {text!r}"
    )


def is_file(text: str) -> bool:
    """Whether the name of a text is that of a file."""
    return text_suffix(text) in TEXT_SUFFIXES


def text_suffix(text: str) -> str:
    """The suffix that says what a text is, in lower case and without that of its compression."""
    path = Path(text)
    packed = path.suffix.lower() in PACKED_SUFFIXES
    return Path(path.stem if packed else path).suffix.lower()


def is_repository_text(text: str) -> bool:
    """Whether the name of a text is that of a dataset on the hub."""
    return not is_file(text) and is_repository(text.partition(":")[0])


def _check_shares(texts: Mapping) -> dict:
    if not texts:
        raise ValueError("expected at least one text")
    return {check_text(name) if isinstance(name, str) else name: texts[name] for name in texts}


def _check_path(path: object) -> object:
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if isinstance(path, str) and (not path.strip() or re.search("[\0\ud800-\udfff]", path)):
        raise ValueError(f"expected a path, not {path!r}")
    return expanded(path) if isinstance(path, str) else path


def parse_size(size: str) -> int:
    """Bytes of a size such as "5GB" (decimal) or "4GiB" (binary). Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMG]i?B)", size.strip())
    if not match:
        raise ValueError(f"expected a size with a unit, such as 500MB or 2GiB, not {size[:40]!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _format_size(size: int) -> str | int:
    fitting = (name for name, unit in _SIZE_UNITS.items() if size % unit == 0)
    unit = next(fitting, None)
    return size if unit is None else f"{size // _SIZE_UNITS[unit]}{unit}"


PathText = Annotated[str, BeforeValidator(_check_path)]
TextName = Annotated[
    str,
    BeforeValidator(lambda text: check_text(text) if isinstance(text, str) else text),
    Field(validation_alias=AliasChoices("text", "data")),
]
# Texts and the share of the sequences that each of them gives.
TextShares = Annotated[
    str | dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]],
    BeforeValidator(lambda text: _check_shares(text) if isinstance(text, Mapping) else text),
    BeforeValidator(lambda text: check_text(text) if isinstance(text, str) else text),
    Field(validation_alias=AliasChoices("text", "data")),
]
TextField = Annotated[str, Field(min_length=1, max_length=200)] | None
ByteSize = Annotated[
    int,
    BeforeValidator(lambda size: parse_size(size) if isinstance(size, str) else size),
    Field(ge=1),
    PlainSerializer(_format_size),
]
Rows = Annotated[int, Field(ge=1)]
RowLength = Annotated[int, Field(ge=8)]


class Section(BaseModel):
    """Base of all sections of a recipe: frozen, strictly typed, without unknown keys.

    The string below a key is its description in the documentation.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _fold_case(cls, values: Any) -> Any:
        """Choices may be written in capitals: GGUF is gguf."""
        return _folded(cls.model_fields, values)


def _folded(fields: Mapping[str, FieldInfo], values: Any) -> Any:
    """`values` with the choices among them in small letters, where the schema has them so."""
    if not isinstance(values, Mapping):
        return values
    found = dict(values)
    for key, value in values.items():
        choices = get_args(fields[key].annotation) if key in fields else ()
        if isinstance(value, str) and value not in choices and value.lower() in choices:
            found[key] = value.lower()
    return found


class ModelSection(Section):
    """The checkpoint to quantize."""

    path: PathText
    """A release directory (the parent of `ckpt-0`), a safetensors directory with a config.json, or
    `toy` for the small Grok inside the package."""
    config: PathText | None = None
    """A config.json for a release that is not Grok-1 and has no config.json of its own."""


class CalibrationSection(Section):
    """The calibration text; only methods that need calibration data use it."""

    text: TextShares = "python-docs"
    """`python-docs` (the documentation inside every Python installation), `python-code` (the code
    of its standard library), `package-docs` (the documentation of numpy and scipy), a .txt, .json,
    .jsonl or .parquet file (also .gz, .bz2, .xz, .zst), or a name for the datasets library such as
    `hub/name:config:split`. Several texts are given with their shares:
    `{python-docs: 0.3, chats.jsonl: 0.7}`."""
    field: TextField = None
    """The field of a record that holds a text, a conversation, which the model's chat template
    renders, or token numbers. Unset: the first of `text`, `messages`, `conversations`, `input_ids`
    and `content`."""
    samples: Rows = 128
    """Number of calibration sequences; fewer if the text is too short."""
    length: RowLength = 2048
    """Tokens per sequence."""
    packed: bool = True
    """Documents are joined and cut into sequences. `false`: each sequence is the beginning of one
    document; documents of fewer than `length` tokens are skipped."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Random seed for choosing the sequences; the same seed chooses the same ones."""

    @property
    def shares(self) -> dict[str, float]:
        """The texts, and the part of the sequences that each of them gives; the sum is 1."""
        if isinstance(self.text, str):
            return {self.text: 1.0}
        total = sum(self.text.values())
        return {name: share / total for name, share in self.text.items()}

    @property
    def samples_of(self) -> dict[str, int]:
        """The number of sequences from each text: whole numbers whose sum is `samples`."""
        ends = [0, *(round(self.samples * end) for end in accumulate(self.shares.values()))]
        parts = zip(self.shares, pairwise(ends), strict=True)
        return {name: stop - start for name, (start, stop) in parts}


class _Rule(Section):
    """How the matrices that `match` selects are stored. The first matching rule applies.

    Keys that the method does not accept must be unset.
    """

    match: Annotated[str, Field(min_length=1, max_length=200)]
    """A glob over matrix names such as `layers.3.experts.5.down`: `*` matches any text
    including dots, `?` matches any character, and `[0-3]` matches one character of a set."""
    method: str
    grid: GridName = "integer"
    """`integer`, described by `bits`, `group` and `symmetric`, or a named grid. `nf4`, `fp4` and
    `llm_int8` are grids of bitsandbytes; the others are grids of llama.cpp."""
    bits: Literal[2, 3, 4, 8] | None = None
    """Bits of an integer; required if the method rounds to `grid: integer`."""
    group: GroupSize | None = None
    """Number of neighbouring input features that share a scale; `channel` is a whole row.
    Only lossless methods accept `release`, which keeps the stored groups. With these methods, a
    number splits larger groups and repeats their scales, which changes no weight."""
    symmetric: bool = True
    """Integers symmetric around zero; `false` adds a zero point to each group."""
    scale_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type of the scales. Unset: the data type that the output format uses."""

    @property
    def settings(self) -> Any:
        """The settings of the method, as the dataclass that it declares."""
        declared = METHODS[self.method].settings
        return declared(**{key.name: getattr(self, key.name) for key in fields(declared)})

    def matches(self, unit_name: str) -> bool:
        return fnmatchcase(unit_name, self.match)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Rejects keys that the method does not take and fills in defaults. null means unset."""
        values = _folded(cls.model_fields, values)  # before the base does it: keys depend on them
        method = values.get("method") if isinstance(values, dict) else None
        method = FORMER_METHODS.get(method, method) if isinstance(method, str) else None
        if method not in _METHOD_KEYS:
            return values
        given = {key: value for key, value in values.items() if value is not None}
        given["method"] = method
        for key in given:
            if key in cls.model_fields and key not in {"match", "method", *_METHOD_KEYS[method]}:
                takers = ", ".join(name for name, keys in _METHOD_KEYS.items() if key in keys)
                text = f"not allowed with method {method}, only with {takers} (null unsets it)"
                raise _rule_error(key, text)
        defaults = _METHOD_KEYS[method]
        if fixed := _fixed_keys(given.get("grid")):
            if key := next((key for key in fixed if key in given), None):
                raise _rule_error(key, f"fixed by grid {given['grid']} (null unsets it)")
            defaults = defaults | {"group": None}
        return defaults | given

    @model_validator(mode="after")
    def _check_grid(self) -> "_Rule":
        if "grid" in METHODS[self.method].grid_keys:
            if self.bits is None and self.grid == "integer":
                raise _rule_error("bits", f"required by method {self.method}: 2, 3, 4 or 8")
            if self.group == "release":
                raise _rule_error(
                    "group", f"method {self.method} cannot keep the release's own groups"
                )
            row = GRIDS[self.grid]
            if self.group and (None if self.group == "channel" else self.group) not in row.groups:
                text = f"grid {self.grid} has groups of {row.group_names}, not {self.group}"
                raise _rule_error("group", text)
        return self

    @model_serializer
    def _taken_keys(self) -> dict[str, Any]:
        keys = ("match", "method", *_METHOD_KEYS[self.method])
        return {key: getattr(self, key) for key in keys if key not in _fixed_keys(self.grid)}


def _fields_of_methods() -> dict[str, Any]:
    """The fields of a rule that depend on the table of methods."""
    texts = ", ".join(f"`{name}` {method.text}" for name, method in METHODS.items())
    names = Literal[tuple(METHODS)]  # type: ignore[valid-type]
    described: dict[str, Any] = {"method": (names, Field(description=f"{texts}."))}
    for method in METHODS.values():
        types = get_type_hints(method.settings, include_extras=True)
        for key in fields(method.settings):
            field = (types[key.name], key.default)
            _check_key(method.name, key, described.get(key.name, field) == field)
            described[key.name] = field
    return described


def _check_key(method: str, key: DataclassField, alone: bool) -> None:
    """Raises TypeError for a key that a rule cannot have: all methods share one set of names."""
    name = f"method {method}: key {key.name}"
    if key.name in _Rule.model_fields:
        raise TypeError(f"{name}: every rule has a key of this name already")
    if not alone:
        raise TypeError(f"{name}: another method has it with another type or default")
    if key.default is MISSING:
        raise TypeError(f"{name}: has no default")


if TYPE_CHECKING:

    class Rule(_Rule): ...
else:
    Rule = create_model(
        "Rule",
        __base__=_Rule,
        __doc__=_Rule.__doc__,
        __module__=__name__,
        # It has no source that pydantic would find: looking for one takes half a second.
        __cls_kwargs__={"use_attribute_docstrings": False},
        **_fields_of_methods(),
    )


class BudgetSection(Section):
    """Matrices that share a number of bits: each part of them gets the grid that serves the model
    best."""

    bits_per_weight: Annotated[float, Field(gt=0, le=16, strict=False)]
    """The average over these matrices, as stored: codes, scales and all else in their tensors."""
    grids: Annotated[tuple[Any, ...], Field(strict=False, min_length=2)]
    """The grids to choose from: names such as `q3_k`, or the keys of a rule about its grid, such as
    `{bits: 3, group: 64}`."""
    method: str = "gptq"
    """The method that rounds these matrices, as in a rule."""
    match: Annotated[str, Field(min_length=1, max_length=200)] = "layers.*.experts.*"
    """A glob over matrix names, as in a rule. Matrices that `rules` match are left to them."""
    unit: BudgetUnit | None = None
    """What has one grid: `layer` (all experts of a layer, all of its attention), `projection` (gate
    of all experts of a layer) or `expert` (each matrix). Unset: the smallest unit that the readers
    of the output format take."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rule that gives all these matrices each of the grids."""
        return tuple(Rule(**values) for values in map(self._rule, self.grids))

    def _rule(self, grid: Any) -> dict[str, Any]:
        keys = {"grid": grid.lower()} if isinstance(grid, str) else dict(grid)
        return {"match": self.match, "method": self.method} | keys

    @model_validator(mode="after")
    def _check_grids(self) -> "BudgetSection":
        """Each grid must make a rule, and another one than those before it."""
        rounding = [name for name, method in METHODS.items() if "grid" in method.grid_keys]
        if self.method not in rounding:
            text = f"expected one of {', '.join(rounding)}, not {self.method!r}"
            raise _rule_error("method", text)
        seen: list[Rule] = []
        for index, grid in enumerate(self.grids):
            rule = self._checked(index, grid)
            if rule in seen:
                raise _rule_error("grids", f"{grid} is named twice")
            seen.append(rule)
        return self

    def _checked(self, index: int, grid: Any) -> Rule:
        place = f"entry {index}"
        if isinstance(grid, str) and grid.lower() not in GRIDS:
            raise _rule_error("grids", f"{place}: expected one of {', '.join(GRIDS)}, not {grid!r}")
        if not isinstance(grid, str | dict) or {"match", "method"} & {*grid}:
            text = f"{place}: expected the name of a grid, or keys such as {{bits: 3, group: 64}}"
            raise _rule_error("grids", text)
        try:
            return Rule(**self._rule(grid))
        except ValidationError as invalid:
            error = invalid.errors(include_url=False)[0]
        key = error["ctx"]["key"] if error["type"] == "rule" else error["loc"][-1]
        text = "unknown key" if error["type"] == "extra_forbidden" else error["msg"]
        raise _rule_error("grids", f"{place}: {key}: {text}")


class BudgetedRules(Section):
    """`quantize` of a recipe with a budget: the budget, and rules for other matrices."""

    budget: BudgetSection
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = ()
    """Rules as in a recipe without a budget. They come first."""


class ExpertsSection(Section):
    """How experts with few calibration tokens are handled."""

    blend_tokens: Annotated[int, Field(ge=0)] | None = None
    """Below this number of routed tokens, an expert's Hessian is blended with the Hessian of all
    tokens. Unset: 4 times the input features of the matrix, or of its `hessian_block`."""
    min_tokens: Annotated[int, Field(ge=0)] = 32
    """Below this number of routed tokens, an expert is rounded to nearest; this counts as a
    fallback."""


class OutputSection(Section):
    """Where and in which format the result is written."""

    path: PathText
    """The new directory. One with other contents is rejected; so is a finished result of something
    else, unless the run is told to overwrite it."""
    format: Literal["compressed-tensors", "gptq", "bitsandbytes", "gguf", "bf16"] = (
        "compressed-tensors"
    )
    """The format of the checkpoint on disk."""
    tokenizer: Literal["source", "none"] = "source"
    """What `gguf` stores as tokenizer. `source`: that of the source; without one, the recipe is
    rejected. `none`: none, so that programs take and give token numbers only. Other formats have
    the source's tokenizer files beside the weights, or none if it has none."""
    shard: ByteSize = 500 * 10**6
    """Maximum file size, such as `500MB` or `2GiB`. A file holds one or more whole experts of
    one layer. A run commits its output file by file, so a killed run repeats at most one file."""
    lm_head: bool = False
    """Write a head that is tied to the embedding as a tensor of its own. SGLang asks for it."""
    extra_tensors: Literal["carry", "leave_out"] = "carry"
    """Tensors of the source that its model does not use in transformers, such as the layers for
    multi-token prediction. `carry`: copied unchanged. `leave_out`: not written. `plan` and the
    report name them in either case; `gguf` cannot hold them."""
    names: Literal["published", "gptqmodel"] = "published"
    """The names of tensors. `published`: those of the model's own files, which engines read.
    `gptqmodel`: those under which GPTQModel looks for a Mixtral in `gptq`, and engines do not."""
    remote_code: bool = False
    """Add a Python file with the model's classes, so that transformers opens the result without
    grokquant, by `trust_remote_code=True`. For Grok-1, in bf16 and compressed-tensors."""

    @field_validator("format", mode="before")
    @classmethod
    def _no_grid_or_former_format(cls, value: object) -> object:
        if value == "int-quantized":
            raise ValueError(
                "int-quantized is no longer written, because engines do not read it; "
                "compressed-tensors holds the same integers"
            )
        if isinstance(value, str) and (grid := named_grid(value)):
            formats = " or ".join(GRIDS[grid].formats)
            raise ValueError(
                f"{value[:40]} is no format: the rules say grid: {grid}, the format is {formats}"
            )
        return value


class EvalSection(Section):
    """The held-out text on which the result is compared with its source."""

    text: TextName = "python-docs"
    """Like `calibration.text`; `python-docs`, `python-code` and `package-docs` have a part that
    calibration does not use."""
    field: TextField = None
    """Like `calibration.field`."""
    samples: Rows = 64
    """Number of sequences, from the start of the text; fewer if the text is too short."""
    length: RowLength = 2048
    """Tokens per sequence."""
    packed: bool = True
    """Like `calibration.packed`."""


class _AnyRecipe(Section):
    """The keys of recipes with and without a budget."""

    model: ModelSection
    calibration: CalibrationSection = CalibrationSection()
    quantize: Any
    experts: ExpertsSection = ExpertsSection()
    max_fallbacks: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of the matrices of a kind, such as `experts.down`, that may fall back to a
    simpler method; if more do, the run fails and says what helps. Experts that no token reaches
    although an average one gets 4 times `experts.min_tokens` are named, but not counted."""
    output: OutputSection
    eval: EvalSection = EvalSection()


class Recipe(_AnyRecipe):
    """One run: the model, how each matrix is quantized, the output and its evaluation."""

    quantize: Annotated[tuple[Rule, ...], Field(strict=False, min_length=1)]

    def rule_index(self, unit_name: str) -> int | None:
        """The index of the first rule that matches `unit_name`, None if none does."""
        matching = (i for i, rule in enumerate(self.quantize) if rule.matches(unit_name))
        return next(matching, None)

    def published(self) -> "Recipe":
        """The recipe without absolute paths, see `published_path`."""
        sections = {
            "model": {"path", "config"},
            "calibration": {"text"},
            "output": {"path"},
            "eval": {"text"},
        }
        return self.model_copy(
            update={name: _published(getattr(self, name), keys) for name, keys in sections.items()}
        )

    def to_yaml(self) -> str:
        """The recipe as YAML with all defaults; `load_recipe` reads the same recipe from it."""
        return to_yaml(self.model_dump(exclude_none=True))


class BudgetRecipe(_AnyRecipe):
    """A recipe whose grids are still to be chosen within a budget."""

    quantize: BudgetedRules

    def with_rules(self, rules: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """The keys of the recipe that has these rules, after its own: those that were given."""
        values = self.model_dump(mode="json", exclude_unset=True)
        own = values["quantize"].get("rules", [])
        return values | {"quantize": [*own, *rules]}


def to_yaml(values: dict[str, Any]) -> str:
    """Keys and values of a recipe as YAML."""
    yaml = YAML()
    yaml.width = 1 << 30  # never fold a long path
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _published(section: Section, keys: set[str]) -> Section:
    values = {key: getattr(section, key) for key in keys}
    changed = {key: _published_text(value) for key, value in values.items() if value is not None}
    return section.model_copy(update=changed)


def _published_text(text: str | dict[str, float]) -> str | dict[str, float]:
    if isinstance(text, str):
        return published_path(text)
    shares: dict[str, float] = {}
    for name, share in text.items():
        shown = published_path(name)
        shares[shown] = shares.get(shown, 0) + share
    return shares


def _fixed_keys(grid: object) -> tuple[str, ...]:
    """The keys that a named grid fixes; with some grids the recipe still chooses the group."""
    if not isinstance(grid, str) or grid == "integer" or grid not in GRIDS:
        return ()
    fixed = ("bits", "symmetric", "scale_dtype")
    return fixed if GRIDS[grid].other_groups else (*fixed, "group")


def _rule_error(key: str, text: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{text}", {"key": key, "text": text})
