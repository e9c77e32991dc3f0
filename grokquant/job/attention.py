"""What the matrices of attention should give, for the inputs of the quantized model.

Those before the last should give what they give in the original. attention.o should give what makes
the states after attention those of the original (see `mixture`), and so makes good for errors of
layers before, and of the other matrices.
"""

import torch.nn.functional as F
from torch import Tensor

from grokquant.job.mixture import move_to_missing_
from grokquant.streaming.blocks import BlockwiseModel

LAST = "attention.o"


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
