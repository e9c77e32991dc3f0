"""Modules that take the place of decoder layers, to see what a model hands to them."""

from typing import Any

import torch
from torch import Tensor, nn


class Tap(nn.Module):
    """Takes the place of a decoder layer: notes its arguments, returns `hidden` if that is set.

    There is one for each layer, since models give other masks to layers with a sliding window.
    Models that read attributes of their layers find those of `layer`. With `in_tuple` the states
    are returned in a tuple, as the layers of some models do.
    """

    def __init__(self, layer: nn.Module, in_tuple: bool = False) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no child: its parameters are not the tap's
        self.in_tuple = in_tuple
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
        return (out,) if self.in_tuple else out
