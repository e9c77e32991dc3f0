"""GPTQ: rounding with error feedback through the input Hessian (Frantar et al., arXiv 2210.17323).

Written in its equivalent LDLQ form (Chee et al., arXiv 2307.13304, theorem 6): with H = F D F^T and
F unit upper triangular, column k is rounded at w_k + (W - Q)[:, :k] F[:k, k]. F comes from one
Cholesky factorisation; no inverse is taken. Everything is float32. A Hessian is a list of the
square blocks along its diagonal; a full one is a list of one block.

Columns are rounded by recursive halving, so that most feedback is large matrix products:

    | left half | right half |      1. round the left half (halved again, down to 64 columns)
    |  W - Q  --> @ F ------->|      2. feed its errors back to the targets of the right half
    |           |            |      3. round the right half
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite, sqrt
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.gptq_leaf import Columns, leaf_of
from grokquant.methods.ldl import factorize_, permute_
from grokquant.methods.levels import find_levels
from grokquant.methods.method import Cost, Method, Needs, Rounded, Site, UnusableHessian
from grokquant.methods.rtn import GRID_KEYS, RTN, ScaleSettings
from grokquant.methods.scales import ScaleRule
from grokquant.methods.spans import divisors
from grokquant.threads import alone, in_order, in_pieces, slices
from grokquant.types import QTensor

T = TypeVar("T")
_FLOAT = torch.float32.itemsize
# Columns rounded one by one; the feedback between more of them is a matrix product.
_LEAF = 64
# Rows rounded at once on a GPU: bounds the working memory, and the products stay large.
SLAB_ROWS = 4096
# Rows that one thread of a CPU rounds: fewer make slower products, more leave threads idle.
_PIECE_ROWS = 256
# Columns of the output energy that one thread adds up.
_PIECE_COLUMNS = 512
# Random sign combinations of rows that replace the rows in ||W X||: a relative error of 1 percent.
_PROBES = 128
# How often damping is raised, tenfold each time, before a Hessian counts as unusable: from the
# usual 0.01 of the mean to 10 times the mean, where hardly any feedback is left.
_RETRIES = 3


@dataclass(frozen=True)
class GptqSettings(ScaleSettings):
    """The keys of `gptq`."""

    act_order: Annotated[
        bool,
        Field(
            description="Rounds the columns with the strongest inputs first. Groups keep their "
            "columns, so this costs nothing at inference."
        ),
    ] = True
    damping: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Added to the Hessian's diagonal, as a share of its mean, so that the "
            "Hessian can be inverted.",
        ),
    ] = 0.01
    hessian_block: Annotated[
        Annotated[int, Field(ge=32)] | None,
        Field(
            description="Limits error feedback to blocks of this many input features (unset: all), "
            "which reduces memory and time in proportion."
        ),
    ] = None


@dataclass(frozen=True)
class Factor:
    """A diagonal block of a Hessian in visiting order: H + shift I = F diag(D) F^T.

    `columns` int64 [block] are the matrix columns in that order. `F` [block, block] is valid above
    its diagonal only, which would be 1. `D` is [block].
    """

    columns: Tensor
    F: Tensor
    D: Tensor
    shift: float


@dataclass(frozen=True)
class Feedback:
    """A factorised Hessian, as rounding needs it; gate and up share one.

    `importance` [in] is the Hessian's diagonal. `damping` is what was added to the diagonal of a
    block at most, as a share of the diagonal's mean.
    """

    factors: list[Factor]
    importance: Tensor
    damping: float


def factorize(H: Tensor | list[Tensor], damping: float, act_order: bool) -> Feedback:
    """Factorises the diagonal blocks of H + damping * mean(diag H) * I. Raises UnusableHessian.

    Blocks in a list are overwritten and become the factors, so that a large Hessian never exists
    twice; the list is left empty. A tensor is one block and is not changed.
    """
    blocks = [H.clone()] if isinstance(H, Tensor) else H
    importance = torch.cat([block.diagonal() for block in blocks])
    # No entry of a Gram matrix exceeds the largest of its diagonal, so checking that is enough.
    if not torch.isfinite(importance).all():
        raise UnusableHessian("the Hessian is not finite")
    mean = alone(importance.mean).item()
    if mean <= 0:
        raise UnusableHessian("the Hessian is zero")
    factors: list[Factor] = []
    start = 0
    while blocks:
        factors.append(_factorize_block(blocks.pop(0), start, damping * mean, act_order))
        start += len(factors[-1].columns)
    return Feedback(factors, importance, max(factor.shift for factor in factors) / mean)


def round_gptq(W: Tensor, feedback: Feedback, scheme: Scheme, rule: ScaleRule = "mse") -> Rounded:
    """Rounds W [out, in] column by column, each time with the feedback of the errors so far.

    Scales are found first, in natural column order (static groups), so that the result needs no
    group index, in whatever order columns are visited. Besides W and the result, this takes the
    memory of four float32 slabs: [256, in] for each thread, [4096, in] on a GPU. The numerator of
    the output error is exact, and so is the denominator for up to 128 rows; for more rows, 128
    random combinations of them estimate it to about one percent.
    """
    importance = feedback.importance if rule == "mse" else None
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    quantized = find_levels(W, scheme, rule, importance).hold(codes)

    def lost_in(rows: slice) -> float:
        slabs = (Slab(W, quantized, rows, factor) for factor in feedback.factors)
        return sum(slab.round(codes) for slab in slabs)

    if W.device.type == "cpu":
        lost = sum(in_pieces(lost_in, slices(0, len(W), _PIECE_ROWS)))
    else:
        lost = sum(in_order(lost_in, slices(0, len(W), SLAB_ROWS)))
    energy = _output_energy(W, feedback)
    return Rounded(quantized, sqrt(max(lost, 0.0) / max(energy, 1e-30)))


def _factorize_block(H: Tensor, start: int, shift: float, act_order: bool) -> Factor:
    """Factorises H [block, block], whose first column is column `start` of the matrix."""
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        permute_(H, order)
    for attempt in range(_RETRIES + 1):
        raised = shift * 10**attempt  # the first attempt is not raised
        D = factorize_(H, raised)
        if D is not None:
            return Factor(order + start, H, D, raised)
    raise UnusableHessian(
        f"the Hessian is not positive definite, its damping raised {_RETRIES} times"
    )


def _output_energy(W: Tensor, feedback: Feedback) -> float:
    """tr(W H W^T); estimated from random combinations of the rows if there are many.

    F has replaced H in memory, so H is (F D F^T) - shift I here.
    """
    P = probes(W)
    energy = 0.0
    for factor in feedback.factors:
        Y = P[:, factor.columns]  # (probes, block)
        add_up = partial(_energy_of, Y, factor)
        energy += sum(_by_columns(add_up, factor.F))
        energy -= factor.shift * alone(Y.norm).item() ** 2
    return energy


def _energy_of(Y: Tensor, factor: Factor, part: slice) -> float:
    """The energy of some columns of YF."""
    F = factor.F
    YF = Y[:, part] + Y[:, part] @ F[part, part].triu(1)
    YF.addmm_(Y[:, : part.start], F[: part.start, part])
    return (YF.square_() @ factor.D[part]).sum(dtype=torch.float64).item()


def probes(W: Tensor) -> Tensor:
    """A float32 matrix P [at most _PROBES, in] with P^T P close to W^T W."""
    if len(W) <= _PROBES:
        return W.float()
    generator = torch.Generator().manual_seed(0)  # the same signs on every device
    probes = torch.zeros(_PROBES, W.shape[1], device=W.device)
    for rows in W.split(SLAB_ROWS):
        shape = (_PROBES, len(rows))
        signs = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1)
        _by_columns(partial(_add_probes, probes, signs.float().to(W.device), rows), W)
    return probes


def _add_probes(probes: Tensor, signs: Tensor, rows: Tensor, part: slice) -> None:
    probes[:, part].addmm_(signs, rows[:, part].float(), alpha=_PROBES**-0.5)


def _by_columns(work: Callable[[slice], T], M: Tensor) -> list[T]:
    """Results of `work` for parts of the columns of M; their size bounds the memory of a part."""
    if M.device.type == "cpu":
        return in_pieces(work, slices(0, M.shape[1], _PIECE_COLUMNS))
    return in_order(work, slices(0, M.shape[1], SLAB_ROWS))


class Slab:
    """Some rows of W in the columns of a factor, while they are rounded.

    Everything is transposed, [columns in visiting order, rows], so that a column is contiguous in
    memory.
    """

    def __init__(self, W: Tensor, quantized: QTensor, rows: slice, factor: Factor) -> None:
        self.shift = factor.shift
        self.rows = rows
        self.first = int(factor.columns.min())
        self.order = factor.columns - self.first
        last = self.first + len(self.order)
        weights = W[rows, self.first : last].T.contiguous()[self.order].float()
        scales = quantized.scales[rows]
        group_size = W.shape[1] // scales.shape[1]
        unit = quantized.scheme.row.unit
        self.columns = Columns(
            errors=weights,
            targets=weights.clone(),
            codes=torch.empty(weights.shape, dtype=torch.int8, device=W.device),
            F=factor.F,
            D=factor.D,
            groups=factor.columns // group_size,
            scales=divisors(scales, unit).T.float().contiguous(),
            zero_points=self._of_groups(quantized.zero_points, scales),
            offsets=self._of_groups(quantized.offsets, scales),
            scheme=quantized.scheme,
        )
        self.leaf = leaf_of(W.device)(self.columns)

    def _of_groups(self, values: Tensor | None, scales: Tensor) -> Tensor:
        """The slab's rows of `values` [out, groups] as float32 [groups, rows]; zeros for None."""
        if values is None:
            return torch.zeros_like(scales.T, dtype=torch.float32).contiguous()
        return values[self.rows].T.float().contiguous()

    def round(self, codes: Tensor) -> float:
        """Rounds all columns into `codes` int8 [out, in]; returns tr(E H E^T) of the errors E."""
        rounded = self.columns.codes
        self._descend(0, len(rounded))
        natural = torch.empty_like(rounded)
        natural[self.order] = rounded
        codes[self.rows, self.first : self.first + len(natural)] = natural.T
        # The leaves lose it in H + shift I.
        return self.leaf.loss() - self.shift * self.columns.errors.norm().item() ** 2

    def _descend(self, start: int, stop: int) -> None:
        """Rounds these columns, whose targets hold the feedback of all columns before `start`."""
        if stop - start <= _LEAF:
            self.leaf.round(slice(start, stop))
            return
        middle = (start + stop) // 2
        self._descend(start, middle)
        self._feed_back(slice(start, middle), slice(middle, stop))
        self._descend(middle, stop)

    def _feed_back(self, source: slice, sink: slice) -> None:
        """Adds the errors of the columns `source` to the targets of the columns `sink`."""
        columns = self.columns
        F = columns.F[source, sink]  # (left half, right half)
        columns.targets[sink].addmm_(F.T, columns.errors[source])


