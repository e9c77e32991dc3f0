"""8-bit floats with a scale per block, as DeepSeek and Qwen publish them, which are only read.

A matrix `X.weight` is float8_e4m3fn [out, in]. `X.weight_scale_inv` [ceil(out / 128),
ceil(in / 128)], for blocks of 128 x 128, holds the factor of each block; despite its name it
multiplies. Blocks at the right and lower edges may be cut off:

    weight  | block 0,0 | block 0,1 | 0,2      scale_inv  s00  s01  s02
            | block 1,0 | block 1,1 | 1,2                 s10  s11  s12

It reads as bfloat16.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import ReadableFormat
from grokquant.formats.reading import packed_tensor, validated
from grokquant.types import Source, TensorRef

NAME = "fp8"

_SCALE = "_scale_inv"
_SCALE_DTYPES = (torch.float32, torch.bfloat16)
_Size = Annotated[int, Field(ge=1)]


class _Config(BaseModel):
    """What reading takes from a `quantization_config`."""

    weight_block_size: tuple[_Size, _Size]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"


def unpacked(source: Source) -> Source:
    """`source` with its 8-bit floats presented as bfloat16 matrices."""
    block = validated(source, _Config).weight_block_size
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        owner = source.tensors.get(name.removesuffix(_SCALE)) if name.endswith(_SCALE) else None
        if ref.dtype == torch.float8_e4m3fn:
            tensors[name] = _dense_ref(source, ref, block)
        elif owner is None or owner.dtype != torch.float8_e4m3fn:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _dense_ref(source: Source, ref: TensorRef, block: tuple[int, int]) -> TensorRef:
    scale = packed_tensor(source, ref.name + _SCALE)
    blocks = tuple(-(-size // part) for size, part in zip(ref.shape, block, strict=False))
    if len(ref.shape) != 2 or scale.shape != blocks or scale.dtype not in _SCALE_DTYPES:
        raise InputError(
            f"{source.path}: {scale.name} is {scale.dtype} {list(scale.shape)}, blocks of "
            f"{list(block)} in {list(ref.shape)} need torch.float32 {list(blocks)}"
        )
    rows, columns = ref.shape

    def load_rows(first: int, stop: int) -> Tensor:
        values = ref.load_rows(first, stop) if ref.load_rows else ref.read()[first:stop]
        scales = scale.read().float()[torch.arange(first, stop) // block[0]]  # (rows, blocks)
        scales = scales.repeat_interleave(block[1], dim=1)[:, :columns]  # (rows, columns)
        dense = (values.float() * scales).to(torch.bfloat16)
        if not dense.isfinite().all():
            raise InputError(f"{source.path}: {ref.name} times {scale.name} is not finite")
        return dense

    stored = ref.stored_bytes + scale.stored_bytes
    load = partial(load_rows, 0, rows)
    return TensorRef(ref.name, ref.shape, torch.bfloat16, stored, load, load_rows=load_rows)


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked)
