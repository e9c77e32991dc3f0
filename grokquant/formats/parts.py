"""The parts of a packed matrix: the tensors that stand for it in a checkpoint."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.types import QTensor

# Names of parts with their dtypes and shapes.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
# As a format's `packed_layout` and `pack_into`.
LayoutOf = Callable[[str, tuple[int, int], Scheme], Layout]
PackInto = Callable[[Mapping[str, Tensor], str, slice, QTensor], None]


def pack_all(
    tensor: str, quantized: QTensor, layout_of: LayoutOf, pack_into: PackInto
) -> dict[str, Tensor]:
    """All rows of a matrix, packed into new memory where its codes are."""
    rows, columns = quantized.codes.shape
    layout, device = layout_of(tensor, (rows, columns), quantized.scheme), quantized.codes.device
    parts = {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in layout.items()
    }
    pack_into(parts, tensor, slice(0, rows), quantized)
    return parts
