"""compressed-tensors `int-quantized`: an int8 for every code, nothing to unpack.

A matrix `X.weight` is int8 [out, in]; beside it lie `X.weight_scale` [out, groups] and, if
asymmetric, `X.weight_zero_point` int8 [out, groups]. `compressed_tensors` reads it and lists it.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from grokquant.formats.compressed_config import config_of, not_integers
from grokquant.formats.format import PackedLayout
from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.types import QTensor, Unit

NAME = "int-quantized"


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    return not_integers(scheme, (8,))


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> PackedLayout:
    """Names, dtypes and shapes of the packed tensors of a matrix."""
    spans = (shape[0], scheme.groups(shape[1]))
    layout: PackedLayout = {
        tensor: (torch.int8, shape),
        f"{tensor}_scale": (SCALE_DTYPES[scheme.scale_dtype], spans),
    }
    if not scheme.symmetric:
        layout[f"{tensor}_zero_point"] = (torch.int8, spans)
    return layout


def pack_into(packed: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix into its packed tensors."""
    device = packed[tensor].device
    packed[tensor][rows] = quantized.codes.to(device)
    packed[f"{tensor}_scale"][rows] = quantized.scales.to(device)
    if quantized.zero_points is not None:
        packed[f"{tensor}_zero_point"][rows] = quantized.zero_points.to(device)


def unpack(tensor: str, packed: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The inverse of `pack`, bit by bit."""
    zero_points = packed.get(f"{tensor}_zero_point")
    return QTensor(packed[tensor], packed[f"{tensor}_scale"], scheme, zero_points)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """One group of targets per scheme; the quant_method is that of `compressed_tensors`."""
    return config_of("int-quantized", units, unquantized)
