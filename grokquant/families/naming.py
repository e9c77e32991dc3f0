"""Files name the same tensors in several ways: here a source gets the names of its family.

Other names are replaced, and the experts that transformers 5 fuses to one 3-D tensor appear one by
one, each reading only its part of the file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.families.family import Family
from grokquant.types import QTensor, Source, TensorRef

_TIED = "but config.json ties the two"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a fused tensor holds of each expert.
_FUSED = {
    "gate_up_proj": ("gate", "up"),
    "down_proj": ("down",),
    "gate_up_proj_bias": ("gate", "up"),
    "down_proj_bias": ("down",),
}


def renamed(source: Source, family: Family) -> Source:
    """`source` under the names of its family. Raises InputError where two tensors get one name or
    fused experts have an impossible shape."""
    fused = _fused_names(family)
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        known = replace(ref, name=family.tensor_name(name))
        found = fused.fullmatch(known.name) if fused else None
        parts = _split(source, family, known, int(found[1]), found[2]) if found else [known]
        for part in parts:
            if part.name in tensors:
                raise InputError(f"{source.path}: {part.name} is there under two names")
            tensors[part.name] = part
    return replace(source, tensors=tensors)


def _fused_names(family: Family) -> re.Pattern | None:
    """Matches (layer, kind) in the names of fused experts."""
    if not family.experts:
        return None
    layer = re.escape(family.layer_prefix).replace(r"\{layer\}", r"(\d+)")
    module, _, _ = family.experts["gate"].partition("{expert}")
    return re.compile(f"{layer}{re.escape(module)}({'|'.join(_FUSED)})")


def _split(
    source: Source, family: Family, ref: TensorRef, layer: int, kind: str
) -> Iterator[TensorRef]:
    """The matrices [out, in] or biases [out] of single experts."""
    parts, bias = _FUSED[kind], kind.endswith("_bias")
    axis = 2 if family.transposed and not bias else 1
    if len(ref.shape) != (2 if bias else 3) or ref.shape[axis] % len(parts):
        raise InputError(f"{source.path}: {ref.name} has shape {list(ref.shape)}, not of experts")
    rows = ref.shape[axis] // len(parts)
    shape = (rows,) if bias else (rows, ref.shape[3 - axis])
    for expert in range(ref.shape[0]):
        names = (family.expert_biases if bias else family.expert_tensors)(layer, expert)
        for number, part in enumerate(parts):
            step = len(parts) if family.interleaved else 1
            first = number if step > 1 else number * rows
            load = _Part(ref, expert, axis, first, rows, step)
            size = prod(shape) * ref.dtype.itemsize
            yield TensorRef(names[part], shape, ref.dtype, size, load)


@dataclass(frozen=True)
class _Part:
    """Reads `rows` of one expert, every `step`-th from `first` on, along `axis` of the fused."""

    ref: TensorRef
    expert: int
    axis: int
    first: int
    rows: int
    step: int

    def __call__(self) -> Tensor:
        # Of rows in turns the file's reader takes all: it knows no steps.
        whole = self.step > 1
        wanted = slice(None) if whole else slice(self.first, self.first + self.rows)
        expert = slice(self.expert, self.expert + 1)
        index = (expert, slice(None), wanted) if self.axis == 2 else (expert, wanted)
        part = self.ref.load_part(index) if self.ref.load_part else self.ref.read()[index]
        part = part.squeeze(0).movedim(self.axis - 1, 0)
        return (part[self.first :: self.step] if whole else part).contiguous()


def with_tied_head(source: Source) -> Source:
    """`source` without its head, of a model in which that is the embedding.

    Reading the embedding proves it: raises InputError where the two differ.
    """
    tensors = dict(source.tensors)
    embedding, head = tensors[EMBEDDING], tensors.pop(HEAD)
    if embedding.shape != head.shape:
        raise InputError(f"{source.path}: {HEAD} has shape {list(head.shape)}, {_TIED}")

    def load_rows(first: int, stop: int) -> Tensor:
        rows, same = (_rows(ref, first, stop) for ref in (embedding, head))
        if not torch.equal(rows.to(same.dtype), same):
            raise InputError(f"{source.path}: {HEAD} differs from {EMBEDDING}, {_TIED}")
        return rows

    tied = replace(
        embedding,
        load=lambda: load_rows(0, embedding.shape[0]),
        load_rows=load_rows,
        load_part=None,
        load_into=None,
        scheme=None,
    )
    return replace(source, tensors=tensors | {EMBEDDING: tied})


def without_biases(source: Source, names: list[str]) -> Source:
    """`source` without biases that its model does not have: AutoGPTQ writes zeros there.

    Reading the matrix beside one proves that: raises InputError where it is not zero.
    """
    tensors = dict(source.tensors)
    for name in names:
        W = tensors[matrix_of(name)]
        tensors[W.name] = replace(
            W,
            load=partial(_beside_zeros, source, tensors.pop(name), W),
            load_rows=None,
            load_into=None,
            load_part=None,
        )
    return replace(source, tensors=tensors)


def _beside_zeros(source: Source, bias: TensorRef, W: TensorRef) -> Tensor | QTensor:
    if bias.read().any():
        raise InputError(f"{source.path}: {bias.name} is not zero, but the model has no such bias")
    return W.load()


def matrix_of(bias: str) -> str:
    """The name of the matrix beside a bias."""
    return bias.removesuffix("bias") + "weight"


def _rows(ref: TensorRef, first: int, stop: int) -> Tensor:
    return ref.load_rows(first, stop) if ref.load_rows else ref.read()[first:stop]
