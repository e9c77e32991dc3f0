"""Patterns of configs match as those of `re` do, in a time that no pattern can stretch."""

import random
import re
import warnings

import pytest

from grokquant.formats import patterns
from grokquant.formats.patterns import Pattern
from grokquant.formats.targets import check_target, matches

NAMES = [
    "model.layers.0.mlp.experts.12.gate_proj",
    "model.layers.17.self_attn.q_proj",
    "model.layers.3.block_sparse_moe.gate",
    "lm_head",
    "model.embed_tokens",
    "",
    "x",
]
REAL = [
    r".*block_sparse_moe.gate$",
    r".*mlp\.experts\.\d+\.(gate|up|gate_up|down)_proj$",
    r".*\.(?:q|k|v)_proj",
    r"^model\.layers\.(?:[0-9]|1[0-7])\..*$",
    r".*lm_head.*",
    r"(?!.*experts).*proj$",
    r"^(?!.*mtp)(?=model).*",
    r"vision_model.*",
    r"[^.]*\.layers\.\d{1,2}\.[a-z_]+?\.\w+_proj\Z",
    r"(?:.*\.)?q_proj",
    r"model|lm_head",
    r"",
    r"\S+ x",
]


@pytest.mark.parametrize("text", REAL)
def test_patterns_of_real_configs(text):
    compiled = Pattern(text)
    for name in NAMES:
        assert compiled.match(name) == (re.match(text, name) is not None), name


def random_pattern(draw: random.Random, depth: int = 3) -> str:
    kind = draw.randrange(8 if depth else 3)
    if kind < 2:
        return draw.choice(["a", "b", ".", "\\.", "\\d", "\\w", "[ab]", "[^a]", "[a-c1]"])
    if kind == 2:
        return draw.choice(["^", "$", "a", "b1"])
    inner = random_pattern(draw, depth - 1)
    if kind == 3:
        return f"({inner})" + draw.choice(["*", "+", "?", "{2}", "{1,3}", "*?", "{2,}"])
    if kind == 4:
        return f"(?:{inner}|{random_pattern(draw, depth - 1)})"
    return inner + random_pattern(draw, depth - 1)


def test_random_patterns_match_as_those_of_re():
    draw = random.Random(0)
    compared = matched = 0
    for _ in range(1500):
        text = random_pattern(draw)
        try:
            compiled = Pattern(text)
        except ValueError:
            continue
        for _ in range(10):
            name = "".join(draw.choices("ab1.", k=draw.randrange(8)))
            expected = re.match(text, name) is not None
            assert compiled.match(name) == expected, (text, name)
            compared += 1
            matched += expected
    assert compared > 10_000 and 0.2 < matched / compared < 0.98


@pytest.mark.parametrize(
    "text",
    ["([a-z0-9_.]+)+!", "(a|aa)+!", "(.*)*!", ".*" * 50 + "!", "(a?){60}" * 5 + "a" * 60 + "!"],
)
def test_no_pattern_takes_more_steps_than_states_and_characters(text):
    """With `re` the first takes longer than the age of the world."""
    name = "model.layers.0.self_attn.q_proj" + "a" * 200
    compiled = Pattern(text)
    moves = 0
    moved = compiled.automaton._moved

    def counted(states, character):
        nonlocal moves
        moves += 1
        return moved(states, character)

    compiled.automaton._moved = counted  # type: ignore[method-assign]
    assert not compiled.match(name)
    assert moves <= len(name)
    assert len(compiled.automaton.next) <= patterns.MAX_STATES


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("(", "missing"),
        (r"(a)\1", "groupref is not supported"),
        ("a(?=b)", "assert is not supported"),
        ("(?<!a)b", "assert not is not supported"),
        ("(?i)a", "flags are not supported"),
        ("(?i:a)", "flags are not supported"),
        (r"\bx", "at is not supported"),
        ("a{5000}", "too large"),
        ("(?:(?:a{100}){100}){100}", "too large"),
        ("(?:(?:(?:){1000}){1000}){1000}", "too large"),
        ("(?:){4000000000}", "too large"),
        ("a" * 3000, "longer than"),
        ("(" * 900 + "a" + ")" * 900, ""),
        ("a{99999999999999}", ""),
    ],
)
def test_other_patterns_are_refused_by_name(text, complaint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=complaint):
            check_target("re:" + text)


def test_targets():
    assert matches("a.b", "re:.*b$") and not matches("a.b", "re:b")
    assert matches("a.b", "b") and matches("a.b", "Linear")
