"""Modules that take the place of decoder layers, to see what a model hands to them."""

from typing import Any

import torch
from torch import Tensor, nn


class Tap(nn.Module):
    """Takes the place of a decoder layer: notes its arguments, returns `hidden` if that is set.

    There is one for each layer, since models give other masks to layers with a sliding window.
    Models that read attributes of their layers find those of `layer`. Layers of some models return
    a tuple that begins with the states; `returned` is the number of its items, 0 where it is none.
    """

    def __init__(self, layer: nn.Module, returned: int = 0) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no child: its parameters are not the tap's
        self.returned = returned
        self.beside: Any = None  # what else is returned
        self.arguments: tuple[tuple, dict] = ((), {})
        self.hidden: Tensor | None = None
        self.entered = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.pop("hidden_states", None)
        self.entered = args[0] if named is None else named
        self.arguments = (args[1:] if named is None else args, kwargs)
        out = self.entered if self.hidden is None else self.hidden
        return (out, *[self.beside] * (self.returned - 1)) if self.returned else out
