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
from grokquant.text.records import READERS, excerpts, is_large, read_dataset, size_of

if TYPE_CHECKING:
    from grokquant.checkpoint import Checkpoint


# Of excerpts, for each token that is used: four times what a token has, for sequences are drawn.
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
    """Sequences of a text, int64 [rows, length].

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
    packed: bool = True,
) -> TextRows:
    """`samples` sequences of `length` tokens, or as many as the text has.

    They are cut from the joined documents, or, if not `packed`, are the beginnings of documents.
    With a `seed`, they are drawn at random and returned in the order of the text. None takes the
    first ones and reads no further. Raises InputError if the text is too short for one.
    """
    cut = _joined_rows if packed else _document_rows
    return cut(documents, tokenizer, samples, length, seed)


def token_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int | None,
) -> Tensor:
    """The tokens of `rows_of`, int64 [samples, length]."""
    return rows_of(documents, tokenizer, samples, length, seed).tokens


def _joined_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int | None,
) -> TextRows:
    """The documents' tokens, joined with nothing between them, in sequences without overlap:

    | document 0 | document 1     | document 2  |
    | row 0    | row 1    | row 2    | (rest)
    """
    limit = samples * length if seed is None else None
    tokens, ends = _tokens(documents, tokenizer, limit)
    found = len(tokens) // length
    if found == 0:
        raise InputError(
            f"the text has {len(tokens)} tokens, but one sequence needs {length}"
            "; lower length, or take a longer text"
        )
    whole = found * length
    rows = torch.frombuffer(tokens, dtype=torch.int64)[:whole].view(found, length)
    # A token is from the first document that ends after it.
    numbers = torch.bucketize(torch.arange(whole), torch.tensor(ends), right=True).view_as(rows)
    if seed is None:
        return TextRows(rows[:samples], numbers[:samples])
    drawn = _shuffled(found, seed)[:samples].sort().values
    return TextRows(rows[drawn], numbers[drawn])


def _document_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int | None,
) -> TextRows:
    """The first tokens of each of some documents, those that are too short left out:

    | document 0    | document 1 | document 2     |
    | row 0    |                   | row 1    |
    """
    numbered: Iterable[tuple[int, Document]] = enumerate(documents)
    if seed is not None:
        listed = list(numbered)
        numbered = (listed[number] for number in _shuffled(len(listed), seed).tolist())
    rows: dict[int, Sequence[int]] = {}
    longest = 0
    for number, document in numbered:
        tokens = tokens_of_document(tokenizer, document)
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
    numbers = sorted(rows)
    found = torch.tensor([rows[number] for number in numbers])
    return TextRows(found, torch.tensor(numbers)[:, None].expand_as(found))


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def calibration_rows(
    settings: CalibrationSection, tokenizer: PreTrainedTokenizerBase, checkpoint: "Checkpoint"
) -> Tensor:
    """The calibration tokens of a recipe, int64 [samples, length], text by text. Raises InputError.

    `length` is limited to the positions of the model.
    """
    length = min(settings.length, checkpoint.positions)
    parts = []
    for text, samples in settings.samples_of.items():
        documents = _calibration_documents(settings, text, samples * length)
        try:
            rows = rows_of(documents, tokenizer, samples, length, settings.seed, settings.packed)
        except InputError as error:
            raise InputError(f"calibration.text: {text}: {error}") from None
        parts.append(rows.tokens)
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
    return excerpts(text, settings.field, bytes_read(text, tokens), settings.seed)


def bytes_read(path: str, tokens: int) -> int:
    """How much of a file calibration reads for so many tokens."""
    return tokens * _BYTES_PER_TOKEN if is_large(path) else size_of(path)


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
