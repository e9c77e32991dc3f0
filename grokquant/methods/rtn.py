"""Round to nearest: no data needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods import compiled
from grokquant.methods.levels import search_levels
from grokquant.methods.method import TILE_ROWS, Errors, Method, Rounded, Site
from grokquant.methods.scales import ScaleRule, quantize_nearest, search_scales
from grokquant.methods.tiles import kernel_of, round_by_tiles
from grokquant.types import QTensor

# Keys about the grid that every rounding method takes, and their defaults.
GRID_KEYS: Mapping[str, object] = {
    "grid": "integer",
    "bits": None,
    "group": 128,
    "symmetric": True,
    "scale_dtype": None,
}


@dataclass(frozen=True)
class ScaleSettings:
    """The keys of methods that search scales themselves."""

    scale: Annotated[
        ScaleRule,
        Field(
            description="`absmax` scales to the largest weight of a group; `mse` searches for the "
            "scale with the least squared error."
        ),
    ] = "mse"


def quantize_rtn(W: Tensor | QTensor, scheme: Scheme, rule: ScaleRule = "mse") -> QTensor:
    """Rounds W [out, in] to the nearest codes of the scales that `rule` finds."""
    kernel = kernel_of(W, scheme)
    if kernel is None:
        return quantize_with_torch(W, scheme, rule)
    return round_by_tiles(kernel, W, scheme, rule == "mse", None)


def quantize_with_torch(W: Tensor | QTensor, scheme: Scheme, rule: ScaleRule = "mse") -> QTensor:
    """`quantize_rtn` in torch operations, on any device and for any group size; the reference for
    the kernels."""
    dense = W.dequantize() if isinstance(W, QTensor) else W
    if scheme.is_integer:
        return quantize_nearest(dense, *search_scales(dense, scheme, rule), scheme)
    return search_levels(dense, scheme, rule).nearest(dense)


class Rtn(Method):
    name = "rtn"
    text = "rounds to nearest"
    settings = ScaleSettings
    grid_keys = GRID_KEYS

    def round(
        self, W: Tensor, scheme: Scheme, settings: ScaleSettings, site: Site | None
    ) -> Rounded:
        return Rounded(quantize_rtn(W, scheme, settings.scale))

    def round_tile(
        self, tile: Tensor | QTensor, scheme: Scheme, settings: ScaleSettings
    ) -> tuple[QTensor, Errors]:
        kernel = kernel_of(tile, scheme)
        if kernel is None:
            return super().round_tile(tile, scheme, settings)
        return kernel(tile, scheme, settings.scale == "mse", None)

    def tile_rows(self, columns: int, on_cpu: bool) -> int:
        return compiled.tile_rows(columns) if on_cpu else TILE_ROWS


RTN = Rtn()
