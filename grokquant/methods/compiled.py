"""Integers on CPUs by the compiled kernels, tile by tile of rows."""

import numpy as np
import torch
from torch import Tensor

from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.methods.kernels import LANES, Grid, RowSource, round_rows
from grokquant.types import QTensor

# Fractions of the full range that the search tries; below 0.6 no group of a trained model gains.
SHRINKS = np.linspace(1.0, 0.6, 21, dtype=np.float32)
# Weights of a tile: few enough for the cache, enough to hide the cost of Python's calls.
_TILE = 3 << 19

# Mantissa bits of float32 (23) that a scale loses when it is stored in this dtype.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def least_scale(dtype: torch.dtype) -> float:
    """The smallest positive scale of this dtype.

    float16 uses its subnormal numbers too: its normal ones end at 6e-5, which is the scale of a
    group of 8-bit codes whose largest weight is 0.008.
    """
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def round_tile(
    tile: Tensor | QTensor, scheme: Scheme, search: bool, importance: Tensor | None = None
) -> tuple[QTensor, np.ndarray]:
    """Rounds [rows, in] with scales that span each group's range, or the best ones of a `search`.

    Also returns float64 [3]: the sum of squared errors, the sum of squared weights, and the number
    of rows that are zero throughout. The search weighs errors by `importance` [in].
    """
    source = row_source(tile)
    rows, columns = tile.shape
    groups = scheme.groups(columns)
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((groups, rows), np.float32)
    zeros = np.empty((groups, rows), np.float32)
    sums = np.zeros(3)
    weights = torch.ones(columns) if importance is None else importance.float().contiguous()
    outputs = (codes.view(np.uint32), scales, zeros, sums)
    tried = _candidates(scheme) if search else 1
    round_rows(source, SHRINKS, tried, grid_numbers(scheme), weights.numpy(), *outputs)
    zero_points = None if scheme.symmetric else torch.from_numpy(zeros.T.astype(np.int8, order="C"))
    stored = torch.from_numpy(scales).to(SCALE_DTYPES[scheme.scale_dtype]).T.contiguous()
    return QTensor(torch.from_numpy(codes), stored, scheme, zero_points), sums


def rows_of_zeros(quantized: QTensor) -> int:
    """How many rows of what `round_tile` returns are zero throughout.

    All scales of such a row are 1, which stands for those that would be stored as 0.
    """
    suspects = (quantized.scales == 1).all(1)
    codes = quantized.codes[suspects].unflatten(1, (quantized.scales.shape[1], -1))
    if quantized.zero_points is not None:
        codes = codes - quantized.zero_points[suspects].unsqueeze(-1)
    return int(torch.count_nonzero(~codes.flatten(1).any(1)))


def _candidates(scheme: Scheme) -> int:
    """Scales that a search tries: symmetric grids also try the lowest code for the peak."""
    return len(SHRINKS) * (2 if scheme.symmetric else 1)


def tile_rows(columns: int) -> int:
    """How many rows to give to `round_tile` at once, a multiple of LANES."""
    return max(_TILE // columns // LANES, 1) * LANES


def row_source(tile: Tensor | QTensor) -> RowSource:
    """A tile as the kernels read it."""
    if isinstance(tile, QTensor):
        # The kernels dequantize symmetric integers with bfloat16 scales, which are Grok-1's.
        plain = tile.scheme.is_integer and tile.zero_points is None
        if plain and tile.scales.dtype == torch.bfloat16:
            return _stored_rows(tile)
        tile = tile.dequantize()
    if tile.T.is_contiguous():  # in float32, for which alone the kernels read columns
        return _dense(tile.T.float().numpy(), by_column=True)
    return _dense(_bits(tile) if tile.dtype == torch.bfloat16 else tile.float().numpy())


def _dense(values: np.ndarray, by_column: bool = False) -> RowSource:
    no_scales = np.empty((0, 0), np.float32)
    return RowSource(np.ravel(values), values.shape[1], by_column, no_scales, 0)


def _stored_rows(tile: QTensor) -> RowSource:
    """The codes as they lie in memory, column after column; copied only if they lie otherwise."""
    codes = tile.codes.T if tile.codes.stride(0) == 1 else tile.codes.T.contiguous()
    columns, rows = codes.shape
    stride = codes.stride(0)
    # One flat view from the first code to the last, with the gaps between columns in it.
    values = codes.as_strided(((columns - 1) * stride + rows,), (1,)).numpy()
    group_size = columns // tile.scales.shape[1]
    # A bfloat16 number is the upper half of the float32 one.
    scales = (_bits(tile.scales.T).astype(np.uint32, order="C") << 16).view(np.float32)
    return RowSource(values, stride, True, scales, group_size)


def _bits(values: Tensor) -> np.ndarray:
    """bfloat16 seen as uint16, since numpy has no bfloat16."""
    return values.view(torch.int16).numpy().view(np.uint16)


def grid_numbers(scheme: Scheme) -> Grid:
    """The numbers in which the kernels know a scheme."""
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    dropped = _DROPPED_BITS[dtype]
    tiny = torch.finfo(dtype).tiny
    step = least_scale(dtype)
    # Just above half of the least subnormal number, which itself rounds to 0, the even one.
    least = np.nextafter(np.float32(step / 2), np.float32(1))
    if step == tiny:  # no subnormal scales: the least number that rounds up to `tiny`
        least = np.float32(tiny * (1 - 2.0 ** (dropped - 24)))
    return Grid(
        qmin=np.float32(scheme.qmin),
        qmax=np.float32(scheme.qmax),
        symmetric=scheme.symmetric,
        unit=np.uint32(1 << dropped),
        even=np.uint32(max((1 << dropped) // 2 - 1, 0)),
        odd=np.uint32((1 << dropped) // 2),
        limit=np.float32(65536.0 if dtype == torch.float16 else np.inf),
        tiny=np.float32(tiny),
        step=np.float32(step),
        least=least,
    )
