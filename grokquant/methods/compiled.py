"""rtn on CPUs by the compiled kernels: tile by tile of rows, on all cores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.methods.kernels import LANES, STEP, Grid, Rows, round_rows
from grokquant.types import QTensor

# Fractions of the full range that the search tries; below 0.6 no group of a trained model gains.
SHRINKS = np.linspace(1.0, 0.6, 21, dtype=np.float32)
# Weights of a tile: few enough for the cache, enough for the interpreter not to be felt.
_TILE = 3 << 19

_T = TypeVar("_T")
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def least_scale(dtype: torch.dtype) -> float:
    """The smallest scale of this dtype. float16 goes below its normal numbers, which are no smaller
    than 6e-5: a group of 8-bit codes reaches that with weights of 0.008."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def can_round(W: Tensor | QTensor, scheme: Scheme) -> bool:
    """Whether `round_tile` is made for rounding W, or tiles of it, to `scheme`."""
    matrix = W.codes if isinstance(W, QTensor) else W
    group_size = scheme.group_size or matrix.shape[1]
    return scheme.is_integer and matrix.device.type == "cpu" and group_size % STEP == 0


def round_tile(
    tile: Tensor | QTensor, scheme: Scheme, search: bool, importance: Tensor | None = None
) -> tuple[QTensor, np.ndarray]:
    """Rounds [rows, in] to scales of the whole range, or to those that a search finds best.

    Also returns float64 [3]: the sums of squares of the errors and of the weights, and the number
    of rows that are zero throughout.
    """
    source = _rows(tile)
    rows, columns = tile.shape
    codes, sums = np.empty((rows, columns), np.int8), np.zeros(3)
    scales, zeros = np.empty((2, rows, scheme.groups(columns)), np.float32)
    candidates = len(SHRINKS) * (2 if scheme.symmetric else 1) if search else 1
    weights = torch.ones(columns) if importance is None else importance.float().contiguous()
    outputs = codes.view(np.uint32), scales, zeros, sums
    round_rows(source, SHRINKS, candidates, _grid(scheme), weights.numpy(), *outputs)
    zero_points = None if scheme.symmetric else torch.from_numpy(zeros.astype(np.int8))
    stored = torch.from_numpy(scales).to(SCALE_DTYPES[scheme.scale_dtype])
    return QTensor(torch.from_numpy(codes), stored, scheme, zero_points), sums


def tile_rows(columns: int) -> int:
    """How many rows to give to `round_tile` at once."""
    return max(_TILE // columns // LANES, 1) * LANES


def quantize(
    W: Tensor | QTensor, scheme: Scheme, search: bool, importance: Tensor | None = None
) -> QTensor:
    """All of W [out, in] as `round_tile` rounds it."""
    rows, columns = W.shape

    def work(part: slice) -> QTensor:
        tile = W.rows(part) if isinstance(W, QTensor) else W[part]
        return round_tile(tile, scheme, search, importance)[0]

    tiles = in_tiles(rows, tile_rows(columns), work)
    return QTensor.cat(tiles)


def in_tiles(rows: int, size: int, work: Callable[[slice], _T]) -> list[_T]:
    """`work` for all tiles of `size` rows, on as many threads as torch uses; in their order."""
    tiles = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, tiles))


def _rows(tile: Tensor | QTensor) -> Rows:
    if isinstance(tile, QTensor):
        plain = tile.scheme.is_integer and tile.zero_points is None
        if plain and tile.scales.dtype == torch.bfloat16:
            codes = tile.codes.T if tile.codes.stride(0) == 1 else tile.codes.T.contiguous()
            columns, rows = codes.shape
            stride = codes.stride(0)
            values = codes.as_strided(((columns - 1) * stride + rows,), (1,)).numpy()
            group_size = columns // tile.scales.shape[1]
            scales = (_bits(tile.scales.T).astype(np.uint32, order="C") << 16).view(np.float32)
            return Rows(values, stride, scales, group_size)
        tile = tile.dequantize()
    values = _bits(tile) if tile.dtype == torch.bfloat16 else tile.float().numpy()
    return Rows(np.ravel(values), tile.shape[1], np.empty((0, 0), np.float32), 0)


def _bits(values: Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16)


def _grid(scheme: Scheme) -> Grid:
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    dropped, tiny, step = _DROPPED_BITS[dtype], torch.finfo(dtype).tiny, least_scale(dtype)
    least = np.nextafter(np.float32(step / 2), np.float32(1))
    if step == tiny:
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
