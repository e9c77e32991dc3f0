"""From the name of a text to rows of tokens, for calibration and for evaluation alike."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grokquant.errors import InputError
from grokquant.families.tokenizer import tokens_of
from grokquant.files.json_objects import check_extent
from grokquant.files.regular import open_regular, read_regular
from grokquant.recipe import CalibrationSection, check_text

if TYPE_CHECKING:
    from grokquant.checkpoint import Checkpoint

# The largest texts that people evaluate on have some hundred megabytes, their longest documents a
# few. Tokenizers take a hundred bytes of memory per byte of a document.
_MAX_TEXT_BYTES = 2_000_000_000
_MAX_DOCUMENT_BYTES = 64_000_000
_MAX_VALUES = 100_000  # of the JSON of one document
# Parquet files of prose unpack to five times their size, of empty rows and repetitions to more.
_MAX_UNPACKED = 100
_ROWS_AT_ONCE = 256
_INSTALL = 'it needs the eval extra: pip install "grokquant[eval]"'


def load_documents(text: str, part: Literal["train", "calibration", "heldout"]) -> list[str]:
    """The documents that `text` names, without empty ones.

    `python-docs` is the text of this Python installation; `part` chooses documents of it. A .txt
    file is one document of at most 64 MB; a .jsonl file holds one per line and a .parquet file one
    per row, both in `text`. Anything else is `name[:config[:split]]` for the datasets library,
    where `name` is a data set on the hub or a directory; the split is `train` by default, the
    column `text`. Raises InputError naming file and line.
    """
    try:
        check_text(text)
    except ValueError as error:
        raise InputError(str(error), "text") from None
    if text == "python-docs":
        from grokquant.text import python_docs

        return python_docs.documents(part)
    read = READERS.get(Path(text).suffix.lower(), _read_dataset)
    documents = [document for document in read(text) if document.strip()]
    if not documents:
        raise InputError(f"{text}: holds no text")
    return documents


@dataclass(frozen=True)
class TextRows:
    """Windows of a text, int64 [rows, length].

    `tokens` are token ids, `documents` the index of the document that each token is from.
    """

    tokens: Tensor
    documents: Tensor


def rows_of(
    documents: Iterable[str],
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
        raise InputError(f"the text has {len(tokens)} tokens, but one row needs {length}")
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
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int | None,
) -> Tensor:
    """The tokens of `rows_of`, int64 [samples, length]."""
    return rows_of(documents, tokenizer, samples, length, seed).tokens


def calibration_rows(
    settings: CalibrationSection, tokenizer: PreTrainedTokenizerBase, checkpoint: "Checkpoint"
) -> Tensor:
    """The calibration tokens of a recipe, int64 [samples, length]. Raises InputError.

    `length` is limited to the positions of the model.
    """
    length = min(settings.length, checkpoint.config.max_position_embeddings)
    documents = load_documents(settings.text, "calibration")
    try:
        return token_rows(documents, tokenizer, settings.samples, length, settings.seed)
    except InputError as error:
        raise InputError(f"calibration.text: {settings.text}: {error}") from None


def text_digest(documents: Sequence[str]) -> str:
    """SHA-256 of the documents and their boundaries, in hex."""
    digest = hashlib.sha256()
    for text in documents:
        encoded = text.encode()
        digest.update(f"{len(encoded)}\n".encode())  # else ["ab"] and ["a", "b"] would be equal
        digest.update(encoded)
    return digest.hexdigest()


def _tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> "tuple[array[int], list[int]]":
    """The joined tokens of the documents, and the position at which each document ends.

    Stops after the document that reaches `limit` tokens.
    """
    tokens = array("q")  # 8 bytes a token, where a list takes 36
    ends: list[int] = []
    for text in documents:
        tokens.extend(tokens_of(tokenizer, text))
        ends.append(len(tokens))
        if limit is not None and len(tokens) >= limit:
            break
    return tokens, ends


def _read_txt(path: str) -> Iterator[str]:
    raw = read_regular(Path(path), _MAX_DOCUMENT_BYTES)
    yield _decoded(raw, path)


def _read_jsonl(path: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        text = _decoded(line, where)
        if not text.strip():
            continue
        try:
            check_extent(text, _MAX_VALUES)
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: not a JSON object") from None
        if not isinstance(record, dict) or "text" not in record:
            raise InputError(f'{where}: expected a JSON object with the field "text"')
        yield _checked(record["text"], where)


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a file, one at a time. Raises InputError for one that is too long."""
    with open_regular(Path(path)) as file:
        if os.fstat(file.fileno()).st_size > _MAX_TEXT_BYTES:
            raise InputError(f"{path}: larger than {_MAX_TEXT_BYTES} bytes, the limit for a text")
        number = 0
        while line := file.readline(_MAX_DOCUMENT_BYTES + 1):
            number += 1
            if len(line) > _MAX_DOCUMENT_BYTES:
                raise InputError(
                    f"{path}:{number}: longer than {_MAX_DOCUMENT_BYTES} bytes, not a document"
                )
            yield line.removesuffix(b"\n")


def _read_parquet(path: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: {_INSTALL}") from None
    with open_regular(Path(path)) as opened:
        most = _MAX_UNPACKED * max(os.fstat(opened.fileno()).st_size, 1_000_000)
        try:
            _check_columns(parquet.read_schema(opened).names, path)
            # A text that repeats stays a single one in memory until it is taken out.
            file = parquet.ParquetFile(opened, read_dictionary=["text"])
            _check_unpacked(path, _column_bytes(file), most)
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=["text"], use_threads=False)
            number = unpacked = 0
            for batch in batches:
                for value in batch.column("text"):
                    number += 1
                    text = _checked(value.as_py(), f"{path}: row {number}")
                    unpacked += len(text)
                    _check_unpacked(path, unpacked, most)
                    yield text
        except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
            raise InputError(f"{path}: cannot be read as parquet: {_first_line(error)}") from None


def _column_bytes(file: Any) -> int:
    """The size of the column `text`, unpacked, as the file's footer has it."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    columns = (group.column(index) for group in groups for index in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text")


def _check_unpacked(path: str, size: int, most: int) -> None:
    if size > most:
        raise InputError(f"{path}: unpacks to more than {_MAX_UNPACKED} times its size")


def _read_dataset(data: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{data}: {_INSTALL}") from None
    name, config, split = [*data.split(":", maxsplit=2), "", ""][:3]  # the last two are optional
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # of a dozen unrelated classes: network, cache, name, file format
        raise InputError(f"{data}: cannot be loaded: {_first_line(error)}") from None
    _check_columns(rows.column_names, data)
    for number, text in enumerate(rows["text"], start=1):
        yield _checked(text, f"{data}: row {number}")


READERS: dict[str, Callable[[str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # Windows programs begin a file with a byte order mark
    except UnicodeDecodeError as error:
        way_out = "convert it, as with iconv -f UTF-16 -t UTF-8 or -f LATIN1"
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); {way_out}") from None


def _checked(text: object, where: str) -> str:
    """Returns `text` if a tokenizer accepts it: JSON may hold other types or half a character."""
    if not isinstance(text, str):
        raise InputError(f'{where}: "text" should be a string, not {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f'{where}: "text" holds half of a surrogate pair') from None
    return text


def _check_columns(columns: Sequence[str], where: str) -> None:
    if "text" not in columns:
        raise InputError(f'{where}: no column "text", only {", ".join(columns)}')


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
