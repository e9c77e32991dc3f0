"""Plans that can be trusted: bytes exactly, memory and time nearly."""

import shutil
import time

import pytest
from conftest import ATTENTION, EXPERTS
from make_release import write_hollow_grok_1

from grokquant.job import pipeline
from grokquant.job.budget import budget_of, timing
from grokquant.job.budget.memory import peak_step, resident_bytes
from grokquant.job.budget.probe_model import ProbeModel
from grokquant.job.plan import build_plan
from grokquant.methods.method import Cost
from grokquant.toy import TOY_PATH

RTN = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32, "scale": "absmax"}


@pytest.mark.parametrize("rules", [(EXPERTS, ATTENTION), (RTN,), (EXPERTS | {"symmetric": False},)])
@pytest.mark.parametrize("shard", ["1KB", "200KB", "1GB"])
def test_every_file_has_its_planned_size(tiny_recipe, tmp_path, rules, shard):
    recipe = tiny_recipe(*rules, output={"path": str(tmp_path / "out"), "shard": shard})
    plan = build_plan(recipe)
    output = pipeline.quantize(recipe)
    sizes = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
    assert sizes == {file.name: file.layout.size for file in plan.files}
    assert plan.output_bytes == sum(sizes.values())


def test_a_budget_names_a_step_and_takes_seconds(tiny_recipe):
    plan = build_plan(tiny_recipe())
    start = time.process_time()  # other programs do not count
    budget = budget_of(plan)
    assert time.process_time() - start < 120
    assert budget.peak.name.split(":")[0] in {*plan.units, "embedding", *plan.carried_over}
    assert budget.peak_bytes > resident_bytes() and budget.seconds > 0
    assert min(budget.times.values()) >= 0 and "reading" in budget.times


def test_the_plan_counts_each_product_once(tiny_recipe, monkeypatch):
    """With a second for each multiply-add, steps take as many seconds as a run has of them."""
    monkeypatch.setattr(timing, "_SMALL_LAYER", 0)
    monkeypatch.setattr(timing, "_rates", lambda plan, model: timing._Rates(1, 1, 1, 1))
    free = timing._Rounding(shared=0, own=0, weights=1 << 60, square=1, cost=Cost())
    monkeypatch.setattr(timing, "_round_piece", lambda unit, stored: free)
    plan = build_plan(tiny_recipe(EXPERTS, experts={"blend_tokens": 0}))
    times = timing.expected_times(plan)
    layers, experts, hidden, inner = 2, plan.checkpoint.num_experts, 128, 256
    routed = 16 * 64 * 2 // experts
    of_all = layers * experts
    assert times["forward of experts"] == of_all * routed * 3 * hidden * inner
    assert times["Hessians"] == of_all * routed * (hidden**2 + inner**2)
    assert times["factorization"] == of_all * (hidden**3 + inner**3) / 6


def test_a_copied_attention_is_not_captured(tiny_recipe, monkeypatch):
    """Its passes: one where it is copied, parts of others where its inputs are captured."""
    monkeypatch.setattr(timing, "_SMALL_LAYER", 0)
    monkeypatch.setattr(ProbeModel, "time_outside_experts", lambda *_: (1.0, 1))
    tokens = 16 * 64
    gptq = {"match": "layers.*.attention.*", "method": "gptq", "bits": 8, "group": 32}
    passes = [
        timing.expected_times(build_plan(tiny_recipe(EXPERTS, rule)))["forward outside experts"]
        for rule in (ATTENTION, gptq)
    ]
    assert passes[0] == 2 * tokens
    q_k_v = 128 * 128 + 2 * 128 * 64
    assert passes[1] == pytest.approx(2 * tokens * (1 + q_k_v / (q_k_v + 128 * 128)))


def test_the_probe_leaves_nothing_behind(tiny_recipe, tmp_path):
    before = sorted(tmp_path.iterdir())
    budget_of(build_plan(tiny_recipe()))
    assert sorted(tmp_path.iterdir()) == before


def test_a_smaller_hessian_lowers_the_peak_of_grok_1(tmp_path, tiny_recipe, monkeypatch):
    write_hollow_grok_1(tmp_path / "grok-1", layers=1)
    shutil.copy(TOY_PATH / "tokenizer.model", tmp_path / "grok-1")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
    model, few = {"path": str(tmp_path / "grok-1")}, {"samples": 64, "length": 1024}
    experts = EXPERTS | {"group": 128}

    def peak(**keys):
        rules = (experts | keys, ATTENTION | {"group": 128})
        return peak_step(build_plan(tiny_recipe(*rules, model=model, calibration=few)))

    whole, blocks = peak(), peak(hessian_block=4096)
    assert whole.name.endswith("down: gptq") and whole.knob == "hessian_block"
    hessian = 4 * 32768**2
    assert whole.bytes - blocks.bytes == pytest.approx(hessian - hessian / 8, rel=0.01)
    assert whole.bytes < 14e9
