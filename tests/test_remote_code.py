"""`output.remote_code`: transformers opens Grok-1 with the file of classes, where we are not."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import seal
from test_llama_cpp import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import grokquant
from grokquant.errors import InputError
from grokquant.families import FAMILIES
from grokquant.families.grok import REMOTE_CODE
from grokquant.families.grok_model import Grok1ForCausalLM
from grokquant.job import pipeline
from grokquant.job.plan import build_plan
from grokquant.job.verify import faults, verify
from grokquant.recipe import parse_recipe
from grokquant.reporting.inspection import describe
from grokquant.runtime.packed import PackedMatrix

RTN = {"match": "*", "method": "rtn", "bits": 4, "group": 32, "scale": "absmax"}
RULES = {
    "bf16": [{"match": "*", "method": "unquantized"}],
    "int4": [RTN],
    "int8": [RTN | {"bits": 8}],
    "int4 and copied int8": [
        RTN | {"match": "*.experts.*"},
        {"match": "*", "method": "copy", "group": 32},
    ],
}
PROMPT = "The function returns the value of the list."
ALONE = """
import sys
sys.modules["grokquant"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for path in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    tokens = tokenizer(sys.argv[1], return_tensors="pt").input_ids
    eager = {"experts_implementation": "eager"}
    ways = {"by default": {}, "eager": eager, "in float32": eager | {"dtype": torch.float32}}
    for name, how in ways.items():
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **how)
        with torch.no_grad():
            found[path, name] = tokens, model(tokens).logits
torch.save(found, "found.pt")
"""


def recipe_of(source: Path | str, path: Path, rules: list[dict], form: str, **output: object):
    output = {"path": str(path), "format": form, "remote_code": True} | output
    return parse_recipe({"model": {"path": str(source)}, "quantize": rules, "output": output})


@pytest.fixture(scope="module")
def outputs(tiny_release, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("outputs")
    made = {}
    for name, rules in RULES.items():
        form = "bf16" if name == "bf16" else "compressed-tensors"
        recipe = recipe_of(tiny_release, place / name.replace(" ", "-"), rules, form)
        made[name] = pipeline.quantize(recipe)
    return made


@pytest.fixture(scope="module")
def found(outputs, tmp_path_factory) -> dict:
    """Tokens and logits of transformers in a process that cannot import this package."""
    place = tmp_path_factory.mktemp("alone")
    environment = os.environ | {"HF_MODULES_CACHE": str(place), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", ALONE, PROMPT, *map(str, outputs.values())]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(place / "found.pt")


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_transformers_alone_computes_what_we_do(outputs, found, name):
    path = outputs[name]
    model, tokenizer = grokquant.load(path, packed=False)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = model(tokens).logits
    for how in ("eager", "by default"):
        assert torch.equal(found[str(path), how][0], tokens)
    assert torch.equal(found[str(path), "eager"][1], wanted)
    # By other kernels for experts, and with attention that is not rounded to bfloat16.
    for how in ("by default", "in float32"):
        logits = found[str(path), how][1]
        assert (logits - wanted).norm() < 0.02 * wanted.norm(), how
    assert logits.dtype == torch.float32


def test_where_we_are_imported_our_own_classes_are_used(outputs):
    """With or without trust, and without a question."""
    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(outputs["int4"], trust_remote_code=trust)
        assert type(model) is Grok1ForCausalLM
        assert any(isinstance(module, PackedMatrix) for module in model.modules())
    tokenizer = AutoTokenizer.from_pretrained(outputs["int4"])
    assert type(tokenizer).__module__ == "grokquant.families.grok_tokenizer"


@pytest.mark.parametrize("name", RULES)
def test_verify_and_inspect_know_the_file(outputs, name):
    verify(outputs[name])
    described = describe(outputs[name])
    assert described["notes"] == []
    if name != "bf16":
        assert described["runs_in"]["transformers"] == "yes"


def test_the_file_imports_nothing_of_ours(outputs):
    text = (outputs["int4"] / REMOTE_CODE.file).read_text()
    assert text == REMOTE_CODE.text()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    assert {name.split(".")[0] for name in imported} == {"math", "torch", "transformers", "typing"}
    classes = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert classes >= {REMOTE_CODE.config, REMOTE_CODE.model, REMOTE_CODE.tokenizer}


def test_without_the_key_there_is_no_code(tiny_recipe):
    output = pipeline.quantize(tiny_recipe(RTN))
    assert "auto_map" not in json.loads((output / "config.json").read_text())
    assert "auto_map" not in json.loads((output / "tokenizer_config.json").read_text())
    assert not list(output.glob("*.py"))


def faults_of(output: Path) -> str:
    return "\n".join(map(str, faults(output)))


def test_verify_names_code_that_was_changed(tiny_release, tmp_path):
    recipe = recipe_of(tiny_release, tmp_path / "out", RULES["int4"], "compressed-tensors")
    output = pipeline.quantize(recipe)
    code = output / REMOTE_CODE.file
    code.write_text(code.read_text() + "import os\n")
    seal(output)
    assert f"{code}: is not the code that this version of grokquant writes" in faults_of(output)
    assert pipeline.repair(recipe) == output
    verify(output)
    (output / "other.py").write_text("")
    assert f"{output / 'other.py'}: is code" in faults_of(output)
    (output / "other.py").unlink()
    code.unlink()
    assert f"{code}: planned, but missing" in faults_of(output)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_verify_names_an_auto_map_of_somebody_else(tiny_recipe, name):
    output = pipeline.quantize(tiny_recipe(RTN))
    config = json.loads((output / name).read_text())
    classes = {"AutoTokenizer": ["a/b--c.D", None], "AutoConfig": "a/b--c.D"}
    (output / name).write_text(json.dumps(config | {"auto_map": classes}))
    seal(output)
    assert f"{output / name}: auto_map" in faults_of(output)


def test_code_of_the_source_is_not_carried_over(outputs, tmp_path):
    """An output as a source; with the key it gets the file anew."""
    source = outputs["bf16"]
    recipe = recipe_of(source, tmp_path / "without", [RTN], "compressed-tensors", remote_code=False)
    output = pipeline.quantize(recipe)
    verify(output)
    assert not list(output.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((output / name).read_text())
    output = pipeline.quantize(recipe_of(source, tmp_path / "with", [RTN], "compressed-tensors"))
    verify(output)
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["auto_map"] == REMOTE_CODE.tokenizer_auto_map


@pytest.mark.parametrize(
    ("form", "rules", "reason"),
    [
        ("gptq", [RTN], "experts in gptq, which stay random"),
        ("gguf", [{"match": "*", "method": "rtn", "grid": "q8_0"}], "formats other than"),
        ("compressed-tensors", [RTN | {"symmetric": False}], "zero points"),
    ],
)
def test_what_transformers_could_not_read_is_refused(tiny_release, tmp_path, form, rules, reason):
    with pytest.raises(InputError, match=f"output.remote_code: transformers alone.* {reason}"):
        build_plan(recipe_of(tiny_release, tmp_path / "out", rules, form))


def test_families_of_transformers_need_no_code(tmp_path):
    others = [FAMILIES[name] for name in FAMILIES if FAMILIES[name].name != "grok-1"]
    assert others and not any(family.remote_code for family in others)
    config = AutoConfig.for_model("mixtral", **SIZES | {"num_local_experts": 2})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    with pytest.raises(InputError, match=r"^output.remote_code: transformers has mixtral itself$"):
        build_plan(recipe_of(tmp_path / "in", tmp_path / "out", [RTN], "compressed-tensors"))
