"""One model and everything that is to pass through it, layer by layer, each layer read once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grokquant.calibration.blocks import BlockwiseModel, Rows
from grokquant.errors import InputError


class Stream:
    """Batches of rows of a length of their own, on their way through `model`.

    `hidden` are the states of each batch [rows, time, hidden] after the layers that have run;
    `chosen` the experts of the last one [tokens, k] for each batch, None where it was dense.
    """

    def __init__(self, model: BlockwiseModel, batches: Sequence[Rows]) -> None:
        self.model, self.batches = model, batches
        self.hidden = [model.embed(rows.tokens) for rows in batches]
        self.chosen: tuple[Tensor, ...] | None = None

    def run_layer(self, index: int) -> None:
        """Takes all rows through layer `index`.

        Raises InputError where the weights are so large that the states are not finite.
        """
        self.chosen = None
        mix = self.model.stored_experts(index)

        def watched(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            self.chosen = experts.split([rows.tokens.numel() for rows in self.batches])
            return mix(x, experts, gates)

        self.model.load_layer(index)
        self.hidden = self.model.run_batches(index, self.batches, self.hidden, watched)
        self.model.free_layer(index)
        if not all(torch.isfinite(hidden).all() for hidden in self.hidden):
            path = self.model.source.path
            raise InputError(f"{path}: the outputs of layer {index} are not finite")
