"""Arguments and options that several commands have."""

import os
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from grokquant import parallel
from grokquant.errors import InputError
from grokquant.files.published import is_repository
from grokquant.files.unfinished import RECIPE_SUFFIXES, check_directory
from grokquant.toy import TOY

# Files that mean a recipe or a model; what reads them says more of one that is missing.
_MODEL_FILES = (*RECIPE_SUFFIXES, ".json", ".gguf")


class _Path(click.ParamType):
    """A path as typed: shells leave `~` and variables as they are after `=` and in quotes."""

    name = "path"

    def convert(self, value: str, *_: object) -> str:
        from grokquant.files.typed_paths import expanded

        try:
            return expanded(value)
        except ValueError as error:
            raise InputError(str(error)) from None


class _Model(_Path):
    """A path of a model or recipe. One of nothing is refused before torch takes seconds to load,
    but for processes of torchrun, one of which tells it for all."""

    def convert(self, value: str, *context: object) -> str:
        typed = super().convert(value, *context)
        if typed.lower() == TOY and not os.path.lexists(typed):
            return TOY
        is_named = typed == TOY or is_repository(typed) or typed.lower().endswith(_MODEL_FILES)
        if not (is_named or parallel.is_shared() or os.path.lexists(typed)):
            with suppress(OSError):  # such as for a name that is too long; opening it says more
                check_directory(Path(typed))
        return typed


class _Format(click.Choice):
    """A format of results: for the name of a grid, the error says which option takes it."""

    def __init__(self) -> None:
        super().__init__(FORMATS, case_sensitive=False)

    def convert(self, value: str, *context: Any) -> str:
        try:
            return super().convert(value, *context)
        except click.BadParameter as error:
            text = f"{error.message} {_meant(value.lower())}".rstrip()
            raise click.BadParameter(text, error.ctx, error.param) from None


def _meant(name: str) -> str:
    """What to do about the name of a format that is none."""
    from grokquant.grids import named_grid

    if name.startswith("int"):
        return "Give the bits of integers by --bits."
    if grid := named_grid(name):
        return f"{grid} is a grid: `grokquant quantize MODEL --grid {grid}`"
    near = get_close_matches(name, FORMATS, n=1)
    return f"Did you mean {near[0]}?" if near else ""


PATH = _Path()
MODEL = _Model()
# The formats of `recipe/schema.py`, repeated here so that --help does not import pydantic.
FORMATS = ("compressed-tensors", "gptq", "bitsandbytes", "gguf", "bf16")
FORMAT = _Format()
# The consumers of `engines.py`, repeated for the same reason.
ENGINES = (
    "llama.cpp",
    "vllm",
    "sglang",
    "transformers-grokquant",
    "transformers",
    "lm-eval",
    "lm-eval-grokquant",
    "gptqmodel",
    "exllamav2",
)
overrides_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe key, e.g. --set model.path=DIR or --set quantize[0].bits=8.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device: cpu, cuda or cuda:N; auto uses a GPU if there is one.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an earlier result once the new one is complete."
)
