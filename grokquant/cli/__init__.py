"""The command line. stdout carries results, stderr progress; errors are one line.

Commands import what they need when they run: help and usage errors answer without waiting for it.
A new command is a module beside this one and a row of `_COMMANDS`.
"""

import os
import signal

import click

from grokquant.cli.convert import convert
from grokquant.cli.evaluate import compare, evaluate
from grokquant.cli.generate import generate
from grokquant.cli.group import Commands
from grokquant.cli.inspect import inspect, verify
from grokquant.cli.quantize import budget, plan, quantize, recipes
from grokquant.version import __version__

__all__ = ["main"]

_COMMANDS = (
    recipes,
    plan,
    budget,
    quantize,
    verify,
    evaluate,
    compare,
    inspect,
    convert,
    generate,
)

_EXIT_CODES = """
Exit codes: 0 success; 1 a quality or verification gate failed; 2 invalid command, recipe or input,
or too little memory; 130 interrupted.
"""

_SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}


@click.group(cls=Commands, epilog=_EXIT_CODES, context_settings=_SETTINGS)
@click.version_option(__version__)
def main() -> None:
    """Quantize Grok-1 and similar models without loading them whole, and measure the loss.

    \b
    grokquant quantize toy                         quantize the embedded toy, in a minute
    grokquant eval toy-int4 --reference toy        measure perplexity, KL divergence, routing
    grokquant generate toy-int4 --prompt "The "    generate text with the result
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # shells ignore SIGINT in the background
        signal.signal(number, signal.default_int_handler)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers reads it at import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # traces of processes that were lost


for _command in _COMMANDS:
    main.add_command(_command)
