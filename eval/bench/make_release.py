"""Writes a checkpoint of Grok-1's true shapes in the release's layout, with any number of layers.

    python eval/bench/make_release.py DIR [--layers 1] [--seed 0]

One layer takes 4.93 GB, the embedding 3.22 GB; every file has the size of the real one. Weights are
random but shaped as trained ones are: heavy tails in a row, rows of different scale. The tokenizer
is the toy's, whose ids are a part of the vocabulary. The same seed writes the same bytes.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grokquant.families.grok_model import Grok1Config
from grokquant.sources.release import EMBEDDING, LAYER, TOP, leaf_names
from grokquant.toy import TOY_PATH
from grokquant.toy.release_writer import Chunked, Leaf, Payload, write_release

# The release splits the input features of its row-parallel matrices into groups with own scales.
GROUPS = {"moe/linear_1": 8, "multi_head_attention/linear": 8}
# Means of the real first layer's norms; the final one keeps next-token distributions open.
NORMS = {"rms_norm": 0.73, "rms_norm_1": 0.97, "rms_norm_2": 0.29, "rms_norm_3": 0.54}
FINAL_NORM_MEAN, NORM_SPREAD = 0.35, 0.1
ROW_SPREAD = 0.3  # of the logarithms of a matrix's scales
ROUTER_LOGITS = 0.7  # standard deviation: every expert gets tokens, none gets most of them
TAIL = 0.05  # h of Tukey's h-distribution z * exp(h z^2 / 2); its kurtosis is 4.4
CHUNK = 1 << 24  # values in memory at once, besides the pool of a leaf


def write_random_grok(directory: Path, config: Grok1Config, seed: int = 0) -> None:
    """Writes a release of the shapes in `config`, with config.json and a tokenizer.

    Needs the memory of one expert matrix in int8 and a few hundred MB.
    """
    leaves = ((name, _leaf(name, config, seed)) for name in leaf_names(config.num_hidden_layers))
    write_release(directory, _config_json(config), leaves)
    shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "tokenizer.model")


def _config_json(config: Grok1Config) -> dict:
    fields = config.to_dict() | {"architectures": ["Grok1ForCausalLM"]}
    return {name: fields[name] for name in json.loads((TOY_PATH / "config.json").read_text())}


def _leaf(name: str, config: Grok1Config, seed: int) -> Leaf:
    random = np.random.default_rng([seed, *name.encode()])
    slot = name if name in TOP else name.split("/", 2)[2]
    leaf = (TOP | LAYER)[slot]
    shape = tuple(_sizes(config)[letter] for letter in leaf.dimensions)
    if leaf.quantized:
        return _quantized(shape, GROUPS.get(slot, 1), random)
    if len(shape) == 1:
        values = random.standard_normal(shape, np.float32)
        return torch.from_numpy(NORMS.get(slot, FINAL_NORM_MEAN) * (1 + NORM_SPREAD * values))
    if slot == EMBEDDING:
        return _normal(shape, 1 / config.embedding_multiplier_scale, random)
    return _normal(shape, ROUTER_LOGITS / (NORMS["rms_norm_2"] * math.sqrt(shape[0])), random)


def _sizes(config: Grok1Config) -> dict[str, int]:
    """Sizes by the letters of `release.LeafSpec`."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "E": config.num_local_experts,
        "F": config.intermediate_size,
        "Q": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
    }


def _normal(shape: tuple[int, ...], scale: float, random: np.random.Generator) -> Payload:
    rows, columns = shape
    at_once = max(1, CHUNK // columns)
    chunks = (
        torch.from_numpy(random.standard_normal((min(at_once, rows - row), columns), np.float32))
        for row in range(0, rows, at_once)
    )
    return Chunked(torch.float32, shape, (chunk * scale for chunk in chunks))


def _quantized(
    shape: tuple[int, ...], groups: int, random: np.random.Generator
) -> tuple[Payload, Payload]:
    """Codes [.., K, N] and scales [.., groups, N] as absmax rounding of each group leaves them."""
    *lead, rows, columns = shape
    pool = _pool(rows, columns, groups, random)
    matrices = (part for _ in range(math.prod(lead)) for part in _shuffled(pool, groups, random))
    of_rows = random.standard_normal((*lead, 1, columns), np.float32)
    of_groups = random.standard_normal((*lead, groups, columns), np.float32)
    spread = np.exp(ROW_SPREAD * (of_rows + of_groups / 4))
    # The largest of a group's weights is some 5.5 standard deviations, and one keeps variance.
    scales = spread * (5.5 / 127 / math.sqrt(rows))
    return Chunked(torch.int8, shape, matrices), torch.from_numpy(scales).to(torch.bfloat16)


def _pool(rows: int, columns: int, groups: int, random: np.random.Generator) -> np.ndarray:
    """Heavy-tailed int8 codes [groups, rows / groups, columns], 127 the largest of each group."""
    levels = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    z = torch.special.ndtri(levels)
    quantiles = (z * torch.exp(TAIL / 2 * z.square())).float().numpy()
    pool = np.empty((groups, rows // groups, columns), np.int8)
    at_once = max(1, CHUNK * groups // rows)
    for group in pool:
        for start in range(0, columns, at_once):
            block = group[:, start : start + at_once]
            values = quantiles[random.integers(0, 65536, block.shape, np.uint16)]
            np.rint(values * (127 / np.abs(values).max(0)), out=values)
            block[:] = values
    return pool


def _shuffled(pool: np.ndarray, groups: int, random: np.random.Generator) -> Iterator[Tensor]:
    """A matrix of the pool's rows in another order and sign, its columns turned about."""
    _, rows, columns = pool.shape
    shift, at_once = int(random.integers(columns)), max(1, CHUNK // columns)
    for group in random.permutation(groups):
        order = random.permutation(rows)
        for start in range(0, rows, at_once):
            chosen = order[start : start + at_once]
            signs = random.choice(np.array([-1, 1], np.int8), (len(chosen), 1))
            yield torch.from_numpy(np.roll(pool[group, chosen] * signs, shift, axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_random_grok(given.directory, Grok1Config(num_hidden_layers=given.layers), given.seed)


if __name__ == "__main__":
    main()
