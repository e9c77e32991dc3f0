"""What rounding each matrix costs the model: one pass of the original, layer by layer.

For each matrix and grid the matrix alone is rounded, by the method of the budget, and the layer
runs with it. With d the change of the layer's output for tokens that reach the matrix and that its
rounding has not seen,

    error[matrix, grid] = sum of d^T M d / tokens in all        M see `methods/output_metric`

That compares the experts of a layer, and the grids. What errors of different layers and parts do to
the predictions is measured as it is: for each kind of matrix in a layer, some rows of tokens go on
to the end with all matrices of the kind rounded to a coarse grid, beside the unchanged rows:

    rows        layer 0              layer 1              ...   logits
    all         original      ->     original      ->     ...   p
    some        gate rounded  ->     original      ->     ...   KLD(p, q) of layer 0, gate
    some        up rounded    ->     original      ->     ...   KLD(p, q) of layer 0, up
    some                             gate rounded  ->     ...   KLD(p, q) of layer 1, gate

    cost[matrix, grid] = error[matrix, grid] * KLD(kind) / sum of error over the kind as rounded
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration.site import Inputs, Site
from grokquant.methods import METHODS
from grokquant.methods.method import Layer, UnusableHessian, dense, errors_of
from grokquant.methods.output_metric import metric_of_sum
from grokquant.streaming.blocks import TOKENS_IN_PIECE, BlockwiseModel, Expert, Outputs, Routed
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor, Unit

# Tokens of an expert on which its errors are measured: an average over more would hardly differ.
_TOKENS = 2048
# Of so many tokens of an expert one is kept from its Hessian, to measure errors on.
_HELD_OUT = 8
# The smallest cost of a matrix, as a share of what its weights' error costs the others of its kind
# on average: calibration that does not reach an expert does not show that nothing will.
_UNSEEN = 0.02
# Of a norm: no division by zero.
_SMALL = 1e-12


@dataclass
class Errors:
    """Of a matrix, by the number of a grid: errors of outputs, and ||W - Q||^2 / ||W||^2."""

    outputs: dict[int, float] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """All matrices of one kind in a layer, rounded to grid `grids[name]` each."""

    layer: int
    kind: str
    grids: Mapping[str, int]


class LayerErrors:
    """Measures layer `index` of the original model.

    `options` are the units to measure by the name of their matrix and the number of their grid.
    Matrices that fewer than `min_tokens` reach are rounded to nearest. `run` fills `errors` by the
    same names.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        index: int,
        options: Mapping[str, Mapping[int, Unit]],
        min_tokens: int,
    ) -> None:
        self.model = model
        self.index = index
        self.min_tokens = min_tokens
        self.options = {
            name: units
            for name, units in options.items()
            if next(iter(units.values())).layer == index
        }
        self.errors = {name: Errors() for name in self.options}
        self.probes = [
            Probe(index, kind, {name: probed_grid(self.options[name]) for name in names})
            for kind, names in self._kinds().items()
        ]
        self._probed: dict[str, QTensor] = {}  # matrices as the probes have them

    def run(self, hidden: Tensor, rows: int, probed: int) -> Tensor:
        """The states [rows and those of probes, time, hidden] after the layer; new probes follow.

        `hidden` are `rows` of the original model, then `probed` rows for each earlier probe.
        """
        if not self.options:
            return self._run_as_stored(hidden)
        self.model.load_layer(self.index)
        original = hidden[:rows]
        readers = cast(Layer, _Readers(self.model, self.index))
        self._metric = metric_of_sum(readers, hidden.shape[2], gradients=False).cpu()
        self._measure_outside_experts(original)
        tokens = rows * hidden.shape[1]
        stored = self.model.combine_stored(self.index)

        def measure_and_combine(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            combined = stored(x, experts, gates)
            self._combined = combined[:tokens]
            measure = self.model.combine_experts(self.index, self._measure_expert)
            measure(x[:tokens], experts[:tokens], gates[:tokens])
            return combined

        after = self.model.run_layer(self.index, hidden, measure_and_combine)
        probes = (self._run_probe(probe, original[:probed]) for probe in self.probes)
        after = torch.cat([after, *probes])
        self.model.free_layer(self.index)
        return after

    def _kinds(self) -> dict[str, list[str]]:
        """The names of the matrices of each kind."""
        kinds: dict[str, list[str]] = {}
        for name, units in self.options.items():
            kinds.setdefault(next(iter(units.values())).kind, []).append(name)
        return kinds

    def _run_as_stored(self, hidden: Tensor) -> Tensor:
        self.model.load_layer(self.index)
        after = self.model.run_layer(self.index, hidden, self.model.combine_stored(self.index))
        self.model.free_layer(self.index)
        return after

    # --- outside the experts

    def _measure_outside_experts(self, hidden: Tensor) -> None:
        """By the states after the layer without its experts, as attention leaves them."""
        outside = {n: units for n, units in self.options.items() if _of(units).expert is None}
        if not outside:
            return
        run = partial(self.model.run_layer, self.index, hidden, _without_experts)
        before = run().flatten(0, 1)
        for name, units in outside.items():
            W = self._original(_of(units).tensor)
            x = self.model.inputs_of(self.index, _of(units).tensor, hidden)
            site = self._site(x, torch.arange(len(x)))
            for grid, unit in units.items():
                self.model.replace(self.index, unit.tensor, self._rounded(W, unit, grid, site))
                lost = self._cost(run().flatten(0, 1), before)
                self.errors[name].outputs[grid] = lost / len(before)
            self.model.replace(self.index, _of(units).tensor, W)

    def _cost(self, after: Tensor, before: Tensor) -> float:
        """Sum of d^T M d with d = after - before [tokens, hidden]."""

        def cost(part: slice) -> float:
            return _weighed(after[part].float() - before[part].float(), self._metric)

        return sum(in_pieces(cost, slices(0, len(after), TOKENS_IN_PIECE)))

    # --- experts

    def _measure_expert(self, expert: int, routed: Routed) -> Outputs:
        """Measures the matrices of an expert one by one; the expert itself adds nothing."""
        nothing = self.model.on_routed(torch.zeros_like, routed)
        names = self.model.family.expert_tensors(self.index, expert)
        owned = {
            _of(units).part: (name, units)
            for name, units in self.options.items()
            if _of(units).expert == expert
        }
        if not owned:
            return nothing
        stored = {part: self._original(name) for part, name in names.items()}
        seen, unseen = _held_out(len(routed.token))
        outer = self._site(routed.x, routed.token[seen])
        inner = self._inner_site(expert, stored, routed.x, routed.token[seen])
        token = routed.token[unseen]
        gate = routed.gate[unseen]
        x = routed.x[token].to(self.model.device)
        y = self._outputs(expert, stored, x)
        share = len(routed.token) / max(len(token), 1) / len(routed.x)
        for part, (name, units) in owned.items():
            site = inner if part == "down" else outer
            for grid, unit in units.items():
                rounded = stored | {part: self._rounded(stored[part], unit, grid, site)}
                lost = (self._outputs(expert, rounded, x).float() - y.float()).cpu() * gate
                cost = self._cost_in_sum(lost, self._combined[token])
                self.errors[name].outputs[grid] = cost * share
        return nothing

    def _outputs(self, expert: int, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The outputs of an expert with these matrices for x [tokens, hidden]."""
        return self.model.by_rows(self._expert(expert, weights), x) if len(x) else x

    def _expert(self, expert: int, weights: Mapping[str, Tensor]) -> Expert:
        W = {part: weight.to(self.model.dtype) for part, weight in weights.items()}
        inner = self.model.hidden_units(self.index, expert, W.get("gate"), W["up"])
        bias = self.model.expert_bias(self.index, expert, "down")
        return lambda x: F.linear(inner(x), W["down"], bias)

    def _cost_in_sum(self, lost: Tensor, combined: Tensor) -> float:
        """Sum of d^T M d where `lost` [tokens, hidden] is added to the sum of all experts, which
        may pass a norm."""
        gain = self._gain

        def cost(part: slice) -> float:
            d = lost[part]
            if gain is not None:
                y = combined[part]
                d = (_normed(y + d) - _normed(y)) * gain
            return _weighed(d, self._metric)

        return sum(in_pieces(cost, slices(0, len(lost), TOKENS_IN_PIECE)))

    @property
    def _gain(self) -> Tensor | None:
        """The gain of the norm after the experts, float32 [hidden], if there is one."""
        norm = self.model.family.mixture_norm
        if not norm:
            return None
        return self.model.layers[self.index].get_parameter(f"{norm}.weight").float().cpu()

    # --- probes

    def _run_probe(self, probe: Probe, hidden: Tensor) -> Tensor:
        """The states after the layer with all matrices of a kind rounded."""
        units = [self.options[name][grid] for name, grid in probe.grids.items()]
        rounded = {unit.tensor: self._probed.pop(unit.name) for unit in units}
        outside = [unit.tensor for unit in units if unit.expert is None]
        for tensor in outside:
            self.model.replace(self.index, tensor, rounded[tensor].dequantize())

        def expert(number: int, routed: Routed) -> Outputs:
            names = self.model.family.expert_tensors(self.index, number)
            weights = {
                part: rounded[t].dequantize() if t in rounded else self._original(t)
                for part, t in names.items()
            }
            return self.model.on_routed(self._expert(number, weights), routed)

        combine = self.model.combine_experts(self.index, expert)
        after = self.model.run_layer(self.index, hidden, combine)
        for tensor in outside:
            self.model.replace(self.index, tensor, self._original(tensor))
        return after

    # --- matrices

    def _original(self, tensor: str) -> Tensor:
        return self.model.source.tensors[tensor].load_on(self.model.device)

    def _site(self, x: Tensor, token: Tensor) -> Site:
        """The rows `token` of x [tokens, features] as the input of matrices."""
        return self._site_of(x.shape[1], token, self.model.reader_of(x, token))

    def _inner_site(
        self, expert: int, stored: Mapping[str, Tensor], x: Tensor, token: Tensor
    ) -> Site:
        """The hidden units of an expert for the rows `token` of x, the input of down."""
        W = {part: weight.to(self.model.dtype) for part, weight in stored.items()}
        inner = self.model.hidden_units(self.index, expert, W.get("gate"), W["up"])

        read = self.model.reader_of(x, token)

        def units() -> Iterator[Tensor]:
            return (self.model.by_rows(inner, part) for part in read())

        return self._site_of(len(W["up"]), token, units)

    def _site_of(self, features: int, token: Tensor, inputs: Inputs) -> Site:
        few = f"{len(token)} tokens" if len(token) < self.min_tokens else None
        return Site(len(token), features, inputs, refusal=few)

    def _rounded(self, W: Tensor, unit: Unit, grid: int, site: Site) -> Tensor:
        """W rounded and dequantized; notes the error of its weights, and keeps what probes need."""
        rounded = _round(dense(W), unit, site)
        self.errors[unit.name].weights[grid] = errors_of(W, rounded).relative ** 2
        if grid == probed_grid(self.options[unit.name]):
            self._probed[unit.name] = rounded
        return rounded.dequantize()


class _Readers:
    """What reads the output of a layer: all that `metric_of_sum` asks of a layer.

    The norm after the experts is left out, since errors are measured behind it.
    """

    mixture_gain = None

    def __init__(self, model: BlockwiseModel, index: int) -> None:
        self.later_routers: Callable[[], Iterable[Tensor]] = partial(model.later_routers, index)
        self.head_directions = lambda: model.head_directions


def probed_grid(units: Mapping[int, Unit]) -> int:
    """The grid a third of the way up from the smallest of those of a matrix.

    A larger divergence stands out from noise, and tells more about the errors that matter.
    """
    ordered = sorted(units, key=lambda grid: (_bits(units[grid]), grid))
    return ordered[(len(ordered) - 1) // 3]


def costs(
    errors: Mapping[str, Errors], probes: Iterable[Probe], kld: Iterable[float]
) -> dict[str, dict[int, float]]:
    """The divergence that rounding each matrix to each grid is expected to cost, in nats a token.

    `kld` are the mean divergences of the probes.
    """
    found: dict[str, dict[int, float]] = {}
    for probe, divergence in zip(probes, kld, strict=True):
        of_kind = {name: errors[name] for name in probe.grids}
        outputs = sum(own.outputs[probe.grids[name]] for name, own in of_kind.items())
        weights = sum(own.weights[probe.grids[name]] for name, own in of_kind.items())
        nats = divergence / max(outputs, _SMALL)
        unseen = _UNSEEN * divergence / max(weights, _SMALL)
        for name, own in of_kind.items():
            found[name] = {
                grid: nats * lost + unseen * own.weights[grid] for grid, lost in own.outputs.items()
            }
    return found


def divergences(model: BlockwiseModel, hidden: Tensor, rows: int, probed: int) -> list[float]:
    """The mean KLD of each probe, from the states after the last layer."""
    total: list[float] = []
    for start in range(rows, len(hidden), probed):
        lost = 0.0
        for row in range(probed):
            before = model.logits(hidden[row : row + 1])[0]
            after = model.logits(hidden[start + row : start + row + 1])[0]
            lost += sum(in_pieces(partial(_kld, before, after), slices(0, len(before), 256)))
        total.append(lost / (probed * hidden.shape[1]))
    return total


def _kld(before: Tensor, after: Tensor, part: slice) -> float:
    """The sum of the divergences of some tokens."""
    p = before[part].float().log_softmax(-1)
    q = after[part].float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(dtype=torch.float64).item()


def _round(W: Tensor, unit: Unit, site: Site) -> QTensor:
    """W rounded as planned, or to nearest where the site cannot be used."""
    method = METHODS[unit.method]
    with suppress(UnusableHessian):
        return method.round(W, unit.scheme, unit.settings, site).quantized
    assert method.fallback is not None, f"{unit.method} needs data and has no fallback"
    return method.fallback.round(W, unit.scheme, unit.settings, None).quantized


def _held_out(tokens: int) -> tuple[Tensor, Tensor]:
    """Which of the tokens of an expert make its Hessian, and on which errors are measured."""
    numbers = torch.arange(tokens)
    if tokens < _HELD_OUT:
        return numbers, numbers
    held_out = numbers[_HELD_OUT - 1 :: _HELD_OUT]
    seen = numbers[numbers % _HELD_OUT != _HELD_OUT - 1]
    return seen, held_out[:: -(-len(held_out) // _TOKENS)]


def _without_experts(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    return torch.zeros(x.shape)


def _weighed(d: Tensor, M: Tensor) -> float:
    """Sum of d^T M d over the rows of d [tokens, hidden]."""
    return ((d @ M) * d).sum(dtype=torch.float64).item()


def _normed(y: Tensor) -> Tensor:
    return y / y.square().mean(-1, keepdim=True).sqrt().clamp(min=_SMALL)


def _of(units: Mapping[int, Unit]) -> Unit:
    """Any of the units of a matrix; all share its place and name."""
    return next(iter(units.values()))


def _bits(unit: Unit) -> float:
    return unit.scheme.bits + unit.scheme.group_bits / (unit.scheme.group_size or unit.shape[1])
