"""Renames the tensors of a source to the names of its family; files use several.

The experts that transformers 5 fuses to one 3-D tensor are split, and each reads only its part of
the file:

    gate_up_proj   [experts, 2 * inner, hidden]    gate 0, gate 1, ..     up 0, up 1, ..
      interleaved  [experts, 2 * inner, hidden]    gate 0, up 0, gate 1, up 1, ..
    down_proj      [experts, hidden, inner]
      transposed   the last two axes are swapped
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.families.family import EMBEDDING, FUSED_PARTS, HEAD, Family, FusedExperts
from grokquant.types import QTensor, Source, TensorRef

_TIED = "but config.json ties the two"


def renamed(source: Source, family: Family) -> Source:
    """`source` with the names of its family.

    Raises InputError if two tensors get the same name or fused experts have an impossible shape.
    """
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        known = replace(ref, name=family.tensor_name(name))
        if known.name != name and ref.scheme is None:  # packed matrices are always [out, in]
            known = _as_matrix(known, family)
        fused = family.fused_experts(known.name)
        parts = _split(source, family, known, fused) if fused else [known]
        for part in parts:
            if part.name in tensors:
                raise InputError(f"{source.path}: {part.name} occurs under two names")
            tensors[part.name] = part
    return replace(source, tensors=tensors)


def _as_matrix(ref: TensorRef, family: Family) -> TensorRef:
    """A tensor of a file that its model holds in another form than [out, in], in this form."""
    if ref.name in family.turned and len(ref.shape) == 2:
        return _turned(ref)
    if ref.name in family.stacked and len(ref.shape) == 3:
        flat = ref.loaded_by(lambda: ref.read().flatten(0, 1))
        return replace(flat, shape=(ref.shape[0] * ref.shape[1], ref.shape[2]))
    return ref


def _turned(ref: TensorRef) -> TensorRef:
    """A matrix [in, out] as [out, in]."""
    load_part = ref.load_part
    return replace(
        ref.loaded_by(lambda: ref.read().T.contiguous()),
        shape=ref.shape[::-1],
        load_part=load_part and (lambda index: load_part(index[::-1]).T.contiguous()),
    )


def _split(
    source: Source, family: Family, ref: TensorRef, fused: FusedExperts
) -> Iterator[TensorRef]:
    """The matrices [out, in] or biases [out] of single experts."""
    parts = FUSED_PARTS[fused.kind]
    fused = fused.as_stored(ref.shape)
    bias = fused.kind.endswith("_bias")
    axis = 2 if fused.transposed and not bias else 1  # of the output features
    if len(ref.shape) != (2 if bias else 3) or ref.shape[axis] % len(parts):
        raise InputError(
            f"{source.path}: {ref.name} has shape {list(ref.shape)}, which is not one of experts"
        )
    rows = ref.shape[axis] // len(parts)
    shape = (rows,) if bias else (rows, ref.shape[3 - axis])
    for expert in range(ref.shape[0]):
        names = (family.expert_biases if bias else family.expert_tensors)(fused.layer, expert)
        for number, part in enumerate(parts):
            step = len(parts) if fused.interleaved else 1
            first = number if step > 1 else number * rows  # this part's first row
            load = _Part(ref, expert, axis, first, rows, step)
            size = prod(shape) * ref.dtype.itemsize
            load_part = load.some if ref.load_part else None
            yield TensorRef(names[part], shape, ref.dtype, size, load, load_part=load_part)


@dataclass(frozen=True)
class _Part:
    """Reads `rows` rows of one expert, every `step`-th from `first` on, along a fused `axis`."""

    ref: TensorRef
    expert: int
    axis: int
    first: int
    rows: int
    step: int

    def __call__(self) -> Tensor:
        whole = self.step > 1  # readers of files take no steps, so interleaved rows are all read
        wanted = slice(None) if whole else slice(self.first, self.first + self.rows)
        expert = slice(self.expert, self.expert + 1)
        index = (expert, slice(None), wanted) if self.axis == 2 else (expert, wanted)
        part = self.ref.load_part(index) if self.ref.load_part else self.ref.read()[index]
        part = part.squeeze(0).movedim(self.axis - 1, 0)
        return (part[self.first :: self.step] if whole else part).contiguous()

    def some(self, index: tuple[slice, ...]) -> Tensor:
        """Some rows and columns of the part, from the first to the last of which is read."""
        assert self.ref.load_part
        rows, *columns = index
        last = self.first + (rows.stop - 1) * self.step
        wanted = [slice(self.first + rows.start * self.step, last + 1), *columns]
        ordered = wanted[::-1] if self.axis == 2 else wanted
        some = self.ref.load_part((slice(self.expert, self.expert + 1), *ordered))
        return some.squeeze(0).movedim(self.axis - 1, 0)[:: self.step].contiguous()


def with_own_head(source: Source) -> Source:
    """`source` with a tied head as a tensor of its own, for engines that know no tying."""
    head = replace(source.tensors[EMBEDDING], name=HEAD)
    return replace(source, tensors={HEAD: head} | source.tensors)


def with_tied_head(source: Source, name: str = HEAD, of: str = EMBEDDING) -> Source:
    """`source` without its head `name`, for a model that uses the embedding `of` in its place.

    Reading the embedding compares the two and raises InputError if they differ.
    """
    tensors = dict(source.tensors)
    embedding = tensors[of]
    head = tensors.pop(name)
    if embedding.shape != head.shape:
        raise InputError(f"{source.path}: {name} has shape {list(head.shape)}, {_TIED}")

    def load_rows(first: int, stop: int) -> Tensor:
        rows = _rows(embedding, first, stop)
        head_rows = _rows(head, first, stop)
        if not torch.equal(rows.to(head_rows.dtype), head_rows):
            raise InputError(f"{source.path}: {name} differs from {of}, {_TIED}")
        return rows

    tied = embedding.loaded_by(lambda: load_rows(0, embedding.shape[0]), load_rows)
    tied = replace(tied, scheme=None)
    return replace(source, tensors=tensors | {of: tied})


def without_biases(source: Source, names: list[str]) -> Source:
    """`source` without biases that its model does not have: AutoGPTQ writes zeros for them.

    Reading the matrix beside a bias checks it and raises InputError if it is not zero.
    """
    tensors = dict(source.tensors)
    for name in names:
        W = tensors[matrix_of(name)]
        tensors[W.name] = W.loaded_by(partial(_beside_zeros, source, tensors.pop(name), W))
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
