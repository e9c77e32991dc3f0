"""What every program of this directory is given: MODEL TOKENS OUTPUT BITS GROUP.

TOKENS is a JSON Lines file of calibration sequences, `{"input_ids": [...]}` each.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Given:
    """`rows` are the calibration sequences, all of the same length."""

    model: str
    rows: list[list[int]]
    output: str
    bits: int
    group: int


def given() -> Given:
    model, tokens, output, bits, group = sys.argv[1:]
    lines = Path(tokens).read_text().splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    return Given(model, rows, output, int(bits), int(group))
