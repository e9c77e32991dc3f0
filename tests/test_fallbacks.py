"""When too many matrices fall back, and what the error says then."""

import re

import pytest

from grokquant.errors import GateError
from grokquant.job.fallbacks import Fallbacks, Fallen, dead_experts
from grokquant.job.plan import build_plan
from grokquant.recipe import parse_recipe

REASON = "tokens, fewer than experts.min_tokens = 32"
EXPERTS = {"match": "layers.*.experts.*", "method": "gptq", "bits": 4, "group": 128}


def of_toy(rows: int = 16, length: int = 256, **settings: object) -> Fallbacks:
    """Of the toy: 4 layers of 8 experts, so 32 matrices of each of their kinds; top 2."""
    values = {
        "model": {"path": "toy"},
        "calibration": {"samples": 16, "length": length},
        "quantize": [EXPERTS],
        "output": {"path": "out"},
    }
    return Fallbacks(build_plan(parse_recipe(values | settings)), rows, length)


def fall(fallbacks: Fallbacks, tokens: int, *names: str) -> Fallbacks:
    for name in names:
        fallbacks.add(Fallen(name, tokens, f"{tokens} {REASON}"))
    return fallbacks


GATES = [f"layers.{layer}.experts.{expert}.gate" for layer in range(4) for expert in range(8)]


def test_each_kind_is_counted_by_itself():
    whole = [f"layers.0.experts.3.{part}" for part in ("gate", "up", "down")]
    fall(of_toy(max_fallbacks=1 / 32), 5, *whole).check()
    two_gates = fall(of_toy(max_fallbacks=1 / 32), 5, *GATES[:2])
    assert re.match("2 of 32 matrices experts.gate fell back", two_gates.excess() or "")
    again = fall(of_toy(max_fallbacks=1 / 32), 5, GATES[0], GATES[0])
    assert again.excess() is None  # a layer that is made again


def message(fallbacks: Fallbacks) -> str:
    with pytest.raises(GateError) as error:
        fallbacks.check()
    return str(error.value)


def test_the_error_has_the_numbers_of_the_run():
    text = message(fall(of_toy(), 4, GATES[9]))
    assert text == (
        "1 of 32 matrices experts.gate fell back to rtn, max_fallbacks = 0.01 allows 0: "
        f"layers.1.experts.1.gate: 4 {REASON}; "
        "calibration.samples=256 would give them enough, 16 were used; "
        "calibration.text should be like what the model is used for, and varied; "
        "max_fallbacks=0.04 or more accepts them, and resumes this run where it is"
    )
    share = float(re.search("max_fallbacks=([0-9.]+) or more", text)[1])
    fall(of_toy(max_fallbacks=share), 4, GATES[9]).check()


def test_a_text_that_is_too_short_is_named():
    text = message(fall(of_toy(rows=3), 8, GATES[0]))
    assert "python-docs gives only 3 sequences of 256 tokens: set calibration.text to a" in text
    assert "of about 6144 tokens" in text and "calibration.samples=" not in text


def test_only_reasons_that_more_tokens_cure_ask_for_them():
    fallbacks = of_toy()
    fallbacks.add(Fallen(GATES[0], 5000, "its Hessian cannot be factorized"))
    assert "samples" not in message(fallbacks)


def test_many_are_not_all_named():
    assert "and 5 more; calib" in message(fall(of_toy(), 4, *GATES[:8]))


def test_a_dead_expert_does_not_count_where_others_got_enough():
    """16 rows of 256 tokens give an expert 1024 on average, 2 rows of 32 only 16."""
    fall(of_toy(), 0, *GATES[:3]).check()
    assert "0 tokens" in message(fall(of_toy(rows=2, length=32), 0, GATES[0]))


def test_dead_experts_of_a_report():
    rows = [
        {"name": f"layers.0.experts.{expert}.{part}", "tokens": tokens, "fallback": reason}
        for expert, tokens, reason in [(0, 0, REASON), (1, 4, REASON), (2, 900, None)]
        for part in ("gate", "up", "down")
    ]
    assert dead_experts(rows) == ["layers.0.experts.0"]
