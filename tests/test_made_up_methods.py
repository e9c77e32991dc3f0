"""A method is one file and one row: made-up ones are planned, timed, run and resumed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ATTENTION, EXPERTS, run_stored_layer
from jobs import interrupt_after

from grokquant.checkpoint import open_checkpoint
from grokquant.grids import Scheme
from grokquant.job import pipeline
from grokquant.job.budget import timing
from grokquant.job.layer import LayerQuantizer
from grokquant.job.plan import build_plan
from grokquant.job.workdir import States
from grokquant.methods import METHODS
from grokquant.methods.gptq import Gptq
from grokquant.methods.method import Layer, LayerRounding, Needs, Revision, dense
from grokquant.methods.rtn import ScaleSettings, quantize_rtn
from grokquant.streaming.blocks import CALIBRATION_DTYPE, BlockwiseModel
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer

PROGRAM = Path(__file__).parent / "made_up_method.py"
NORM = "model.layers.{}.post_moe_norm.weight"
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run(tiny_recipe, tmp_path) -> Run:
    """The command, to which the method was added; recipes use it for all experts."""
    rule = {"match": "layers.*.experts.*", "method": "rtn", "bits": 4, "group": 32}
    text = tiny_recipe(rule, ATTENTION).to_yaml()
    text = text.replace("method: rtn", "method: towards-zero\n  reluctance: 0.5")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)

    def command(name: str, *arguments: str, out: Path) -> subprocess.CompletedProcess:
        where = ["--set", f"output.path={out}", "--set", "output.shard=20KB"]
        line = [sys.executable, str(PROGRAM), name, str(recipe), *where, *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=300)

    return command


@pytest.mark.parametrize("data", [[], ["--with-data"]], ids=["without data", "with data"])
def test_a_new_method_is_planned_and_runs(run, tmp_path, tiny_release, data):
    planned = run("plan", "--json", *data, out=tmp_path / "out")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["seconds"] > 0 and plan["peak_bytes"] > 0
    assert plan["seconds"] == pytest.approx(sum(plan["seconds_by_step"].values()))
    done = run("quantize", *data, out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "quantization-report.json").read_text())
    assert {row["method"] for row in report["units"]} == {"towards-zero", "copy"}
    source = dict(open_checkpoint(tiny_release).units())
    for name, ref in open_checkpoint(tmp_path / "out").units():
        if ".experts." in name:
            nearest = quantize_rtn(dense(source[name].load()), Scheme(4, 32)).codes
            codes = ref.read_quantized().codes
            assert not torch.equal(codes, nearest), "another method ran under this name"


def test_a_new_method_is_resumed_with_the_same_bytes(run, tmp_path):
    assert run("quantize", "--with-data", out=tmp_path / "whole").returncode == 0
    died = run("quantize", "--die-after", "20", "--with-data", out=tmp_path / "again")
    assert died.returncode == 9
    assert not (tmp_path / "again").exists()
    resumed = run("quantize", "--with-data", out=tmp_path / "again")
    assert "files are done" in resumed.stderr
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_keys_and_texts_of_a_new_method_reach_the_schema(tmp_path):
    program = (
        "import made_up_method as made_up, json\n"
        "made_up.METHODS['towards-zero'] = made_up.TowardsZero()\n"
        "from grokquant.recipe import Rule\n"
        "print(json.dumps(Rule.model_json_schema()['properties']))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PROGRAM.parent
    )
    keys = json.loads(found.stdout)
    assert "towards-zero" in keys["method"]["enum"]
    assert "`towards-zero` rounds towards zero" in keys["method"]["description"]
    assert keys["reluctance"]["description"] == "A share of a step."
    assert keys["reluctance"]["maximum"] == 1


class Refit(Gptq):
    """Looks at whole layers of both models and tunes what is carried over."""

    needs = Needs.REFERENCE
    revises = True

    def begin_layer(self, layer: Layer) -> "RefitLayer":
        return RefitLayer(self, layer)


class RefitLayer(LayerRounding):
    def revise(self) -> Revision:
        layer = self.layer
        assert layer.outputs.shape == layer.reference_outputs.shape == layer.inputs.shape
        seen.append((layer.index, layer.reference_inputs, layer.reference_outputs))
        unit = layer.units[-1]
        W = layer.original(unit.tensor).float()
        norm = NORM.format(layer.index)
        return Revision(
            codes={unit.name: quantize_rtn(W, unit.scheme, "absmax")},
            tensors={norm: layer.original(norm) * 0.5},
        )


seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []


@pytest.fixture
def refit(monkeypatch, tiny_recipe, tmp_path):
    monkeypatch.setitem(METHODS, "gptq", Refit())
    seen.clear()
    return tiny_recipe(EXPERTS, output={"path": str(tmp_path / "out"), "shard": "20KB"})


def test_a_method_may_revise_a_whole_layer(refit, tiny_release):
    output = open_checkpoint(pipeline.quantize(refit))
    source = open_checkpoint(tiny_release)
    units, stored = dict(output.units()), dict(source.units())
    for layer in range(2):
        norm = NORM.format(layer)
        before = source.source.tensors[norm].read()
        assert torch.equal(output.source.tensors[norm].read(), before * 0.5)
        name = f"layers.{layer}.experts.3.down"
        nearest = quantize_rtn(stored[name].read().float(), Scheme(4, 32), "absmax")
        assert torch.equal(units[name].read_quantized().codes, nearest.codes)


def test_a_method_sees_the_original_model(refit, tiny_release):
    pipeline.quantize(refit)
    checkpoint = open_checkpoint(tiny_release)
    rows = calibration_rows(refit.calibration, load_tokenizer(checkpoint), checkpoint)
    model = BlockwiseModel(checkpoint, CALIBRATION_DTYPE)
    hidden = model.embed(rows)
    for index, inputs, outputs in seen:
        assert torch.equal(hidden, inputs)
        model.load_layer(index)
        hidden = run_stored_layer(model, index, hidden)
        assert torch.equal(hidden, outputs)
    assert len(seen) == 2


def test_later_layers_see_what_was_revised(refit):
    plan = build_plan(refit)
    rows = calibration_rows(refit.calibration, load_tokenizer(plan.checkpoint), plan.checkpoint)
    running = BlockwiseModel(plan.checkpoint, CALIBRATION_DTYPE)
    hidden = running.embed(rows)
    states = States(hidden, hidden)
    for index in range(2):
        states = LayerQuantizer(plan, running, index, lambda *_: None, lambda _: None).run(states)
    written = BlockwiseModel(open_checkpoint(pipeline.quantize(refit)), CALIBRATION_DTYPE)
    after = written.embed(rows)
    for index in range(2):
        written.load_layer(index)
        after = run_stored_layer(written, index, after)
    assert torch.equal(states.hidden, after)


def test_a_revised_layer_is_resumed_with_the_same_bytes(refit, monkeypatch, tmp_path):
    whole = pipeline.quantize(refit)
    changed = refit.output.model_copy(update={"path": str(tmp_path / "again")})
    again = refit.model_copy(update={"output": changed})
    interrupt_after(15, again, monkeypatch)
    resumed = pipeline.quantize(again)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (resumed / path.name).read_bytes()


def test_matrices_with_one_input_are_captured_and_factorized_once(tiny_recipe, monkeypatch):
    """q, k and v: one capture and one factorisation a layer; o another."""
    counts = {"captured": 0, "factorized": 0}
    inputs_of = BlockwiseModel.inputs_of

    def capture(model: BlockwiseModel, *given: object) -> torch.Tensor:
        counts["captured"] += 1
        return inputs_of(model, *given)  # type: ignore[arg-type]

    factorize = METHODS["gptq"].round.__globals__["factorize"]

    def count(*given: object) -> object:
        counts["factorized"] += 1
        return factorize(*given)

    monkeypatch.setattr(BlockwiseModel, "inputs_of", capture)
    monkeypatch.setattr("grokquant.methods.gptq.factorize", count)
    rule = {"match": "layers.*.attention.*", "method": "gptq", "bits": 4, "group": 64}
    pipeline.quantize(tiny_recipe(rule))
    assert counts == {"captured": 2 * 2, "factorized": 2 * 2}


def test_every_method_in_the_table_is_timed_in_pieces(tiny_recipe, monkeypatch):
    rules = [
        {"match": "layers.*.experts.0.*", "method": "rtn", "bits": 4, "group": 32},
        EXPERTS,
        ATTENTION,
    ]
    assert timing.expected_seconds(build_plan(tiny_recipe(*rules))) > 0


def test_settings_of_a_fallback_fit_the_method():
    for method in METHODS.values():
        if method.needs is not Needs.NOTHING:
            assert method.fallback is not None
            assert issubclass(method.settings, method.fallback.settings)
    assert ScaleSettings().scale == "mse"


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("scale: float = 1.0", "key scale: another method has it with another type or default"),
        ("group: int = 32", "key group: every rule has a key of this name already"),
        ("slack: float", "key slack: has no default"),
    ],
)
def test_keys_that_a_rule_cannot_have_are_refused_at_import(key, complaint):
    program = (
        "from dataclasses import dataclass\n"
        "from grokquant.methods import METHODS, rtn\n"
        f"@dataclass(frozen=True)\nclass Settings:\n    {key}\n"
        "class Odd(rtn.Rtn):\n    name, text, settings = 'odd', 'is odd', Settings\n"
        "METHODS['odd'] = Odd()\n"
        "import grokquant.recipe\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"method odd: {complaint}" in found.stderr
