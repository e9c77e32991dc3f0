"""The vLLM plugin as far as it goes without vLLM; `make test-engines` runs it inside."""

import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from grokquant import vllm_plugin
from grokquant.errors import InputError
from grokquant.families.grok import GROK_1
from grokquant.job import pipeline
from grokquant.sources import open_source
from grokquant.vllm_plugin.completeness import check_complete

RTN = {"match": "*", "method": "rtn"}
OUTPUTS = {
    "bf16": ([{"match": "*", "method": "unquantized"}], {"format": "bf16", "lm_head": True}),
    "compressed-tensors": (
        [
            RTN | {"match": "*.experts.*", "bits": 4, "group": 32, "symmetric": False},
            RTN | {"bits": 8},
        ],
        {},
    ),
    "gptq": ([RTN | {"bits": 4, "group": 32}], {"format": "gptq"}),
}


@pytest.fixture(params=OUTPUTS)
def names(request, tiny_recipe, tmp_path) -> tuple[list[str], object]:
    """The tensors of an output as vLLM reads them, and its config."""
    rules, form = OUTPUTS[request.param]
    recipe = tiny_recipe(*rules, output={"path": str(tmp_path / "out")} | form)
    source = open_source(pipeline.quantize(recipe))
    config = GROK_1.config(source.path, GROK_1.fields(source.path, source.config))
    return list(source.tensors), config


def test_the_entry_point_leads_to_a_function():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["grokquant"].partition(":")
    assert callable(getattr(import_module(module), name))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_nothing_happens():
    assert vllm_plugin.register() is None


def test_nothing_that_vllm_imports_imports_numba():
    script = (
        "import sys, grokquant.vllm_plugin.completeness, grokquant.families.grok_model;"
        "print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_whole_checkpoint_is_accepted_and_each_missing_tensor_is_named(names):
    found, config = names
    experts = range(config.num_local_experts)
    check_complete(found, config, experts)
    # A zero point alone may be missing: then the grid is symmetric, which vLLM's layer knows.
    needed = [n for n in found if n != "lm_head.weight" and not n.endswith("zero_point")]
    for name in needed:
        with pytest.raises(InputError, match=rf"{name.rpartition('.')[0]} is incomplete"):
            check_complete([other for other in found if other != name], config, experts)


def test_unknown_tensors_are_errors(names):
    found, config = names
    experts = range(config.num_local_experts)
    for name in ("model.layers.0.attn.q_proj.weight", "model.layers.2.pre_moe_norm.weight"):
        with pytest.raises(InputError, match="unexpected tensor in model.layers"):
            check_complete([*found, name], config, experts)
    with pytest.raises(InputError, match="o_proj is incomplete: there is .*bias"):
        check_complete([*found, "model.layers.0.self_attn.o_proj.bias"], config, experts)


def test_a_rank_of_several_reads_its_own_experts(names):
    found, config = names
    kept = [name for name in found if ".experts." not in name or ".experts.0." in name]
    check_complete(kept, config, {0})
    with pytest.raises(InputError, match=r"experts\.1\.w1 is incomplete: there is nothing"):
        check_complete(kept, config, {0, 1})
