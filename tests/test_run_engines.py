"""vLLM itself runs outputs: `make test-engines`; what it gave its modules is recorded.

`make test` checks our configs against the recorded file, which holds names and grids as the engine
sees them.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reader_envs import only_with_engines, run_reader
from safetensors import safe_open
from test_engines import gptq_grid, vllm_scheme
from test_llama_cpp import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.errors import GateError
from grokquant.job import pipeline
from grokquant.job.metadata import output_config
from grokquant.job.plan import build_plan, check_engine
from grokquant.recipe import Recipe, parse_recipe
from grokquant.toy import TOY_PATH

RECORDED = Path(__file__).parent / "recorded" / "vllm.json"
RTN = {"match": "*", "method": "rtn", "group": 32}
EXPERTS = RTN | {"match": "*.experts.*", "bits": 4}
MLP = RTN | {"match": "*.mlp.*", "bits": 4}
INT8 = RTN | {"bits": 8}
KEEP = {"match": "*", "method": "unquantized"}
# name -> (model, format, rules)
CASES: dict[str, tuple[str, str, list[dict]]] = {
    "toy bf16": ("toy", "bf16", [KEEP]),
    "toy int8": ("toy", "compressed-tensors", [INT8]),
    "toy int4 int8": ("toy", "compressed-tensors", [EXPERTS, INT8]),
    "toy gptq int4 int8": ("toy", "gptq", [EXPERTS, INT8]),
    "mixtral int4 int8": ("mixtral", "compressed-tensors", [EXPERTS, INT8]),
    "mixtral gptq int4 int8": ("mixtral", "gptq", [EXPERTS, INT8]),
    "mixtral layers": (
        "mixtral",
        "gptq",
        [INT8 | {"match": "layers.1.*"}, RTN | {"bits": 4}],
    ),
    "llama int4 int8": ("llama", "compressed-tensors", [MLP, INT8]),
    "llama gptq mlp": ("llama", "gptq", [MLP, KEEP]),
    "llama bf16": ("llama", "bf16", [KEEP]),
    "mixtral bf16": ("mixtral", "bf16", [KEEP]),
    "mixtral zero points": (
        "mixtral",
        "compressed-tensors",
        [RTN | {"bits": 4, "symmetric": False}],
    ),
    "mixtral channel": (
        "mixtral",
        "compressed-tensors",
        [RTN | {"bits": 8, "group": "channel"}],
    ),
}
# What vLLM refuses, of which the table of consumers has a row each.
REFUSED: dict[str, tuple[str, str, list[dict]]] = {
    "llama 3 bits": ("llama", "gptq", [RTN | {"bits": 3}]),
    "llama q unlike k": (
        "llama",
        "compressed-tensors",
        [INT8 | {"match": "*.attention.q"}, RTN | {"bits": 4}],
    ),
    "mixtral experts of one layer": (
        "mixtral",
        "compressed-tensors",
        [INT8 | {"match": "*.down"}, RTN | {"bits": 4}],
    ),
    "mixtral whole rows": ("mixtral", "compressed-tensors", [RTN | {"bits": 4, "group": 256}]),
    "mixtral names of gptqmodel": ("mixtral", "gptq", [RTN | {"bits": 4}]),
    "llama nf4": ("llama", "bitsandbytes", [{"match": "*", "method": "rtn", "grid": "nf4"}]),
    "toy gguf": ("toy", "gguf", [{"match": "*", "method": "rtn", "grid": "q8_0"}]),
}


def recipe_of(case: str, directory: Path) -> Recipe:
    """The recipe of a case; its model is made where it is not the toy."""
    model, form, rules = (CASES | REFUSED)[case]
    names = "gptqmodel" if "gptqmodel" in case else "published"
    path = model if model == "toy" else str(directory / "in")
    if model != "toy":
        torch.manual_seed(0)
        experts = {"num_local_experts": 4} if model == "mixtral" else {}
        config = AutoConfig.for_model(model, **SIZES | experts)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "in" / "tokenizer.model")
    return parse_recipe(
        {
            "model": {"path": path},
            "quantize": rules,
            "output": {"path": str(directory / "out"), "format": form, "names": names},
        }
    )


def logprobs(output: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Ours of every token after the first, float32 [rows, time - 1, vocabulary]."""
    model, _ = grokquant.load(output, dtype=dtype)
    with torch.no_grad():
        return model(tokens).logits[:, :-1].float().log_softmax(-1)


