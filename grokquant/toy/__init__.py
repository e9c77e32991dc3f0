"""The embedded toy: a small Grok, trained by `train.py`, stored in the release's own layout."""

from pathlib import Path

TOY_PATH = Path(__file__).parent / "release"
