"""Several processes make one result, with the same bytes as one."""

import shutil

import pytest
from conftest import ATTENTION, EXPERTS
from members import together

from grokquant.job import pipeline

RTN = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
GPTQ_ATTENTION = ATTENTION | {"method": "gptq", "bits": 8, "group": 32}
# What differs between runs that are divided: rules, and the size of files.
CASES = {
    "without data": ([RTN], {"shard": "100KB"}),
    # A file for each expert.
    "gptq": ([EXPERTS, GPTQ_ATTENTION], {"shard": "60KB"}),
    # Files with several experts, which several members make, and attention of the source.
    "gptq, large files": ([EXPERTS, ATTENTION], {"shard": "1MB"}),
    "gguf": ([EXPERTS | {"grid": "q4_0", "bits": None, "group": None}], {"format": "gguf"}),
}


@pytest.fixture(params=CASES)
def recipe(request, tiny_recipe, tmp_path):
    rules, output = CASES[request.param]
    rules = [{key: value for key, value in rule.items() if value is not None} for rule in rules]
    return tiny_recipe(*rules, output=output | {"path": str(tmp_path / "out")})


def sums_of(recipe, size: int) -> str:
    """SHA256SUMS, the report among them, of a run of `size` members."""
    outputs = together(size, lambda team: pipeline.quantize(recipe, team=team))
    text = (outputs[0] / "SHA256SUMS").read_text()
    shutil.rmtree(outputs[0])
    return text


def test_any_number_of_members_gives_the_same_bytes(recipe):
    alone = sums_of(recipe, 1)
    for size in (2, 3, 6):
        assert sums_of(recipe, size) == alone, size
