"""Texts by name, and the rows of tokens cut from them."""

import ast
import bz2
import gc
import gzip
import hashlib
import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch

from grokquant.errors import InputError
from grokquant.recipe import TEXT_SUFFIXES, CalibrationSection, EvalSection
from grokquant.recipe.of_output import origin_of_text, settings_of
from grokquant.text import document, installed, python_docs, records
from grokquant.text.document import Chat, TokenIds
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
        self.texts: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        self.seen += 1
        self.texts.append(text)
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(char) for char in text])


def text_of(rows: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in rows.tolist()]


FIELDS = "text, messages, conversations, input_ids, content"
SHOULD_BE = "should be a text, a conversation or token numbers"


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
    with pytest.raises(
        InputError, match=f"^the text has {found} tokens, but one sequence needs 8; lower"
    ):
        token_rows(documents, Characters(), samples=1, length=8, seed=seed)


def test_calibration_rows_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 2)
    checkpoint = SimpleNamespace(positions=32)
    settings = CalibrationSection(text=str(path), samples=4, length=10)
    assert text_of(calibration_rows(settings, Characters(), checkpoint)) == ["0123456789"] * 2
    with pytest.raises(InputError, match=r"^calibration\.text: .*a\.txt: the text has 20 tokens"):
        calibration_rows(CalibrationSection(text=str(path), length=32), Characters(), checkpoint)


def test_calibration_rows_are_no_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 2)
    checkpoint = SimpleNamespace(positions=10)
    rows = calibration_rows(CalibrationSection(text=str(path)), Characters(), checkpoint)
    assert text_of(rows) == ["0123456789"] * 2


def test_digest_sees_texts_and_borders() -> None:
    assert text_digest(["ab", "c"]) == hashlib.sha256(b"2\nab1\nc").hexdigest()
    assert len({text_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], [])}) == 4


def test_python_docs_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(installed.TEXTS, "python-docs", lambda part: [f"the {part} part"])
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
    assert message(path) == f"{path}: holds no text; take another"
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
        (b"{text: 1}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"12", "expected a JSON object or a string"),
        (b'{"txt": "a"}', f"no field {FIELDS}, only txt; name it by the key field"),
        (b'{"text": 1}', f'"text" {SHOULD_BE}, not int'),
        (b'{"text": [1, 2.5]}', f'"text" {SHOULD_BE}, not list'),
        (b'{"text": [{"role": "user"}, 1]}', f'"text" {SHOULD_BE}, not list'),
        (b'{"messages": [{"content": "x"}]}', '"messages": a message without role'),
        (b'{"messages": [{"role": "\\ud800"}]}', '"messages" holds half of a surrogate pair'),
        (b'{"text": "\\ud800"}', '"text" holds half of a surrogate pair'),
        (b'{"text": "\xff"}', f"not UTF-8 text (byte 10); {ICONV}"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert message(path) == f"{path}:2: {expected}"


def test_json_is_a_document_per_element(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n [{"text": "one"}, "two", {"content": ""}, {"content": "three", "id": 1}]')
    assert load_documents(str(path), "calibration") == ["one", "two", "three"]
    path.write_text('["one", 2]')
    assert message(path) == f"{path}: element 2: expected a JSON object or a string"
    path.write_text('{"text": "a line"}\n{"text": "another"}\n')
    assert load_documents(str(path), "calibration") == ["a line", "another"]


def compress_zst(text: bytes) -> bytes:
    packed: bytes = pytest.importorskip("pyarrow").compress(text, "zstd", asbytes=True)
    return packed


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_texts_are_unpacked(tmp_path: Path, suffix: str) -> None:
    known = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress_zst}
    pack = known[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "one"}\n{"text": "two"}\n'))
    assert load_documents(str(path), "calibration") == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-12])
    assert message(path).startswith(f"{path}: cannot be unpacked: ")
    path.write_bytes(b'{"text": "plain"}')
    assert message(path).startswith(f"{path}: cannot be unpacked: ")


def test_a_zst_text_names_the_package_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"(")
    assert message(path) == f'{path}: it needs the eval extra: pip install "grokquant[eval]"'


