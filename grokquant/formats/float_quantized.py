"""compressed-tensors' small floats, which are only read: FP8, MXFP8, MXFP4 and NVFP4.

    storage                 codes of X                      X.weight_scale            reads as
    float-quantized         weight float8 [out, in]         of blocks, any float      its dtype
    mxfp8-quantized         weight float8 [out, in]         uint8 [out, in / 32]      bfloat16
    mxfp4-pack-quantized    weight_packed uint8 [out, in/2] uint8 [out, in / 32]      bfloat16
    nvfp4-pack-quantized    weight_packed uint8 [out, in/2] float8 [out, in / 16]     bfloat16

A uint8 scale is an exponent: 2^(s - 127). A float8 scale of NVFP4 is divided by
`X.weight_global_scale` float32 [1]. A byte holds two codes of e2m1, the first in the low bits:

    byte     0      1     ..
    code  |1   0|3   2|  ..

Source: compressors/naive_quantized, mxfp8, mxfp4 and nvfp4 of the compressed-tensors package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.compressed_config import Float8, Storage, Weights
from grokquant.formats.reading import packed_tensor
from grokquant.formats.scaled_floats import (
    Block,
    ScaledFloats,
    from_exponents,
    from_float4,
    from_float8,
    scaled_ref,
)
from grokquant.grids import SCALE_DTYPES
from grokquant.types import Source, TensorRef


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How a storage keeps a matrix `X.weight`.

    `name` is what people call its floats. `codes` is what follows `X.` in the name of its codes, of
    which a stored value of `code_dtype` holds `per_value`. `scale_dtypes` are those of
    `X.weight_scale`, `group_size` the columns that share one, None where the config says it. With
    `global_scale`, `X.weight_global_scale` divides them. `dtype` is what the package reads it as,
    None for the dtype of its scales.
    """

    name: str
    codes: str
    code_dtype: torch.dtype
    per_value: int
    decoded: Callable[[Tensor], Tensor]
    scale_dtypes: tuple[torch.dtype, ...]
    factors: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None
    group_size: int | None = None
    global_scale: bool = False


KINDS: dict[Storage, _Kind] = {
    "float-quantized": _Kind(
        name="fp8",
        codes="weight",
        code_dtype=torch.float8_e4m3fn,
        per_value=1,
        decoded=from_float8,
        scale_dtypes=tuple(SCALE_DTYPES.values()),
        factors=from_float8,
        dtype=None,
    ),
    "mxfp8-quantized": _Kind(
        name="mxfp8",
        codes="weight",
        code_dtype=torch.float8_e4m3fn,
        per_value=1,
        decoded=from_float8,
        scale_dtypes=(torch.uint8,),
        factors=from_exponents,
        dtype=torch.bfloat16,
        group_size=32,
    ),
    "mxfp4-pack-quantized": _Kind(
        name="mxfp4",
        codes="weight_packed",
        code_dtype=torch.uint8,
        per_value=2,
        decoded=from_float4,
        scale_dtypes=(torch.uint8,),
        factors=from_exponents,
        dtype=torch.bfloat16,
        group_size=32,
    ),
    "nvfp4-pack-quantized": _Kind(
        name="nvfp4",
        codes="weight_packed",
        code_dtype=torch.uint8,
        per_value=2,
        decoded=from_float4,
        scale_dtypes=(torch.float8_e4m3fn,),
        factors=from_float8,
        dtype=torch.bfloat16,
        group_size=16,
        global_scale=True,
    ),
}


def dense_ref(source: Source, tensor: str, storage: Storage, weights: Weights) -> TensorRef:
    """The matrix `tensor`, which reads as floats. Raises InputError where its tensors do not fit
    together."""
    kind = KINDS[storage]
    stem = tensor.removesuffix("weight")
    codes = packed_tensor(source, stem + kind.codes)
    scale = packed_tensor(source, f"{tensor}_scale")
    if codes.dtype != kind.code_dtype or len(codes.shape) != 2:
        raise InputError(
            f"{source.path}: {codes.name} is {codes.dtype} {list(codes.shape)}, {storage} needs "
            f"{kind.code_dtype} of two axes"
        )
    shape = codes.shape[0], codes.shape[1] * kind.per_value
    stored = [codes, scale]
    factors = kind.factors
    if kind.global_scale:
        stored.append(_global_scale(source, tensor))
        factors = partial(_divided, stored[-1])
    floats = ScaledFloats(
        kind=kind.name,
        values=codes,
        scales=scale,
        shape=shape,
        block=_block(kind, weights, shape),
        decoded=kind.decoded,
        factors=factors,
    )
    _check_scale(source, floats, storage)
    stored_bytes = sum(ref.stored_bytes for ref in stored)
    return scaled_ref(source, tensor, floats, kind.dtype or scale.dtype, stored_bytes)


def _block(kind: _Kind, weights: Weights, shape: tuple[int, int]) -> Block:
    """The rows and columns of a block that shares a scale."""
    rows, columns = shape
    if kind.group_size:
        return 1, kind.group_size
    assert isinstance(weights, Float8)
    if weights.block is not None:
        return weights.block
    return rows if weights.strategy == "tensor" else 1, columns


def _check_scale(source: Source, floats: ScaledFloats, storage: Storage) -> None:
    """Raises InputError where there is not one scale of a known dtype for each block."""
    scale = floats.scales
    count = prod(floats.blocks)
    fits = prod(scale.shape) == 1 if count == 1 else scale.shape == floats.blocks
    if not fits or scale.dtype not in KINDS[storage].scale_dtypes:
        expected = " or ".join(map(str, KINDS[storage].scale_dtypes))
        raise InputError(
            f"{source.path}: {scale.name} is {scale.dtype} {list(scale.shape)}, blocks of "
            f"{list(floats.block)} in {list(floats.shape)} need {expected} {list(floats.blocks)}"
        )


def _global_scale(source: Source, tensor: str) -> TensorRef:
    ref = packed_tensor(source, f"{tensor}_global_scale")
    if (ref.dtype, ref.shape) != (torch.float32, (1,)):
        raise InputError(
            f"{source.path}: {ref.name} is {ref.dtype} {list(ref.shape)}, not torch.float32 [1]"
        )
    return ref


def _divided(divisor: TensorRef, scales: Tensor) -> Tensor:
    """float32 factors of NVFP4: the scales over the global one, as the package computes them."""
    return scales.float() / divisor.read()
