"""The column loop of GPTQ on a GPU: one launch for a leaf, whatever its number of columns.

A program holds some rows of the leaf in registers, transposed as in `gptq_kernels`, and works on
its columns one after the other; no row needs another one:

               row 0   row 1   ..  row 31        one program
    column 0   round                             1. a column is rounded for all rows of a program,
    column 1   += F[0, 1] * error                2. then its errors are fed back to the columns
    column 2   += F[0, 2] * error                   below it, before the next one is rounded

Triton comes with the CUDA builds of torch. Its interpreter runs this on a CPU, in tests.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from grokquant.methods.gptq_leaf import Columns

# Rows of a program: one for each thread of a warp, so that a column needs no synchronization, and
# 4096 rows make a program for nearly every multiprocessor of a large GPU.
_ROWS = 32
# 1.5 * 2^23: between 2^23 and 2^24 a float32 holds whole numbers only, so that adding this and
# taking it off rounds to the nearest one, ties to even. Triton has no `rint` of its own.
_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _nearest(table, entries, value):
    """The index of the entry nearest to each value, the first of equals, and the entry."""
    best = tl.zeros_like(value)
    entry = tl.zeros_like(value) + tl.load(table)
    for index in range(1, entries):
        other = tl.load(table + index)
        nearer = tl.abs(other - value) < tl.abs(entry - value)
        best = tl.where(nearer, index * 1.0, best)
        entry = tl.where(nearer, other, entry)
    return best, entry


@triton.jit
def _round_leaf(
    errors,
    targets,
    codes,
    lost,
    groups,
    D,
    F,
    scales,
    zero_points,
    offsets,
    table,
    low,
    high,
    columns,
    rows,
    F_stride,
    entries,
    HAS_TABLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < rows
    is_place = (column < columns)[:, None] & is_row[None, :]
    tile = tl.load(targets + column[:, None] * rows + row[None, :], mask=is_place, other=0.0)
    leaf_loss = tl.zeros([ROWS], tl.float32)
    for k in range(columns):
        target = tl.sum(tl.where((column == k)[:, None], tile, 0.0), 0)
        span = tl.load(groups + k) * rows + row
        scale = tl.load(scales + span, mask=is_row, other=1.0)
        if HAS_TABLE:
            code, entry = _nearest(table, entries, tl.div_rn(target, scale))
            value = entry * scale
        else:
            zero = tl.load(zero_points + span, mask=is_row, other=0.0)
            offset = tl.load(offsets + span, mask=is_row, other=0.0)
            steps = tl.div_rn(target - offset, scale)
            code = ((steps + _WHOLE) - _WHOLE) + zero
            code = tl.minimum(tl.maximum(code, low), high)
            value = (code - zero) * scale + offset
        miss = target - value
        leaf_loss += tl.load(D + k) * miss * miss
        place = k * rows + row
        error = tl.load(errors + place, mask=is_row, other=0.0) - value
        tl.store(errors + place, error, mask=is_row)
        tl.store(codes + place, code.to(tl.int8), mask=is_row)
        is_later = (column > k) & (column < columns)
        factor = tl.load(F + k * F_stride + column, mask=is_later, other=0.0)
        tile += factor[:, None] * error[None, :]
    total = tl.load(lost + row, mask=is_row, other=0.0)
    tl.store(lost + row, total + leaf_loss.to(tl.float64), mask=is_row)


def round_columns(c: "Columns", table: Tensor, part: slice, lost: Tensor) -> None:
    """Rounds a part of the columns of W in one launch.

    Adds the sum of D (target - Q)^2 of each row to `lost` float64 [rows], which nobody has to read
    before the next part is launched. `table` float32 holds the values of a codebook, or nothing.
    """
    targets = c.targets[part]
    columns, rows = targets.shape
    with torch.cuda.device_of(targets):  # else Triton launches on the current GPU
        _round_leaf[(triton.cdiv(rows, _ROWS),)](
            *(c.errors[part], targets, c.codes[part], lost),
            *(c.groups[part], c.D[part], c.F[part, part]),
            *(c.scales, c.zero_points, c.offsets, table),
            *c.limits,
            columns,
            rows,
            c.F.stride(0),
            len(table),
            HAS_TABLE=len(table) > 0,
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=_ROWS,
            num_warps=1,
            enable_fp_fusion=True,  # as on the CPU: a product and a sum may become one instruction
        )