def test_a_compressed_text_without_end_is_not_unpacked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_MAX_TEXT_BYTES", 10_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 100_000))
    assert message(path) == f"{path}: larger than 10000 bytes, the limit for a text"


def test_a_file_of_another_kind_is_no_name_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.lz4"
    path.write_bytes(b"(")
    assert message(path).startswith(f"{path}: not a kind of text that can be read (.txt, .json,")


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
)
SPOKEN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "oh"}]


class Chatty(Characters):
    """Renders conversations as transformers does."""

    def __init__(self, template: str | None = TEMPLATE) -> None:
        super().__init__()
        self.chat_template = template

    def __len__(self) -> int:
        return 200

    def apply_chat_template(self, messages: list, tools: list | None, tokenize: bool) -> str:
        assert not tokenize
        return jinja2.Template(self.chat_template).render(messages=messages, tools=tools)


def test_conversations_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    told = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "oh"}]
    lines = [
        {"messages": SPOKEN, "tools": [{"name": "look"}]},
        {"conversations": told, "id": 7},
        {"messages": []},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    called, spoken = load_documents(str(path), "calibration")
    assert called == Chat(tuple(SPOKEN), ({"name": "look"},)) and spoken == Chat(tuple(SPOKEN))
    rows = token_rows([spoken, called], Chatty(), samples=9, length=23, seed=None)
    assert text_of(rows) == ["<user>hi<assistant>oh<u", "ser>hi<assistant>oh[loo"]
    with pytest.raises(InputError, match="conversations, but the model has no chat template"):
        token_rows([spoken], Chatty(None), samples=9, length=4, seed=None)
    with pytest.raises(InputError, match="the model's chat template fails: "):
        token_rows([spoken], Chatty("{% for"), samples=9, length=4, seed=None)
    assert text_digest([spoken]) != text_digest([called])


def test_token_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, 2, 3, 4]}\n{"input_ids": [5, 6, 7, 8]}\n{"input_ids": []}\n')
    documents = load_documents(str(path), "calibration")
    assert documents == [TokenIds((1, 2, 3, 4)), TokenIds((5, 6, 7, 8))]
    rows = token_rows(documents, Chatty(), samples=9, length=4, seed=3)
    assert rows.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(InputError, match="token numbers should be from 0 to 199"):
        token_rows([TokenIds((1, 200))], Chatty(), samples=9, length=2, seed=None)


def test_a_field_given_to_an_evaluation_replaces_the_recipe_s(tmp_path: Path) -> None:
    assert settings_of(tmp_path, field="body").field == "body"
    recipe = "{model: {path: toy}, quantize: [{match: '*', method: copy}], output: {path: out}, "
    (tmp_path / "recipe.yaml").write_text(recipe + "eval: {field: title}}")
    assert settings_of(tmp_path).field == "title"
    assert settings_of(tmp_path, text="a.txt").field is None
    assert settings_of(tmp_path, text="a.jsonl", field="body").field == "body"


def test_the_recipe_of_another_tool_is_none_of_ours(tmp_path: Path) -> None:
    order = "!!python/object/apply:compressed_tensors.quantization.ActivationOrdering [static]"
    stage = f"default_stage:\n  default_modifiers:\n    GPTQModifier: {{actorder: {order}}}\n"
    (tmp_path / "recipe.yaml").write_text(stage)
    assert settings_of(tmp_path) == EvalSection()
    assert origin_of_text(tmp_path, None) == "the default"


def test_a_field_is_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n')
    assert load_documents(str(path), "calibration", "body") == ["two"]
    with pytest.raises(InputError, match=":1: no field title, only text, body$"):
        load_documents(str(path), "calibration", "title")
    checkpoint = SimpleNamespace(positions=32)
    settings = CalibrationSection(text=str(path), field="body", samples=1, length=8)
    with pytest.raises(InputError, match="the text has 3 tokens"):
        calibration_rows(settings, Characters(), checkpoint)


