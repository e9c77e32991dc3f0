"""A sample of `make fuzz`, the same bytes as files, and recipes that nobody would write."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokquant.errors import InputError
from grokquant.recipe import Recipe, load_recipe, parse_recipe
from grokquant.sources import open_source
from grokquant.sources.pickles import read_headers

SAMPLE = 4000  # of the million of `make fuzz`
FILES = 300


@pytest.mark.parametrize("name", fuzz.READERS)
def test_mutated_headers_are_read_or_refused(name):
    outcome = fuzz.run_chunk(name, 0, SAMPLE)
    assert outcome.failures == []
    assert outcome.refused + outcome.read == SAMPLE
    # Neither all too broken to get far nor most of them whole.
    assert SAMPLE / 50 < outcome.read < SAMPLE / 2


def test_a_fault_of_a_reader_is_reported(monkeypatch, capsys):
    def fails(raw: bytes) -> None:
        raise KeyError("weight_map")

    monkeypatch.setitem(fuzz.READERS, "index", replace(fuzz.READERS["index"], read=fails))
    outcome = fuzz.run_chunk("index", 3, 2)
    assert (outcome.read, outcome.refused, len(outcome.failures)) == (2, 0, 2)
    assert "KeyError: 'weight_map'" in outcome.failures[0]
    case = next(fuzz.cases("index", 3, 1))
    assert outcome.failures[0].endswith(repr(case))


def test_cases_depend_on_the_number_of_their_chunk_alone():
    first = list(fuzz.cases("gguf", 5, 50))
    assert first == list(fuzz.cases("gguf", 5, 50)) != list(fuzz.cases("gguf", 6, 50))


# The names of files that hold each kind of header, and how they are opened.
PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "safetensors": ("model.safetensors", lambda path: open_source(path.parent)),
    "gguf": ("x.gguf", lambda path: open_source(path.parent)),
    "index": ("model.safetensors.index.json", lambda path: open_source(path.parent)),
    "pickle": ("tensor00000_000", read_headers),
}


@pytest.mark.parametrize("name", PLACES)
def test_mutated_files_are_opened_or_refused(tmp_path, name):
    """With what is behind the header's own reader, such as the safetensors library."""
    file, opened = PLACES[name]
    path = tmp_path / file
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    shard = fuzz.with_length(b'{"a":{"dtype":"I8","shape":[24],"data_offsets":[0,24]}}')
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(shard)
    refused = 0
    for raw in fuzz.cases(name, 1, FILES):
        path.write_bytes(raw)
        try:
            opened(path)
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), raw
            refused += 1
    assert FILES / 2 < refused <= FILES


# --- recipes

GOOD = {
    "model": {"path": "toy"},
    "calibration": {"text": "python-docs", "samples": 8, "length": 64},
    "quantize": [{"match": "*.experts.*", "method": "gptq", "bits": 4, "group": 32}],
    "experts": {"min_tokens": 4},
    "max_fallbacks": 0.5,
    "output": {"path": "out", "format": "gguf", "shard": "500MB"},
    "eval": {"text": "python-docs", "samples": 2},
}
WORDS = sorted(
    {word for section in (GOOD, *GOOD.values()) if isinstance(section, dict) for word in section}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["gptq", "rtn", "keep", "*", "toy", "5GB", "channel", "q4_k", "a.txt", "hub/x:y"]
    )
)
KEYS = st.sampled_from([*WORDS, "match", "method", "bits", "group", "grid", "damping"]) | st.text(
    max_size=9
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
modest = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def check_refusal(error: InputError, beginning: str) -> None:
    message = str(error)
    assert message.startswith(beginning) and "\n" not in message and len(message) < 2000


@modest
@given(st.dictionaries(KEYS, VALUES, max_size=7))
def test_any_mapping_is_a_recipe_or_refused(values):
    try:
        assert isinstance(parse_recipe(values), Recipe)
    except InputError as error:
        check_refusal(error, "recipe: ")


@modest
@given(KEYS, st.data())
def test_any_value_in_a_good_recipe_is_taken_or_refused(key, data):
    """One value replaced, so that what follows its own check is reached, too."""
    values = json.loads(json.dumps(GOOD))
    section = data.draw(st.sampled_from([values, *filter(None, map(as_mapping, values.values()))]))
    section[data.draw(st.sampled_from(sorted(section)) | st.just(key))] = data.draw(VALUES)
    try:
        recipe = parse_recipe(values)
    except InputError as error:
        check_refusal(error, "recipe: ")
    else:
        assert parse_recipe(recipe.model_dump()) == recipe


def as_mapping(section: object) -> dict | None:
    if isinstance(section, list):
        return section[0]
    return section if isinstance(section, dict) else None


FRAGMENTS = (
    "model:", "path: toy", "quantize:", "- match: '*'", "method: keep", "bits: 4", "output:",
    "\n", "\n  ", "\n    ", "{", "}", "[", "]", ",", ": ", "&a ", "*a", "!!python/name:os.system ",
    "<<: ", "|", ">-", "---", "...", "%YAML 9.9", "? ", "- ", "#", "'", '"', "\\UFFFFFFFF", "\t",
    ".nan", "0x", "1_0", "2024-01-01", "~", "=", "\x85", "\u2028", "\ufeff", "\x00", "\x1b",
)  # fmt: skip


@modest
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=25).map("".join))
def test_any_text_is_a_recipe_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_recipe(path), Recipe)
    except InputError as error:
        check_refusal(error, f"{path}:")


def test_mutated_recipes_are_read_or_refused(tmp_path):
    words = tuple(word.encode() for word in FRAGMENTS)
    value = re.compile(rb'"[^"]*"|[\d.]+')
    text = json.dumps(GOOD, indent=2).encode()  # YAML holds JSON
    reader = fuzz.Reader(bytes, (text,), words, value=value)
    draw = random.Random(0)
    path = tmp_path / "recipe.yaml"
    for _ in range(FILES):
        path.write_bytes(fuzz.edited(text, reader, draw))
        try:
            assert isinstance(load_recipe(path), Recipe)
        except InputError as error:
            check_refusal(error, f"{path}:")


@modest
@given(st.text(max_size=12), VALUES)
def test_any_override_is_taken_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "good.yaml"
    path.write_text(json.dumps(GOOD))
    try:
        load_recipe(path, [f"{key}={json.dumps(value)}"])
    except InputError as error:
        check_refusal(error, "override ")
