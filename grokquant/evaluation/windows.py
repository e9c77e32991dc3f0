"""The texts of a suite as windows of tokens, with the protocol for the report."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.evaluation.measure import Windows
from grokquant.evaluation.report import Protocol
from grokquant.evaluation.suite import TextSection
from grokquant.files.published import published_path
from grokquant.recipe import BUILT_IN_TEXTS
from grokquant.text.document import Document
from grokquant.text.documents import load_documents, rows_of, text_digest
from grokquant.text.tokenizer import load_tokenizer

_SCORED = {
    "hf": "every token but the first of each sequence",
    "llama.cpp": "the second half of each sequence",
}


# By the dtype of the products of experts.
_ARITHMETIC = {
    torch.float32: "float32 on the stored weights",
    torch.bfloat16: "float32 on the stored weights, products of experts in bfloat16",
}


@dataclass(frozen=True)
class TextWindows:
    """`documents` [windows, scored] holds the document number of each scored token."""

    windows: Windows
    documents: torch.Tensor
    protocol: Protocol


def read_text(
    section: TextSection, base: Checkpoint, key: str, products: torch.dtype = torch.float32
) -> TextWindows:
    """The windows of a text, cut by the tokenizer of `base`, no longer than its positions.

    Its protocol says that products of experts are in the dtype `products`.
    Raises InputError that begins with `key`, the section, where the text has no whole window.
    """
    documents = load_documents(section.text, "heldout", section.field)
    tokenizer = load_tokenizer(base)
    length = min(section.row_length, base.positions)
    try:
        cut = rows_of(documents, tokenizer, section.samples, length, None, section.packed)
    except InputError as error:
        raise InputError(f"{key}.text: {section.text}: {error}") from None
    rows = _with_bos(cut.tokens, tokenizer, key) if section.bos else cut.tokens
    windows = Windows(rows, section.first_scored(length))
    scored = cut.documents[:, windows.first :]
    return TextWindows(windows, scored, _protocol(section, documents, windows, products))


def _with_bos(rows: torch.Tensor, tokenizer: PreTrainedTokenizerBase, key: str) -> torch.Tensor:
    bos: int | None = tokenizer.bos_token_id  # type: ignore[attr-defined]
    if bos is None:
        raise InputError(f"{key}.bos: the tokenizer has no BOS token")
    rows = rows.clone()
    rows[:, 0] = bos
    return rows


def _protocol(
    section: TextSection, documents: list[Document], windows: Windows, products: torch.dtype
) -> Protocol:
    count, length = windows.rows.shape
    held_out = section.text in BUILT_IN_TEXTS
    return Protocol(
        text=f"{section.text}, held-out part" if held_out else published_path(section.text),
        text_sha256=text_digest(documents),
        samples=count,
        length=length,
        packed=section.packed,
        asked_length=section.row_length if section.row_length > length else None,
        tokens_scored=count * (length - windows.first),
        scored=_SCORED[section.protocol],
        bos=section.bos,
        arithmetic=_ARITHMETIC[products],
    )
