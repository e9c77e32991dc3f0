"""The compiled kernel of each grid, which rounds tiles of rows on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from grokquant.grids import FinderName, Scheme
from grokquant.methods import compiled, compiled_blocks
from grokquant.methods.kernels import STEP
from grokquant.methods.method import Errors
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor, rows_of

# Rounds a tile [rows, in] with scales that span the range of each group, or with the best ones of a
# search that weighs errors by an importance [in].
Kernel = Callable[[Tensor | QTensor, Scheme, bool, Tensor | None], tuple[QTensor, Errors]]


def kernel_of(W: Tensor | QTensor, scheme: Scheme) -> Kernel | None:
    """The kernel that rounds W, or tiles of it, to `scheme`; None if there is none."""
    group_size = scheme.group_size or W.shape[1]
    if W.device.type != "cpu" or group_size % STEP:
        return None
    return KERNELS.get(scheme.row.finder)


def round_by_tiles(
    kernel: Kernel, W: Tensor | QTensor, scheme: Scheme, search: bool, importance: Tensor | None
) -> QTensor:
    """All of W [out, in], on all cores."""
    rows, columns = W.shape

    def work(part: slice) -> QTensor:
        return kernel(rows_of(W, part), scheme, search, importance)[0]

    return QTensor.cat(in_pieces(work, slices(0, rows, compiled.tile_rows(columns))))


def _round_integers(
    tile: Tensor | QTensor, scheme: Scheme, search: bool, importance: Tensor | None
) -> tuple[QTensor, Errors]:
    quantized, sums = compiled.round_tile(tile, scheme, search, importance)
    error, norm, zero_rows = sums
    lost_rows = compiled.rows_of_zeros(quantized) - int(zero_rows)
    return quantized, Errors(float(error), float(norm), int(zero_rows), lost_rows)


def _round_blocks(
    tile: Tensor | QTensor, scheme: Scheme, search: bool, importance: Tensor | None
) -> tuple[QTensor, Errors]:
    quantized, out = compiled_blocks.round_tile(tile, scheme, search, importance)
    error, norm = out.sums
    was_zero, is_zero = torch.from_numpy(out.peaks) == 0
    lost_rows = int((is_zero & ~was_zero).sum())
    return quantized, Errors(float(error), float(norm), int(was_zero.sum()), lost_rows)


# By the finder of a grid.
KERNELS: dict[FinderName, Kernel] = {
    "integers": _round_integers,
    "range": _round_blocks,
    "table": _round_blocks,
    "block_scales": _round_blocks,
    "block_minima": _round_blocks,
}
