"""The grids that matrices are rounded onto, by the names that people know them by."""

from dataclasses import dataclass
from statistics import NormalDist

import torch

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _normal_float_4() -> tuple[float, ...]:
    """Quantiles of the normal distribution over the largest of them, zero among them (Dettmers et
    al., arXiv 2305.14314, section 3). Float32 where bitsandbytes has it, for the same last bits."""
    quantile = NormalDist().inv_cdf
    above, below = (torch.linspace(0.9677083, 0.5, count)[:-1].tolist() for count in (9, 8))
    values = [-quantile(p) for p in below] + [0.0] + [quantile(p) for p in reversed(above)]
    return tuple((torch.tensor(values) / torch.tensor(values[-1])).tolist())


_FLOAT_4 = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
# What 4-bit codes that are no integers stand for, times the absmax of their group: normal floats
# and floats of a sign, two exponent and one mantissa bit, in the order of bitsandbytes.
CODEBOOKS = {"nf4": _normal_float_4(), "fp4": (*_FLOAT_4, *(-value for value in _FLOAT_4))}
# Bits that llama.cpp's grids take for the scale and offset of a group, its share of the header.
GROUP_BITS = {"q4_1": 32, "q4_k": 16, "q5_k": 16, "q6_k": 9}
UNSIGNED_GRIDS = ("nf4", "fp4", "q4_1", "q4_k", "q5_k")


@dataclass(frozen=True)
class Scheme:
    """The grid that a matrix is rounded onto.

    `group_size` counts consecutive input columns that share a scale; None is one scale per row.
    Codes of the grid `integer` are signed: -2^(bits-1) .. 2^(bits-1)-1, asymmetric ones add a zero
    point of that range. Codes of a codebook (`nf4`, `fp4`) are 0 .. 15, places in its table. A
    scale of `llm_int8` is the absmax of a row, its codes are signed parts of 127. Those of
    llama.cpp's `q4_1`, `q4_k`, `q5_k` are 0 .. 2^bits-1 above an offset of the group, those of
    `q6_k` -32 .. 31; scales and offsets of the last three are themselves stored as small integers
    in the header of a block of 256 columns.
    """

    bits: int
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    grid: str = "integer"

    @property
    def unit(self) -> float:
        """What stands for a code of 1, in scales."""
        return 1 / 127 if self.grid == "llm_int8" else 1.0

    @property
    def qmin(self) -> int:
        return 0 if self.grid in UNSIGNED_GRIDS else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return self.qmin + (1 << self.bits) - 1

    def groups(self, in_features: int) -> int:
        """Number of scales in a row of `in_features` columns."""
        return 1 if self.group_size is None else in_features // self.group_size

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        if self.grid != "integer":
            return f"{self.grid} {group}"
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


# Grids by the names that people know them by; the group of nf4 and fp4 may be another.
NAMED_GRIDS = {
    "nf4": Scheme(4, 64, True, "float32", "nf4"),
    "fp4": Scheme(4, 64, True, "float32", "fp4"),
    "llm_int8": Scheme(8, None, True, "float32", "llm_int8"),
    "q8_0": Scheme(8, 32, True, "float16"),
    "q4_0": Scheme(4, 32, True, "float16"),
    "q4_1": Scheme(4, 32, False, "float16", "q4_1"),
    "q4_k": Scheme(4, 32, False, "float32", "q4_k"),
    "q5_k": Scheme(5, 32, False, "float32", "q5_k"),
    "q6_k": Scheme(6, 16, True, "float32", "q6_k"),
}
