"""Writes small Grok checkpoints with random weights in the release's layout, for tests."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from grokquant.sources.release import LAYER, TOP, file_name, leaf_names
from grokquant.toy.release_writer import (
    MULTIARRAY,
    Leaf,
    _framed,
    _nbytes,
    quantize_leaf,
    write_release,
)

GROUPED = ("moe/linear_1", "multi_head_attention/linear")


def write_random_release(
    directory: Path,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 128,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    experts: int = 4,
    vocab: int = 128,
    groups: int = 8,
    seed: int = 0,
) -> dict:
    """Writes `directory`/ckpt-0 and config.json; returns the config.

    Matrices are N(0, 1/K) quantized as the release's, `groups` scale groups in the two row-parallel
    ones; the embedding is scaled so that embedding_multiplier_scale makes it of unit variance.
    """
    config = {
        "model_type": "grok-1",
        "architectures": ["Grok1ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "attn_output_multiplier": 1 / math.sqrt(head_dim),
        "embedding_multiplier_scale": math.sqrt(hidden),
        "output_multiplier_scale": 1 / math.sqrt(3),
        "max_position_embeddings": 512,
    }
    sizes = dict(V=vocab, D=hidden, E=experts, F=ffn, Q=heads * head_dim, K=kv_heads * head_dim)
    write_release(directory, config, random_leaves(layers, sizes, groups, seed))
    return config


def random_leaves(
    layers: int, sizes: dict[str, int], groups: int, seed: int
) -> Iterator[tuple[str, Leaf]]:
    generator = torch.Generator().manual_seed(seed)
    for name in leaf_names(layers):
        slot = name if name in TOP else name.split("/", 2)[2]
        yield name, random_leaf(slot, sizes, groups, generator)


def random_leaf(slot: str, sizes: dict[str, int], groups: int, generator: torch.Generator) -> Leaf:
    leaf = (TOP | LAYER)[slot]
    shape = tuple(sizes[letter] for letter in leaf.dimensions)
    values: Tensor = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * values
    if slot in TOP:
        return values / math.sqrt(sizes["D"])
    values = values / math.sqrt(shape[-2])
    return quantize_leaf(values, groups if slot in GROUPED else 1) if leaf.quantized else values


# Shapes of the real Grok-1's leaves: int8 weights with bf16 scales, or float32 alone.
GROK_1 = {
    "moe/linear": ((8, 6144, 32768), (8, 1, 32768)),
    "moe/linear_1": ((8, 32768, 6144), (8, 8, 6144)),
    "moe/linear_v": ((8, 6144, 32768), (8, 1, 32768)),
    "multi_head_attention/key": ((6144, 1024), (1, 1024)),
    "multi_head_attention/linear": ((6144, 6144), (8, 6144)),
    "multi_head_attention/query": ((6144, 6144), (1, 6144)),
    "multi_head_attention/value": ((6144, 1024), (1, 1024)),
    "router": ((6144, 8), None),
    "language_model/in_out_embed": ((131072, 6144), None),
}


def write_hollow_grok_1(directory: Path, layers: int = 64) -> int:
    """All files of the real Grok-1 in full size, with holes in place of weights; their bytes."""
    (directory / "ckpt-0").mkdir(parents=True)
    total = 0
    for index, name in enumerate(leaf_names(layers)):
        slot = name if name in TOP else name.split("/", 2)[2]
        weight, scales = GROK_1.get(slot, ((6144,), None))
        size = framed_size(weight, scales)
        write_hollow(directory / "ckpt-0" / file_name(index), weight, scales, size)
        total += size
    return total


def write_hollow(path: Path, weight: tuple, scales: tuple | None, size: int) -> None:
    arrays = _arrays(weight, scales)
    with path.open("wb") as file:
        for part in _framed(arrays, MULTIARRAY):
            if isinstance(part, int):
                file.seek(_nbytes(*arrays[part]), os.SEEK_CUR)
            else:
                file.write(part)
        assert file.tell() == size


def framed_size(weight: tuple[int, ...], scales: tuple[int, ...] | None = None) -> int:
    """Bytes of the file of an int8 `weight` with bfloat16 `scales`, or of a float32 leaf."""
    arrays = _arrays(weight, scales)
    parts = _framed(arrays, MULTIARRAY)
    return sum(_nbytes(*arrays[part]) if isinstance(part, int) else len(part) for part in parts)


def _arrays(weight: tuple, scales: tuple | None) -> list[tuple[torch.dtype, tuple]]:
    if scales is None:
        return [(torch.float32, weight)]
    return [(torch.int8, weight), (torch.bfloat16, scales)]
