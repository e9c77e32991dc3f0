"""The texts of a suite as windows of tokens, and the protocol that says so."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.evaluation import report as parts
from grokquant.evaluation.measure import Windows
from grokquant.evaluation.suite import TextSection
from grokquant.text.documents import load_documents, rows_of, text_digest
from grokquant.text.tokenizer import load_tokenizer

_SCORED = {
    "hf": "every token but the first of each window",
    "llama.cpp": "the second half of each window",
}


@dataclass(frozen=True)
class Text:
    """`documents` [windows, scored] tells which of the text's each scored token is from."""

    windows: Windows
    documents: torch.Tensor
    protocol: parts.Protocol


def read_text(text: TextSection, base: Checkpoint, key: str) -> Text:
    """Its windows by the tokenizer of `base`, no longer than the model has positions.

    Raises InputError that begins with `key` where there is not one whole window.
    """
    documents, tokenizer = load_documents(text.data, "heldout"), load_tokenizer(base)
    length = min(text.row_length, base.config.max_position_embeddings)
    try:
        cut = rows_of(documents, tokenizer, text.windows, length, None)
    except InputError as error:
        raise InputError(f"{key}: {text.data}: {error}") from None
    rows = _with_bos(cut.tokens, tokenizer, key) if text.bos else cut.tokens
    windows = Windows(rows, text.first_scored(length))
    scored = cut.documents[:, windows.first :]
    return Text(windows, scored, _protocol(text, documents, windows))


def _with_bos(rows: torch.Tensor, tokenizer: PreTrainedTokenizerBase, key: str) -> torch.Tensor:
    bos: int | None = tokenizer.bos_token_id  # type: ignore[attr-defined]
    if bos is None:
        raise InputError(f"{key.removesuffix('data')}bos: the tokenizer has none")
    rows = rows.clone()
    rows[:, 0] = bos
    return rows


def _protocol(text: TextSection, documents: list[str], windows: Windows) -> parts.Protocol:
    count, length = windows.rows.shape
    return parts.Protocol(
        text="python-docs, held-out part" if text.data == "python-docs" else text.data,
        text_sha256=text_digest(documents),
        windows=count,
        length=length,
        tokens_scored=count * (length - windows.first),
        scored=_SCORED[text.protocol],
        bos=text.bos,
        arithmetic="float32 on the stored weights, integers multiplied out to bf16",
    )
