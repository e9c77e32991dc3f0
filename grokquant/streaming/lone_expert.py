"""A dense MLP as the only expert of its layer: it gets every token, with a gate of 1.

So what runs, differentiates and rounds experts does the same for dense layers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor


def as_lone_expert(mlp: Any) -> None:
    """Has the module `mlp` (gate_proj, up_proj, act_fn) of a layer hand its inputs over as a
    module of experts does, to its `exchange`."""
    mlp.forward = partial(_forward, mlp)
    mlp._apply_gate = partial(_apply_gate, mlp)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, -2)  # (tokens, hidden)
    experts = torch.zeros(len(tokens), 1, dtype=torch.long, device=x.device)
    gates = x.new_ones(len(tokens), 1)
    return mlp.exchange(tokens, experts, gates).view_as(x)


def _apply_gate(mlp: Any, both: Tensor) -> Tensor:
    """Hidden units [tokens, inner] of gate and up [tokens, 2 * inner]."""
    gate, up = both.chunk(2, dim=-1)
    return mlp.act_fn(gate) * up
