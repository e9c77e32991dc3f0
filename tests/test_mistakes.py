"""Slips that people make: the line they get says where it is and what to do."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from grokquant.cli import main
from grokquant.cli.options import MODEL
from grokquant.devices import device_of
from grokquant.errors import InputError
from grokquant.files.atomic import check_writable
from grokquant.files.json_objects import read_json_object
from grokquant.files.regular import read_regular
from grokquant.files.unfinished import check_directory
from grokquant.job.plan import build_plan
from grokquant.recipe import load_recipe, parse_recipe
from grokquant.sources import open_source
from grokquant.sources.safetensors_directory import parse_header
from grokquant.text.documents import load_documents

RULE = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 128}
VALUES = {"model": {"path": "toy"}, "quantize": [RULE], "output": {"path": "out"}}
SLIPS = {
    'quantize[0].method=gpqt': 'quantize[0].method: expected unquantized, copy, rtn, gptq or '
    'two-sided, not "gpqt"; did you mean gptq?',
    "quantize[0].grid=q4_km": "did you mean q4_k?",
    "bits=8": "bits: unknown key here, did you mean quantize[0].bits?",
    "path=x": "path: unknown key here, did you mean model.path or output.path?",
    "samples=8": "samples: unknown key here, did you mean calibration.samples or eval.samples?",
    "nothing=8": "nothing: unknown key, expected one of model, calibration,",
    "output.format=Q4_K_M": "Q4_K_M is no format: the rules say grid: q4_k, the format is gguf",
    "quantize={match: x}": "quantize: expected a list, each entry of which begins with a dash",
    "quantize[0].bits=5": "quantize[0].bits: expected 2, 3, 4 or 8, not 5",
    "calibration.samples=many": 'calibration.samples: should be a valid integer, not "many"',
}  # fmt: skip


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(VALUES))
    return path


@pytest.mark.parametrize("change", SLIPS)
def test_slips_in_a_recipe(file, change):
    with pytest.raises(InputError) as error:
        load_recipe(file, [change])
    assert SLIPS[change] in str(error.value)


def test_choices_may_be_written_in_capitals(file):
    changes = ["quantize[0].method=GPTQ", "output.format=GGUF", "quantize[0].scale=MSE"]
    changes += ["quantize[0].bits=null", "quantize[0].group=null", "quantize[0].grid=Q4_K"]
    recipe = load_recipe(file, changes)
    rule = recipe.quantize[0]
    assert (rule.method, rule.grid, recipe.output.format) == ("gptq", "q4_k", "gguf")
    with pytest.raises(InputError, match="did you mean .*match"):
        load_recipe(file, ["quantize[0].MATCH=x"])


@pytest.mark.parametrize(
    ("rule", "output_format", "way_out"),
    [
        (RULE, "gguf", "such as grid: q4_k or iq4_nl; output.format: compressed-tensors or gptq"),
        ({**RULE, "bits": 3}, "compressed-tensors", "; output.format: gptq can"),
        ({"match": "*", "method": "rtn", "grid": "q4_k"}, "gptq", "; output.format: gguf can"),
        ({"match": "*", "method": "rtn", "grid": "nf4"}, "gguf", "output.format: bitsandbytes can"),
    ],
)
def test_a_grid_that_the_format_cannot_hold(rule, output_format, way_out):
    output = {"path": "out", "format": output_format}
    with pytest.raises(InputError) as error:
        build_plan(parse_recipe(VALUES | {"quantize": [rule], "output": output}))
    assert way_out in str(error.value)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "abacus", "CPU "])
def test_devices_that_are_none(name):
    with pytest.raises(InputError, match="device: expected auto, cpu, cuda or cuda:N, not"):
        device_of(name)
    assert device_of("cpu") == torch.device("cpu")


def test_texts_in_other_encodings(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("hello", encoding="utf-16")
    with pytest.raises(InputError, match=r"not UTF-8 text .* iconv -f UTF-16 -t UTF-8"):
        load_documents(str(path), "calibration")


def test_h_is_help_everywhere():
    for command in ("", *main.commands):
        short, long = (
            CliRunner().invoke(main, [*([command] if command else []), option])
            for option in ("-h", "--help")
        )
        assert short.exit_code == 0 and short.output == long.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["quantize", "toy", "--bits", "7"], "'7' is not one of '2', '3', '4', '5', '6', '8'"),
        (["quantize", "toy", "--grid", "q4_k_m"], "--grid: no grid 'q4_k_m', expected one of nf4"),
        (["quantize", "toy", "--device", "gpu"], "grokquant: --device: expected auto, cpu, cuda"),
        (["plan", "toy", "--output", "/proc/x"], "grokquant: /proc/x: cannot be "),
        (
            ["plan", "toy", "--text", "x.txt"],
            "No such option '--text'; the recipe has it: --set calibration.text=VALUE or --set "
            "eval.text=VALUE",
        ),
        (
            ["plan", "toy", "--max-fallbacks", "1"],
            "'; the recipe has it: --set max_fallbacks=VALUE",
        ),
        (
            ["quantize", "toy", "--format", "Q4_K"],
            "q4_k is a grid: `grokquant quantize MODEL --gri",
        ),
        (["quantize", "toy", "--format", "integer"], "'bf16'. Give the bits of integers by --bits"),
        (["plan", "toy", "--format", "INT4"], "'bf16'. Give the bits of integers by --bits"),
        (["plan", "toy", "--format", "ggfu"], "'bf16'. Did you mean gguf?"),
        (
            ["plan", "toy", "--format", "q4_k_m"],
            "q4_k is a grid: `grokquant quantize MODEL --grid q4_k`",
        ),
        (["plan", "toy", "--format", "integer"], "Give the bits of integers by --bits.\n"),
        (
            ["compare", "toy"],
            "; name results that `grokquant eval` has evaluated",
        ),
        (["inspect", __file__], "is a file, expected the directory of a checkpoint\n"),
        (["plan", "toy", "--nothing"], "Error: No such option '--nothing'."),
    ],
)
def test_slips_on_the_command_line(arguments, complaint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert complaint in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_in_place_of_its_result(file):
    with pytest.raises(InputError, match=r"recipe.yaml: is a file, .* give the output.path"):
        check_directory(file)


def test_a_path_of_nothing_names_what_is_like_it_or_where_it_was_looked_for(tmp_path, monkeypatch):
    (tmp_path / "Mixtral").mkdir()
    (tmp_path / "mine.yaml").write_text("")
    meant = rf"no such directory; did you mean {tmp_path}/Mixtral\?$"
    with pytest.raises(InputError, match=meant):
        check_directory(tmp_path / "mixtrl")
    with pytest.raises(
        InputError, match=r"No such file or directory; did you mean .*/mine.yaml\?$"
    ):
        read_regular(tmp_path / "MINE.yml", 10)
    with pytest.raises(InputError, match="nothing: no such directory$"):
        check_directory(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"nothing: no such directory; looked in {tmp_path}$"):
        check_directory(Path("nothing"))


def test_the_toy_may_be_written_in_capitals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MODEL.convert("Toy", None, None) == "toy"
    Path("Toy").mkdir()
    assert MODEL.convert("Toy", None, None) == "Toy"  # a directory of this name


def test_directories_that_cannot_be_written_say_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "new" / "below")
    with pytest.raises(InputError, match="cannot be written: it is a file, not a directory"):
        check_writable(tmp_path / "file")
    with pytest.raises(InputError, match=f"below: cannot be written: {tmp_path}/file is a file"):
        check_writable(tmp_path / "file" / "below")
    monkeypatch.setattr("grokquant.files.atomic.os.access", lambda *_: False)  # root may do all
    with pytest.raises(InputError, match="new: cannot be written: Permission denied"):
        check_writable(tmp_path / "new")


def test_files_that_hold_nothing(tmp_path):
    readers = {
        "model.safetensors": lambda path: parse_header(path.open("rb"), str(path)),
        "model.gguf": open_source,
        "config.json": read_json_object,
    }
    for name, read in readers.items():
        (tmp_path / name).write_text("")
        with pytest.raises(InputError, match=f"{name}: is empty; get it again"):
            read(tmp_path / name)


def test_a_model_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a checkpoint: it has a config.json but no weights"):
        open_source(tmp_path)
