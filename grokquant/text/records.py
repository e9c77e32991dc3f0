"""Files of texts as records, one at a time: a text, or an object with a text in one of its fields.

Each record comes with its place, for messages. Files are read in parts of bounded size.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import IO, TYPE_CHECKING, Any

from grokquant.errors import InputError, said_by
from grokquant.files.hub import impatiently
from grokquant.files.json_objects import check_extent
from grokquant.files.regular import open_regular
from grokquant.memory import refused
from grokquant.text.document import Document, columns_of, document_of

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# The largest texts that people evaluate on have some hundred megabytes, their longest documents a
# few. Tokenizers take a hundred bytes of memory per byte of a document.
_MAX_TEXT_BYTES = 2_000_000_000
_MAX_DOCUMENT_BYTES = 64_000_000
# Of larger texts, calibration takes excerpts: as much as it needs from so many bytes at each place.
_EXCERPTS_ABOVE = _MAX_DOCUMENT_BYTES
_EXCERPT_BYTES = 16_384
# Of a .parquet file, which can be read from the start of a row group only; more where so many are
# too small.
_GROUPS = 16
_MAX_VALUES = 100_000  # of the JSON of one document
_MAX_ARRAY_VALUES = 4_000_000  # of all documents of a .json file
# Parquet files of prose unpack to five times their size, of empty rows and repetitions to more.
_MAX_UNPACKED = 100
_ROWS_AT_ONCE = 256
_INSTALL = 'it needs the eval extra: pip install "grokquant[eval]"'


def _open_zst(file: IO[bytes]) -> IO[bytes]:
    """The unpacked bytes of a .zst `file`, by pyarrow, which notes where one is cut off."""
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError(f"{file.name}: {_INSTALL}") from None
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))


_UNPACK: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
# ValueError: pyarrow's.
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def read_txt(path: str, field: str | None) -> Iterator[Document]:
    """One document. `field` is ignored, since a .txt has none."""
    with _opened(path) as file:
        yield document_of(_decoded(_read(file, path), path), None, path)


def read_jsonl(path: str, field: str | None) -> Iterator[Document]:
    """A document per line, which is a JSON object or string."""
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        text = _decoded(line, where)
        if text.strip():
            yield document_of(_parsed(text, where, _MAX_VALUES), field, where)


def read_json(path: str, field: str | None) -> Iterator[Document]:
    """A document per element of the array that the file is; a file of lines is read as .jsonl."""
    with _opened(path) as file:
        is_array = file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_array:
        yield from read_jsonl(path, field)
        return
    with _opened(path) as file:
        text = _decoded(_read(file, path), path)
    for number, record in enumerate(_parsed(text, path, _MAX_ARRAY_VALUES), start=1):
        yield document_of(record, field, f"{path}: element {number}")


def read_parquet(path: str, field: str | None) -> Iterator[Document]:
    """A document per row."""
    with _parquet(path, field) as (file, columns):
        yield from _documents_of(path, file, columns, 0)


@contextmanager
def _parquet(path: str, field: str | None) -> "Iterator[tuple[ParquetFile, list[str]]]":
    """An opened file and the columns that make its documents. Raises InputError."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: {_INSTALL}") from None
    with open_regular(Path(path)) as opened:
        try:
            schema = parquet.read_schema(opened)
            columns = columns_of(schema.names, field, path)
            # A text that repeats stays a single one in memory until it is taken out.
            texts = [name for name in columns if pa.types.is_string(schema.field(name).type)]
            file = parquet.ParquetFile(opened, read_dictionary=texts)
            _check_unpacked(path, _column_bytes(file, columns))
            yield file, columns
        except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
            raise InputError(f"{path}: cannot be read as parquet: {said_by(error)}") from None


def _documents_of(
    path: str,
    file: "ParquetFile",
    columns: list[str],
    first: int,
    groups: list[int] | None = None,
) -> Iterator[Document]:
    """The documents from row `first` on of some row groups, by default of all."""
    batches = file.iter_batches(_ROWS_AT_ONCE, groups, columns, use_threads=False)
    number = unpacked = 0
    for batch in batches:
        for values in zip(*(batch.column(name) for name in columns), strict=True):
            number += 1
            if number <= first:
                continue
            record = {n: v.as_py() for n, v in zip(columns, values, strict=True)}
            document = document_of(record, columns[0], f"{path}: row {number}")
            unpacked += len(document)
            _check_unpacked(path, unpacked)
            yield document


def read_dataset(data: str, field: str | None) -> Iterator[Document]:
    """A document per row of `name[:config[:split]]` of the datasets library."""
    name, config, split = [*data.split(":", maxsplit=2), "", ""][:3]  # the last two are optional
    if Path(name).is_file():
        known = f"{', '.join(READERS)}; {', '.join(_UNPACK)}"
        raise InputError(f"{name}: not a kind of text that can be read ({known})")
    try:
        import datasets
    except ImportError:
        raise InputError(f"{data}: {_INSTALL}") from None
    waiting = nullcontext() if Path(name).exists() else impatiently()
    with refused(f"{data}: cannot be loaded"), waiting:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    columns = columns_of(rows.column_names, field, data)
    for number, record in enumerate(rows.select_columns(columns), start=1):
        yield document_of(record, columns[0], f"{data}: row {number}")


