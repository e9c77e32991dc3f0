"""Two-sided rounding: towards what the original gives, in the metric of the layer's output.

With E = What - W* the error of a matrix, this lowers

    tr(G E H E^T)        H = sum of w x x^T over tokens     the inputs' side, [in, in]
                         W* the target                      see `targets`
                         G = what errors of outputs cost    the outputs' side, see `output_metric`

by GPTQ on W* with feedback through both sides (`coupled`), and then, if it is asked for, by
coordinate descent on codes and scales (`descent`). Experts are rounded so, and dense MLPs, as the
only expert of their layer, which gets all tokens with a gate of 1. A token counts w = p^2, the
square of its gate, and 1 / rms^2 more where a norm follows the sum of the experts. gate and up are
to give what they give for the original's inputs, down what the sum of all experts lacks
(`job/mixture`). Attention is rounded so, too, q, k and v as gate and up, o as down
(`job/attention`), and the matrices of shared experts as q is. Others are rounded by GPTQ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.coupled import round_coupled
from grokquant.methods.descent import descend
from grokquant.methods.gptq import GPTQ, Feedback, GptqSettings, factorize, probes, round_gptq
from grokquant.methods.ldl import permute_, restore_
from grokquant.methods.method import Aim, Cost, Layer, LayerRounding, Method, Needs, Rounded, Site
from grokquant.methods.output_metric import (
    interleave,
    metric_of_inner,
    metric_of_site,
    metric_of_states,
    metric_of_sum,
    part_of,
    slope_moments,
    units_in_block,
)
from grokquant.methods.rtn import GRID_KEYS, RTN, ScaleSettings
from grokquant.methods.targets import (
    PIECE,
    missed,
    missing_outputs,
    moved_inputs,
    solve_,
    solve_for,
    times,
    weighted,
)
from grokquant.threads import alone, in_pieces, slices
from grokquant.types import QTensor, Unit

_FLOAT = torch.float32.itemsize
_INNER_PARTS = ("gate", "up")
_O = "attention.o"
# Added to the diagonal of H, as a share of its mean: one of these, by tokens that are held out. Few
# tokens for each input need much: targets, and rounding as well, fit their noise, too.
_RIDGES = (0.05, 0.2, 0.8, 3.2)
# Where none are held out, and the first that is tried: others cost another factorization.
_RIDGE = 0.2
# Rows of a matrix whose targets decide: the ridge is that of its inputs, not of its outputs.
_DECIDING_ROWS = 32
# Sweeps over a matrix, and passes over all codes in each.
_SWEEPS = 3
_PASSES = 2


@dataclass(frozen=True)
class TwoSidedSettings(ScaleSettings):
    """The keys of two-sided rounding."""

    metric: Annotated[
        Literal["head", "gradients"],
        Field(
            description="What an error of outputs costs: `head` takes it from the rows of the "
            "head, `gradients` from a backward pass of the original over some calibration tokens, "
            "which reads the source twice more. Attention gains little without."
        ),
    ] = "head"
    descent: Annotated[
        bool,
        Field(
            description="Goes on from there by coordinate descent on codes and scales, which takes "
            "about as long again."
        ),
    ] = False
    refit: Annotated[
        bool,
        Field(
            description="Fits the router, and projections of attention that stay in floating "
            "point, to what they give in the original."
        ),
    ] = True


class TwoSided(Method):
    name = "two-sided"
    text = (
        "rounds experts, dense MLPs and attention towards the outputs of the original, by what "
        "errors do to the output of the layer, and matrices of unknown use as gptq does"
    )
    settings = TwoSidedSettings
    grid_keys = GRID_KEYS
    needs = Needs.REFERENCE
    # What it sees of a layer comes to the owner of an expert with its tokens.
    sees_layer = False
    fallback = RTN

    def round(
        self, W: Tensor, scheme: Scheme, settings: TwoSidedSettings, site: Site | None
    ) -> Rounded:
        """Rounds a matrix of which nothing is known but its inputs: the outputs count alike."""
        H = _hessian(site)
        quantized = _round(W.float(), None, H, scheme, settings, None, site)
        return Rounded(quantized, _output_error(W, quantized, H))

    def needs_gradients(self, settings: TwoSidedSettings) -> bool:
        return settings.metric == "gradients"

    def refits(self, settings: TwoSidedSettings) -> bool:
        return settings.refit

    def cost(self, rows: int, columns: int, settings: TwoSidedSettings) -> Cost:
        """Float32 copies: gate and up, their targets and what these are made of, and E H. The
        products are those of GPTQ, two solutions, another factorisation of H, with the ridge that
        is found, and one with H in each sweep."""
        gptq = GPTQ.cost(rows, columns, GptqSettings())
        sweeps = _SWEEPS if settings.descent else 0
        return Cost(
            working_bytes=gptq.working_bytes + 7 * rows * columns * _FLOAT,
            shared_products=gptq.shared_products,
            products=gptq.products + (2 + sweeps) * rows * columns**2 + columns**3 / 6,
        )

    def begin_layer(self, layer: Layer) -> "TwoSidedLayer":
        return TwoSidedLayer(self, layer)


class TwoSidedLayer(LayerRounding):
    """Matrices that read the same input are rounded together, when the first is asked for."""

    def __init__(self, method: TwoSided, layer: Layer) -> None:
        super().__init__(method, layer)
        self._metrics: dict[bool, Tensor] = {}
        self._rounded: dict[str, Rounded] = {}  # those of one site

    def round(self, unit: Unit, W: Tensor, site: Site | None) -> Rounded:
        if site is None or site.aim is None:
            if unit.expert is None:
                return GPTQ.round(W, unit.scheme, GptqSettings(unit.settings.scale), site)
            return super().round(unit, W, site)
        if unit.part == _O:
            return self._round_last(unit, W.float(), self._metric_of_o(unit), site, site.aim)
        expert = unit.expert or 0
        parts = {tensor: part for part, tensor in self.layer.expert_tensors(expert).items()}
        if parts.get(unit.tensor) == "down":
            M = self._metric(unit, len(W))
            return self._round_last(unit, W.float(), M, site, site.aim)
        if unit.name not in self._rounded and unit.tensor in parts:
            self._rounded = self._round_inner(unit, expert, site, site.aim)
        elif unit.name not in self._rounded:
            self._rounded = self._round_apart(unit, site, site.aim)
        return self._rounded.pop(unit.name)

    def _metric(self, unit: Unit, hidden: int) -> Tensor:
        gradients = self.method.needs_gradients(unit.settings)
        if gradients not in self._metrics:
            self._metrics[gradients] = metric_of_sum(self.layer, hidden, gradients)
        return self._metrics[gradients]

    def _metric_of_site(self, members: Sequence[Unit]) -> Tensor:
        """G by gradients, in blocks, of matrices one above the other."""
        moments = self.layer.site_gradients[members[0].reads]
        site = [other for other in self.layer.units if self._is_in_metric(members[0], other)]
        blocks = moments.split([other.shape[0] // moments.shape[1] for other in site])
        return metric_of_site(torch.cat([blocks[site.index(member)] for member in members]))

    def _is_in_metric(self, unit: Unit, other: Unit) -> bool:
        same = _read_the_same(unit, other) and other.method == unit.method
        return same and self.method.needs_gradients(other.settings)

    def _metric_of_o(self, unit: Unit) -> Tensor:
        if self.method.needs_gradients(unit.settings):
            return self._metric_of_site([unit])[0]
        return metric_of_states(self.layer, unit.shape[0], self.layer.attention_gain)

    def _round_last(self, unit: Unit, W: Tensor, M: Tensor, site: Site, aim: Aim) -> Rounded:
        """down of an expert, or o of attention: what it gives has the metric M."""
        H = _hessian(site)
        S = missing_outputs(W, site, aim)
        quantized = _round(W, S, H, unit.scheme, unit.settings, M.unsqueeze(0), site)
        return Rounded(
            quantized, _output_error(W, quantized, H), _held_out_error(W, quantized, site)
        )

    def _round_apart(self, unit: Unit, site: Site, aim: Aim) -> dict[str, Rounded]:
        """Matrices outside experts that read the same inputs and are planned like `unit`."""
        H = _hessian(site)
        site_units = [other for other in self.layer.units if _read_the_same(unit, other)]
        members = [other for other in site_units if _is_rounded_like(unit, other)]
        W = torch.cat([self.layer.original(member.tensor).float() for member in members])
        G = None
        if self.method.needs_gradients(unit.settings):
            G = self._metric_of_site(members)
        S = times(W, moved_inputs(site, aim))
        quantized = _round(W, S, H, unit.scheme, unit.settings, G, site)
        rounded = {}
        start = 0
        for member in members:
            rows = slice(start, start + member.shape[0])
            start = rows.stop
            Q = quantized.rows(rows)
            errors = _output_error(W[rows], Q, H), _held_out_error(W[rows], Q, site)
            rounded[member.name] = Rounded(Q, *errors)
        return rounded

    def _round_inner(self, unit: Unit, expert: int, site: Site, aim: Aim) -> dict[str, Rounded]:
        """gate and up of an expert, or the one of them that is planned like `unit`."""
        H = _hessian(site)
        names = self.layer.expert_tensors(expert)
        inner = [names[part] for part in _INNER_PARTS]
        own = [other for other in self.layer.units if other.tensor in inner]
        members = [other for other in own if _is_rounded_like(unit, other)]
        gate, up, down = (self.layer.original(names[p]).float() for p in (*_INNER_PARTS, "down"))
        size = units_in_block(len(gate))
        moments = slope_moments(self.layer, expert, gate, up, aim, size)
        places = [inner.index(member.tensor) for member in members]
        moments = moments[:, places][..., places, :]
        G = metric_of_inner(self._metric(unit, len(down)), down, moments)
        W = interleave([(gate, up)[place] for place in places], size)
        del gate, up, down
        S = times(W, moved_inputs(site, aim))
        quantized = _round(W, S, H, unit.scheme, unit.settings, G, site)
        rounded = {}
        for place, member in enumerate(members):
            take = partial(part_of, place=place, members=len(members), size=size)
            Q = quantized.each(take)
            stored = take(W)
            errors = _output_error(stored, Q, H), _held_out_error(stored, Q, site)
            rounded[member.name] = Rounded(Q, *errors)
        return rounded


def _is_rounded_like(unit: Unit, other: Unit) -> bool:
    how = (unit.method, unit.scheme, unit.settings)
    return (other.method, other.scheme, other.settings) == how


def _read_the_same(unit: Unit, other: Unit) -> bool:
    """Whether two matrices outside the experts do."""
    return other.expert is None and other.reads == unit.reads


def _hessian(site: Site | None) -> Tensor:
    """H [in, in] of a site, tokens weighted by its aim if it has one. Raises UnusableHessian."""
    assert site is not None, "a method that needs data is given a site"
    (H,) = site.hessian(None, weighted=site.aim is not None)
    return H


def _round(
    W: Tensor,
    S: Tensor | None,
    H: Tensor,
    scheme: Scheme,
    settings: TwoSidedSettings,
    G: Tensor | None,
    site: Site | None,
) -> QTensor:
    """Rounds W float32 [out, in] towards the target that S [out, in] makes of it, or towards W.

    The ridge is the best for the tokens of the site that are held out. S is overwritten; H [in, in]
    is, too, but holds the same again at the end.
    """
    feedback = factorize([H], _RIDGE, act_order=True)
    if S is not None:
        ridge = _best_ridge(W, S, feedback, site)
        if ridge != _RIDGE:
            _restore(H, feedback)
            feedback = factorize([H], ridge, act_order=True)
    (factor,) = feedback.factors
    target = W if S is None else solve_(S, factor).add_(W)
    if G is None:
        quantized = round_gptq(target, feedback, scheme, settings.scale).quantized
    else:
        quantized = round_coupled(target, feedback, G, scheme, settings.scale)
    _restore(H, feedback)
    if settings.descent:
        H.diagonal().add_(factor.shift)
        quantized = descend(quantized, target, H, G, _SWEEPS, _PASSES)
        H.diagonal().copy_(feedback.importance)
    return quantized


def _restore(H: Tensor, feedback: Feedback) -> None:
    """Makes H [in, in] of the factor that has its memory."""
    (factor,) = feedback.factors
    restore_(H, feedback.importance[factor.columns])
    permute_(H, factor.columns.argsort())


def _best_ridge(W: Tensor, S: Tensor, feedback: Feedback, site: Site | None) -> float:
    """The ridge whose targets come nearest to what is wanted of the tokens that are held out.

    _RIDGE if there are none. W and S are [out, in].
    """
    held_out = None if site is None else site.held_out
    if held_out is None or held_out.aim is None:
        return _RIDGE
    rows = torch.arange(0, len(W), max(1, len(W) // _DECIDING_ROWS))
    mean = alone(feedback.importance.mean).item()
    ridges = [ridge * mean for ridge in _RIDGES]
    changes = solve_for(S[rows], feedback.factors[0], ridges)
    misses = [missed(W[rows] + change, W[rows], rows, held_out, held_out.aim) for change in changes]
    return _RIDGES[misses.index(min(misses))]


def _output_error(W: Tensor, quantized: QTensor, H: Tensor) -> float:
    """||(W - Q) X|| / ||W X||; from random combinations of the rows if there are many."""
    both = _probes(W, quantized)

    def energies(part: slice) -> list[float]:
        return [((P @ H[:, part]) * P[:, part]).sum().item() for P in both]

    return _ratio(in_pieces(energies, slices(0, len(H), PIECE)))


def _held_out_error(W: Tensor, quantized: QTensor, site: Site) -> float | None:
    """The same for the inputs that are held out; None if there are none."""
    held_out = site.held_out
    if held_out is None or held_out.aim is None:
        return None
    both = _probes(W, quantized)
    found: list[list[float]] = []
    for X, weights in weighted(held_out.inputs, held_out.aim):

        def energies(part: slice, X: Tensor = X, weights: Tensor = weights) -> list[float]:
            return [((X[part] @ P.T).square() * weights[part]).sum().item() for P in both]

        found += in_pieces(energies, slices(0, len(X), PIECE))
    return _ratio(found)


def _probes(W: Tensor, quantized: QTensor) -> tuple[Tensor, Tensor]:
    """The rows of W - Q and of W, or random combinations of them."""
    return probes(W.float() - quantized.dequantize().float()), probes(W)


def _ratio(energies: list[list[float]]) -> float:
    """The root of what is lost, in pieces, over what there was."""
    lost, stored = (sum(values) for values in zip(*energies, strict=True))
    return sqrt(max(lost, 0.0) / max(stored, 1e-30))


TWO_SIDED = TwoSided()
