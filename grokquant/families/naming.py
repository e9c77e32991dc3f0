"""Files name the same tensors in several ways: here a source gets the names of its family.

Other names are replaced, and the experts that transformers 5 fuses to one 3-D tensor appear one by
one, each reading only its part of the file.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from torch import Tensor

from grokquant.errors import InputError
from grokquant.families.family import Family
from grokquant.types import Source, TensorRef

_FUSED = {
    "gate_up_proj": ("gate", "up"),
    "down_proj": ("down",),
    "gate_up_proj_bias": ("gate", "up"),
    "down_proj_bias": ("down",),
}


def renamed(source: Source, family: Family) -> Source:
    """`source` under the names of its family. Raises InputError where two tensors get one name or
    fused experts have no sensible shape."""
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        for part in _parts(family, source.path, replace(ref, name=family.tensor_name(name))):
            if part.name in tensors:
                raise InputError(f"{source.path}: {part.name} is there under two names")
            tensors[part.name] = part
    return replace(source, tensors=tensors)


def _parts(family: Family, path: Path, ref: TensorRef) -> Iterator[TensorRef]:
    """The matrices or biases of single experts that a tensor holds, or the tensor itself."""
    layer = re.escape(family.layer_prefix).replace(r"\{layer\}", r"(\d+)")
    module = re.escape(family.tensor_name(family.layer_prefix.format(layer=0) + family.fused))
    module = module.removeprefix(re.escape(family.layer_prefix.format(layer=0)))
    found = re.fullmatch(rf"{layer}{module}\.({'|'.join(_FUSED)})", ref.name)
    if not family.experts or not found:
        yield ref
        return
    kind, bias = found[2], found[2].endswith("_bias")
    parts = _FUSED[kind]
    if len(ref.shape) != (2 if bias else 3) or _rows(family, ref) % len(parts):
        raise InputError(f"{path}: {ref.name} has shape {list(ref.shape)}, not that of experts")
    names = family.expert_biases if bias else family.expert_tensors
    for expert in range(ref.shape[0]):
        for number, part in enumerate(parts):
            yield _part(family, ref, names(int(found[1]), expert)[part], expert, number, len(parts))


def _rows(family: Family, ref: TensorRef) -> int:
    """Rows of gate and up, or of down, in a fused tensor."""
    return ref.shape[-1] if family.transposed or len(ref.shape) == 2 else ref.shape[-2]


def _part(
    family: Family, ref: TensorRef, name: str, expert: int, number: int, count: int
) -> TensorRef:
    """Matrix [out, in] or bias [out] of an expert: the part `number` of `count` in its rows."""
    rows = _rows(family, ref) // count
    columns = () if len(ref.shape) == 2 else (ref.shape[-2 if family.transposed else -1],)

    def load() -> Tensor:
        if ref.load_rows is None:
            fused = ref.read()[expert]
        else:
            fused = ref.load_rows(expert, expert + 1)[0]
        if family.transposed and columns:
            fused = fused.T
        part = fused[number::count] if family.interleaved else fused.chunk(count)[number]
        return part.contiguous()

    shape = (rows, *columns)
    return TensorRef(name, shape, ref.dtype, prod(shape) * ref.dtype.itemsize, load)
