"""FP8 and NVFP4 of NVIDIA ModelOpt, which are only read.

    quant_algo   X.weight             X.weight_scale           X.weight_scale_2
    FP8          float8 [out, in]     float32 [] or [out]      none
    NVFP4        uint8 [out, in / 2]  float8 [out, in / 16]    float32 [] or [1]

A byte holds two codes of e2m1, the first in the low bits. Both scales multiply. It reads as
bfloat16, each product rounded once as in engines; ModelOpt's own function for FP8 rounds the scale
to bfloat16 as well.
Layout: github.com/NVIDIA/Model-Optimizer, modelopt/torch/export/quant_utils.py.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats import fp8
from grokquant.formats.format import ReadableFormat
from grokquant.formats.reading import packed_tensor, validated
from grokquant.formats.scaled_floats import ScaledFloats, from_float4, scaled_ref
from grokquant.types import Source, TensorRef

NAME = "modelopt"

_GROUP = 16  # columns that share a scale of NVFP4


class _Config(BaseModel):
    """What reading takes from a `quantization_config` or a hf_quant_config.json."""

    quant_algo: Literal["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"]
    kv_cache_quant_algo: str | None = Field(None, max_length=40)
    kv_cache_scheme: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_file_of_its_own(cls, value: object) -> object:
        nested = value.get("quantization") if isinstance(value, dict) else None
        return nested if isinstance(nested, dict) else value


def unpacked(source: Source) -> Source:
    """`source` with its small floats presented as bfloat16 matrices."""
    validated(source, _Config)
    tensors = dict(source.tensors)
    for name, ref in source.tensors.items():
        if not name.endswith(".weight") or ref.dtype not in (torch.float8_e4m3fn, torch.uint8):
            continue
        scale = packed_tensor(source, f"{name}_scale")
        if ref.dtype == torch.uint8:
            shared = packed_tensor(source, f"{name}_scale_2")
            tensors[name] = _nvfp4_ref(source, ref, scale, shared)
            del tensors[shared.name]
        else:
            tensors[name] = fp8.dense_ref(source, ref, scale, None)
        del tensors[scale.name]
    return replace(source, tensors=tensors)


def _nvfp4_ref(source: Source, ref: TensorRef, scale: TensorRef, shared: TensorRef) -> TensorRef:
    rows, half = ref.shape if len(ref.shape) == 2 else (0, 0)
    floats = ScaledFloats(
        kind="nvfp4",
        values=ref,
        scales=scale,
        shape=(rows, 2 * half),
        block=(1, _GROUP),
        decoded=from_float4,
        factors=partial(_times, shared),
    )
    fits = scale.shape == floats.blocks and prod(shared.shape) == 1 and half > 0
    dtypes = (scale.dtype, shared.dtype) == (torch.float8_e4m3fn, torch.float32)
    if not fits or not dtypes:
        raise InputError(
            f"{source.path}: {ref.name} of {list(ref.shape)} bytes needs scales "
            f"torch.float8_e4m3fn {list(floats.blocks)} and torch.float32 [], not {scale.dtype} "
            f"{list(scale.shape)} and {shared.dtype} {list(shared.shape)}"
        )
    stored = ref.stored_bytes + scale.stored_bytes + shared.stored_bytes
    return scaled_ref(source, ref.name, floats, torch.bfloat16, stored)


def _times(shared: TensorRef, scales: Tensor) -> Tensor:
    return scales.float() * shared.read()


def activations(config: dict) -> Iterable[str]:
    """How inputs and the cache are quantized, in words."""
    read = _Config.model_validate(config)
    yield f"inputs of matrices ({read.quant_algo})"
    if read.kv_cache_quant_algo or read.kv_cache_scheme:
        yield f"cache of keys and values ({read.kv_cache_quant_algo or '8 bits'})"


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked, activations=activations)
