"""What each part of two-sided rounding is worth: it is left out, and the KL divergence compared.

    python eval/bench/ablation.py MODEL RESULTS [--match M] [--bits N] [--seeds N] [--part P]
                                  [--text F]

Experts, or what else the rule matches, are quantized once for each part and draw of calibration
windows, and evaluated on each text. RESULTS gets a JSON line for each; what is there is not
measured again, so that a program that was stopped goes on. Prints the table: ratios to `gptq` on
the same windows of calibration and test, their mean and its standard error over draws and texts.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))  # where comparison is

from comparison import mean_with_error

import grokquant
from grokquant.methods import two_sided

WINDOWS = {"samples": 128, "length": 256}
TEST_WINDOWS = {"samples": 96, "length": 256}
BASE = "gptq"


@dataclass(frozen=True)
class Part:
    """Keys of the rule, and what is put in place of names of `two_sided`."""

    keys: Mapping[str, object] = field(default_factory=dict)
    patches: Mapping[str, object] = field(default_factory=dict)


def alike(blocks: Tensor) -> Tensor:
    """A metric of the same shape in which all outputs count alike."""
    return torch.eye(blocks.shape[-1]).expand_as(blocks).contiguous()


def outputs_alike(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: alike(make(*given))


def stays(S: Tensor, _: object) -> Tensor:
    """The change of a target that is the stored matrix."""
    return S.zero_()


PARTS = {
    BASE: Part({"method": "gptq"}),
    "two-sided": Part(),
    "descent": Part({"descent": True}),
    "gradients": Part({"metric": "gradients"}),
    "gradients and descent": Part({"metric": "gradients", "descent": True}),
    "floats not fitted": Part({"refit": False}),
    "targets are the stored matrices": Part(patches={"solve_": stays}),
    "one ridge": Part(patches={"_best_ridge": lambda *given: two_sided._RIDGE}),
    "one side": Part(
        patches={
            "metric_of_sum": outputs_alike(two_sided.metric_of_sum),
            "metric_of_inner": outputs_alike(two_sided.metric_of_inner),
        }
    ),
}


@dataclass(frozen=True)
class Setup:
    model: str
    bits: int
    group: int
    texts: Sequence[str | None]
    match: str = "layers.*.experts.*"

    def quantized(self, part: Part, seed: int, output: Path) -> Path:
        """Matrices of the model, rounded with a part on or off; the rest stays."""
        rule = {"match": self.match, "method": "two-sided", "bits": self.bits}
        recipe = {
            "model": {"path": self.model},
            "calibration": WINDOWS | {"seed": seed},
            "quantize": [rule | {"group": self.group, **part.keys}],
            "output": {"path": str(output), "format": "gptq"},
        }
        with patch.dict(vars(two_sided), part.patches):
            return grokquant.quantize(recipe)

    def measured(self, name: str, seed: int, texts: Iterable[str | None]) -> Iterator[dict]:
        """A line for each text."""
        with tempfile.TemporaryDirectory() as directory:
            output = self.quantized(PARTS[name], seed, Path(directory) / "output")
            for text in texts:
                report = grokquant.evaluate(
                    output, self.model, text=text, **TEST_WINDOWS, quick=True
                )
                kld = report.kld.mean
                yield self.key(name, seed, text) | {"kld": kld.value, "kld_error": kld.error}

    def key(self, name: str, seed: int, text: str | None) -> dict:
        return {
            "bench": "ablation",
            "model": Path(self.model).name,
            "match": self.match,
            "bits": self.bits,
            "group": self.group,
            "part": name,
            "seed": seed,
            "text": Path(text).name if text else "the recipe's",
        }


def read(results: Path) -> list[dict]:
    return list(map(json.loads, results.read_text().splitlines())) if results.exists() else []


def is_of(row: dict, key: dict) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def ratios(rows: Sequence[dict], setup: Setup, name: str) -> list[float]:
    """KL divergences with a part over those of the base, for each draw and text that both have."""
    found = []
    for row in rows:
        if not is_of(row, setup.key(name, row["seed"], None) | {"text": row["text"]}):
            continue
        same = {key: row[key] for key in ("model", "match", "bits", "group", "seed", "text")}
        found += [row["kld"] / base["kld"] for base in rows if is_of(base, same | {"part": BASE})]
    return found


def table(rows: Sequence[dict], setup: Setup) -> str:
    lines = ["| | ratio | draws and texts |", "|---|---|---|"]
    for name in PARTS:
        if found := ratios(rows, setup, name):
            lines.append(f"| {name} | {mean_with_error(found, 3)} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("results", type=Path)
    parser.add_argument("--match", default=Setup.match, help="the matrices")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--text", action="append", help="default: that of the recipe")
    options = parser.parse_args()
    texts = options.text or [None]
    setup = Setup(options.model, options.bits, options.group, texts, options.match)
    for seed, name in product(range(options.seeds), options.part or PARTS):
        rows = read(options.results)
        keys = {text: setup.key(name, seed, text) for text in setup.texts}
        left = [text for text, key in keys.items() if not any(is_of(r, key) for r in rows)]
        for row in setup.measured(name, seed, left) if left else ():
            with options.results.open("a") as file:
                print(json.dumps(row), file=file)
    print(table(read(options.results), setup))


if __name__ == "__main__":
    main()
