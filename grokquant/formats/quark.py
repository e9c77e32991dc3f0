"""AMD Quark's plain exports, which are only read.

    dtype       X.weight                  X.weight_scale                  reads as
    fp8_e4m3    float8_e4m3fn [out, in]   one, or [out] of rows           bfloat16
    fp4         uint8 [out, in / 2]       uint8 [out, in / 32] (MXFP4)    bfloat16
    int8        int8 [out, in]            one, or [out] of rows           integers

A byte of fp4 holds two codes of e2m1, the first in the low bits; its scales are exponents. int8 has
`X.weight_zero_point` of the shape of the scales. Source: torch/export of the amd-quark package.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats import fp8
from grokquant.formats.format import ReadableFormat
from grokquant.formats.reading import WAY_OUT, packed_tensor, validated
from grokquant.formats.scaled_floats import ScaledFloats, from_exponents, from_float4, scaled_ref
from grokquant.grids import SCALE_DTYPE_NAMES, Scheme
from grokquant.types import QTensor, Source, TensorRef

NAME = "quark"

_MX_GROUP = 32
# Of zero points.
_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


class _Export(BaseModel):
    weight_format: Literal["real_quantized"]
    # `reorder` changes the order of codes of 4 bits in words, which are not read.
    pack_method: str = "reorder"


class _Config(BaseModel):
    """What reading takes from a `quantization_config`."""

    export: _Export
    global_quant_config: dict[str, Any]


def unpacked(source: Source) -> Source:
    """`source` with its quantized matrices presented as one `X.weight` each."""
    validated(source, _Config)
    tensors = dict(source.tensors)
    for name, ref in source.tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        matrix = name.removesuffix("_scale")
        codes = packed_tensor(source, matrix)
        tensors[matrix] = _unpacked_ref(source, codes, ref)
        for beside in (name, f"{matrix}_zero_point"):
            tensors.pop(beside, None)
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, codes: TensorRef, scale: TensorRef) -> TensorRef:
    if len(codes.shape) == 2:
        if codes.dtype == torch.float8_e4m3fn:
            return fp8.dense_ref(source, codes, scale, None)
        if codes.dtype == torch.uint8 and scale.dtype == torch.uint8:
            return _float4(source, codes, scale)
        if codes.dtype == torch.int8 and scale.dtype in SCALE_DTYPE_NAMES:
            return _integers(source, codes, scale)
    raise _misfit(source, codes, scale)


def _float4(source: Source, codes: TensorRef, scale: TensorRef) -> TensorRef:
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    if scale.shape != (rows, columns // _MX_GROUP) or columns % _MX_GROUP:
        raise _misfit(source, codes, scale)
    floats = ScaledFloats(
        kind="mxfp4",
        values=codes,
        scales=scale,
        shape=(rows, columns),
        block=(1, _MX_GROUP),
        decoded=from_float4,
        factors=from_exponents,
    )
    stored = codes.stored_bytes + scale.stored_bytes
    return scaled_ref(source, codes.name, floats, torch.bfloat16, stored)


def _integers(source: Source, codes: TensorRef, scale: TensorRef) -> TensorRef:
    """int8 with a scale for the matrix, which becomes one for each row, or for each row."""
    rows, columns = codes.shape
    if scale.shape not in ((), (1,), (rows,), (rows, 1)):
        raise _misfit(source, codes, scale)
    zero_point = _zero_point(source, codes, scale)
    stored = sum(ref.stored_bytes for ref in (codes, scale, zero_point) if ref)
    scheme = Scheme(8, None, zero_point is None, SCALE_DTYPE_NAMES[scale.dtype])

    def of_rows(ref: TensorRef) -> Tensor:
        return ref.read().reshape(-1, 1).expand(rows, 1).contiguous()

    def load() -> QTensor:
        zeros = [of_rows(zero_point).to(torch.int8)] if zero_point else []
        return QTensor(codes.read(), of_rows(scale), scheme, *zeros)

    return TensorRef(codes.name, (rows, columns), scale.dtype, stored, load, scheme)


def _zero_point(source: Source, codes: TensorRef, scale: TensorRef) -> TensorRef | None:
    """As many int8 numbers as there are scales; None where all are zero: it is symmetric."""
    ref = source.tensors.get(f"{codes.name}_zero_point")
    if ref is None:
        return None
    points = ref.read()
    is_int8 = ref.dtype in _WHOLE and torch.equal(points, points.to(torch.int8).to(ref.dtype))
    if not is_int8 or points.numel() != prod(scale.shape):
        raise _misfit(source, codes, ref)
    return ref if points.any() else None


def _misfit(source: Source, codes: TensorRef, scale: TensorRef) -> InputError:
    return InputError(
        f"{source.path}: {codes.name} {codes.dtype} {list(codes.shape)} with {scale.name} "
        f"{scale.dtype} {list(scale.shape)} is no export of Quark that is supported: FP8 and int8 "
        f"per tensor or row, MXFP4; {WAY_OUT}"
    )


def activations(config: dict) -> Iterable[str]:
    """That inputs of matrices are rounded, too."""
    described = config.get("global_quant_config", {}).get("input_tensors")
    if isinstance(described, dict):
        yield f"inputs of matrices ({str(described.get('dtype'))[:20]})"


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked, activations=activations)
