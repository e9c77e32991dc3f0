"""Tensors that llama.cpp's converter joins on request, presented as the parts that it joined.

    attn_qkv          [q | k | v, in]               rows of q, then of k, then of v
    ffn_gate_up_exps  [experts x (gate | up), in]   rows of gate and of up of each expert in turn

Biases are joined the same way along their last axis.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.types import Source, TensorRef

_NAME = re.compile(r"(blk\.\d{1,6}\.)(attn_qkv|ffn_gate_up_exps)\.(weight|bias)")


@dataclass(frozen=True)
class _Part:
    """A part of a joined tensor: `size` of every `whole`, from `start` on, in each of `stacks`."""

    start: int
    size: int
    whole: int
    stacks: int = 1

    def of(self, length: int) -> tuple[int, int, int]:
        """First row, number of rows, and rows of a stack, if all stacks have `length`."""
        stack = length // self.stacks
        return self.start * stack // self.whole, self.size * stack // self.whole, stack

    def fits(self, length: int) -> bool:
        return length % (self.stacks * self.whole) == 0


def with_parts(source: Source) -> Source:
    """`source`, a GGUF file of another program, with the parts of its joined tensors.

    Raises InputError if a tensor has no whole number of rows for each.
    """
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        found = _NAME.fullmatch(name)
        parts = _parts(source.metadata, found[2]) if found else {}
        for part, place in parts.items():
            assert found is not None
            kept = _bias if found[3] == "bias" else _rows
            # The biases of all experts are a matrix with a row for each.
            own = replace(place, stacks=1) if found[3] == "bias" else place
            if not own.fits(ref.shape[-1] if found[3] == "bias" else ref.shape[0]):
                raise InputError(f"{source.path}: {name} does not divide into {', '.join(parts)}")
            tensors[f"{found[1]}{part}.{found[3]}"] = kept(ref, own)
        if not parts:
            tensors[name] = ref
    return replace(source, tensors={name: replace(r, name=name) for name, r in tensors.items()})


def _parts(metadata: Mapping[str, Any], joined: str) -> dict[str, _Part]:
    """What a tensor joins; empty if the metadata do not say it by one number for all layers."""
    prefix = f"{metadata.get('general.architecture')}."
    if joined == "ffn_gate_up_exps":
        experts = metadata.get(f"{prefix}expert_count")
        if not _number(experts):
            return {}
        return dict(zip(("ffn_gate_exps", "ffn_up_exps"), _in_turn((1, 1), experts), strict=True))
    heads = metadata.get(f"{prefix}attention.head_count")
    groups = metadata.get(f"{prefix}attention.head_count_kv", heads)
    key = metadata.get(f"{prefix}attention.key_length", 1)
    value = metadata.get(f"{prefix}attention.value_length", key)
    if not all(map(_number, (heads, groups, key, value))):
        return {}
    sizes = (heads * key, groups * key, groups * value)
    return dict(zip(("attn_q", "attn_k", "attn_v"), _in_turn(sizes, 1), strict=True))


def _number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 < value < 2**24


def _in_turn(sizes: tuple[int, ...], stacks: int) -> Iterator[_Part]:
    start = 0
    for size in sizes:
        yield _Part(start, size, sum(sizes), stacks)
        start += size


def _rows(ref: TensorRef, part: _Part) -> TensorRef:
    """Rows of each stack, below each other."""
    _, count, _ = part.of(ref.shape[0])
    load_rows = partial(_read_rows, ref, part)
    rows = count * part.stacks
    return replace(
        ref.loaded_by(partial(load_rows, 0, rows)),
        shape=(rows, *ref.shape[1:]),
        stored_bytes=ref.stored_bytes * rows // ref.shape[0],
        load_rows=load_rows,
    )


def _read_rows(ref: TensorRef, part: _Part, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` - 1 of a part of a joined tensor."""
    assert ref.load_rows is not None
    first, count, stack = part.of(ref.shape[0])
    pieces = []
    for number in range(start // count, -(-stop // count)):
        low = max(start - number * count, 0)
        high = min(stop - number * count, count)
        offset = number * stack + first
        pieces.append(ref.load_rows(offset + low, offset + high))
    return torch.cat(pieces)


def _bias(ref: TensorRef, part: _Part) -> TensorRef:
    """Columns of a bias, or of the matrix of the biases of all experts."""
    first, count, _ = part.of(ref.shape[-1])

    def load() -> Tensor:
        return ref.read()[..., first : first + count].contiguous()

    def load_rows(start: int, stop: int) -> Tensor:
        assert ref.load_rows is not None
        return ref.load_rows(start, stop)[..., first : first + count].contiguous()

    return replace(
        ref.loaded_by(load),
        shape=(*ref.shape[:-1], count),
        stored_bytes=ref.stored_bytes * count // ref.shape[-1],
        load_rows=load_rows if ref.load_rows else None,
    )
