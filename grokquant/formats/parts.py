"""The parts of a packed matrix: the tensors that stand for it in a checkpoint."""

import torch
from torch import Tensor

# Names of parts with their dtypes and shapes.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def empty_parts(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Memory for the parts, to be filled."""
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in layout.items()
    }
