"""`python -m grokquant` is the command line."""

from grokquant.cli import main

main()
