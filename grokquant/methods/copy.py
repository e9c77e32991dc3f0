"""Lossless: keeps the integers and scales of the source; nothing is recomputed."""

from dataclasses import replace

from torch import Tensor

from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.methods.method import TILE_ROWS, Errors, Method
from grokquant.types import QTensor

# Rows copied at once, few enough for the cache.
_COPY_ROWS = 512


class InexactScale(ValueError):
    """A stored scale has no exact value in the dtype that it should be copied to."""


def copy_quantized(stored: QTensor, scheme: Scheme) -> QTensor:
    """The stored codes under `scheme`, whose groups must divide the stored ones.

    Smaller groups repeat the stored scale, and scales are converted exactly, so that every weight
    keeps its value. Raises InexactScale if a scale cannot be converted exactly.
    """
    columns = stored.codes.shape[1]
    repeats, rest = divmod(scheme.groups(columns), stored.scales.shape[1])
    assert rest == 0 and repeats >= 1, "plan admits only groups that divide the stored ones"
    scales = _in_dtype(stored.scales, scheme.scale_dtype).repeat_interleave(repeats, dim=1)
    zero_points = stored.zero_points
    if zero_points is not None:
        zero_points = zero_points.repeat_interleave(repeats, dim=1)
    return replace(stored, scales=scales, scheme=scheme, zero_points=zero_points)


def can_copy(stored: Scheme, scheme: Scheme, in_features: int) -> bool:
    """Whether `scheme` can hold a tensor stored as `stored` without changing a value, provided that
    its scale dtype can hold the scales."""
    same_grid = replace(scheme, group_size=stored.group_size, scale_dtype=stored.scale_dtype)
    groups, stored_groups = scheme.groups(in_features), stored.groups(in_features)
    return same_grid == stored and groups % stored_groups == 0


def _in_dtype(scales: Tensor, name: str) -> Tensor:
    changed = scales.to(SCALE_DTYPES[name])
    if changed.dtype != scales.dtype:
        lost = changed.double() != scales.double()
        if lost.any():
            raise InexactScale(f"{name} cannot hold the scale {scales[lost][0].item():g}")
    return changed


class Copy(Method):
    name = "copy"
    text = "keeps the source's quantized weights unchanged"
    grid_keys = {"group": "release", "scale_dtype": None}
    lossless = True

    def round_tile(
        self, tile: Tensor | QTensor, scheme: Scheme, settings: object
    ) -> tuple[QTensor, Errors]:
        """Raises InexactScale."""
        assert isinstance(tile, QTensor), "plan admits only matrices that are stored quantized"
        return copy_quantized(tile, scheme), Errors()

    def tile_rows(self, columns: int, on_cpu: bool) -> int:
        return _COPY_ROWS if on_cpu else TILE_ROWS


COPY = Copy()
