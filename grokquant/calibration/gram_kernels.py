"""X^T X of bfloat16 inputs in float32 on CPUs, by the quickest instructions that they have.

PyTorch has no CPU product of bfloat16 matrices with a float32 result, and multiplying their float32
copies takes two to ten times as long. Products of bfloat16 are exact in float32.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import llvmlite.binding
import numpy as np
import torch
from torch import Tensor

from grokquant import amx
from grokquant.calibration import gram_dots, gram_tiles
from grokquant.calibration.gram_panels import BLOCK, WIDTH, pack
from grokquant.threads import in_pieces

# Panels of a piece of work: a panel above them, read once for all, and they fit the second cache.
_PANELS = 8


class GramKernel(NamedTuple):
    """`add_products` takes packed inputs with so many sides, and H, first and last panel."""

    add_products: Callable[[np.ndarray, np.ndarray, int, int], None]
    sides: int


KERNELS = {
    "AMX": GramKernel(gram_tiles.add_products, sides=2),
    "AVX-512 BF16": GramKernel(gram_dots.add_products, sides=1),
}


@cache
def instructions() -> list[str]:
    """Those of KERNELS that this CPU has, the quickest first."""
    has_dots = bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))
    return ["AMX"] * amx.is_available() + ["AVX-512 BF16"] * has_dots


def add_products(X: Tensor, H: Tensor, kernel: GramKernel) -> None:
    """Adds X^T X of bfloat16 inputs X [tokens, in] to the upper triangle of H float32 [in, in].

    About 2000 tokens at a time are best: their panels fit the second cache, and each call passes
    over H once. The same inputs give the same bits, whatever the number of threads.
    """
    panels = -(-len(H) // WIDTH)
    pairs = -(-len(X) // (2 * BLOCK)) * BLOCK
    packed = np.empty((panels, kernel.sides, pairs, WIDTH), np.uint32)
    inputs = X.view(torch.uint16).numpy()  # numpy has no bfloat16
    result = H.numpy()
    pieces = [(first, min(first + _PANELS, panels)) for first in range(0, panels, _PANELS)]
    in_pieces(lambda piece: pack(inputs, packed, *piece), pieces)
    # The last ones first, which are the largest.
    in_pieces(lambda piece: kernel.add_products(packed, result, *piece), reversed(pieces))
