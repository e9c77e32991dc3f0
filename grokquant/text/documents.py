"""From the name of a text to rows of tokens, for calibration and for evaluation alike."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grokquant.errors import InputError
from grokquant.recipe import BUILT_IN_TEXTS, CalibrationSection, check_text, text_suffix
from grokquant.text.document import Document, bytes_of, tokens_of_document
from grokquant.text.records import READERS, excerpts, is_large, read_dataset

if TYPE_CHECKING:
    from grokquant.checkpoint import Checkpoint


# Of excerpts, for each token that is used: four times what a token has, for windows are drawn.
_BYTES_PER_TOKEN = 16


def load_documents(
    text: str, part: Literal["train", "calibration", "heldout"], field: str | None = None
) -> list[Document]:
    """The documents that `text` names, without empty ones.

    Of BUILT_IN_TEXTS, which every installation has, `part` chooses documents. A .txt file is one
    document of at most 64 MB; a .json, .jsonl or .parquet file holds one per element, line or row.
    Anything else is `name[:config[:split]]` for the datasets library, where `name` is a data set on
    the hub or a directory; the split is `train` by default. A row holds its document in `field`, by
    default the first of text, messages, conversations, input_ids and content: a
    text, a conversation or token numbers. Raises InputError naming file and line.
    """
    try:
        check_text(text)
    except ValueError as error:
        raise InputError(str(error), "text") from None
    if text in BUILT_IN_TEXTS:
        from grokquant.text import installed

        return list(installed.documents(text, part))
    read = READERS.get(text_suffix(text), read_dataset)
    documents = [document for document in read(text, field) if not _is_empty(document)]
    if not documents:
        raise InputError(f"{text}: holds no text; take another")
    return documents


def _is_empty(document: Document) -> bool:
    return not (document.strip() if isinstance(document, str) else document)


@dataclass(frozen=True)
class TextRows:
    """Windows of a text, int64 [rows, length].

    `tokens` are token ids, `documents` the index of the document that each token is from.
    """

    tokens: Tensor
    documents: Tensor


def rows_of(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int | None,
) -> TextRows:
    """`samples` windows of `length` tokens, or as many as the text has.

    The documents' tokens are joined with nothing between them and cut into windows that do not
    overlap:

        | document 0 | document 1     | document 2  |
        | window 0 | window 1 | window 2 | (rest)

    With a `seed`, windows are drawn at random and returned in the order of the text. None takes the
    first ones and reads no further. Raises InputError if the text is shorter than one window.
    """
    limit = samples * length if seed is None else None
    tokens, ends = _tokens(documents, tokenizer, limit)
    windows = len(tokens) // length
    if windows == 0:
        raise InputError(
            f"the text has {len(tokens)} tokens, but one sequence needs {length}"
            "; lower length, or take a longer text"
        )
    whole = windows * length
    rows = torch.frombuffer(tokens, dtype=torch.int64)[:whole].view(windows, length)
    # A token is from the first document that ends after it.
    numbers = torch.bucketize(torch.arange(whole), torch.tensor(ends), right=True).view_as(rows)
    if seed is None:
        return TextRows(rows[:samples], numbers[:samples])
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    drawn = order[:samples].sort().values
    return TextRows(rows[drawn], numbers[drawn])


def token_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int | None,
) -> Tensor:
    """The tokens of `rows_of`, int64 [samples, length]."""
    return rows_of(documents, tokenizer, samples, length, seed).tokens


def document_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """The first `length` tokens of each of `samples` documents, int64 [samples, length].

        | document 0    | document 1 | document 2     |
        | window 0 |      (too short)  | window 1 |

    Documents are drawn at random and returned in the order of the text; fewer if no more are long
    enough. Raises InputError if none is.
    """
    documents = list(documents)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    rows: dict[int, Sequence[int]] = {}
    longest = 0
    for number in order.tolist():
        tokens = tokens_of_document(tokenizer, documents[number])
        longest = max(longest, len(tokens))
        if len(tokens) >= length:
            rows[number] = tokens[:length]
        if len(rows) == samples:
            break
    if not rows:
        raise InputError(
            f"the longest document has {longest} tokens, but a sequence needs {length} of one; "
            "lower length, or leave packed true"
        )
    return torch.tensor([rows[number] for number in sorted(rows)])


def calibration_rows(
    settings: CalibrationSection, tokenizer: PreTrainedTokenizerBase, checkpoint: "Checkpoint"
) -> Tensor:
    """The calibration tokens of a recipe, int64 [samples, length], text by text. Raises InputError.

    `length` is limited to the positions of the model.
    """
    length = min(settings.length, checkpoint.positions)
    cut = token_rows if settings.packed else document_rows
    parts = []
    for text, samples in settings.samples_of.items():
        documents = _calibration_documents(settings, text, samples * length)
        try:
            parts.append(cut(documents, tokenizer, samples, length, settings.seed))
        except InputError as error:
            raise InputError(f"calibration.text: {text}: {error}") from None
    return torch.cat(parts)


def _calibration_documents(
    settings: CalibrationSection, text: str, tokens: int
) -> Iterable[Document]:
    """All documents of a calibration text; of a large one some, drawn by the seed."""
    if text in ("python-code", "package-docs"):  # python-docs has little more than a run needs
        documents = load_documents(text, "calibration")
        return _drawn(documents, tokens * _BYTES_PER_TOKEN, settings.seed)
    if not is_large(text):
        return load_documents(text, "calibration", settings.field)
    return excerpts(text, settings.field, tokens * _BYTES_PER_TOKEN, settings.seed)


def _drawn(documents: list[Document], wanted: int, seed: int) -> list[Document]:
    """Documents of about `wanted` characters together, in the order of the text."""
    order = list(range(len(documents)))
    Random(seed).shuffle(order)
    ends = accumulate(len(documents[number]) for number in order)
    enough = sum(end < wanted for end in ends) + 1
    return [documents[number] for number in sorted(order[:enough])]


def text_digest(documents: Sequence[Document]) -> str:
    """SHA-256 of the documents and their boundaries, in hex."""
    digest = hashlib.sha256()
    for document in documents:
        encoded = bytes_of(document)
        digest.update(f"{len(encoded)}\n".encode())  # else ["ab"] and ["a", "b"] would be equal
        digest.update(encoded)
    return digest.hexdigest()


def _tokens(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> "tuple[array[int], list[int]]":
    """The joined tokens of the documents, and the position at which each document ends.

    Stops after the document that reaches `limit` tokens.
    """
    tokens = array("q")  # 8 bytes a token, where a list takes 36
    ends: list[int] = []
    for document in documents:
        tokens.extend(tokens_of_document(tokenizer, document))
        ends.append(len(tokens))
        if limit is not None and len(tokens) >= limit:
            break
    return tokens, ends
