"""Arguments and options that several commands have."""

from typing import Any

import click

from grokquant.errors import InputError


class _Path(click.ParamType):
    """A path as typed: shells leave `~` and variables as they are after `=` and in quotes."""

    name = "path"

    def convert(self, value: str, *_: object) -> str:
        from grokquant.files.typed_paths import expanded

        try:
            return expanded(value)
        except ValueError as error:
            raise InputError(str(error)) from None


class _Format(click.Choice):
    """A format of results: for the name of a grid, the error says which option takes it."""

    def __init__(self) -> None:
        super().__init__(FORMATS, case_sensitive=False)

    def convert(self, value: str, *context: Any) -> str:
        try:
            return super().convert(value, *context)
        except click.BadParameter as error:
            from grokquant.grids import GRIDS

            if (grid := value.lower()) not in GRIDS:
                raise
            text = f"{error.message} {grid} is a grid: `grokquant quantize MODEL --grid {grid}`"
            raise click.BadParameter(text, error.ctx, error.param) from None


PATH = _Path()
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
