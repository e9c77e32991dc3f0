"""Our own products with codes on CPUs: those of 4 bits that are places in a table, and of 8 bits.

torch has none for tables, and for 8 bits one scale a row at most.
"""

import numpy as np
import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.runtime.matrix_cache import Parts
from grokquant.runtime.vectors import (
    COLUMNS,
    FEW_ROWS,
    LANES,
    MULTIPLIES_BFLOAT16,
    ROWS,
    bfloat16_lanes,
    multiply,
)
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor

_FLOAT_BYTES = 4
# Rows of a thread at a time hide what a call costs; of fewer each thread has its share.
_MOST_ROWS = 1024


def takes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the kernel can multiply with a matrix [out, in]."""
    rows, columns = shape
    group_size = scheme.group_size or columns
    held = bool(scheme.row.table) or scheme.bits > 4
    return held and rows % FEW_ROWS == 0 and group_size % COLUMNS == 0 and columns % group_size == 0


def held_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The bytes of what `prepare` returns."""
    rows, columns = shape
    code_bytes = columns // 2 if scheme.row.table else columns
    levels = scheme.groups(columns) * (1 if scheme.symmetric else 2)
    return rows * (code_bytes + levels * _FLOAT_BYTES) + len(scheme.row.table) * _FLOAT_BYTES


def prepare(quantized: QTensor, dtype: torch.dtype) -> Parts:
    """`codes` as `vectors` has them: uint8 [out, in / 2] of tables, else int8 [out, in]; float32
    `scales` and perhaps `zeros` [out, groups]; perhaps `table` [16]."""
    scheme = quantized.scheme
    scales = quantized.scales.float() * scheme.row.unit
    held = {"codes": quantized.codes.contiguous(), "scales": scales.contiguous()}
    if scheme.row.table:
        held["codes"] = _halves(quantized.codes)
        held["table"] = torch.tensor(scheme.row.table)
    if quantized.zero_points is not None:
        held["zeros"] = -scales * quantized.zero_points
    if quantized.offsets is not None:
        held["zeros"] = quantized.offsets.float()
    return held


def product(x: Tensor, held: Parts) -> Tensor:
    """x [tokens, in] times a prepared matrix: [tokens, out], summed in float32.

    Weights are rounded to bfloat16, as the dequantized ones are, if x is and the CPU multiplies it.
    """
    codes = held["codes"].numpy()
    scales = held["scales"].numpy()
    table, zeros = (held[name].numpy() if name in held else None for name in ("table", "zeros"))
    if MULTIPLIES_BFLOAT16 and x.dtype == torch.bfloat16:
        inputs = bfloat16_lanes(x, table is not None)
    else:
        inputs = x.detach().float().contiguous().numpy()
    out = np.empty((len(codes), len(x)), np.float32)

    def work(part: slice) -> None:
        zeros_of_part = None if zeros is None else zeros[part]
        multiply(table, codes[part], scales[part], zeros_of_part, inputs, out[part])

    share = -(-len(codes) // (torch.get_num_threads() * ROWS)) * ROWS
    in_pieces(work, slices(0, len(codes), min(_MOST_ROWS, share)))
    return torch.from_numpy(out).T.to(x.dtype).contiguous()


def _halves(codes: Tensor) -> Tensor:
    """uint8 [out, in / 2] of codes 0..15: those of 16 columns and of the next 16 share bytes."""
    lower, upper = codes.view(torch.uint8).unflatten(1, (-1, 2, LANES)).unbind(2)
    return (lower | (upper << 4)).flatten(1)
