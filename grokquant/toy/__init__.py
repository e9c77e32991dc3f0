"""The embedded toy, a small Grok in the layout of the release. `eval/train_toy.py` trains it."""

from pathlib import Path

TOY = "toy"  # what recipes and commands call it
TOY_PATH = Path(__file__).parent / "release"
TOY_LENGTH = 256  # tokens of a row in its training