def divergence(ours: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(ours || other) of each token."""
    return (ours.exp() * (ours - other)).sum(-1)


class TestVllm:
    pytestmark = only_with_engines

    @pytest.mark.parametrize("case", CASES)
    def test_it_computes_what_we_do(self, case, tmp_path):
        """Medians: a mean is ruled by the few tokens whose experts differ."""
        output = pipeline.quantize(recipe_of(case, tmp_path))
        tokens = torch.randint(3, 2000, (3, 110), generator=torch.Generator().manual_seed(0))
        np.save(tmp_path / "tokens.npy", tokens.numpy())
        dtype = "float32" if case == "toy bf16" else "bfloat16"
        found = tmp_path / "found.safetensors"
        run_reader("vllm", "run_vllm.py", output, dtype, tmp_path / "tokens.npy", found)
        with safe_open(found, "pt") as file:
            theirs, notes = file.get_tensor("logprobs"), file.metadata()
        ours = logprobs(output, tokens, torch.float32)
        if dtype == "float32":
            assert divergence(ours, theirs).mean() < 1e-7
        else:
            floor = divergence(ours, logprobs(output, tokens, torch.bfloat16)).median()
            assert divergence(ours, theirs).median() < 2 * floor
        known = {"engine": notes["engine"], "without a kernel": notes["replaced"]}
        record(case, known | {"grids": json.loads(notes["grids"])})

    @pytest.mark.parametrize("case", REFUSED)
    def test_what_it_refuses(self, case, tmp_path):
        output = pipeline.quantize(recipe_of(case, tmp_path))
        np.save(tmp_path / "tokens.npy", np.full((1, 8), 3))
        with pytest.raises(AssertionError) as caught:
            run_reader("vllm", "run_vllm.py", output, "bfloat16", tmp_path / "tokens.npy", "none")
        errors = re.findall(r"(?:\w*Error|Value error)\b.*$", str(caught.value), re.MULTILINE)
        record(case, {"refused": errors[-1][:120]})


def record(case: str, found: dict) -> None:
    known = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    known[case] = found
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


# Modules that are not linear layers, which no grid is looked up for.
NOT_LINEAR = ("embed_tokens", "attn")


@pytest.mark.parametrize("case", CASES)
def test_our_config_gives_each_module_of_vllm_the_grid_that_it_found(case, tmp_path):
    """By vLLM's rules as test_engines.py has them; if this fails, ask vLLM: `make test-engines`."""
    recorded = json.loads(RECORDED.read_text())[case]["grids"]
    config = output_config(build_plan(recipe_of(case, tmp_path))).get("quantization_config")
    looked_up = {name: g for name, g in recorded.items() if name.split(".")[-1] not in NOT_LINEAR}
    assert any(name.endswith("qkv_proj") for name in looked_up)
    for name, grid in looked_up.items():
        assert grid_in(config, name.removesuffix(".routed_experts")) == grid, name


@pytest.mark.parametrize("case", CASES)
def test_the_table_of_consumers_says_that_vllm_takes_it(case, tmp_path):
    check_engine(build_plan(recipe_of(case, tmp_path)), "vllm")


@pytest.mark.parametrize("case", REFUSED)
def test_the_table_of_consumers_says_what_vllm_refuses(case, tmp_path):
    assert json.loads(RECORDED.read_text())[case]["refused"]
    with pytest.raises(GateError, match="vLLM .* does not take"):
        check_engine(build_plan(recipe_of(case, tmp_path)), "vllm")


def grid_in(config: dict | None, module: str) -> list[int] | None:
    """Bits and group that the config gives a module of vLLM."""
    if config is None:
        return None
    if config["quant_method"] == "gptq":
        found = gptq_grid(config, module)
        return found and [found["bits"], found["group_size"]]
    # vLLM asks for experts by the names of the first one.
    found = vllm_scheme(config, f"{module}.0.w1" if module.endswith(".experts") else module)
    return found and [found["num_bits"], found["group_size"] or -1]
