"""Models whose layers depend on more than the states before them: all of it is in memory and runs.

Between layers there are the token ids in the place of hidden states. To see the inputs of a matrix,
the model runs from its first layer, with what is quantized so far.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from grokquant.checkpoint import Checkpoint
from grokquant.devices import CPU
from grokquant.families.family import parameter_parent, stored_values
from grokquant.streaming.blocks import BlockwiseModel, Combine, Keep, Rows
from grokquant.threads import in_order, slices


def running(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    twin: BlockwiseModel | None = None,
    pieces: bool = False,
    products: torch.dtype | None = None,
) -> BlockwiseModel:
    """A checkpoint that runs block by block, or whole if it has to."""
    kind = BlockwiseModel if checkpoint.family.streams else WholeModel
    return kind(checkpoint, dtype, device, twin, pieces, products)


class WholeModel(BlockwiseModel):
    """A checkpoint that runs only as a whole.

    Its `hidden` are token ids [rows, time, 1] up to the last layer, whose outputs are the states
    that enter the head.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._each = in_order  # modules hold states while they run
        self._kind: type[ModelOutput] = BaseModelOutput  # of the model below the head
        self.family.set_layers(self.model, self.layers)
        self.config._experts_implementation = "eager"
        for index, layer in enumerate(self.layers):
            prefix = self.family.module_prefix(index)
            for name, _ in list(stored_values(layer)):
                self._fill(layer, name, prefix + name)

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens.unsqueeze(-1).float()

    def free_embedding(self) -> None:
        """Keeps everything: it is needed for each layer."""

    def load_layer(self, index: int) -> nn.Module:
        return self.layers[index]

    def free_layer(self, index: int) -> None:
        """Keeps the layer: later ones need it."""

    @torch.no_grad()
    def _run_layer(
        self,
        index: int,
        batches: list[tuple[Rows | None, Tensor]],
        combine: Combine,
        keep: Keep | None = None,
        extra: int = 0,
    ) -> list[Tensor]:
        hidden = [states for _, states in batches]
        if index + 1 < len(self.layers):
            return hidden
        # A batch without rows has no states.
        return [torch.cat(list(self._states(states)) or [states]) for states in hidden]

    @torch.no_grad()
    def inputs_of(self, index: int, tensor: str, hidden: Tensor) -> Tensor:
        layer = self.layers[index]
        linear, _ = parameter_parent(layer, self.family.parameter_name(layer, index, tensor))
        inputs: list[Tensor] = []
        hook = linear.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].flatten(0, -2).cpu())
        )
        for _ in self._states(hidden):
            pass
        hook.remove()
        return self._joined_inputs(tensor, inputs, self.dtype)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        with self._returning(hidden.to(self.device)):
            return self.model(input_ids=tokens, use_cache=False).logits.cpu()

    def _states(self, hidden: Tensor) -> Iterator[Tensor]:
        """What enters the head, some rows at a time, for token ids [rows, time, 1]."""
        size = max(1, self._tokens_at_once // hidden.shape[1])
        for part in slices(0, len(hidden), size):
            tokens = hidden[part].squeeze(-1).long().to(self.device)
            outputs = self.model.base_model(input_ids=tokens, use_cache=False)
            self._kind = type(outputs)
            yield outputs.last_hidden_state.cpu()

    @contextmanager
    def _returning(self, states: Tensor) -> Iterator[None]:
        """Has the model below the head return `states`."""
        base: Any = self.model.base_model
        base.forward = lambda *args, **kwargs: self._kind(last_hidden_state=states)
        try:
            yield
        finally:
            del base.forward
