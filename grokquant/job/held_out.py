"""The calibration tokens that rounding does not see, on which its settings are chosen."""

import torch
from torch import Tensor

# One row of tokens in so many is held out.
_HELD_OUT = 8


def kept_and_held_out(row: Tensor) -> list[Tensor]:
    """Places among tokens of the rows `row` int64 [tokens], those of every eighth row apart; all in
    one if one were empty."""
    is_held_out = row % _HELD_OUT == _HELD_OUT - 1
    if is_held_out.all() or not is_held_out.any():
        return [torch.arange(len(row))]
    return [torch.where(~is_held_out)[0], torch.where(is_held_out)[0]]
