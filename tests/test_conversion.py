"""`grokquant convert`: the same codes and scales in another form, or a refusal."""

import pytest
import torch

from grokquant import pipeline
from grokquant.checkpoint import open_checkpoint
from grokquant.conversion import conversion_recipe
from grokquant.errors import InputError

RTN = {"match": "layers.*.experts.*", "method": "rtn", "bits": 4, "group": 32}


@pytest.fixture
def result(tiny_recipe):
    return pipeline.quantize(tiny_recipe(RTN))


def test_the_same_format_gives_the_same_codes(result, tmp_path):
    recipe = conversion_recipe(result, "compressed-tensors", tmp_path / "again")
    again = dict(open_checkpoint(pipeline.quantize(recipe)).units())
    for name, ref in open_checkpoint(result).units():
        assert ref.scheme == again[name].scheme
        assert torch.equal(ref.read(), again[name].read())


def test_bf16_is_the_result_multiplied_out(result, tmp_path):
    dense = pipeline.quantize(conversion_recipe(result, "bf16", tmp_path / "dense"))
    units = dict(open_checkpoint(dense).units())
    for name, ref in open_checkpoint(result).units():
        assert units[name].scheme is None
        assert torch.equal(ref.read(), units[name].read())


def test_a_dense_checkpoint_is_refused(result, tmp_path):
    dense = pipeline.quantize(conversion_recipe(result, "bf16", tmp_path / "dense"))
    with pytest.raises(InputError, match="dense: holds no quantized matrix to convert"):
        conversion_recipe(dense, "gptq", tmp_path / "no")
