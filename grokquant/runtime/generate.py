"""Generates text from a checkpoint, as a quick check of it."""

from typing import Any, cast

import torch

from grokquant.errors import InputError
from grokquant.runtime.load import load


def generate_text(
    path: str,
    prompt: str,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    packed: bool = False,
) -> str:
    """`prompt` continued by up to `tokens` new tokens; greedy below temperature 0.001. `packed` is
    passed to `load`. Raises InputError."""
    if not prompt:
        raise InputError("is empty", "prompt")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # undecoded bytes
        raise InputError("is not UTF-8 text", "prompt")
    model, tokenizer = load(path, device, packed=packed)
    if tokenizer is None:
        raise InputError(f"{path}: has no tokenizer, so it cannot generate text")
    encoded: Any = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = encoded.input_ids.shape[1]
    positions = model.config.max_position_embeddings
    if length + tokens > positions:
        raise InputError(
            f"{tokens} after a prompt of {length} exceed the model's {positions} positions",
            "tokens",
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature >= 0.001 else {}
    out = cast(Any, model).generate(
        input_ids=encoded.input_ids,
        attention_mask=encoded.attention_mask,
        max_new_tokens=tokens,
        **sampling,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
