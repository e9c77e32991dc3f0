"""compressed-tensors `int-quantized`, which is only read: an int8 for every code.

A matrix `X.weight` is int8 [out, in]; beside it lie `X.weight_scale` [out, groups] and, if
asymmetric, `X.weight_zero_point` int8 [out, groups]. vLLM reads it only with quantized activations,
which grokquant does not make.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from grokquant.formats.format import PackedLayout
from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.types import QTensor


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


def unpack(tensor: str, packed: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The matrix that the packed tensors of that layout hold."""
    zero_points = packed.get(f"{tensor}_zero_point")
    return QTensor(packed[tensor], packed[f"{tensor}_scale"], scheme, zero_points)
