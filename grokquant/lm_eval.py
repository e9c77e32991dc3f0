"""lm-eval's own command line, for every output of grokquant.

    python -m grokquant.lm_eval run --model hf --model_args pretrained=OUT --tasks NAME

`lm_eval` by itself imports transformers alone, which reads only some of them; here Python has
imported this package first.
"""

import sys

import click


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        extra = 'pip install "grokquant[eval]"'
        click.echo(f"grokquant: lm-eval needs {extra} ({error.name} is missing)", err=True)
        sys.exit(2)
    cli_evaluate()


if __name__ == "__main__":  # processes that vLLM spawns import this module
    main()
