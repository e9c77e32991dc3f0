"""compressed-tensors `int-quantized`, which is only read: an int8 for every code.

A matrix `X.weight` is int8 [out, in]; beside it lie `X.weight_scale` [out, groups], or [1] for the
whole matrix, and, if asymmetric, `X.weight_zero_point` int8 of the same shape. W8A8 models are
stored so; how their activations are rounded is no part of the weights.
"""

from math import prod

import torch

from grokquant.errors import InputError
from grokquant.formats.compressed_config import Integers
from grokquant.formats.format import PackedLayout
from grokquant.formats.reading import check_group_size, check_packed
from grokquant.grids import Scheme
from grokquant.types import QTensor, Source, TensorRef


def unpacked_ref(
    source: Source, tensor: str, weights: Integers, scheme: Scheme, scale: TensorRef
) -> TensorRef:
    """The matrix `tensor`, which reads as a QTensor. Raises InputError where its tensors do not fit
    together. A scale for the whole matrix becomes one for each row."""
    codes = source.tensors[tensor]
    if len(codes.shape) != 2:
        raise InputError(f"{source.path}: {tensor} has shape {list(codes.shape)}, not [out, in]")
    rows, columns = codes.shape
    shared = weights.strategy == "tensor"
    if shared and prod(scale.shape) != 1:
        raise InputError(
            f"{source.path}: {scale.name} has shape {list(scale.shape)}, but strategy tensor "
            "has one scale"
        )
    spans = scale.shape if shared else (rows, scheme.groups(columns))
    layout: PackedLayout = {tensor: (torch.int8, (rows, columns)), scale.name: (scale.dtype, spans)}
    if not scheme.symmetric:
        layout[f"{tensor}_zero_point"] = (torch.int8, spans)
    refs = check_packed(source, layout, scheme)
    check_group_size(source, tensor, scheme, columns)

    def load() -> QTensor:
        packed, *found = (ref.read() for ref in refs)
        if shared:
            found = [span.reshape(1, 1).repeat(rows, 1) for span in found]
        scales, *zero_points = found
        return QTensor(packed, scales, scheme, *zero_points)

    stored = sum(ref.stored_bytes for ref in refs)
    return TensorRef(tensor, (rows, columns), scale.dtype, stored, load, scheme)
