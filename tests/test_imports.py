"""What an import and a command load; and that transformers knows us whichever comes first."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import grokquant

HEAVY = {"numba", "numpy", "pydantic", "rich", "scipy", "torch", "transformers"}
RULE = {"match": "*", "method": "rtn", "bits": 4, "group": 32, "scale": "absmax"}
TRANSFORMERS = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer"


def run(script: str, *arguments: object) -> str:
    """What a new Python prints for `script`, its last line."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def imported_by(script: str, *arguments: object) -> set[str]:
    listed = f"{script}\nimport json, sys\nprint(json.dumps([*sys.modules]))"
    return set(json.loads(run(listed, *arguments)))


COMMAND = """
import sys
from grokquant.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("exit", end.code)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["quantize", "--help"], ["convert", "--help"], ["quantise"]],
    ids=" ".join,
)
def test_help_version_and_typing_errors_load_nothing_heavy(arguments):
    assert HEAVY & imported_by(COMMAND, *arguments) == set()


@pytest.mark.parametrize(
    "command", ["plan", "quantize", "inspect", "generate --prompt x", "eval --reference toy"]
)
def test_a_model_that_is_not_there_is_refused_before_anything_heavy_is_loaded(command):
    assert HEAVY & imported_by(COMMAND, *command.split(), "NOSUCH") == set()


SLIPS = ("recipes", "plan {recipe}", "quantize {recipe} --set bits=8", "plan toy --bits 5")


@pytest.mark.parametrize("command", SLIPS)
def test_what_no_model_is_needed_for_is_told_before_transformers_is_loaded(command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modle: {path: toy}")
    assert "transformers" not in imported_by(COMMAND, *command.format(recipe=recipe).split())


def test_a_rule_looks_for_no_source_of_its_class():
    """pydantic would search all modules for it, which takes half a second of every command."""
    from grokquant.recipe import Rule

    assert not Rule.model_config["use_attribute_docstrings"]
    assert Rule.model_fields["bits"].description.startswith("Bits of an integer")


def test_importing_us_loads_nothing_heavy():
    assert HEAVY & imported_by("import grokquant") == set()


def test_the_parts_of_the_package_are_what_they_were():
    names = ("compare", "evaluate", "evaluation_report", "inspect", "load", "plan",
             "quantization_report", "quantize")  # fmt: skip
    for name in names:
        function = getattr(grokquant, name)
        assert inspect.isfunction(function) and function.__doc__
        assert name in dir(grokquant) and name in grokquant.__all__
    assert list(inspect.signature(grokquant.load).parameters) == [
        "path", "device", "dtype", "packed", "max_memory"
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="'grokquant' has no attribute 'laod'"):
        _ = grokquant.laod


def test_a_family_is_imported_alone():
    loaded = imported_by(
        "from grokquant.families import FAMILIES\n"
        "assert FAMILIES['MixtralForCausalLM'].name == 'mixtral'"
    )
    families = {name for name in loaded if name.startswith("transformers.models.")}
    assert {name.split(".")[2] for name in families} <= {"auto", "mixtral"}
    assert "grokquant.families.mixtral" in loaded and "grokquant.families.grok" not in loaded


@pytest.fixture(scope="module")
def output(tiny_release, tmp_path_factory) -> Path:
    """An output of Grok-1 whose quant_method is one of transformers' own."""
    path = tmp_path_factory.mktemp("imports") / "out"
    return grokquant.quantize(
        {
            "model": {"path": str(tiny_release)},
            "quantize": [RULE],
            "output": {"path": str(path)},
        }
    )


LOADED = """
import sys
path = sys.argv[1]
config = AutoConfig.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
smallest = {"num_hidden_layers": 0, "hidden_size": 8, "vocab_size": 16}
made = AutoModelForCausalLM.from_config(AutoConfig.for_model("grok-1", **smallest))
found = [config, tokenizer, model, model.hf_quantizer, made]
print(*(type(thing).__name__ for thing in found))
"""
AGAIN = "from grokquant.runtime.registry import register\nregister()"


@pytest.mark.parametrize(
    "imports",
    [
        ("import grokquant", TRANSFORMERS),
        (TRANSFORMERS, "import grokquant"),
        ("import transformers.quantizers.auto", "import grokquant", AGAIN, TRANSFORMERS),
    ],
    ids=["we first", "we last", "after quantizers and twice"],
)
def test_transformers_knows_us_whichever_comes_first(output, imports):
    found = run("\n".join([*imports, LOADED]), output).split()
    assert found[:2] == ["Grok1Config", "Grok1Tokenizer"]
    assert found[2:] == ["Grok1ForCausalLM", "PackedQuantizer", "Grok1ForCausalLM"]


def test_a_tokenizer_without_a_model_is_known(output, tmp_path):
    for file in output.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    script = "import sys, grokquant\nfrom transformers import AutoTokenizer\n"
    script += "print(type(AutoTokenizer.from_pretrained(sys.argv[1])).__name__)"
    assert run(script, tmp_path) == "Grok1Tokenizer"


def test_registering_twice_wraps_once():
    from transformers.quantizers import auto

    from grokquant.runtime.registry import register

    configs, finders = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), list(sys.meta_path)
    register()
    assert configs == auto.AUTO_QUANTIZATION_CONFIG_MAPPING and finders == sys.meta_path
    original = configs["gptq"].__base__
    assert original.__module__.startswith("transformers.")


WORKERS = """
import multiprocessing, sys
from worker import loaded

if __name__ == "__main__":
    import grokquant
    from transformers import AutoModelForCausalLM
    config = AutoModelForCausalLM.from_pretrained(sys.argv[1]).config
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.apply(loaded, (config, sys.argv[1])))
"""
WORKER = """
def loaded(config, path):
    from transformers import AutoModelForCausalLM
    made = AutoModelForCausalLM.from_config(config)
    model = AutoModelForCausalLM.from_pretrained(path)
    found = (config, config.quantization_config, made, model, model.hf_quantizer)
    return [type(thing).__name__ for thing in found]
"""


def test_a_worker_that_unpickles_a_config_of_ours_knows_us(output, tmp_path):
    """It imports only transformers by itself."""
    (tmp_path / "main.py").write_text(WORKERS)
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, tmp_path / "main.py", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, config = "Grok1ForCausalLM", ["Grok1Config", "PackedConfig"]
    assert done.stdout.split() == [*config, model, model, "PackedQuantizer"]
