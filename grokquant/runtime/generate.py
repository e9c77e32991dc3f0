"""Generates text from a checkpoint, as a quick check of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from grokquant.errors import InputError
from grokquant.families.config import positions_of
from grokquant.memory import refused
from grokquant.runtime.load import load


@dataclass(frozen=True)
class Generated:
    """`text` is the prompt and its continuation, or the answer to a chat. `bytes_read` counts the
    matrices that were read from files, `hit_rate` is the share of uses that found theirs in
    memory."""

    text: str
    new_tokens: int
    bytes_read: int
    hit_rate: float


class _Pieces(TextStreamer):
    """Hands text on as soon as its last word is complete."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], skip_prompt: bool
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def generate_text(
    path: str,
    prompt: str,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    packed: bool | None = None,
    max_memory: int | str | None = None,
    chat: bool = False,
    write: Callable[[str], object] = lambda piece: None,
) -> Generated:
    """Continues `prompt` by up to `tokens` new tokens; greedy below temperature 0.001.

    With `chat` the prompt is a user's message in the model's chat template. `write` gets the text
    piece by piece as it is made. `packed` and `max_memory` are passed to `load`. Raises InputError.
    """
    if not prompt:
        raise InputError("is empty", "prompt")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # undecoded bytes
        raise InputError("is not UTF-8 text", "prompt")
    model, tokenizer = load(path, device, packed=packed, max_memory=max_memory)
    if tokenizer is None:
        raise InputError(f"{path}: has no tokenizer, so it cannot generate text")
    ids = _ids(path, tokenizer, prompt, chat).to(model.device)
    length = ids.shape[1]
    positions = positions_of(model.config.get_text_config())
    if length + tokens > positions:
        raise InputError(
            f"{tokens} after a prompt of {length} exceed the model's {positions} positions",
            "tokens",
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature >= 0.001 else {}
    out = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        streamer=_Pieces(tokenizer, write, skip_prompt=chat),
        **sampling,
    )
    shown = out[0, length:] if chat else out[0]
    text = str(tokenizer.decode(shown, skip_special_tokens=True))
    return Generated(text, out.shape[1] - length, *_reading(model))


def _ids(path: str, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Tensor:
    """Token numbers [1, time]."""
    if not chat:
        encoded: Any = tokenizer(prompt, return_tensors="pt")
        return encoded.input_ids
    if tokenizer.chat_template is None:
        raise InputError(f"{path} has no chat template", "chat")
    message = {"role": "user", "content": prompt}
    with refused(f"{path}: its chat template fails"):  # a program, run in a sandbox
        found: Any = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return found["input_ids"]


def _reading(model: Any) -> tuple[int, float]:
    """Bytes read from files, and the share of uses that did not have to."""
    cache = getattr(model, "matrix_cache", None)
    if cache is None or not cache.hits + cache.misses:
        return 0, 1.0
    return cache.bytes_read, cache.hits / (cache.hits + cache.misses)
