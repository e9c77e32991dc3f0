"""Texts by name, and the rows of tokens cut from them."""

import ast
import gc
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grokquant.errors import InputError
from grokquant.recipe import TEXT_SUFFIXES, CalibrationSection
from grokquant.text import documents, python_docs
from grokquant.text.documents import (
    READERS,
    calibration_rows,
    load_documents,
    text_digest,
    token_rows,
)

ICONV = "convert it, as with iconv -f UTF-16 -t UTF-8 or -f LATIN1"


class Characters:
    """A tokenizer of one token per character that counts the documents it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        self.seen += 1
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(char) for char in text])


def text_of(rows: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in rows.tolist()]


def message(data: object) -> str:
    with pytest.raises(InputError) as caught:
        load_documents(str(data), "calibration")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_windows_run_on_across_documents() -> None:
    rows = token_rows(["abc", "defg", "hij"], Characters(), samples=9, length=4, seed=None)
    assert rows.dtype == torch.int64
    assert text_of(rows) == ["abcd", "efgh"]


def test_without_a_seed_the_first_windows_are_taken_and_no_more_is_read() -> None:
    tokenizer = Characters()
    rows = token_rows(["abcdef"] * 100, tokenizer, samples=2, length=4, seed=None)
    assert text_of(rows) == ["abcd", "efab"]
    assert tokenizer.seen == 2


def test_a_seed_draws_windows_in_the_order_of_the_text() -> None:
    text = "".join(map(chr, range(100, 500)))
    windows = [text[start : start + 8] for start in range(0, 400, 8)]

    def draw(seed: int, samples: int = 10) -> list[str]:
        return text_of(token_rows([text], Characters(), samples, length=8, seed=seed))

    assert draw(0) == draw(0) != draw(1)
    assert len(set(draw(0))) == 10 and set(draw(0)) < set(windows)
    assert draw(0) == sorted(draw(0))
    assert draw(0) != windows[:10]
    assert draw(3, samples=1000) == windows


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("documents", "found"), [(["abc", "defg"], 7), ([], 0)])
def test_too_little_text(documents: list[str], found: int, seed: int | None) -> None:
    with pytest.raises(InputError, match=f"^the text has {found} tokens, but one row needs 8$"):
        token_rows(documents, Characters(), samples=1, length=8, seed=seed)


def test_calibration_rows_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 2)
    checkpoint = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=32))
    settings = CalibrationSection(text=str(path), samples=4, length=10)
    assert text_of(calibration_rows(settings, Characters(), checkpoint)) == ["0123456789"] * 2
    with pytest.raises(InputError, match=r"^calibration\.text: .*a\.txt: the text has 20 tokens"):
        calibration_rows(CalibrationSection(text=str(path), length=32), Characters(), checkpoint)


def test_calibration_rows_are_no_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 2)
    checkpoint = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10))
    rows = calibration_rows(CalibrationSection(text=str(path)), Characters(), checkpoint)
    assert text_of(rows) == ["0123456789"] * 2


def test_digest_sees_texts_and_borders() -> None:
    assert text_digest(["ab", "c"]) == hashlib.sha256(b"2\nab1\nc").hexdigest()
    assert len({text_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], [])}) == 4


def test_python_docs_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "documents", lambda part: [f"the {part} part"])
    assert load_documents("python-docs", "heldout") == ["the heldout part"]


def test_every_suffix_of_a_recipe_has_a_reader() -> None:
    assert tuple(READERS) == TEXT_SUFFIXES


def test_txt_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntw\xc3\xb6\n")
    assert load_documents(str(path), "heldout") == ["one\n\ntwö\n"]
    path.write_bytes(b"ok \xff")
    assert message(path) == f"{path}: not UTF-8 text (byte 3); {ICONV}"
    path.write_text(" \n")
    assert message(path) == f"{path}: holds no text"
    assert (
        message(tmp_path / "b.txt")
        == f"{tmp_path}/b.txt: cannot be read: No such file or directory"
    )


def test_jsonl_is_a_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\u2028", "id": 1}\n\n{"text": ""}\r\n{"text": "two"}')
    assert load_documents(str(path), "calibration") == ["one\u2028", "two"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{text: 1}", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'"text"', 'expected a JSON object with the field "text"'),
        (b'{"txt": "a"}', 'expected a JSON object with the field "text"'),
        (b'{"text": 1}', '"text" should be a string, not int'),
        (b'{"text": null}', '"text" should be a string, not NoneType'),
        (b'{"text": "\\ud800"}', '"text" holds half of a surrogate pair'),
        (b'{"text": "\xff"}', f"not UTF-8 text (byte 10); {ICONV}"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert message(path) == f"{path}:2: {expected}"


def test_parquet_is_a_document_per_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 3], "text": ["one", "", "two"]}), path)
    assert load_documents(str(path), "calibration") == ["one", "two"]
    parquet.write_table(pa.table({"text": ["one", None]}), path)
    assert message(path) == f'{path}: row 2: "text" should be a string, not NoneType'
    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    assert message(path) == f'{path}: no column "text", only id, body'
    path.write_bytes(path.read_bytes()[:-20])
    assert message(path).startswith(f"{path}: cannot be read as parquet: ")
    path.unlink()
    assert message(path).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize("repeated", [True, False])
def test_parquet_that_unpacks_to_far_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeated: bool
) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * 100_000] * 1100})
    parquet.write_table(table, path, compression="zstd", use_dictionary=repeated)
    assert path.stat().st_size < 100_000
    made = 0

    def counted(text: object, where: str) -> str:
        nonlocal made
        made += len(str(text))
        return str(text)

    monkeypatch.setattr(documents, "_checked", counted)
    assert message(path) == f"{path}: unpacks to more than 100 times its size"
    # Plain values are refused by the file's own figures, repeated ones when they are too many.
    assert made <= 100_100_000 if repeated else made == 0


def test_a_line_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_MAX_DOCUMENT_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "' + b"x" * 5000)
    assert message(path) == f"{path}:2: longer than 1000 bytes, not a document"
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1001)
    assert message(path) == f"{path}: larger than 1000 bytes, the limit for such a file"


def test_a_line_of_many_values_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x", "y": [' + b"[]," * 100_000 + b"[]]}")
    monkeypatch.setattr(documents.json, "loads", None)
    assert message(path) == f"{path}:1: not a JSON object"


def test_datasets_by_name_config_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, texts in {"train": ["one", "", "two"], "test": ["three"]}.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    assert load_documents(str(folder), "calibration") == ["one", "two"]
    assert load_documents(f"{folder}::test", "calibration") == ["three"]
    assert load_documents(f"{folder}:default:train[:1]", "calibration") == ["one"]
    assert message(f"{folder}::nowhere").startswith(f"{folder}::nowhere: cannot be loaded: ")
    (folder / "train.jsonl").write_text('{"body": "x"}\n')
    (folder / "test.jsonl").unlink()
    assert message(folder) == f'{folder}: no column "text", only body'


def test_datasets_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> None:
        assert (name, config, split) == ("hub/name", "small", "train")
        raise ConnectionError("Couldn't reach 'hub/name' on the Hub\nmore words")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    expected = "hub/name:small: cannot be loaded: Couldn't reach 'hub/name' on the Hub"
    assert message("hub/name:small") == expected


def test_the_eval_extra_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    install = 'it needs the eval extra: pip install "grokquant[eval]"'
    assert message("hub/name") == f"hub/name: {install}"
    assert message(tmp_path / "a.parquet") == f"{tmp_path}/a.parquet: {install}"


def test_names_that_are_no_text() -> None:
    assert message("notes.md").startswith("text: expected python-docs, a .txt, .jsonl or .parquet")
    assert message("").endswith("not ''")


def test_docstrings_are_in_the_order_of_the_whole_tree(tmp_path: Path) -> None:
    """In which they always were: a text is named by its digest."""
    source = tmp_path / "m.py"
    blocks = "try:\n{0}\nexcept E:\n{1}\nelse:\n{2}\nfinally:\n{3}\n"
    blocks += "match x:\n case 1:\n{4}\nfor a in b:\n{5}\nelse:\n{6}\nwith c:\n{7}\n"
    inner = (
        "  class C{0}:\n   'class {0}'\n   async def f(self, a=lambda: 1):\n    'function {0}'\n"
    )
    source.write_text("'module'\n" + blocks.format(*map(inner.format, range(8))))
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    walked = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, holders)]
    found = python_docs._docstrings(source)
    assert found == [ast.get_docstring(node) for node in walked] and len(found) == 17
    assert gc.isenabled()
