"""Finds the levels of a matrix, by the finder of its grid, and rounds to them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grokquant.grids import FinderName, Scheme
from grokquant.methods.find_blocks import find_block_minima, find_block_scales
from grokquant.methods.find_groups import find_absmax, find_range, find_table
from grokquant.methods.scales import ScaleRule, group_columns, round_to_grid, search_scales
from grokquant.methods.spans import Spans, divisors, nearest_in_codebook
from grokquant.methods.tiles import kernel_of, round_by_tiles
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor

# Weights searched at once: 512 KB in float32, so temporaries stay in the cache.
_AT_ONCE = 1 << 17

# Finds the levels of W [out, in], columns weighted by `importance` [in].
Finder = Callable[[Tensor, Scheme, ScaleRule, Tensor | None], Spans]
# Finds those of some rows as groups [rows, groups, group_size], with the importance in the second
# tensor [1, groups, group_size].
FindInGroups = Callable[[Tensor, Tensor, Scheme, ScaleRule], Spans]


@dataclass(frozen=True)
class Levels:
    """The values that a matrix may take under a scheme: all of a QTensor but its codes."""

    scheme: Scheme
    spans: Spans

    def hold(self, codes: Tensor) -> QTensor:
        """The matrix with these int8 codes [out, in]."""
        spans = self.spans
        return QTensor(
            codes, spans.scales, self.scheme, spans.zero_points, spans.offsets, spans.headers
        )

    def nearest(self, W: Tensor) -> QTensor:
        """Every weight of W [out, in] rounded to its nearest level."""
        codes = in_pieces(
            lambda part: self._nearest(W[part].float(), part.start),
            slices(0, len(W), _rows_at_once(W)),
            W.device,
        )
        return self.hold(torch.cat(codes))

    def _nearest(self, W: Tensor, start: int) -> Tensor:
        """int8 codes [rows, in] of the rows from `start` on."""
        rows = slice(start, start + len(W))
        spans = self.spans
        scales = spans.scales[rows].unsqueeze(-1)  # (rows, groups, 1)
        steps = divisors(scales, self.scheme.row.unit)
        groups = group_columns(W, self.scheme)
        if spans.offsets is not None:
            groups = groups - spans.offsets[rows].float().unsqueeze(-1)
        if self.scheme.row.table:
            return nearest_in_codebook(groups / steps, self.scheme).flatten(1)
        zeros = None
        if spans.zero_points is not None:
            zeros = spans.zero_points[rows].float().unsqueeze(-1)
        return round_to_grid(groups, steps, zeros, self.scheme).to(torch.int8).flatten(1)


def find_levels(
    W: Tensor, scheme: Scheme, rule: ScaleRule, importance: Tensor | None = None
) -> Levels:
    """Levels for W [out, in]: `absmax` spans the whole range of each group, `mse` searches for the
    least squared error, with columns weighted by `importance` [in]."""
    if importance is not None and not importance.any():
        importance = None  # all levels would lose nothing
    kernel = kernel_of(W, scheme)
    if kernel is None:
        return search_levels(W, scheme, rule, importance)
    found = round_by_tiles(kernel, W, scheme, rule == "mse", importance)
    return Levels(scheme, Spans(found.scales, found.zero_points, found.offsets, found.headers))


def search_levels(
    W: Tensor, scheme: Scheme, rule: ScaleRule, importance: Tensor | None = None
) -> Levels:
    """The same as `find_levels` in torch operations, on the device of W."""
    return Levels(scheme, FINDERS[scheme.row.finder](W, scheme, rule, importance))


def _find_integers(W: Tensor, scheme: Scheme, rule: ScaleRule, importance: Tensor | None) -> Spans:
    scales, zero_points = search_scales(W, scheme, rule, importance)
    return Spans(scales, zero_points)


def _by_rows(find: FindInGroups) -> Finder:
    """A finder that gives some rows at once to `find`."""

    def find_all(W: Tensor, scheme: Scheme, rule: ScaleRule, importance: Tensor | None) -> Spans:
        if importance is None:
            importance = torch.ones(W.shape[1], device=W.device)
        weights = group_columns(importance.float().unsqueeze(0), scheme)

        def find_rows(part: slice) -> Spans:
            return find(group_columns(W[part].float(), scheme), weights, scheme, rule)

        return Spans.cat(in_pieces(find_rows, slices(0, len(W), _rows_at_once(W)), W.device))

    return find_all


# By the `finder` of a row of GRIDS.
FINDERS: dict[FinderName, Finder] = {
    "integers": _find_integers,
    "absmax": _by_rows(find_absmax),
    "range": _by_rows(find_range),
    "table": _by_rows(find_table),
    "block_scales": _by_rows(find_block_scales),
    "block_minima": _by_rows(find_block_minima),
}


def _rows_at_once(W: Tensor) -> int:
    """Few enough for the cache of a CPU, many enough for another device."""
    values = _AT_ONCE if W.device.type == "cpu" else 128 * _AT_ONCE
    return max(1, values // W.shape[1])
