"""`output.names: gptqmodel`: a Mixtral under the names that GPTQModel looks for.

tests/test_gptqmodel.py has GPTQModel itself load it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_engines import gptq_grid
from test_llama_cpp import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.errors import GateError, InputError
from grokquant.files.json_objects import read_json_object
from grokquant.job import pipeline
from grokquant.job.plan import build_plan, check_engine
from grokquant.job.verify import faults, verify
from grokquant.recipe import Recipe, parse_recipe
from grokquant.reporting.inspection import describe

RTN = {"match": "*", "method": "rtn", "group": 32, "scale": "absmax"}
RULES = [
    RTN | {"match": "*.experts.*", "bits": 4},
    {"match": "layers.1.attention.*", "method": "unquantized"},
    RTN | {"bits": 8},
]
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "block_sparse_moe": "mlp"}


def its_name(name: str) -> str:
    """What transformers 5 calls a module of Mixtral, and GPTQModel 7.6 a quantized one."""
    return ".".join(NAMES.get(word, word) for word in name.split("."))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SIZES | {"num_local_experts": 4})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def recipe_of(source: Path | str, path: Path, names: str, form: str = "gptq") -> Recipe:
    output = {"path": str(path), "format": form, "names": names}
    return parse_recipe({"model": {"path": str(source)}, "quantize": RULES, "output": output})


@pytest.fixture(scope="module")
def outputs(mixtral, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("outputs")
    made = ("published", "gptqmodel")
    return {names: pipeline.quantize(recipe_of(mixtral, place / names, names)) for names in made}


def tensors_of(output: Path) -> dict[str, torch.Tensor]:
    files = sorted(output.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_only_the_names_differ(outputs):
    published, named = (tensors_of(outputs[names]) for names in ("published", "gptqmodel"))
    assert named.keys() == {its_name(name) for name in published} != published.keys()
    assert all(torch.equal(named[its_name(name)], value) for name, value in published.items())
    index = read_json_object(outputs["gptqmodel"] / "model.safetensors.index.json")
    assert index["weight_map"].keys() == named.keys()


def test_the_config_gives_each_name_its_grid(outputs):
    published, named = (
        read_json_object(outputs[names] / "config.json")["quantization_config"]
        for names in ("published", "gptqmodel")
    )
    stems = {name.rpartition(".")[0] for name in tensors_of(outputs["published"])}
    grids = {gptq_bits(published, stem) for stem in stems if "proj" in stem or "w1" in stem}
    assert grids == {None, 4, 8}
    for stem in stems:
        assert gptq_bits(named, its_name(stem)) == gptq_bits(published, stem), stem


def gptq_bits(config: dict, stem: str) -> int | None:
    grid = gptq_grid(config, stem)
    return grid and grid["bits"]


@torch.no_grad()
def test_it_is_read_like_the_other(outputs):
    tokens = torch.arange(3, 40)[None]
    logits = [grokquant.load(path)[0](tokens).logits for path in outputs.values()]
    assert torch.equal(*logits)
    loaded = AutoModelForCausalLM.from_pretrained(outputs["gptqmodel"])
    assert torch.equal(loaded(tokens).logits, logits[0])


def test_verify_knows_the_names(outputs, mixtral, tmp_path):
    for path in outputs.values():
        verify(path)
    recipe = recipe_of(mixtral, tmp_path / "out", "gptqmodel")
    output = pipeline.quantize(recipe)
    first = sorted(output.glob("*.safetensors"))[-1]
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    assert any(first.name in str(fault) for fault in faults(output))
    pipeline.repair(recipe)
    verify(output)


def test_plan_and_inspect_tell_who_takes_which(outputs, mixtral, tmp_path):
    for names, other, takes, refuses in (
        ("published", "gptqmodel", "vllm", "gptqmodel"),
        ("gptqmodel", "published", "gptqmodel", "vllm"),
    ):
        plan = build_plan(recipe_of(mixtral, tmp_path / "out", names))
        check_engine(plan, takes)
        found = describe(outputs[names])["runs_in"]
        assert found[takes] == "yes" and found[refuses].startswith("no: ")
        with pytest.raises(GateError, match=f": set output.names to {other}$"):
            check_engine(plan, refuses)


@pytest.mark.parametrize(
    ("source", "form", "reason"),
    [
        ("toy", "gptq", "GPTQModel has no other names for grok-1"),
        ("mixtral", "compressed-tensors", "gptqmodel is allowed with format gptq only"),
    ],
)
def test_where_there_is_nothing_to_rename_it_is_refused(mixtral, tmp_path, source, form, reason):
    path = mixtral if source == "mixtral" else source
    with pytest.raises(InputError, match=f"output.names: {reason}"):
        build_plan(recipe_of(path, tmp_path / "out", "gptqmodel", form))
