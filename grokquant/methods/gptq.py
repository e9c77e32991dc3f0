"""GPTQ: rounding with error feedback through the input Hessian (Frantar et al., arXiv 2210.17323).

Written in its equivalent LDLQ form (Chee et al., arXiv 2307.13304, theorem 6): with H = F D F^T and
F unit upper triangular, column k is rounded at w_k + (W - Q)[:, :k] F[:k, k]. F comes from one
Cholesky factorisation; no inverse is taken. Everything is float32. A Hessian may be block-diagonal:
it comes as a list of squares, a full one as a list of one.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.gptq_kernels import round_columns
from grokquant.methods.ldl import factorize_, permute_
from grokquant.methods.levels import find_levels
from grokquant.methods.method import Cost, Method, Needs, Rounded, Site, UnusableHessian
from grokquant.methods.rtn import GRID_KEYS, RTN, ScaleSettings
from grokquant.methods.scales import ScaleRule, round_to_grid
from grokquant.methods.spans import divisors, nearest_in_codebook
from grokquant.types import QTensor

_FLOAT = torch.float32.itemsize
# Columns rounded one by one; the feedback between any more is a matrix product.
_LEAF = 64
# Rows rounded at once: bounds the working memory, and the products stay large.
SLAB_ROWS = 4096
# Sign combinations of rows that stand for all rows in ||W X||.
_PROBES = 128
# Damping is raised this often, tenfold each time, before a Hessian counts as unusable.
_RETRIES = 3


@dataclass(frozen=True)
class GptqSettings(ScaleSettings):
    """The keys of `gptq`."""

    act_order: Annotated[
        bool,
        Field(
            description="Round the columns with the strongest inputs first. Groups stay where they "
            "are, so it costs nothing at run time."
        ),
    ] = True
    damping: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Share of the Hessian's mean diagonal that is added to it, so that it can "
            "be inverted.",
        ),
    ] = 0.01
    hessian_block: Annotated[
        Annotated[int, Field(ge=32)] | None,
        Field(
            description="Limits the feedback to blocks of this many input features (unset: all of "
            "them), which takes less memory and time in proportion."
        ),
    ] = None


@dataclass(frozen=True)
class Factor:
    """A diagonal block of a Hessian in visiting order: H + shift I = F diag(D) F^T.

    `columns` int64 [block] are the matrix columns in that order. Of `F` [block, block] only what
    lies above the diagonal means anything. `D` is [block].
    """

    columns: Tensor
    F: Tensor
    D: Tensor
    shift: float


@dataclass(frozen=True)
class Feedback:
    """What rounding needs of a Hessian; gate and up share one.

    `importance` [in] is the Hessian's diagonal, `damping` the largest share of its mean that was
    added to the diagonal of a block.
    """

    factors: list[Factor]
    importance: Tensor
    damping: float


def factorize(H: Tensor | list[Tensor], damping: float, act_order: bool) -> Feedback:
    """Factors of a Hessian's diagonal blocks + damping * mean(diag H) * I. Raises UnusableHessian.

    The blocks of a list are overwritten and become the factors, so that a large Hessian never
    exists twice; the list is left empty. A tensor is one block and is left alone.
    """
    blocks = [H.clone()] if isinstance(H, Tensor) else H
    importance = torch.cat([block.diagonal() for block in blocks])
    # No entry of a Gram matrix exceeds its diagonal, so that is all there is to check.
    if not torch.isfinite(importance).all():
        raise UnusableHessian("the Hessian is not finite")
    mean = importance.mean().item()
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

    Scales are found before, in natural column order (static groups), so that the result needs no
    group index whatever the order of the columns. Besides W and the result it takes the memory of
    four float32 slabs of 4096 rows. The numerator of the output error is exact, the denominator up
    to 128 rows; above, that many random combinations of the rows estimate it, to about a hundredth.
    """
    importance = feedback.importance if rule == "mse" else None
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    quantized = find_levels(W, scheme, rule, importance).hold(codes)
    lost = 0.0
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for start in range(0, len(W), SLAB_ROWS):
            rows = slice(start, start + SLAB_ROWS)
            for factor in feedback.factors:
                slab = _Slab(W, quantized, rows, factor)
                lost += slab.round(threads if W.device.type == "cpu" else None)
                slab.store(codes)
    energy = _output_energy(W, feedback)
    return Rounded(quantized, sqrt(max(lost, 0.0) / max(energy, 1e-30)))


def _factorize_block(H: Tensor, start: int, shift: float, act_order: bool) -> Factor:
    """The factor of H [block, block], the block of the columns from `start` on."""
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        permute_(H, order)
    for attempt in range(_RETRIES + 1):
        raised = shift * 10**attempt
        D = factorize_(H, raised)
        if D is not None:
            return Factor(order + start, H, D, raised)
    raise UnusableHessian(
        f"the Hessian is not positive definite, its damping raised {_RETRIES} times"
    )


def _output_energy(W: Tensor, feedback: Feedback) -> float:
    """tr(W H W^T), of random combinations of the rows where there are more than _PROBES."""
    probes = _probes(W)
    energy = 0.0
    for factor in feedback.factors:
        F, Y = factor.F, probes[:, factor.columns]  # (probes, block)
        for start in range(0, len(F), SLAB_ROWS):
            part = slice(start, start + SLAB_ROWS)
            YF = Y[:, part] + Y[:, part] @ F[part, part].triu(1)
            YF.addmm_(Y[:, :start], F[:start, part])
            energy += (YF.square_() @ factor.D[part]).sum(dtype=torch.float64).item()
        energy -= factor.shift * Y.norm().item() ** 2
    return energy


