"""Families that are derived from transformers' own models: a sample; `make families` tries all."""

import pytest
from try_families import passes, try_family

# One of each kind: how layers pass their states, what their experts are like, how files name them.
SAMPLE = {
    "olmo2": "dense",
    "bloom": "layers return tuples",
    "deepseek_v3": "shared experts, buffers in files",
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_derived_family_does_all_that_a_family_does(kind, tmp_path):
    found = try_family(kind, tmp_path)
    assert found["derived"] and passes(found), found
