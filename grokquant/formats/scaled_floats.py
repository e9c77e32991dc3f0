"""Small floats times a scale per block, which several formats store: how they read as a matrix.

A block is a part of the matrix [out, in] that has one scale. Those at the right and lower edges may
be cut off. Every way to share scales is a shape of blocks:

    tensor  [out, in]     channel  [1, in]     group  [1, group_size]     block  [128, 128]

    weight  | block 0,0 | block 0,1 | 0,2      scales  s00  s01  s02
            | block 1,0 | block 1,1 | 1,2              s10  s11  s12
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.types import Source, TensorRef

Block = tuple[int, int]

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Of the 16 codes of a float with a sign, two bits of exponent and one of mantissa (e2m1).
_FLOAT4 = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])


@dataclass(frozen=True, kw_only=True)
class ScaledFloats:
    """A stored matrix of `shape` [out, in], of which each block has a scale.

    `kind` is what people call such floats: fp8, nvfp4. `decoded` makes float32 [rows, in] of some
    stored rows of `values`. `factors` makes float32 of the stored `scales`, one for each block.
    """

    kind: str
    values: TensorRef
    scales: TensorRef
    shape: tuple[int, int]
    block: Block
    decoded: Callable[[Tensor], Tensor]
    factors: Callable[[Tensor], Tensor]

    @property
    def blocks(self) -> tuple[int, int]:
        """The number of blocks below and beside each other."""
        rows, columns = self.shape
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    @property
    def name(self) -> str:
        """The floats and what shares a scale, as people read it: fp8 channel, nvfp4 g16."""
        rows, columns = self.block
        if self.block == self.shape:
            return f"{self.kind} tensor"
        if rows > 1:
            return f"{self.kind} {rows}x{columns}"
        return f"{self.kind} channel" if columns == self.shape[1] else f"{self.kind} g{columns}"

    def load_rows(self, first: int, stop: int) -> Tensor:
        """float32 [stop - first, in]"""
        stored = self.values.load_rows
        rows = stored(first, stop) if stored else self.values.read()[first:stop]
        factors = self.factors(self.scales.read()).reshape(self.blocks)
        factors = factors[torch.arange(first, stop) // self.block[0]]  # (rows, blocks)
        width = min(self.block[1], self.shape[1])
        factors = factors.repeat_interleave(width, dim=1)  # (rows, in or more)
        return self.decoded(rows) * factors[:, : self.shape[1]]


def scaled_ref(
    source: Source, tensor: str, floats: ScaledFloats, dtype: torch.dtype, stored_bytes: int
) -> TensorRef:
    """The matrix `tensor`, which reads as `dtype`: the products, each rounded once.

    Reading raises InputError where a product is not finite.
    """

    def load_rows(first: int, stop: int) -> Tensor:
        dense = floats.load_rows(first, stop).to(dtype)
        if not dense.isfinite().all():
            names = f"{floats.values.name} times {floats.scales.name}"
            raise InputError(f"{source.path}: {names} is not finite")
        return dense

    return TensorRef(
        tensor,
        floats.shape,
        dtype,
        stored_bytes,
        load=partial(load_rows, 0, floats.shape[0]),
        load_rows=load_rows,
        grid_name=floats.name,
    )


def from_float8(values: Tensor) -> Tensor:
    """float32 of floats of 8 bits, or of any other floats."""
    return values.float()


def from_exponents(exponents: Tensor) -> Tensor:
    """float32 2^(e - 127) of exponents e in uint8 (e8m0); NaN where e is 255."""
    return exponents.view(torch.float8_e8m0fnu).float()


def from_float4(pairs: Tensor) -> Tensor:
    """float32 [.., 2 n] of uint8 [.., n] that hold two codes each, the first in the low bits."""
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    return _FLOAT4[codes.int()]
