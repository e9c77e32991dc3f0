"""Rounds and packs a matrix by a method without calibration, in one pass over memory."""

from collections.abc import Callable, Mapping
from math import isfinite

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats import Format
from grokquant.grids import Scheme
from grokquant.methods import METHODS
from grokquant.methods.copy import InexactScale
from grokquant.methods.method import TILE_ROWS, Errors, dense
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor, Unit, rows_of


def round_and_pack(
    unit: Unit,
    stored: Tensor | QTensor,
    output_format: Format,
    parts: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Errors]:
    """Rounds `stored` [out, in] by the unit's method and packs it, tile by tile on all cores.

    Returns the tensors of the format's `packed_layout`; `parts`, if given, are overwritten and
    returned. Raises InputError for non-finite weights and for scales that the grid cannot hold.
    """
    layout = output_format.packed_layout(unit.tensor, unit.shape, unit.scheme)
    filled = dict(parts or {name: torch.empty(s, dtype=d) for name, (d, s) in layout.items()})

    def pack(part: slice, quantized: QTensor) -> None:
        output_format.pack_into(filled, unit.tensor, part, quantized)

    return filled, _round_tiles(unit, stored, pack)


def round_whole(unit: Unit, stored: Tensor | QTensor) -> tuple[QTensor, Errors]:
    """The same without packing."""
    tiles: dict[int, QTensor] = {}
    errors = _round_tiles(unit, stored, lambda part, tile: tiles.update({part.start: tile}))
    return QTensor.cat([tiles[start] for start in sorted(tiles)]), errors


def _round_tiles(
    unit: Unit, stored: Tensor | QTensor, take: Callable[[slice, QTensor], None]
) -> Errors:
    """Matrices stored by columns, as Grok-1's are, are read as they lie."""
    method = METHODS[unit.method]
    rows, columns = stored.shape

    def work(part: slice) -> Errors:
        quantized, errors = method.round_tile(rows_of(stored, part), unit.scheme, unit.settings)
        take(part, quantized)
        return errors

    size = method.tile_rows(columns, stored.device.type == "cpu")
    try:
        errors = sum(in_pieces(work, slices(0, rows, size)), Errors())
    except InexactScale as reason:
        raise InputError(f"{unit.tensor}: copy would not be lossless: {reason}") from None
    if not isfinite(errors.squared_error + errors.squared_norm) or not _finite_scales(stored):
        raise not_finite(unit.tensor, stored, unit.scheme)
    return errors


def not_finite(tensor: str, stored: Tensor | QTensor, scheme: Scheme) -> InputError:
    """The error for a matrix whose weights or errors have no finite sum of squares."""
    count = 0
    first = [0, 0]
    peak = 0.0
    for start in range(0, stored.shape[0], TILE_ROWS):
        W = dense(rows_of(stored, slice(start, start + TILE_ROWS)))
        bad = ~W.isfinite()
        if count == 0 and bad.any():
            row, column = bad.nonzero()[0].tolist()
            first = [start + row, column]
        count += int(bad.sum())
        peak = max(peak, W.abs().max().item())
    if count:
        return InputError(f"{tensor}: {count} non-finite weights, the first at {first}")
    held = scheme.scale_dtype if scheme.is_integer else scheme.grid
    return InputError(f"{tensor}: {held} cannot hold weights as large as {peak:g}")


def _finite_scales(stored: Tensor | QTensor) -> bool:
    return not isinstance(stored, QTensor) or bool(stored.scales.isfinite().all())
