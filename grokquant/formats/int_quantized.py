"""compressed-tensors `int-quantized`: an int8 for every code, nothing to unpack.

A matrix `X.weight` stays int8 [out, in]; beside it lie `X.weight_scale` [out, groups] and, if
asymmetric, `X.weight_zero_point` int8 [out, groups].
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from grokquant.formats.compressed_config import config_of, not_integers
from grokquant.formats.parts import Layout
from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.types import QTensor, Unit

NAME = "int-quantized"
# How a scale is stored if the recipe does not say; whether an output of no quantized matrix is one.
SCALE_DTYPE, HOLDS_DENSE = "bfloat16", False


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    return not_integers(scheme, (8,))


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> Layout:
    """Names, dtypes and shapes of what `pack` will return, known before anything is read."""
    spans = (shape[0], scheme.groups(shape[1]))
    layout: Layout = {
        tensor: (torch.int8, shape),
        f"{tensor}_scale": (SCALE_DTYPES[scheme.scale_dtype], spans),
    }
    if not scheme.symmetric:
        layout[f"{tensor}_zero_point"] = (torch.int8, spans)
    return layout


def pack(tensor: str, quantized: QTensor) -> dict[str, Tensor]:
    """The named tensors that stand for `tensor` in a checkpoint."""
    parts = {tensor: quantized.codes.contiguous(), f"{tensor}_scale": quantized.scales}
    if quantized.zero_points is not None:
        parts[f"{tensor}_zero_point"] = quantized.zero_points
    return parts


def pack_into(parts: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix to their place; tiles may be written concurrently."""
    for name, part in pack(tensor, quantized).items():
        parts[name][rows] = part.to(parts[name].device)


def unpack(tensor: str, packed: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The inverse of `pack`, bit by bit."""
    zero_points = packed.get(f"{tensor}_zero_point")
    return QTensor(packed[tensor], packed[f"{tensor}_scale"], scheme, zero_points)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of config.json; `unquantized` modules hold a matrix as it is.

    It says compressed-tensors, whose module reads this form too.
    """
    return config_of("int-quantized", units, unquantized)


def papers(config: dict) -> dict[str, dict]:
    """JSON files that readers of this format want beside config.json, by name: none."""
    return {}
