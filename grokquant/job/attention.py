"""What the matrices of attention should give, for the inputs of the quantized model.

Those before the last should give what they give in the original. attention.o should give what makes
the states after attention those of the original (see `mixture`), and so makes good for errors of
layers before, and of the other matrices.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration.site import Site
from grokquant.job.division import Division
from grokquant.job.held_out import kept_and_held_out
from grokquant.job.mixture import inverse_squares, move_to_missing_, normalized
from grokquant.methods.method import Aim
from grokquant.streaming.blocks import BlockwiseModel
from grokquant.threads import alone
from grokquant.types import Unit

LAST = "attention.o"


class Attention:
    """The matrices of attention of layer `index` that have an aim, in a plan that is divided."""

    def __init__(self, division: Division, model: BlockwiseModel, index: int) -> None:
        self._division = division
        self._model = model
        self._index = index
        self._before: Tensor = torch.empty(0)
        self._given: dict[str, Tensor] = {}  # [tokens, in], by what the matrices read

    def record(self, hidden: Tensor) -> None:
        """Notes what they read in the original, for the states `hidden` [rows, time, hidden]."""
        plan = self._division.plan
        self._before = hidden
        for units in plan.sites_outside_experts(self._index):
            if any(map(plan.aims_alone, units)):
                inputs = self._model.inputs_of(self._index, units[0].tensor, hidden)
                self._given[units[0].reads] = inputs

    def forget(self) -> None:
        self._given.clear()

    def has_aim(self, unit: Unit) -> bool:
        return unit.reads in self._given

    def site(self, X: Tensor, unit: Unit, hidden: Tensor) -> Site | None:
        """The site of a unit, where it is made.

        X [tokens, in] are its inputs in the quantized model, `hidden` [rows, time, hidden] the
        states before the layer there.
        """
        goal, rms = self._given[unit.reads], torch.ones(len(X))
        is_last = unit.part == LAST
        if is_last:
            states = self._before, hidden
            goal, rms = missing_of_attention(self._model, self._index, goal, *states)
        team, makers = self._division.team, {self._division.maker_of(unit)}
        gathered = [team.gather(t, makers) for t in (X, goal, rms.unsqueeze(1))]
        if any(t is None for t in gathered):
            return None
        every_X, every_goal, every_rms = (t for t in gathered if t is not None)
        weights = alone(lambda: inverse_squares(every_rms.squeeze(1)))
        row = torch.arange(len(every_X)) // hidden.shape[1]
        parts = kept_and_held_out(row)

        def aim_of(part: Tensor) -> Aim:
            own = normalized(weights[part])
            if is_last:
                return Aim(own, outputs=partial(every_goal.__getitem__, part))
            return Aim(own, reference=self._model.reader_of(every_goal, part))

        inputs = [self._model.reader_of(every_X, part) for part in parts]
        site = Site(len(parts[0]), every_X.shape[1], inputs[0])
        site.take_aim(list(map(aim_of, parts)), inputs)
        return site


def missing_of_attention(
    model: BlockwiseModel, index: int, given: Tensor, h_f: Tensor, h_q: Tensor
) -> tuple[Tensor, Tensor]:
    """What attention.o of layer `index` should give, without its bias, float32 [tokens, hidden],
    and the rms of what it gives in the original, or ones without a norm [tokens].

    `given` [tokens, in] are its inputs in the original; `h_f` and `h_q` [rows, time, hidden] the
    states before the layer in the original and in the quantized model.
    """
    tensor = model.family.attention_output(model.config, index)
    W = model.expert_weight(tensor, given.dtype)
    bias = model.bias_of(tensor, given.dtype)
    y = model.by_rows(lambda x: F.linear(x.to(W.device), W, bias).cpu(), given).float()
    states = h_f.flatten(0, 1), h_q.flatten(0, 1)
    rms = move_to_missing_(y, *states, model.attention_gain(index))
    return y if bias is None else y - bias.float().cpu(), rms
