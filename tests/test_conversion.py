"""`grokquant convert`: the same codes and scales in another form, or a refusal that says why."""

import json
from pathlib import Path

import pytest
import torch

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.grids import GRIDS, Scheme
from grokquant.job import pipeline
from grokquant.job.convert import conversion_recipe
from grokquant.recipe import parse_recipe
from grokquant.types import QTensor

EXPERTS = {"match": "layers.*.experts.*", "method": "rtn"}
INT4 = EXPERTS | {"bits": 4, "group": 32, "scale_dtype": "float16"}
INT8 = EXPERTS | {"bits": 8, "group": "channel"}
BFLOAT16 = EXPERTS | {"bits": 4, "group": 64, "scale_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_release):
    """(rule, format) -> what `quantize` wrote, once each."""
    made: dict[str, Path] = {}

    def make(rule: dict, output_format: str) -> Path:
        key = json.dumps([rule, output_format])
        if key not in made:
            output = {"path": str(tmp_path_factory.mktemp("result") / "out")}
            values = {"model": {"path": str(tiny_release)}, "quantize": [rule]}
            values["output"] = output | {"format": output_format}
            made[key] = pipeline.quantize(parse_recipe(values))
        return made[key]

    return make


def values(quantized: QTensor) -> torch.Tensor:
    """The real numbers that codes and scales stand for, as float64 [out, in]."""
    codes = quantized.codes.double().unflatten(1, (quantized.scales.shape[1], -1))
    if quantized.zero_points is not None:
        codes = codes - quantized.zero_points.double().unsqueeze(-1)
    found = codes * quantized.scales.double().unsqueeze(-1)
    if quantized.offsets is not None:
        found = found + quantized.offsets.double().unsqueeze(-1)
    return found.flatten(1)


# (rule, format it was made in, another that holds it, the grid that it has there)
PAIRS = [
    (INT4, "compressed-tensors", "compressed-tensors", Scheme(4, 32, True, "float16")),
    (INT4, "compressed-tensors", "gptq", Scheme(4, 32, True, "float16")),
    (INT4, "compressed-tensors", "gguf", GRIDS["q4_0"].scheme),
    (INT4, "gptq", "compressed-tensors", Scheme(4, 32, True, "float16")),
    (INT4, "gptq", "gguf", GRIDS["q4_0"].scheme),
    (INT4 | {"group": 128}, "gptq", "gguf", GRIDS["q4_0"].scheme),
    (INT8, "gptq", "gguf", GRIDS["q8_0"].scheme),
    (INT8, "compressed-tensors", "gguf", GRIDS["q8_0"].scheme),
    (BFLOAT16, "compressed-tensors", "gptq", Scheme(4, 64, True, "float16")),
    (BFLOAT16, "compressed-tensors", "gguf", GRIDS["q4_0"].scheme),
    (EXPERTS | {"grid": "q4_0"}, "gguf", "gptq", Scheme(4, 32, True, "float16")),
    (EXPERTS | {"grid": "q8_0"}, "gguf", "compressed-tensors", Scheme(8, 32, True, "float16")),
    (EXPERTS | {"grid": "q4_1"}, "gguf", "gguf", GRIDS["q4_1"].scheme),
    (INT4 | {"symmetric": False}, "compressed-tensors", "compressed-tensors", None),
    (EXPERTS | {"bits": 3, "group": 64}, "gptq", "gptq", Scheme(3, 64, True, "float16")),
]


@pytest.mark.parametrize(("rule", "first", "second", "scheme"), PAIRS)
def test_codes_and_scales_are_repacked(results, tmp_path, rule, first, second, scheme):
    result = results(rule, first)
    output = pipeline.quantize(conversion_recipe(result, second, tmp_path / "out"))
    again, converted = dict(open_checkpoint(output).units()), 0
    for name, ref in open_checkpoint(result).units():
        assert (ref.scheme is None) == (again[name].scheme is None)
        if ref.scheme is None:
            assert torch.equal(ref.read(), again[name].read())
            continue
        stored, found = ref.read_quantized(), again[name].read_quantized()
        assert found.scheme == (scheme or stored.scheme)
        assert torch.equal(found.codes, stored.codes)
        assert torch.equal(values(found), values(stored)), name
        converted += 1
    assert converted == 24
    other = dict(open_checkpoint(result).source.tensors)
    for name, ref in open_checkpoint(output).source.tensors.items():
        if ref.scheme is None:
            assert torch.equal(ref.read().float(), other[name].read().float()), name


REFUSALS = [
    (INT4 | {"symmetric": False}, "compressed-tensors", "gptq", "cannot store a zero point of 0"),
    (INT4 | {"symmetric": False}, "compressed-tensors", "gguf", "none of int4 g32 asym"),
    (EXPERTS | {"bits": 3, "group": 32}, "gptq", "compressed-tensors", "4 or 8 bits, not int3"),
    (EXPERTS | {"bits": 2, "group": 32}, "gptq", "gguf", "none of int2 g32 sym"),
    (EXPERTS | {"grid": "q4_1"}, "gguf", "gptq", "it holds integers, not q4_1"),
    (EXPERTS | {"grid": "q4_1"}, "gguf", "compressed-tensors", "4 or 8 bits, not q4_1 g32"),
]


@pytest.mark.parametrize(("rule", "first", "second", "reason"), REFUSALS)
def test_what_a_format_cannot_hold_is_refused(results, tmp_path, rule, first, second, reason):
    recipe = conversion_recipe(results(rule, first), second, tmp_path / "out")
    named = rf"layers\.0\.experts\.0\.gate: {second} cannot hold it: .*{reason}"
    with pytest.raises(InputError, match=named):
        pipeline.quantize(recipe)
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_the_other_dtype_has_not_is_named(results, tmp_path):
    """float16 has eleven bits, bfloat16 eight."""
    result = results(INT4, "gptq")
    recipe = conversion_recipe(result, "compressed-tensors", tmp_path / "out")
    rules = [rule.model_dump() | {"scale_dtype": "bfloat16"} for rule in recipe.quantize[-1:]]
    changed = recipe.model_dump(exclude_none=True) | {"quantize": [*recipe.quantize[:-1], *rules]}
    with pytest.raises(
        InputError, match=r"w1.weight: copy would not be lossless: bfloat16 cannot hold"
    ):
        pipeline.quantize(parse_recipe(changed))


@pytest.mark.parametrize(
    ("rule", "first"),
    [(INT4, "gptq"), (BFLOAT16, "compressed-tensors"), (EXPERTS | {"grid": "q4_1"}, "gguf")],
)
def test_bf16_is_the_result_multiplied_out(results, tmp_path, rule, first):
    result = results(rule, first)
    dense = pipeline.quantize(conversion_recipe(result, "bf16", tmp_path / "dense"))
    units = dict(open_checkpoint(dense).units())
    for name, ref in open_checkpoint(result).units():
        assert units[name].scheme is None
        assert torch.equal(ref.read(), units[name].read())


def test_a_dense_checkpoint_is_refused(results, tmp_path):
    result = results(INT4, "gptq")
    dense = pipeline.quantize(conversion_recipe(result, "bf16", tmp_path / "dense"))
    with pytest.raises(InputError, match="dense: has no quantized matrices to convert"):
        conversion_recipe(dense, "gptq", tmp_path / "no")
