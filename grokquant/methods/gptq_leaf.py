"""The columns of a leaf, rounded one by one: the only part of GPTQ that differs between devices.

All leaves do the same: a column is rounded for all rows, then its errors are fed back to the
columns after it, before the next one is rounded.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Protocol
from warnings import warn

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods import gptq_kernels
from grokquant.methods.scales import round_to_grid
from grokquant.methods.spans import nearest_in_codebook


@dataclass(frozen=True)
class Columns:
    """Some rows of W while they are rounded, [columns in visiting order, rows].

    `errors` float32 holds the weights until a column is rounded, then W - Q; `targets` float32 the
    weights with the feedback that they have received so far; `codes` is int8. `F` [columns,
    columns] and `D` [columns] are the unit upper factor and its pivots. `scales`, `zero_points` and
    `offsets` are float32 [groups, rows], and `groups` [columns] is the group of each column.
    """

    errors: Tensor
    targets: Tensor
    codes: Tensor
    F: Tensor
    D: Tensor
    groups: Tensor
    scales: Tensor
    zero_points: Tensor
    offsets: Tensor
    scheme: Scheme

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        return float(self.scheme.qmin), float(self.scheme.qmax)

    @property
    def table(self) -> Tensor:
        """The values of a codebook, float32, or nothing."""
        return torch.tensor(self.scheme.row.table, device=self.codes.device)


class Leaf(Protocol):
    """Rounds parts of the columns whose targets hold the feedback of all columns before them.

    Writes their codes and errors, and nothing of the columns after them.
    """

    def __init__(self, columns: Columns) -> None: ...
    def round(self, part: slice) -> None: ...
    def loss(self) -> float:
        """The sum of D (target - Q)^2 of all that was rounded."""
        ...


def leaf_of(device: torch.device) -> type[Leaf]:
    """The leaf for a device: compiled for the CPU, one launch on a GPU where Triton works."""
    if device.type == "cpu":
        return CompiledLeaf
    return LaunchedLeaf if _launches(device) else PlainLeaf


class CompiledLeaf:
    """By the compiled loops of `gptq_kernels`, on a CPU."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._levels = (columns.scales, columns.zero_points, columns.offsets, columns.table)
        self._loss = 0.0

    def round(self, part: slice) -> None:
        c = self._columns
        of_part = [M[part] for M in (c.errors, c.targets, c.codes, c.groups, c.D)]
        F = c.F[part, part].contiguous()
        arguments = [M.numpy() for M in (*of_part, F, *self._levels)]
        rows = (0, c.codes.shape[1])
        self._loss += gptq_kernels.round_columns(c.limits, rows, *arguments)

    def loss(self) -> float:
        return self._loss


class LaunchedLeaf:
    """By one launch of the kernel of `gptq_triton`. Nothing waits for the device before `loss`."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._table = columns.table
        rows = columns.codes.shape[1]
        self._lost = torch.zeros(rows, dtype=torch.float64, device=columns.codes.device)

    def round(self, part: slice) -> None:
        from grokquant.methods.gptq_triton import round_columns

        round_columns(self._columns, self._table, part, self._lost)

    def loss(self) -> float:
        return self._lost.sum().item()


class PlainLeaf:
    """In PyTorch, a dozen operations for each column: for any device, and a reference in tests."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._table = columns.table
        self._loss = torch.zeros((), dtype=torch.float64, device=columns.codes.device)

    def round(self, part: slice) -> None:
        c = self._columns
        for k, group in enumerate(c.groups[part].tolist(), part.start):
            code, value = self._nearest(c.targets[k], group)
            self._loss += c.D[k] * (c.targets[k] - value).square().sum()
            c.codes[k] = code
            c.errors[k] -= value
            c.targets[k + 1 : part.stop].addr_(c.F[k, k + 1 : part.stop], c.errors[k])

    def _nearest(self, targets: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes and values [rows] of a column."""
        c = self._columns
        scale = c.scales[group]
        if len(self._table):
            code = nearest_in_codebook(targets / scale, c.scheme)
            return code, self._table[code.long()] * scale
        zero = c.zero_points[group]
        offset = c.offsets[group]
        code = round_to_grid(targets - offset, scale, zero, c.scheme)
        return code, (code - zero) * scale + offset

    def loss(self) -> float:
        return self._loss.item()


@cache
def _launches(device: torch.device) -> bool:
    """Whether Triton works here; it needs a C compiler, too. If it is there but fails, says so."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        one = torch.ones(1, 1, device=device)
        code = one.to(torch.int8)
        group = one[0].long() - 1
        columns = Columns(one, one, code, one, one[0], group, one, one, one, Scheme(4, None))
        leaf = LaunchedLeaf(columns)
        leaf.round(slice(0, 1))
        leaf.loss()  # waits for the launch
    except Exception as error:  # of Triton, its compilers and its driver, which have no common kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warn(f"GPTQ rounds columns in a slow loop, since Triton fails: {reason}", stacklevel=2)
        return False
    return True
