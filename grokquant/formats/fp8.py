"""8-bit floats as models are published in them, which are only read.

A matrix `X.weight` is float8_e4m3fn [out, in]. Its factors are `X.weight_scale_inv` or
`X.weight_scale`; despite the first name they multiply. Their shape is one of:

    [ceil(out / 128), ceil(in / 128)]   blocks of weight_block_size   DeepSeek, Qwen, MiniMax
    [out, 1] or [out]                   a factor per row              fbgemm_fp8, Llama 3.1
    [1], [1, 1] or []                   a factor for all              AutoFP8, Mistral

It reads as bfloat16. transformers multiplies likewise (`integrations/finegrained_fp8.py`).
"""

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field

from grokquant.errors import InputError
from grokquant.formats.format import ReadableFormat
from grokquant.formats.reading import packed_tensor, validated
from grokquant.formats.scaled_floats import (
    Block,
    ScaledFloats,
    from_exponents,
    from_float8,
    scaled_ref,
)
from grokquant.types import Source, TensorRef

NAME = "fp8"
FBGEMM_NAME = "fbgemm_fp8"

_SCALES = ("_scale_inv", "_scale")
_SCALE_DTYPES = {
    torch.float32: from_float8,
    torch.bfloat16: from_float8,
    torch.float16: from_float8,
    torch.uint8: from_exponents,  # as MXFP8 has them
    torch.float8_e8m0fnu: from_float8,
}
_Size = Annotated[int, Field(ge=1)]


class _Config(BaseModel):
    """What reading takes from a `quantization_config`."""

    weight_block_size: tuple[_Size, _Size] | None = None
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic", "static"] = "dynamic"


def unpacked(source: Source) -> Source:
    """`source` with its 8-bit floats presented as bfloat16 matrices."""
    block = validated(source, _Config).weight_block_size
    tensors = dict(source.tensors)
    for name, ref in source.tensors.items():
        if ref.dtype == torch.float8_e4m3fn:
            scale = _scale_of(source, name)
            tensors[name] = dense_ref(source, ref, scale, block)
            del tensors[scale.name]
    return replace(source, tensors=tensors)


def _scale_of(source: Source, name: str) -> TensorRef:
    found = [name + ending for ending in _SCALES if name + ending in source.tensors]
    return packed_tensor(source, found[0] if found else name + _SCALES[0])


def dense_ref(source: Source, ref: TensorRef, scale: TensorRef, block: Block | None) -> TensorRef:
    """A matrix of 8-bit floats times its scale, or those of blocks of that shape. Raises InputError
    where they do not fit together."""
    if len(ref.shape) != 2:
        raise InputError(f"{source.path}: {ref.name} has shape {list(ref.shape)}, not [out, in]")
    rows, columns = ref.shape
    floats = ScaledFloats(
        kind=NAME,
        values=ref,
        scales=scale,
        shape=(rows, columns),
        block=block or _implied_block(source, ref, scale),
        decoded=from_float8,
        factors=_SCALE_DTYPES.get(scale.dtype, from_float8),
    )
    fits = block is None or scale.shape == floats.blocks
    if not fits or scale.dtype not in _SCALE_DTYPES:
        raise InputError(
            f"{source.path}: {scale.name} is {scale.dtype} {list(scale.shape)}, blocks of "
            f"{list(floats.block)} in {list(ref.shape)} need torch.float32 {list(floats.blocks)}"
        )
    stored = ref.stored_bytes + scale.stored_bytes
    return scaled_ref(source, ref.name, floats, torch.bfloat16, stored)


def _implied_block(source: Source, ref: TensorRef, scale: TensorRef) -> Block:
    """The block of a scale whose config names none: the matrix or a row of it."""
    rows, columns = ref.shape
    if prod(scale.shape) == 1:
        return rows, columns
    if scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    raise InputError(
        f"{source.path}: {scale.name} has shape {list(scale.shape)}, which is neither one scale "
        f"nor one for each of {rows} rows, and quantization_config.weight_block_size names no block"
    )


def activations(config: dict) -> Iterable[str]:
    """That inputs are rounded to 8-bit floats, too."""
    yield f"inputs of matrices (8-bit float, {config.get('activation_scheme', 'dynamic')})"


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked, activations=activations)
FBGEMM = ReadableFormat(name=FBGEMM_NAME, unpacked=unpacked, activations=activations)
