"""Which kernel multiplies tokens with a matrix that stays packed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.runtime import codes_kernel, torch_kernels
from grokquant.runtime.matrix_cache import Parts
from grokquant.types import QTensor

# A form that takes more than this times the matrix's own bytes defeats its purpose: a byte for each
# code of 5 bits.
_MOST_GROWTH = 1.2
# Kernels for CPUs unpack codes again for every few tokens; from here on it is quicker to dequantize
# the matrix once (eval/bench/packed.py). Ours in bfloat16 does so itself.
_MANY_TOKENS = 32


@dataclass(frozen=True)
class Kernel:
    """Multiplies with matrices [out, in] on one type of device.

    `takes` says whether it can multiply with a grid and shape in a dtype of activations; then
    `held_bytes` are those of the tensors that `prepare` makes of a matrix, and `product` multiplies
    x [tokens, in] with these: [tokens, out]. It is worth it for fewer than `many` tokens; None is
    any number.
    """

    device: str
    takes: Callable[[Scheme, tuple[int, int], torch.dtype], bool]
    held_bytes: Callable[[Scheme, tuple[int, int], torch.dtype], int]
    prepare: Callable[[QTensor, torch.dtype], Parts]
    product: Callable[[Tensor, Parts], Tensor]
    many: int | None

    def is_quicker(self, tokens: int) -> bool:
        """Whether it multiplies so many tokens sooner than a product with dequantized tiles."""
        return self.many is None or tokens < self.many


# The first one that takes a matrix multiplies with it.
KERNELS = (
    Kernel(
        "cpu",
        codes_kernel.takes_bfloat16,
        codes_kernel.held_bytes,
        codes_kernel.prepare,
        codes_kernel.product,
        None,
    ),
    Kernel(
        "cpu",
        torch_kernels.takes,
        torch_kernels.held_bytes,
        torch_kernels.prepare,
        torch_kernels.product,
        _MANY_TOKENS,
    ),
    Kernel(
        "cpu",
        codes_kernel.takes,
        codes_kernel.held_bytes,
        codes_kernel.prepare,
        codes_kernel.product,
        _MANY_TOKENS,
    ),
    Kernel(
        "cuda",
        torch_kernels.takes_on_cuda,
        torch_kernels.held_bytes,
        torch_kernels.prepare_for_cuda,
        torch_kernels.product_on_cuda,
        None,
    ),
)


def kernel_for(
    scheme: Scheme, shape: tuple[int, int], stored_bytes: int, device: str, dtype: torch.dtype
) -> Kernel | None:
    """The kernel that multiplies with a matrix [out, in] in not much more memory than its file
    takes, None if there is none."""
    for kernel in KERNELS:
        if kernel.device == device and kernel.takes(scheme, shape, dtype):
            held = kernel.held_bytes(scheme, shape, dtype)
            return kernel if held <= _MOST_GROWTH * stored_bytes else None
    return None
