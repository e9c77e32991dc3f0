"""Tokenizers from strangers: one line for what is broken, and no endless time, memory or panic."""

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import changed, mutations
from shipped_tokenizers import json_with_config

from grokquant.errors import InputError
from grokquant.families import tokenizer_files
from grokquant.families.tokenizer import read_tokenizer, tokens_of
from grokquant.families.tokenizer_patterns import check_pattern
from grokquant.runtime.generate import _ids
from grokquant.types import Source

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")
TEXT = "Hello  wörld `` 123\n\nnext"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A tokenizer whose steps take regular expressions and replacements."""
    directory = tmp_path_factory.mktemp("tokenizer")
    json_with_config(directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\s+(?!\S)|\S+"}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    quotes = {"type": "Replace", "pattern": {"String": "``"}, "content": "x"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, quotes]}
    path.write_text(json.dumps(content))
    return directory


@pytest.fixture
def directory(shipped, tmp_path) -> Path:
    for name in FILES[:2]:
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    return tmp_path


def source_at(directory: Path) -> Source:
    files = tuple(directory / name for name in FILES if os.path.lexists(directory / name))
    return Source(
        path=directory, kind="x", config={}, tensors={}, tokenizer_files=files, weight_files=()
    )


def edit(directory: Path, **changes: object) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tokenizer(source_at(directory))
    message = str(caught.value)
    assert message.startswith(str(directory)) and "\n" not in message and len(message) < 600
    return message


# --- regular expressions

# Of GPT-2, GPT-4, GPT-4o, Qwen, Kimi, DeepSeek, BLOOM, Falcon, Gemma and others.
IN_USE = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}&&[^\p{Han}]]*[\p{Ll}\p{Lm}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-Ί]+",
    "[一-龥぀-ゟ゠-ヿ]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*)+|\p{N}",
    r"(?:[A-Z][a-z]*)+",
    "[0-9][0-9][0-9]",
    r"\x{200b}+|\u00a0|[\x00-\x1f]+",
    r"(?<=x)y+|[[:alpha:]]+|(?:ab){1,30}|[a-]+|[\w-]+|[\d\-.]+|a{,3}|x{y}",
    "[\r\n]",
    " {2,}",
    "",
]
ENDLESS = [
    "(a|aa)+$",
    "(a+)+$",
    "(a+?)+?x",
    "(a*)*",
    "(a|a)+",
    "([a-z]+)+!",
    "(a?){50}",
    "(a|aa){50}$",
    "((a|aa){4}){4}",
    "a{1,3}+x",
    "(x+x+)+y",
    "(.*a)*x",
    "(?:a|(?:a|b)b*)+$",
    r"(\w|\d)+x",
    r"(?:\s*\w*)*x",
    r"([\p{L}]+[\p{Lu}]?)+x",
    r"(?:é|[à-ï])+x",
    r"(?i:(a|A)+x)",
    "([[:alpha:]]|b)+x",
    "(?=(a+)+$)",
    "(?!(a|ab|b)*$)",
    "a*a*a*a*a*$",
    ".*.*.*.*x",
]
UNREADABLE = [r"(a)\1", "(?R)", "(?x)a", "(a", "a)", "[a", "(" * 60 + ")" * 60, "a" * 30_000]


@pytest.mark.parametrize("pattern", IN_USE)
def test_patterns_in_use_are_accepted(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_of_endless_time_are_refused(directory, pattern):
    edit(directory, pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}})
    message = refusal(directory)
    assert "tokenizer.json: pre_tokenizer: regular expression" in message
    assert "repetitions" in message


@pytest.mark.parametrize("pattern", UNREADABLE)
def test_patterns_that_cannot_be_judged_are_refused(pattern):
    with pytest.raises(ValueError):
        check_pattern(pattern)


def test_random_patterns_are_judged_or_refused():
    draw = random.Random(0)
    parts = [
        *r"ab.|()[]^$*+?{}\-&,1:=!<>",
        "(?",
        "\\p{L}",
        "\\x{1f600}",
        "\\u12",
        "[^",
        "(?i)",
        "é",
    ]
    for _ in range(3000):
        pattern = "".join(draw.choices(parts, k=draw.randint(1, 12)))
        try:
            check_pattern(pattern)
        except ValueError as error:
            assert "\n" not in str(error)


# --- other steps and files


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 101},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 101},
        {"type": "Prepend", "prepend": "a" * 101},
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}]
            * 2000,
        },
    ],
)
def test_a_normalizer_that_makes_texts_endless_is_refused(directory, normalizer):
    edit(directory, normalizer=normalizer)
    assert "normalizer: makes texts more than 100 times longer" in refusal(directory)


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_within_limits(directory, name, monkeypatch):
    path = directory / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{name}: cannot be read: it is a FIFO" in refusal(directory)
    path.unlink()
    path.touch()
    os.truncate(path, 5 << 30)
    assert f"{name}: larger than" in refusal(directory)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    os.truncate(path, 200)
    assert "Git LFS pointer" in refusal(directory)


def test_json_with_too_many_values_is_refused(directory, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "_MAX_VALUES", 100)
    assert "tokenizer.json: not valid JSON: it has more than 100 values" in refusal(directory)


def try_out(directory: Path, sample: int | None) -> None:
    """Reads and uses tokenizers with one value changed, a sample or all."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    every = mutations(content)
    for place, value in random.Random(0).sample(every, sample or len(every)):
        path.write_text(json.dumps(changed(content, place, value)))
        try:
            tokenizer = read_tokenizer(source_at(directory))
            tokenizer.decode(tokens_of(tokenizer, TEXT))
        except InputError as error:
            assert str(directory) in str(error) and "\n" not in str(error)


def test_changed_tokenizers_end_in_one_line(directory):
    try_out(directory, 20)


@pytest.mark.slow
def test_all_changed_tokenizers_end_in_one_line(directory):
    try_out(directory, None)


def test_what_ends_the_library_s_process_is_one_line(directory, capfd):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    edit(directory, model=model | {"continuing_subword_prefix": "x"})
    assert "tokenizer.json: cannot be read as a tokenizer: " in refusal(directory)
    assert capfd.readouterr().err == ""


def test_a_process_with_little_memory_reads_tokenizers(directory):
    most = 4 << 30  # less than a trial would limit itself to
    subprocess.run(
        [sys.executable, "-c", tokenizer_files._TRIAL, str(directory / "tokenizer.json")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        check=True,
    )


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for", "{{ a.b.c }}"],
)
def test_a_chat_template_runs_in_a_sandbox_and_fails_in_one_line(directory, template):
    tokenizer = read_tokenizer(source_at(directory))
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="^m: its chat template fails: .*$"):
        _ids("m", tokenizer, "Hello", chat=True)
