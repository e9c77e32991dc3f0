"""The grids of llama.cpp on CPUs by the compiled kernels, tile by tile of rows."""

from functools import cache
from math import gcd

import numpy as np
import torch
from torch import Tensor

from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.methods.block_headers import MINIMA_HEADERS, SCALE_HEADERS, whole_limits
from grokquant.methods.block_kernels import BlockGrid, Outputs, round_blocks, scratch
from grokquant.methods.compiled import row_source
from grokquant.methods.find_blocks import refinements, searches_step, step_reaches
from grokquant.methods.fits import LEAST_SQUARES, LEAST_STEP, reaches
from grokquant.methods.spans import half_step_lookup
from grokquant.types import QTensor

# Columns read and written at once, where no block says how many.
_COLUMNS = 256


def round_tile(
    tile: Tensor | QTensor, scheme: Scheme, search: bool, importance: Tensor | None = None
) -> tuple[QTensor, Outputs]:
    """`compiled.round_tile` for the grids of llama.cpp that are no integers."""
    W = tile.dequantize() if isinstance(tile, QTensor) else tile
    columns = W.shape[1]
    grid = _block_grid(scheme, search)
    groups = _groups_at_once(scheme, grid, columns)
    out = _outputs(W.shape[0], columns, scheme.groups(columns), groups)
    weights = torch.ones(columns) if importance is None else importance.float().contiguous()
    lanes, block = scratch(groups, grid.group_size)
    # In float32 whatever is stored: compiling the kernel takes too long to have one for each dtype.
    round_blocks(row_source(W.float()), grid, weights.numpy(), lanes, block, out)
    return _quantized(out, scheme), out


def _groups_at_once(scheme: Scheme, grid: BlockGrid, columns: int) -> int:
    """Those of a block, or so many of 256 columns, which lie closer together in memory."""
    if grid.has_header:
        return (scheme.row.block_columns or grid.group_size) // grid.group_size
    return gcd(columns, _COLUMNS) // grid.group_size


def _outputs(rows: int, columns: int, groups: int, groups_of_block: int) -> Outputs:
    words = np.empty((rows, columns // 4), np.uint32)
    scales, offsets, whole, minima = np.empty((4, groups, rows), np.float32)
    d, dmin = np.empty((2, groups // groups_of_block, rows), np.float32)
    peaks = np.empty((2, rows), np.float32)
    return Outputs(words, scales, offsets, whole, minima, d, dmin, peaks, np.zeros(2))


def _quantized(out: Outputs, scheme: Scheme) -> QTensor:
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    scales = torch.from_numpy(out.scales).to(dtype)
    offsets = None if scheme.symmetric else torch.from_numpy(out.offsets).to(dtype).T.contiguous()
    return QTensor(
        torch.from_numpy(out.words.view(np.int8)),
        scales.T.contiguous(),
        scheme,
        offsets=offsets,
        headers=_headers(out, scheme),
    )


def _headers(out: Outputs, scheme: Scheme) -> Tensor | None:
    if not scheme.row.has_header:
        return None
    found = (torch.from_numpy(part.T.copy()) for part in (out.d, out.dmin, out.whole, out.minima))
    d, dmin, whole, minima = (part.unflatten(1, (len(out.d), -1)) for part in found)
    if scheme.symmetric:
        return SCALE_HEADERS[scheme.grid](d, whole)
    return MINIMA_HEADERS[scheme.grid](d, dmin, whole, minima)


@cache
def _block_grid(scheme: Scheme, search: bool) -> BlockGrid:
    """The numbers in which the kernel knows a grid; without a search it tries nothing."""
    row = scheme.row
    assert scheme.group_size is not None and list(row.table) == sorted(row.table)
    least, most = whole_limits(scheme) if row.has_header else (0, 0)
    steps = step_reaches((least, most)) if row.has_header and searches_step(scheme) else []
    table = np.array(row.table, np.float32)
    lookup = half_step_lookup(row.table, torch.device("cpu")).numpy() if row.table else table
    farthest = max(row.table, key=abs) if row.table else scheme.qmax
    return BlockGrid(
        group_size=scheme.group_size,
        lowest=np.float32(scheme.qmin),
        highest=np.float32(scheme.qmax),
        farthest=np.float32(farthest),
        has_offsets=not scheme.symmetric,
        any_sign=not row.has_header,
        has_header=row.has_header,
        least=np.float32(least),
        most=np.float32(most),
        refinements=refinements(scheme) if search else 0,
        reaches=np.array(reaches(scheme) if search else [], np.float32),
        step_reaches=np.array(steps if search else [], np.float32),
        has_table=bool(row.table),
        entries=table,
        middles=(table[1:] + table[:-1]) / 2,
        half_steps=lookup,
        least_step=np.float32(LEAST_STEP),
        least_squares=np.float32(LEAST_SQUARES),
    )
