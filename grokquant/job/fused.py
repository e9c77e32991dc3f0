"""rtn and copy of a matrix from where it is stored to its packed form, in one pass over memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from types import ModuleType

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.grids import Scheme
from grokquant.methods import compiled
from grokquant.methods.copy import InexactScale, copy_quantized
from grokquant.methods.rtn import quantize_with_torch
from grokquant.methods.scales import ScaleRule
from grokquant.types import QTensor

_COPY_ROWS = 512  # stored next to each other: long enough for memory to stream
_TORCH_ROWS = 2048


@dataclass(frozen=True)
class Errors:
    """Sums of squares of W - Q and of W, and the number of rows of W that are zero throughout.

    All are 0 for copy, which changes nothing.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    zero_rows: int = 0

    @property
    def relative(self) -> float:
        """||W - Q|| / ||W||"""
        return sqrt(self.squared_error / max(self.squared_norm, 1e-60))

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            self.zero_rows + other.zero_rows,
        )


def round_and_pack(
    tensor: str,
    stored: Tensor | QTensor,
    method: str,
    scheme: Scheme,
    rule: ScaleRule,
    packing: ModuleType,
    parts: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Errors]:
    """Packs `stored` [out, in] by `method` ("rtn" or "copy"), row tile by row tile on all cores.

    Returns the tensors of `packing.packed_layout(tensor, ...)`, which are `parts` if given (then
    their contents are lost). Matrices stored by columns, as Grok-1's are, are read as they lie.
    Raises InputError for weights that are not finite and for scales that `scheme` cannot hold.
    """
    matrix = stored.codes if isinstance(stored, QTensor) else stored
    rows, columns = matrix.shape
    layout = packing.packed_layout(tensor, (rows, columns), scheme)
    filled = dict(parts or {name: torch.empty(s, dtype=d) for name, (d, s) in layout.items()})

    def work(part: slice) -> Errors:
        tile = _rows(stored, part)
        if method == "copy":
            assert isinstance(tile, QTensor)
            quantized, errors = copy_quantized(tile, scheme), Errors()
        else:
            quantized, errors = _round(tile, scheme, rule)
        packing.pack_into(filled, tensor, part, quantized)
        return errors

    if matrix.device.type != "cpu":
        size = _TORCH_ROWS
    else:
        size = _COPY_ROWS if method == "copy" else compiled.tile_rows(columns)
    try:
        errors = sum(compiled.in_tiles(rows, size, work), Errors())
    except InexactScale as reason:
        raise InputError(f"{tensor}: copy is not lossless, {reason}") from None
    if not isfinite(errors.squared_error + errors.squared_norm) or not _finite_scales(stored):
        raise _not_finite(tensor, stored, scheme)
    return filled, errors


def _round(tile: Tensor | QTensor, scheme: Scheme, rule: ScaleRule) -> tuple[QTensor, Errors]:
    if compiled.can_round(tile, scheme):
        quantized, (error, norm, zero_rows) = compiled.round_tile(tile, scheme, rule == "mse")
        return quantized, Errors(float(error), float(norm), int(zero_rows))
    W = _dense(tile)
    quantized = quantize_with_torch(W, scheme, rule)
    error = W - quantized.dequantize().float()
    lost, norm = (values.square().sum(dtype=torch.float64).item() for values in (error, W))
    return quantized, Errors(lost, norm, int((W == 0).all(1).sum()))


def _rows(stored: Tensor | QTensor, part: slice) -> Tensor | QTensor:
    return stored.rows(part) if isinstance(stored, QTensor) else stored[part]


def _dense(tile: Tensor | QTensor) -> Tensor:
    return (tile.dequantize() if isinstance(tile, QTensor) else tile).float()


def _finite_scales(stored: Tensor | QTensor) -> bool:
    return not isinstance(stored, QTensor) or bool(stored.scales.isfinite().all())


def _not_finite(tensor: str, stored: Tensor | QTensor, scheme: Scheme) -> InputError:
    """What is wrong with a matrix whose weights or errors have no finite sum of squares."""
    count, first, peak = 0, [0, 0], 0.0
    rows = len(stored.codes if isinstance(stored, QTensor) else stored)
    for start in range(0, rows, _TORCH_ROWS):
        W = _dense(_rows(stored, slice(start, start + _TORCH_ROWS)))
        bad = ~W.isfinite()
        if count == 0 and bad.any():
            row, column = bad.nonzero()[0].tolist()
            first = [start + row, column]
        count, peak = count + int(bad.sum()), max(peak, W.abs().max().item())
    if count:
        return InputError(f"{tensor}: {count} non-finite weights, the first at {first}")
    return too_large(tensor, scheme, peak)


def too_large(tensor: str, scheme: Scheme, peak: float) -> InputError:
    """That the scales of `scheme` overflow where weights are as large as `peak`."""
    held = scheme.scale_dtype if scheme.is_integer else scheme.grid
    return InputError(f"{tensor}: {held} cannot hold weights as large as {peak:g}")
