"""What the experts of a layer should add up to, so that its output is that of the original.

With the states h before the experts and the sum y of their gated outputs, of the original (f) and
as quantized (q), the output h_q + y is that of the original for

    y* = y_f + (h_f - h_q)

so errors of attention are made good where experts can. The same holds for the output y of attention
and the states h before it. If y passes a norm y / rms(y) * gain first,
the difference is mapped back through it, and errors of tokens with a small y count more:

    y* = y_f + (h_f - h_q) / gain * rms(y_f)          weight = 1 / rms(y_f)^2

Experts are rounded one after the other. Until its turn, an expert is taken as it was stored. gate
and up do not depend on that, nor what down reads: only the outputs that down should give wait for
the experts before it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grokquant.parallel import ALONE, Team
from grokquant.streaming.blocks import TOKENS_IN_PIECE
from grokquant.threads import alone, in_pieces, slices
from grokquant.types import Guide, Routed

# Weights of tokens, and gains, no smaller than this share of the usual ones are divided by.
_SMALL = 1e-2
# A gate that is 0 in the working dtype: its token has no weight, and nothing is divided by 0.
_NO_GATE = 1e-6


@dataclass(frozen=True)
class Original:
    """The experts of a layer in the original model, for all tokens.

    `inputs` [tokens, hidden]; `outputs` float32 [tokens, hidden], their gated sum; `before`
    [tokens, hidden], the layer's outputs without that sum.
    """

    inputs: Tensor
    outputs: Tensor
    before: Tensor


class Mixture:
    """The experts of a layer while they are rounded one after the other.

    `original` are they in the original model; `before` [rows, time, hidden] is the quantized layer
    without them, `stored` float32 [rows * time, hidden] what all of them would add as they are
    stored. `gain` float32 [hidden] is that of the norm after them, if any. The rows are those of
    one of the members of `team`.
    """

    def __init__(
        self,
        original: Original,
        before: Tensor,
        stored: Tensor,
        gain: Tensor | None,
        team: Team = ALONE,
    ) -> None:
        rows = torch.empty(len(before))
        self._numbers = team.of_all(rows, lambda every: torch.arange(len(every)))
        self._time = before.shape[1]
        before = before.flatten(0, 1)
        self.inputs = original.inputs
        self._missing = original.outputs.clone()
        self.weights = move_to_missing_(self._missing, original.before, before, gain)

        def subtract(part: slice) -> None:
            self._missing[part] -= stored[part]

        in_pieces(subtract, slices(0, len(before), TOKENS_IN_PIECE))
        if gain is not None:
            self.weights = team.of_all(
                self.weights, lambda rms: alone(lambda: inverse_squares(rms))
            )

    def guide(self, routed: Routed) -> Guide:
        """What the tokens `routed` to an expert were: they count by their squared gates."""
        weight = routed.gate.squeeze(1).square() * self.weights[routed.token]
        return Guide(self.inputs, weight, self._numbers[routed.token // self._time])

    def outputs_for(self, routed: Routed, stored: Tensor) -> Tensor:
        """What an expert should give for the tokens `routed` to it, float32 [routed, hidden].

        `stored` [routed, hidden] are its outputs as it is stored. Called once for each expert, in
        order.
        """
        outputs = torch.empty(stored.shape)

        def share(part: slice) -> None:
            token = routed.token[part]
            gate = routed.gate[part]
            missing = self._missing[token] + stored[part].float() * gate
            self._missing[token] = missing
            outputs[part] = (missing - routed.combined[token]) / gate.clamp(min=_NO_GATE)

        in_pieces(share, slices(0, len(outputs), TOKENS_IN_PIECE))
        return outputs


def normalized(weights: Tensor) -> Tensor:
    """Weights of tokens [routed], 1 on average."""
    return weights / alone(weights.mean).clamp(min=_NO_GATE**2)


def move_to_missing_(y: Tensor, h_f: Tensor, h_q: Tensor, gain: Tensor | None) -> Tensor:
    """Turns y_f, float32 [tokens, hidden], into y* for the states h_f and h_q [tokens, hidden].

    Returns the rms of y_f [tokens], ones without a norm. `gain` float32 [hidden] is that of the
    norm that y passes, if any.
    """
    sizes = torch.ones(len(y))

    def move(part: slice) -> None:
        moved = h_f[part].float() - h_q[part].float()
        if gain is not None:
            rms = y[part].square().mean(1, keepdim=True).sqrt()
            sizes[part] = rms.squeeze(1)
            moved *= rms / _away_from_zero(gain)
        y[part] += moved

    in_pieces(move, slices(0, len(y), TOKENS_IN_PIECE))
    return sizes


def _away_from_zero(gain: Tensor) -> Tensor:
    """The gain [hidden] of a norm, safe to divide by."""
    least = _SMALL * gain.abs().mean()
    return torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp(min=least)


def inverse_squares(rms: Tensor) -> Tensor:
    """1 / rms^2 [tokens], 1 on average."""
    weights = rms.clamp(min=_SMALL * rms.mean()) ** -2
    return weights / weights.mean()