READERS: dict[str, Callable[[str, str | None], Iterator[Document]]] = {
    ".txt": read_txt,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def is_large(path: str, limit: int | None = None) -> bool:
    """Whether a text has excerpts and more than `limit` bytes, by default so many that calibration
    takes no more than excerpts."""
    has_excerpts = path.lower().endswith((".txt", ".jsonl", ".parquet"))
    return has_excerpts and size_of(path) > (limit or _EXCERPTS_ABOVE)


def excerpts(path: str, field: str | None, wanted: int, seed: int) -> Iterator[Document]:
    """Documents at random places of a large text, about `wanted` bytes, in the order of the file.

    Of a .txt each is a part of the text; of a .jsonl file those of the lines that follow a place;
    of a .parquet file those of the rows that follow one, in `_GROUPS` row groups or as many as hold
    enough.
    """
    if path.lower().endswith(".parquet"):
        yield from _rows_at(path, field, wanted, seed)
        return
    read = _lines_at if path.lower().endswith(".jsonl") else _text_at
    draw = Random(seed)
    with open_regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        places = sorted(draw.randrange(size) for _ in range(-(-wanted // _EXCERPT_BYTES)))
        for place in places:
            file.seek(place)
            yield from read(file, field, f"{path}: byte {place}")


def _text_at(file: IO[bytes], field: str | None, where: str) -> Iterator[Document]:
    raw = file.read(_EXCERPT_BYTES)
    whole = raw.lstrip(bytes(range(0x80, 0xC0)))  # not the rest of a character that began before
    try:
        text = getincrementaldecoder("utf-8")().decode(whole)  # which keeps half of one at the end
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    yield document_of(text, field, where)


def _lines_at(file: IO[bytes], field: str | None, where: str) -> Iterator[Document]:
    file.readline(_MAX_DOCUMENT_BYTES)  # the rest of a line
    size = 0
    while size < _EXCERPT_BYTES and (line := file.readline(_MAX_DOCUMENT_BYTES)):
        size += len(line)
        text = _decoded(line, where)
        if text.strip():
            yield document_of(_parsed(text, where, _MAX_VALUES), field, where)


def _rows_at(path: str, field: str | None, wanted: int, seed: int) -> Iterator[Document]:
    draw = Random(seed)
    with _parquet(path, field) as (file, columns):
        count = file.num_row_groups
        # At least half of a group follows each place that is drawn.
        needed = max(_GROUPS, 2 * wanted * count // max(_column_bytes(file, columns), 1) + 1)
        groups = sorted(draw.sample(range(count), min(count, needed)))
        for group in groups:
            rows = file.metadata.row_group(group).num_rows
            place = draw.randrange(rows // 2 + 1)  # so that enough rows follow
            size = 0
            for document in _documents_of(path, file, columns, place, [group]):
                yield document
                size += len(document)
                if size >= wanted / len(groups):
                    break


def size_of(path: str) -> int:
    return Path(path).stat().st_size if Path(path).is_file() else 0


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if its name says that it is compressed."""
    with open_regular(Path(path)) as file:
        _check_size(path, os.fstat(file.fileno()).st_size)
        unpack = _UNPACK.get(Path(path).suffix.lower())
        if unpack is None:
            yield file
            return
        try:
            with unpack(file) as unpacked:
                yield unpacked
        except _DAMAGED as error:
            raise InputError(f"{path}: cannot be unpacked: {said_by(error)}") from None


def _read(file: IO[bytes], path: str) -> bytes:
    raw = file.read(_MAX_DOCUMENT_BYTES + 1)
    if len(raw) > _MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{path}: larger than {_MAX_DOCUMENT_BYTES} bytes, the limit for one document; "
            "make it a .jsonl file with a document per line"
        )
    return raw


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a file, one at a time. Raises InputError for one that is too long."""
    with _opened(path) as file:
        number = size = 0
        while line := file.readline(_MAX_DOCUMENT_BYTES + 1):
            number += 1
            size += len(line)
            if len(line) > _MAX_DOCUMENT_BYTES:
                raise InputError(
                    f"{path}:{number}: longer than {_MAX_DOCUMENT_BYTES} bytes, not a document"
                )
            _check_size(path, size)
            yield line.removesuffix(b"\n")


def _check_size(path: str, size: int) -> None:
    if size > _MAX_TEXT_BYTES:
        raise InputError(f"{path}: larger than {_MAX_TEXT_BYTES} bytes, the limit for a text")


def _parsed(text: str, where: str, most_values: int) -> Any:
    try:
        check_extent(text, most_values)
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON") from None


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # Windows programs begin a file with a byte order mark
    except UnicodeDecodeError as error:
        way_out = "convert it, as with iconv -f UTF-16 -t UTF-8 or -f LATIN1"
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); {way_out}") from None


def _column_bytes(file: Any, columns: list[str]) -> int:
    """The size of some columns, unpacked, as the file's footer has it."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    named = (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return sum(chunk.total_uncompressed_size for chunk in named)


def _check_unpacked(path: str, size: int) -> None:
    if size > _MAX_UNPACKED * max(size_of(path), 1_000_000):
        raise InputError(f"{path}: unpacks to more than {_MAX_UNPACKED} times its size")
