"""What both models write from the start of the passage, where they fit in memory.

Each new token passes all layers, which streaming would read again: whole models do it instead.
"""

from typing import Any

import torch
from transformers import GenerationConfig

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.humanize import size
from grokquant.job.budget.memory import available_bytes
from grokquant.memory import refused
from grokquant.runtime.load import build_model

_DTYPE = torch.float32  # that of the figures, so that equal weights write equal texts
_PARTS = 4  # of the free memory: a model takes one, and nothing else has to make room for it

Tokens = list[int]


def continuations(
    quantized: Checkpoint, reference: Checkpoint, prompt: Tokens, count: int, device: torch.device
) -> list[Tokens] | str:
    """Up to `count` tokens that each of the two adds to `prompt`, always the likeliest one, or a
    line that says why there are none."""
    needed = max(model.parameters for model in (quantized, reference)) * _DTYPE.itemsize
    if needed * _PARTS > available_bytes(device):
        return (
            f"the larger model takes {size(needed)} in float32, more than a quarter of the memory "
            "that was free"
        )
    try:
        return [_continued(model, prompt, count, device) for model in (quantized, reference)]
    except InputError as error:  # the figures do not depend on it
        return str(error)


def _continued(checkpoint: Checkpoint, prompt: Tokens, count: int, device: torch.device) -> Tokens:
    model: Any = build_model(checkpoint, device, _DTYPE)
    ends = model.generation_config.eos_token_id
    # Without what the checkpoint asks for beside it: temperatures, penalties, beams.
    model.generation_config = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    ids = torch.tensor([prompt], device=device)
    with refused(f"{checkpoint.family.name} generates no text in transformers"):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))  # (1, time)
    return out[0, len(prompt) :].tolist()
