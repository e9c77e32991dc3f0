"""convert: the same codes in another format."""

import os

import click

from grokquant.cli.group import command
from grokquant.cli.options import FORMAT, PATH, json_option, overwrite_option
from grokquant.cli.printing import print_json, say


@command()
@click.argument("result", type=PATH)
@click.option(
    "--format",
    "output_format",
    required=True,
    type=FORMAT,
    help="Target format.",
)
@click.option("--output", type=PATH, metavar="DIR", help="New directory  [default: RESULT-FORMAT]")
@overwrite_option
@click.option(
    "--tokenizer",
    "output_tokenizer",
    type=click.Choice(("source", "none"), case_sensitive=False),
    default="source",
    show_default=True,
    help="Tokenizer in GGUF files: that of RESULT, or none.",
)
@json_option
def convert(
    result: str,
    output_format: str,
    output: str | None,
    overwrite: bool,
    output_tokenizer: str,
    as_json: bool,
) -> None:
    """Repack RESULT into another format.

    RESULT is a quantized checkpoint; its source is not needed. Codes and scales are copied bit for
    bit. If the format cannot hold them, the command fails and nothing is written.
    """
    from grokquant.job import pipeline
    from grokquant.job.convert import conversion_recipe
    from grokquant.reporting.terminal import RunProgress

    place = output or f"{os.path.realpath(result)}-{output_format}"
    recipe = conversion_recipe(result, output_format, place, output_tokenizer)
    with RunProgress(life=click.get_current_context().obj) as progress:
        written = pipeline.quantize(recipe, progress, overwrite=overwrite)
    if as_json:
        print_json(progress.as_dict(written))
    else:
        say(*progress.summary(written))
