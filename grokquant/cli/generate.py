"""generate: text from a checkpoint."""

import sys

import click

from grokquant import escaping
from grokquant.cli.group import command
from grokquant.cli.options import MODEL, device_option
from grokquant.reporting.signs_of_life import SignsOfLife


@command(doing="loading the model", less_memory="; set --max-memory")
@click.argument("path", type=MODEL)
@click.option("--prompt", required=True, help="Text to continue.")
@click.option(
    "--tokens",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of new tokens.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 100),
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Random seed for sampling.",
)
@click.option("--chat", is_flag=True, help="Put the text into the model's chat template.")
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Hold at most this much of the weights, such as 16GB; read the others when needed.",
)
@click.option(
    "--dequantize", is_flag=True, help="Dequantize all weights at once: up to 4x the memory."
)
@device_option
def generate(
    path: str,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    max_memory: str | None,
    dequantize: bool,
    device: str,
) -> None:
    """Generate text from a checkpoint.

    PATH is an xAI release, a bf16 Hugging Face directory, a quantized output or `toy`. Weights of
    an output stay packed and are read when they are first used. With --max-memory a model larger
    than the memory of the machine runs too, slowly, and ends with a line on how much was read.
    """
    from grokquant.humanize import size
    from grokquant.runtime.generate import generate_text

    life: SignsOfLife = click.get_current_context().obj

    def write(piece: str) -> None:
        life.say = lambda line: None  # the text is one
        click.echo(escaping.lines(piece) if sys.stdout.isatty() else piece, nl=False)

    packed = False if dequantize else None
    made = generate_text(
        path, prompt, tokens, temperature, seed, device, packed, max_memory, chat, write
    )
    click.echo()
    if max_memory and made.new_tokens:
        read = size(made.bytes_read / made.new_tokens)
        click.echo(f"{made.hit_rate:.0%} of matrices in memory, {read} read per token", err=True)
