"""The hidden units of an expert: what its gate and up make of its tokens, and its down reads."""

from collections.abc import Iterator

import torch
from torch import Tensor

from grokquant.job.plan import Plan
from grokquant.streaming.blocks import TOKENS_AT_ONCE, BlockwiseModel, Expert
from grokquant.types import Routed


def kept_tokens(plan: Plan) -> int:
    """The number of tokens of an expert whose hidden units are kept in memory: those that an expert
    has on average, so that the memory of a run does not depend on how its tokens are routed."""
    average = plan.checkpoint.tokens_per_expert(plan.calibration_tokens)
    # In whole parts, as many as models run at once.
    return -(-average // TOKENS_AT_ONCE) * TOKENS_AT_ONCE


class HiddenUnits:
    """The hidden units [tokens, inner] of what is routed to an expert, as `make` computes them.

    down reads them for its Hessian, and, once it is rounded, for the outputs of the expert. Those
    of the first `kept` tokens are computed once; those of any further tokens each time.
    """

    def __init__(
        self, model: BlockwiseModel, make: Expert, features: int, routed: Routed, kept: int
    ) -> None:
        self.features = features
        self._model = model
        self._make = make
        self._x = routed.x
        self._token = routed.token
        shape = (min(kept, len(routed.token)), features)
        self._kept = torch.empty(shape, dtype=model.dtype, device=model.device)

        def fill(part: slice) -> None:
            self._kept[part] = self._made(part)

        model.in_parts(fill, len(self._kept))

    def of(self, part: slice) -> Tensor:
        """Those [some, inner] of one of the parts that a model runs at once."""
        return self._kept[part] if part.stop <= len(self._kept) else self._made(part)

    def inputs(self, places: Tensor) -> Iterator[Tensor]:
        """Those of the tokens at `places` int64, which ascend, some at a time."""
        for some in self._model.inputs_at_once(places):
            kept = some[some < len(self._kept)]
            others = some[len(kept) :]
            units = self._kept[kept.to(self._kept.device)]
            yield torch.cat([units, self._of_others(others)]) if len(others) else units

    def _made(self, part: slice) -> Tensor:
        return self._make(self._x[self._token[part]].to(self._model.device))

    def _of_others(self, places: Tensor) -> Tensor:
        x = self._x[self._token[places]].to(self._model.device)
        return self._model.by_rows(self._make, x)
