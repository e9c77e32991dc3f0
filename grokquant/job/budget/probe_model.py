"""A model with the shapes of a checkpoint that reads nothing, to time forward passes."""

from operator import attrgetter
from time import perf_counter

import torch
from torch import Tensor, nn

from grokquant.checkpoint import Checkpoint
from grokquant.streaming.blocks import CALIBRATION_DTYPE, TOKENS_IN_PIECE, BlockwiseModel

_ROWS = 2048  # of gate and up


class ProbeModel(BlockwiseModel):
    """Matrices of layers are random; what is outside the layers is zero and takes no memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, CALIBRATION_DTYPE, pieces=True)
        layers = range(checkpoint.num_layers)
        routed = [i for i in layers if self.family.experts_of(self.layers[i]) is not None]
        self._hidden = checkpoint.text_config.hidden_size
        self._layer = next(iter(routed), 0)

    def _fill(self, module: nn.Module, name: str, whole: str) -> None:
        like: Tensor = attrgetter(name)(module)
        if not like.is_floating_point():
            value = torch.zeros_like(like, device="cpu")
        elif module is self.model:
            value = torch.zeros((), dtype=self.dtype).expand(like.shape)
        else:
            row = torch.randn(like.shape[-1:], dtype=self.dtype) * 0.02  # as large as usual
            value = row.expand(like.shape).clone()
        self._set(module, name, value)

    def expert_bias(
        self, index: int, number: int, part: str, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        return None

    def time_outside_experts(self, length: int) -> float:
        """The seconds that a token of rows of this length takes through a layer without its
        experts."""
        index = self._layer
        rows = max(1, TOKENS_IN_PIECE // length) * torch.get_num_threads()
        self.embed(torch.zeros(rows, length, dtype=torch.long))
        self.load_layer(index)
        hidden = torch.randn(rows, length, self._hidden).to(self.dtype)
        self._exchange(index, rows * length)
        start = perf_counter()
        self._run_rows(index, hidden)
        seconds = perf_counter() - start
        self.free_layer(index)
        return seconds / (rows * length)

    def hidden_unit_rate(self) -> float:
        """Multiply-adds per second in gate and up of an expert, with what follows them."""
        tokens = max(_ROWS, TOKENS_IN_PIECE * torch.get_num_threads())
        X = torch.randn(tokens, self._hidden).to(self.dtype)
        W = torch.randn(_ROWS, self._hidden).to(self.dtype)
        has_gate = "gate" in self.family.experts
        make = self.hidden_units(self._layer, 0, W if has_gate else None, W)
        self.by_rows(make, X)  # warms up
        start = perf_counter()
        self.by_rows(make, X)
        return (1 + has_gate) * X.numel() * _ROWS / (perf_counter() - start)