def _probes(W: Tensor) -> Tensor:
    """A float32 matrix P of at most _PROBES rows for which P^T P is about W^T W."""
    if len(W) <= _PROBES:
        return W.float()
    generator = torch.Generator(W.device).manual_seed(0)
    probes = torch.zeros(_PROBES, W.shape[1], device=W.device)
    for rows in W.split(SLAB_ROWS):
        shape = (_PROBES, len(rows))
        signs = torch.randint(0, 2, shape, generator=generator, device=W.device).mul_(2).sub_(1)
        probes.addmm_(signs.float(), rows.float(), alpha=_PROBES**-0.5)
    return probes


class _Slab:
    """Some rows of W in the columns of a factor, while they are rounded.

    All is transposed, [columns in visiting order, rows], so that a column is one line of memory.
    `errors` holds the weights until a column is rounded, then W - Q; `targets` the weights with
    what feedback they have got so far.
    """

    def __init__(self, W: Tensor, quantized: QTensor, rows: slice, factor: Factor) -> None:
        self.factor, self.scheme, self.rows = factor, quantized.scheme, rows
        self.first = int(factor.columns.min())
        self.order = factor.columns - self.first
        last = self.first + len(self.order)
        self.errors = W[rows, self.first : last].T.contiguous()[self.order].float()
        self.targets = self.errors.clone()
        self.codes = torch.empty(self.errors.shape, dtype=torch.int8, device=W.device)
        scales, zeros = quantized.scales[rows], quantized.zero_points
        zeros = torch.zeros_like(scales) if zeros is None else zeros[rows]
        self.groups = factor.columns // (W.shape[1] // scales.shape[1])
        offsets = quantized.offsets
        offsets = torch.zeros_like(scales) if offsets is None else offsets[rows]
        levels = (divisors(scales, self.scheme.row.unit), zeros, offsets)
        self.scales, self.zeros, self.offsets = (M.T.float().contiguous() for M in levels)
        self.table = torch.tensor(self.scheme.row.table, device=W.device)

    def round(self, threads: ThreadPoolExecutor | None) -> float:
        """Rounds all; returns tr(E H E^T) of the errors E. Compiled where there are `threads`."""
        loss = self._descend(0, len(self.codes), threads)
        return loss - self.factor.shift * self.errors.norm().item() ** 2

    def store(self, codes: Tensor) -> None:
        """Puts the rounded codes where they belong in `codes` int8 [out, in]."""
        natural = torch.empty_like(self.codes)
        natural[self.order] = self.codes
        codes[self.rows, self.first : self.first + len(natural)] = natural.T

    def _descend(self, start: int, stop: int, threads: ThreadPoolExecutor | None) -> float:
        """Rounds these columns, whose targets hold the feedback of all others before them."""
        if stop - start <= _LEAF:
            part = slice(start, stop)
            return self._plain(part) if threads is None else self._compiled(part, threads)
        middle = (start + stop) // 2
        loss = self._descend(start, middle, threads)
        factor = self.factor.F[start:middle, middle:stop]
        self.targets[middle:stop].addmm_(factor.T, self.errors[start:middle])
        return loss + self._descend(middle, stop, threads)

    def _compiled(self, part: slice, threads: ThreadPoolExecutor) -> float:
        count = self.codes.shape[1]
        share = -(-count // torch.get_num_threads())
        scheme, factor = self.scheme, self.factor
        arrays = [M[part] for M in (self.errors, self.targets, self.codes, self.groups, factor.D)]
        arrays += [factor.F[part, part].contiguous(), self.scales, self.zeros, self.offsets]
        arrays.append(self.table)
        arguments = [array.numpy() for array in arrays]
        limits = float(scheme.qmin), float(scheme.qmax)

        def round_rows(start: int) -> float:
            return round_columns(limits, (start, min(start + share, count)), *arguments)

        return sum(threads.map(round_rows, range(0, count, share)))

    def _plain(self, part: slice) -> float:
        """The same in PyTorch, for other devices than the CPU."""
        loss = torch.zeros((), device=self.codes.device)
        F, D = self.factor.F, self.factor.D
        for k, group in enumerate(self.groups[part].tolist(), part.start):
            scale, zero, offset = self.scales[group], self.zeros[group], self.offsets[group]
            if len(self.table):
                code = nearest_in_codebook(self.targets[k] / scale, self.scheme)
                value = self.table[code.long()] * scale
            else:
                code = round_to_grid(self.targets[k] - offset, scale, zero, self.scheme)
                value = (code - zero) * scale + offset
            loss += D[k] * (self.targets[k] - value).square().sum()
            self.codes[k] = code
            self.errors[k] -= value
            self.targets[k + 1 : part.stop].addr_(F[k, k + 1 : part.stop], self.errors[k])
        return loss.item()


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
        """Four float32 slabs; a Cholesky factorisation of each block, n^3 / 6; half of a product of
        W with the block for the feedback."""
        block = min(settings.hessian_block or columns, columns)
        return Cost(
            working_bytes=4 * min(rows, SLAB_ROWS) * columns * _FLOAT,
            shared_products=columns * block**2 / 6,
            products=rows * columns * block / 2,
        )


GPTQ = Gptq()
