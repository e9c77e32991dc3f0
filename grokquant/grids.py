"""The grids that matrices are rounded onto: one row of GRIDS each, with all that depends on it.

A new grid is a row here, a function that finds its levels (FINDERS in `methods/levels.py`) and the
functions of a format that pack and read it.
"""

import re
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SCALE_DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}

# Functions of methods/levels.py that find the scales of a matrix, and its offsets where it has any.
FinderName = Literal["integers", "absmax", "range", "table", "block_scales", "block_minima"]

# Input features of llama.cpp's larger blocks, and the bits of a number that a block stores once.
SUPER_BLOCK = 256
FLOAT16_BITS = 16


@dataclass(frozen=True)
class Scheme:
    """The grid that a matrix is rounded onto.

    `group_size` counts consecutive input columns that share a scale; None is one scale per row.
    `grid` names a row of GRIDS. Codes of the grid `integer` are signed, -2^(bits-1) to
    2^(bits-1)-1; asymmetric ones have a zero point of the same range.
    """

    bits: int
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    grid: str = "integer"

    @property
    def row(self) -> "Grid":
        return GRIDS[self.grid]

    @property
    def is_integer(self) -> bool:
        """Whether recipes choose bits and groups, and a value is (code - zero point) * scale."""
        return self.grid == "integer"

    @property
    def qmin(self) -> int:
        return 0 if self.row.unsigned else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return self.qmin + (1 << self.bits) - 1

    @property
    def group_bits(self) -> int:
        """Bits that a group takes beside its codes."""
        if not self.is_integer:
            return self.row.group_bits
        scale_bits = SCALE_DTYPES[self.scale_dtype].itemsize * 8
        return scale_bits if self.symmetric else scale_bits + self.bits

    def groups(self, in_features: int) -> int:
        """Number of scales in a row of `in_features` columns."""
        return 1 if self.group_size is None else in_features // self.group_size

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        if not self.is_integer:
            return f"{self.grid} {group}"
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class Grid:
    """A row of GRIDS.

    `formats` are the output formats that may hold it, by name, `finder` the function that finds its
    levels. `group_size` is the group that it has where a recipe names none, `other_groups` those
    that a recipe may name instead. Grids that are not `symmetric` add an offset to each group,
    integers a zero point.

    `table` holds the value of each code, in scales; without one a code is an integer, worth `unit`
    scales, and 0 .. 2^bits-1 where `unsigned`. `scale_bits` is what a file stores of a scale, and
    of an offset.

    `ggml_type` is llama.cpp's number of the grid, `float16_at` the bytes at which its blocks hold a
    float16, `block_columns` the input features of its blocks.
    In a block of several groups scales and offsets are small integers, times a float16 each that
    the block stores once: its header. The scales of a QTensor are the products, in `scale_dtype`.
    A grid that `is_integer` is the grid `integer` under llama.cpp's name.
    """

    name: str
    bits: int
    group_size: int | None
    formats: tuple[str, ...]
    finder: FinderName
    scale_dtype: str = "float32"
    symmetric: bool = True
    other_groups: tuple[int | None, ...] = ()
    table: tuple[float, ...] = ()
    unsigned: bool = False
    unit: float = 1.0
    scale_bits: int = FLOAT16_BITS
    block_columns: int = 0
    ggml_type: int | None = None
    float16_at: tuple[int, ...] = ()
    is_integer: bool = False

    @property
    def scheme(self) -> Scheme:
        """The grid with its usual groups."""
        name = "integer" if self.is_integer else self.name
        return Scheme(self.bits, self.group_size, self.symmetric, self.scale_dtype, name)

    @property
    def groups(self) -> tuple[int | None, ...]:
        return (self.group_size, *self.other_groups)

    @property
    def group_names(self) -> str:
        """Its groups, smallest first, in the words of a recipe."""
        sizes = sorted(size for size in self.groups if size is not None)
        names = [str(size) for size in sizes]
        return ", ".join(names if None not in self.groups else [*names, "channel"])

    @property
    def has_header(self) -> bool:
        """Whether several groups share a block, and scales follow from its header."""
        return self.group_size is not None and self.block_columns > self.group_size

    @property
    def group_bits(self) -> int:
        """Bits that a group takes beside its codes, its share of the block's float16 included."""
        numbers = 1 if self.symmetric else 2
        shared = 0
        if self.has_header:
            assert self.group_size is not None
            shared = FLOAT16_BITS * self.group_size // self.block_columns
        return numbers * (self.scale_bits + shared)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of llama.cpp."""
        assert self.group_size is not None
        groups = self.block_columns // self.group_size
        return (self.block_columns * self.bits + groups * self.group_bits) // 8


def _normal_float_4() -> tuple[float, ...]:
    """Quantiles of the normal distribution over the largest of them, zero among them (Dettmers et
    al., arXiv 2305.14314, section 3). Float32 where bitsandbytes has it, for the same last bits."""
    quantile = NormalDist().inv_cdf
    above, below = (torch.linspace(0.9677083, 0.5, count)[:-1].tolist() for count in (9, 8))
    values = [-quantile(p) for p in below] + [0.0] + [quantile(p) for p in reversed(above)]
    return tuple((torch.tensor(values) / torch.tensor(values[-1])).tolist())


# Floats of a sign, two exponent and one mantissa bit, in the order of bitsandbytes.
_FLOAT_4_POSITIVE = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
_FLOAT_4 = (*_FLOAT_4_POSITIVE, *(-value for value in _FLOAT_4_POSITIVE))
# kvalues_iq4nl of ggml-common.h: closer together around 0, where most weights are.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4_TABLE = tuple(map(float, _IQ4))

_INTEGER_FORMATS = ("compressed-tensors", "gptq", "gguf")
_BNB = ("bitsandbytes",)
_GGUF = ("gguf",)
# Blocks may be of any power of two there, up to 4096 weights.
_BNB_BLOCKS = (32, 128, 256, 512, 1024, 2048, 4096)
# What recipes may choose; checkpoints of others have other groups, too.
_INTEGER_GROUPS = (32, 64, 256, None)

GRIDS = {
    grid.name: grid
    for grid in (
        # The recipe chooses bits, symmetric and scale_dtype.
        Grid(
            "integer", 4, 128, _INTEGER_FORMATS, "integers", "bfloat16",
            other_groups=_INTEGER_GROUPS, is_integer=True,
        ),
        # bitsandbytes. Scales are what the largest weight of a group is stored as.
        Grid(
            "nf4", 4, 64, _BNB, "absmax", other_groups=_BNB_BLOCKS,
            table=_normal_float_4(), unsigned=True, scale_bits=32,
        ),
        Grid(
            "fp4", 4, 64, _BNB, "absmax", other_groups=_BNB_BLOCKS,
            table=_FLOAT_4, unsigned=True, scale_bits=32,
        ),
        Grid("llm_int8", 8, None, _BNB, "absmax", unit=1 / 127, scale_bits=32),
        # llama.cpp, blocks of one group.
        Grid(
            "q8_0", 8, 32, _INTEGER_FORMATS, "integers", "float16",
            block_columns=32, ggml_type=8, float16_at=(0,), is_integer=True,
        ),
        Grid(
            "q4_0", 4, 32, _INTEGER_FORMATS, "integers", "float16",
            block_columns=32, ggml_type=2, float16_at=(0,), is_integer=True,
        ),
        Grid(
            "q4_1", 4, 32, _GGUF, "range", "float16", symmetric=False,
            unsigned=True, block_columns=32, ggml_type=3, float16_at=(0, 2),
        ),
        Grid(
            "iq4_nl", 4, 32, _GGUF, "table", table=_IQ4_TABLE,
            unsigned=True, block_columns=32, ggml_type=20, float16_at=(0,),
        ),
        # llama.cpp, blocks of 256 columns with a header.
        Grid(
            "q6_k", 6, 16, _GGUF, "block_scales",
            scale_bits=8, block_columns=SUPER_BLOCK, ggml_type=14, float16_at=(208,),
        ),
        Grid(
            "q5_k", 5, 32, _GGUF, "block_minima", symmetric=False, unsigned=True,
            scale_bits=6, block_columns=SUPER_BLOCK, ggml_type=13, float16_at=(0, 2),
        ),
        Grid(
            "q4_k", 4, 32, _GGUF, "block_minima", symmetric=False, unsigned=True,
            scale_bits=6, block_columns=SUPER_BLOCK, ggml_type=12, float16_at=(0, 2),
        ),
        Grid(
            "iq4_xs", 4, 32, _GGUF, "block_scales", table=_IQ4_TABLE, unsigned=True,
            scale_bits=6, block_columns=SUPER_BLOCK, ggml_type=23, float16_at=(0,),
        ),
        Grid(
            "q3_k", 3, 16, _GGUF, "block_scales",
            scale_bits=6, block_columns=SUPER_BLOCK, ggml_type=11, float16_at=(108,),
        ),
        Grid(
            "q2_k", 2, 16, _GGUF, "block_minima", symmetric=False, unsigned=True,
            scale_bits=4, block_columns=SUPER_BLOCK, ggml_type=10, float16_at=(80, 82),
        ),
    )
}  # fmt: skip


# What `--grid` takes: that of integers is said by its bits.
NAMED = tuple(name for name in GRIDS if name != "integer")


def named_grid(text: str) -> str | None:
    """The grid of NAMED that `text` is, perhaps with an ending of llama.cpp's file types."""
    stem = re.sub("_[sml]$", "", text.lower())
    return stem if stem in NAMED else None


def block_grid(scheme: Scheme) -> Grid | None:
    """The grid of llama.cpp that `scheme` is, None if it is none."""
    return _BLOCK_GRIDS.get(scheme)


_BLOCK_GRIDS = {grid.scheme: grid for grid in GRIDS.values() if grid.ggml_type is not None}

# Blocks of llama.cpp that are only read: ggml's number, columns and bytes by name. The gguf package
# multiplies them out.
OTHER_BLOCKS = {
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ1_M": (29, 256, 56),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
}
