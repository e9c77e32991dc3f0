"""MXFP4 as gpt-oss is released in it, which is only read.

A fused parameter `X` [experts, in, out] is stored as `X_blocks` uint8 [experts, out, in / 32, 16]
and `X_scales` uint8 [experts, out, in / 32]. A block is 32 floats of 4 bits, two to a byte:

    byte     0      1     ..    15        scale
    code  |1   0|3   2|  ..  |31  30|       s         weight = value(code) * 2^(s - 127)

A code is a sign, two bits of exponent and one of mantissa (e2m1). It reads as bfloat16, which
holds every product. Format: Open Compute Project, Microscaling Formats (MX) Specification 1.0.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import ReadableFormat
from grokquant.formats.reading import packed_tensor
from grokquant.formats.scaled_floats import from_exponents, from_float4
from grokquant.types import Source, TensorRef

NAME = "mxfp4"

_BLOCKS = "_blocks"
_SCALES = "_scales"
_BLOCK = 32  # weights that share a scale


def unpacked(source: Source) -> Source:
    """`source` with its packed parameters presented as bfloat16 ones."""
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        if name.endswith(_BLOCKS):
            dense = _dense_ref(source, name.removesuffix(_BLOCKS))
            tensors[dense.name] = dense
        elif not name.endswith(_SCALES) or name[: -len(_SCALES)] + _BLOCKS not in source.tensors:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _dense_ref(source: Source, name: str) -> TensorRef:
    blocks = packed_tensor(source, name + _BLOCKS)
    scales = packed_tensor(source, name + _SCALES)
    _check(source, blocks, scales)
    experts, rows, count, _ = blocks.shape
    shape = (experts, count * _BLOCK, rows)

    def load_part(index: tuple[slice, ...]) -> Tensor:
        """A part of [experts, in, out]; whole rows are read, as one expert needs them."""
        expert, column, row = (*index, *[slice(None)] * 3)[:3]
        dense = _dense(_read(blocks, (expert, row)), _read(scales, (expert, row)))
        if not dense.isfinite().all():
            raise InputError(f"{source.path}: {scales.name} holds non-finite values")
        return dense.transpose(1, 2)[:, column]

    def load() -> Tensor:
        return load_part(()).contiguous()

    stored = prod(blocks.shape) + prod(scales.shape)
    return TensorRef(name, shape, torch.bfloat16, stored, load, load_part=load_part)


def _check(source: Source, blocks: TensorRef, scales: TensorRef) -> None:
    """Raises InputError where blocks and scales do not fit together."""
    if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, _BLOCK // 2):
        raise InputError(
            f"{source.path}: {blocks.name} has shape {list(blocks.shape)} and {scales.name} "
            f"{list(scales.shape)}, expected [experts, out, in / {_BLOCK}, {_BLOCK // 2}] and "
            f"[experts, out, in / {_BLOCK}]"
        )
    if (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        raise InputError(f"{source.path}: {blocks.name} and its scales must be uint8")


def _read(ref: TensorRef, part: tuple[slice, ...]) -> Tensor:
    return ref.load_part(part) if ref.load_part else ref.read()[part]


def _dense(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [.., blocks, 16] and [.., blocks] to bfloat16 [.., blocks * 32]."""
    values = from_float4(blocks) * from_exponents(scales).unsqueeze(-1)  # (.., blocks, 32)
    return values.flatten(-2).to(torch.bfloat16)


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked)