def test_of_a_large_text_excerpts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_EXCERPTS_ABOVE", 100_000)
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        "".join(json.dumps({"text": f"ö{number:07}"}) + "\n" for number in range(50_000))
    )
    plain = tmp_path / "a.txt"
    plain.write_text("".join(f"ö{number:07}" for number in range(50_000)))
    checkpoint = SimpleNamespace(positions=99)

    def draw(path: Path, seed: int) -> list[str]:
        settings = CalibrationSection(text=str(path), samples=4, length=18, seed=seed)
        tokenizer = Characters()
        rows = text_of(calibration_rows(settings, tokenizer, checkpoint))
        assert sum(map(len, tokenizer.texts)) < 40_000
        return rows

    for path in (lines, plain):
        assert draw(path, 0) == draw(path, 0) != draw(path, 1)
        assert all(row in plain.read_text() for row in draw(path, 2))
    lines.write_bytes(b"{" * 200_000)
    with pytest.raises(InputError, match="the text has 0 tokens"):
        draw(lines, 0)
    plain.write_bytes(b"\xff" * 200_000)
    with pytest.raises(InputError, match=r"a\.txt: byte \d+: not UTF-8 text"):
        draw(plain, 0)


def large_parquet(
    place: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], row_group_size: int
) -> Path:
    """A file that counts as large."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(records, "_EXCERPTS_ABOVE", 100_000)
    path = place / "a.parquet"
    parquet.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size)
    return path


def test_of_a_large_parquet_file_rows_of_some_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"ö{number:07}" for number in range(50_000)]
    path = large_parquet(tmp_path, monkeypatch, texts, 1000)

    def draw(seed: int) -> tuple[list[str], set[int]]:
        settings = CalibrationSection(text=str(path), samples=4, length=18, seed=seed)
        tokenizer = Characters()
        rows = text_of(calibration_rows(settings, tokenizer, SimpleNamespace(positions=99)))
        assert 4 * 18 * 4 < sum(map(len, tokenizer.texts)) < 4_000
        return rows, {int(text[1:5]) for text in tokenizer.texts}

    rows, groups = draw(0)
    assert len(groups) == 16 and (rows, groups) == draw(0) != draw(1)
    assert all(row in "".join(texts) for row in rows)


def test_of_small_row_groups_of_parquet_more_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{number:08}" for number in range(50_000)]
    path = large_parquet(tmp_path, monkeypatch, texts, 20)
    settings = CalibrationSection(text=str(path), samples=100, length=18)
    rows = calibration_rows(settings, Characters(), SimpleNamespace(positions=99))
    assert len(rows) == 100


def test_unpacked_sequences_are_beginnings_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["short", *(f"{letter} is the first of many" for letter in "abcdefgh")]
    path.write_text("\n".join(map(json.dumps, texts)))
    checkpoint = SimpleNamespace(positions=99)

    def draw(samples: int, length: int, seed: int = 0) -> list[str]:
        settings = CalibrationSection(
            text=str(path), samples=samples, length=length, seed=seed, packed=False
        )
        return text_of(calibration_rows(settings, Characters(), checkpoint))

    assert draw(99, 9) == [text[:9] for text in texts[1:]]
    assert len(draw(3, 9)) == 3 and draw(3, 9) == draw(3, 9) != draw(3, 9, seed=1)
    with pytest.raises(
        InputError, match=r"a\.jsonl: the longest document has 22 tokens, but a sequence"
    ):
        draw(3, 25)


def test_several_texts_give_their_shares(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 800)
    checkpoint = SimpleNamespace(positions=99)

    def draw(samples: int, **shares: float) -> str:
        texts = {str(tmp_path / f"{name}.txt"): share for name, share in shares.items()}
        settings = CalibrationSection(text=texts, samples=samples, length=8)
        return "".join(
            row[0] for row in text_of(calibration_rows(settings, Characters(), checkpoint))
        )

    assert draw(10, a=0.3, b=0.7) == "aaabbbbbbb"
    assert draw(3, a=1, b=1) == "aab"
    assert draw(7, b=1) == "bbbbbbb"
    with pytest.raises(InputError, match=r"^calibration\.text: .*b\.txt: the text has 1 tokens"):
        (tmp_path / "b.txt").write_text("x")
        draw(4, a=1, b=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, "expected at least one text"),
        ({"a.txt": 0}, "greater than 0"),
        ({"a.csv": 1}, "expected python-docs, python-code, package-docs, a .txt"),
        ({"a.txt": "half"}, "valid number"),
        (["a.txt"], "valid"),
    ],
)
def test_shares_that_are_none(text: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CalibrationSection(text=text)


def test_parquet_is_a_document_per_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 3], "text": ["one", "", "two"]}), path)
    assert load_documents(str(path), "calibration") == ["one", "two"]
    parquet.write_table(pa.table({"text": ["one", None]}), path)
    assert load_documents(str(path), "calibration") == ["one"]
    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    assert message(path) == f"{path}: no field {FIELDS}, only id, body; name it by the key field"
    assert load_documents(str(path), "calibration", "body") == ["x"]
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

    def counted(text: str, where: str) -> str:
        nonlocal made
        made += len(text)
        return text

    monkeypatch.setattr(document, "_text", counted)
    assert message(path) == f"{path}: unpacks to more than 100 times its size"
    # Plain values are refused by the file's own figures, repeated ones when they are too many.
    assert made <= 100_100_000 if repeated else made == 0


def test_a_line_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_MAX_DOCUMENT_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "' + b"x" * 5000)
    assert message(path) == f"{path}:2: longer than 1000 bytes, not a document"
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1001)
    assert message(path).startswith(f"{path}: larger than 1000 bytes, the limit for one document;")


def test_a_line_of_many_values_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x", "y": [' + b"[]," * 100_000 + b"[]]}")
    monkeypatch.setattr(records.json, "loads", None)
    assert message(path) == f"{path}:1: not valid JSON"


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
    assert message(folder) == f"{folder}: no field {FIELDS}, only body; name it by the key field"
    assert load_documents(str(folder), "calibration", "body") == ["x"]


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    asked = []

    def head(address: str, timeout: float) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    assert message("hub/name").startswith("hub/name: cannot be loaded: Couldn't reach 'hub/name'")
    assert asked == ["https://huggingface.co"]


def test_datasets_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> None:
        assert (name, config, split) == ("hub/name", "small", "train")
        raise ConnectionError("Couldn't reach 'hub/name' on the Hub\nmore words")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    expected = "hub/name:small: cannot be loaded: Couldn't reach 'hub/name' on the Hub more words"
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
    assert message("notes.md").startswith(
        "text: expected python-docs, python-code, package-docs, a .txt, .json, .jsonl or"
    )
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
    found = python_docs.docstrings_of(source)
    assert found == [ast.get_docstring(node) for node in walked] and len(found) == 17
    assert gc.isenabled()


# Texts of every installation


def test_the_code_of_a_module_is_held_out_with_its_documentation() -> None:
    found = dict(installed._modules(python_docs.standard_library(), "module"))
    documented = {name for name, _ in python_docs._all_documents() if name.startswith("module:")}
    assert documented <= found.keys()
    heldout = installed.documents("python-code", "heldout")
    assert sum(map(len, heldout)) > 200_000
    names = [name for name in found if python_docs.part_of(name) == "heldout"]
    sources = [installed._source(found[name]) for name in names]
    assert heldout == [source for source in sources if source.strip()]
    assert not set(heldout) & set(installed.documents("python-code", "calibration"))


def test_documentation_of_packages_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_PACKAGES", ("numpy",))
    calibration, heldout = (
        installed.documents("package-docs", part) for part in ("calibration", "heldout")
    )
    assert not set(calibration) & set(heldout)
    assert "array" in "".join(calibration) and len(heldout) > 3


def test_of_texts_of_every_installation_some_documents_are_drawn() -> None:
    asked = CalibrationSection(text="python-code", samples=4, length=64)
    tokenizers = [Characters(), Characters()]
    rows = [calibration_rows(asked, t, SimpleNamespace(positions=99)) for t in tokenizers]
    assert torch.equal(*rows) and rows[0].shape == (4, 64)
    assert 0 < tokenizers[0].seen < 20
    other = asked.model_copy(update={"seed": 1})
    assert not torch.equal(
        rows[0], calibration_rows(other, Characters(), SimpleNamespace(positions=99))
    )