class Gptq(Method):
    name = "gptq"
    text = "rounds with error feedback"
    settings = GptqSettings
    grid_keys = GRID_KEYS
    needs = Needs.HESSIAN
    fallback = RTN

    def round(
        self, W: Tensor, scheme: Scheme, settings: GptqSettings, site: Site | None
    ) -> Rounded:
        assert site is not None, "a method that needs a Hessian is given a site"

        def feedback() -> Feedback:
            blocks = site.hessian(settings.hessian_block)
            return factorize(blocks, settings.damping, settings.act_order)

        key = (settings.damping, settings.act_order, settings.hessian_block)
        rounded = round_gptq(W, site.once(key, feedback), scheme, settings.scale)
        if rounded.output_error is not None and not isfinite(rounded.output_error):
            raise UnusableHessian("its outputs are too large to be compared")
        return rounded

    def hessian_block(self, settings: GptqSettings) -> int | None:
        return settings.hessian_block

    def cost(self, rows: int, columns: int, settings: GptqSettings) -> Cost:
        """Four float32 slabs, of all threads together; a Cholesky factorisation of each block,
        n^3 / 6; half of a product of W with the block for the feedback."""
        block = self.block_columns(columns, settings)
        on_gpu = torch.cuda.is_available()
        at_once = SLAB_ROWS if on_gpu else _PIECE_ROWS * torch.get_num_threads()
        return Cost(
            working_bytes=4 * min(rows, at_once) * columns * _FLOAT,
            shared_products=columns * block**2 / 6,
            products=rows * columns * block / 2,
        )


GPTQ = Gptq()
