"""The products on CPUs that other packages have with a quantized matrix."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from ggml import Ggml, GgmlMatrix, ggml_library
from torch import Tensor

from grokquant.formats import FORMATS
from grokquant.grids import GRIDS, Scheme
from grokquant.runtime import torch_kernels
from grokquant.types import QTensor

GGML_GRIDS = ("q4_0", "q4_k", "q8_0")
# A matrix of these weights, rounded.
Rounded = Callable[[Scheme], QTensor]


@dataclass(frozen=True)
class Peer:
    """`product` multiplies x [tokens, in] with a matrix of so many bits: [tokens, out]."""

    name: str
    bits: int
    product: Callable[[Tensor], Tensor]


def peers(W: Tensor, rounded: Rounded) -> Iterator[Peer]:
    """Those at hand for a bfloat16 matrix W [out, in]."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would warn at each product
    yield Peer("bf16", 16, lambda x: x @ W.T)
    for group_size in (128, 32):
        held = torch_kernels.prepare(rounded(Scheme(4, group_size)), torch.bfloat16)
        yield Peer(f"torch int4 g{group_size}", 4, partial(torch_kernels.product, held=held))
    yield Peer("torch int8", 8, torch_int8(rounded(Scheme(8, None))))
    yield Peer("bitsandbytes nf4", 4, bitsandbytes_nf4(W))
    yield Peer("bitsandbytes int8", 8, bitsandbytes_int8(W))
    if library := ggml_library():
        ggml = Ggml(library)
        for name in GGML_GRIDS:
            yield from ggml_products(ggml, name, rounded)


def torch_int8(quantized: QTensor) -> Callable[[Tensor], Tensor]:
    codes = quantized.codes.contiguous()
    scales = quantized.scales.flatten().bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, codes, scales)


def bitsandbytes_nf4(W: Tensor) -> Callable[[Tensor], Tensor]:
    """In groups of 64. bitsandbytes rearranges the codes at the first product."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = W.shape
    linear = Linear4bit(columns, rows, False, torch.bfloat16, False, "nf4", device="meta")
    linear.weight = Params4bit(W, False, compress_statistics=False, quant_type="nf4").to("cpu")
    return linear.eval()


def bitsandbytes_int8(W: Tensor) -> Callable[[Tensor], Tensor]:
    """Activations are rounded to int8, too."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    rows, columns = W.shape
    linear = Linear8bitLt(columns, rows, False, has_fp16_weights=False, device="meta")
    linear.weight = Int8Params(W, False, False).to("cpu")
    return linear.eval()


def ggml_products(ggml: Ggml, name: str, rounded: Rounded) -> Iterator[Peer]:
    """In each type of buffers that takes the grid. Activations are rounded to int8, too."""
    grid = GRIDS[name]
    assert grid.ggml_type is not None
    quantized = rounded(grid.scheme)
    (blocks,) = FORMATS["gguf"].pack("x.weight", quantized).values()
    for buffer_type in ggml.buffer_types:
        matrix = GgmlMatrix(ggml, grid.ggml_type, blocks, quantized.shape[1], buffer_type)
        if matrix.is_supported:
            yield Peer(f"ggml {name} {buffer_type}", grid.scheme.bits, matrix.product)
