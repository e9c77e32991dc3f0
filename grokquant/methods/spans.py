"""The scales, zero points and offsets that define the grid of each group, and rounding to it."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from grokquant.grids import Scheme


@dataclass(frozen=True)
class Spans:
    """All of a QTensor but its codes: the values that the codes of each group represent."""

    scales: Tensor
    zero_points: Tensor | None = None
    offsets: Tensor | None = None
    headers: Tensor | None = None

    @staticmethod
    def cat(parts: list["Spans"]) -> "Spans":
        """The spans of all rows from those of some rows each."""
        return Spans(
            torch.cat([part.scales for part in parts]),
            _cat([part.zero_points for part in parts]),
            _cat([part.offsets for part in parts]),
            _cat([part.headers for part in parts]),
        )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def divisors(scales: Tensor, unit: float = 1.0) -> Tensor:
    """float32 steps between codes, safe to divide by. All codes of a group with a scale of 0
    represent its offset."""
    steps = scales.float() * unit
    return torch.where(scales == 0, torch.finfo(torch.float32).tiny, steps)


def nearest_in_codebook(values: Tensor, scheme: Scheme) -> Tensor:
    """int8 codes of the table entries of `scheme` nearest to `values`."""
    table = torch.tensor(scheme.row.table, device=values.device)
    ordered, places = table.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    return places[torch.bucketize(values.contiguous(), middles)].to(torch.int8)


def nearest_values(values: Tensor, scheme: Scheme) -> Tensor:
    """`values` rounded to the grid with a scale of 1. A table must hold integers.

    Entries of such a table meet halfway at multiples of 1/2, so each half step has one nearest
    entry: looking it up is 20 times as fast as a search.
    """
    table = scheme.row.table
    if not table:
        return values.round().clamp(scheme.qmin, scheme.qmax)
    low = values.new_tensor(min(table))
    high = values.new_tensor(max(table))
    inside = torch.fmin(torch.fmax(values, low), high)  # the limits for NaN, too
    half_steps = inside.sub_(low).mul_(2).int()
    lookup = half_step_lookup(table, values.device)
    return lookup.index_select(0, half_steps.flatten()).view_as(values)


@cache
def half_step_lookup(table: tuple[float, ...], device: torch.device) -> Tensor:
    """The entry nearest to each half step from the lowest entry to the highest."""
    start = int(2 * min(table))
    stop = int(2 * max(table))
    middles = [(step + 0.5) / 2 for step in range(start, stop + 1)]
    entries = [min(table, key=lambda entry: abs(entry - middle)) for middle in middles]
    return torch.tensor(entries, device=device)
