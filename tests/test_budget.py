"""Plans that can be trusted: bytes exactly, memory and time nearly."""

import shutil
import sysconfig
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ATTENTION, EXPERTS
from make_release import write_hollow_grok_1
from members import together

from grokquant.errors import InputError
from grokquant.job import pipeline
from grokquant.job.budget import budget_of, timing
from grokquant.job.budget.memory import peak_step, resident_bytes
from grokquant.job.budget.sharing import sharing_of
from grokquant.job.layer import LayerQuantizer
from grokquant.job.plan import build_plan
from grokquant.job.workdir import States
from grokquant.methods import METHODS
from grokquant.methods.method import Cost
from grokquant.parallel import Team
from grokquant.streaming.blocks import CALIBRATION_DTYPE, Outputs
from grokquant.streaming.whole import running
from grokquant.text import documents, installed, python_docs
from grokquant.text.records import READERS
from grokquant.text.tokenizer import load_tokenizer
from grokquant.toy import TOY_PATH
from grokquant.types import Routed

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


@pytest.mark.parametrize("others", [(), ({"match": "layers.*", "method": "copy"},)])
def test_a_budget_is_that_of_the_layer_with_most_to_do(tiny_recipe, others):
    of_all, of_last = (
        build_plan(tiny_recipe(EXPERTS | {"match": f"layers.{layer}.experts.*.*"}, *others))
        for layer in ("*", "1")
    )
    assert of_last.fullest_layer == 1 and of_all.fullest_layer == 0
    shares = [sharing_of(plan, 2) for plan in (of_all, of_last)]
    assert shares[0].device_bytes == shares[1].device_bytes
    assert shares[0].peak_bytes == shares[1].peak_bytes


def test_the_plan_counts_each_product_once(tiny_recipe, monkeypatch):
    """With a second for each multiply-add, steps take as many seconds as a run has of them."""
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


GPTQ_ATTENTION = ATTENTION | {"method": "gptq", "bits": 8, "group": 32}
TWO_SIDED = EXPERTS | {"method": "two-sided"}


@pytest.mark.parametrize(
    "rules",
    [(EXPERTS, ATTENTION), (EXPERTS, GPTQ_ATTENTION), (EXPERTS | {"method": "two-sided"},)],
)
def test_the_passes_of_a_plan_are_those_of_a_run(tiny_recipe, monkeypatch, rules):
    """Outside the experts, in multiply-adds: inputs of attention are captured where it needs them,
    and states are written over where nobody needs them any more."""
    plan = build_plan(tiny_recipe(*rules))
    model = running(plan.checkpoint, CALIBRATION_DTYPE, pieces=True)
    nothing = partial(model.on_routed, torch.zeros_like)

    def make_nothing(layer: LayerQuantizer, number: int, given: Routed, *_: object) -> Outputs:
        return nothing(given)

    monkeypatch.setattr(LayerQuantizer, "_make_expert", make_nothing)
    hidden = model.embed(torch.arange(16 * 64).view(16, 64) % 500)
    products: list[int] = []

    def count(linear: torch.nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        products.append(args[0].numel() * len(linear.weight))

    for module in model.layers[0].self_attn.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    states = States(hidden, hidden if plan.needs_reference else None)
    LayerQuantizer(plan, model, 0, lambda *_: None, lambda _: None).run(states)
    weights = timing.weights_outside_experts(plan)[0]
    passes = timing.passes_outside_experts(plan, 0, weights)
    assert sum(products) == pytest.approx(passes * 16 * 64 * sum(weights.values()))


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


def test_a_part_of_the_texts_is_read_to_time_them(tiny_recipe, monkeypatch, text_file):
    """Of every installation; of others all, once."""
    monkeypatch.setattr(installed, "_PACKAGES", ("numpy",))
    own = str(text_file)
    shares = {"python-docs": 1.0, "package-docs": 2.0, own: 1.0}
    plan = build_plan(tiny_recipe(calibration={"text": shares, "samples": 16, "length": 64}))
    read = []
    folders = [Path(sysconfig.get_path("stdlib")), installed._folder("numpy")]
    covered = [len(list(python_docs.covered_files(folder))) for folder in folders]
    docstrings = python_docs.docstrings_of
    monkeypatch.setattr(python_docs, "docstrings_of", lambda p: read.append(p) or docstrings(p))
    readers = dict(documents.READERS)
    readers[".txt"] = lambda text, field: read.append(Path(text)) or READERS[".txt"](text, field)
    monkeypatch.setattr(documents, "READERS", readers)
    tokens, seconds = timing._timed_texts(plan)
    assert tokens == 16 * 64 and seconds > 0
    assert read.count(Path(own)) == 1
    assert 0 < len(read) <= sum(covered) // 8 + 3


def test_a_text_of_few_sequences_is_timed_with_as_many(tiny_recipe, monkeypatch):
    """One module in eight gives two sequences, so all give sixteen, of which 88 % calibrate."""
    monkeypatch.setattr(installed, "some_documents", lambda text, share: ["word " * 140])
    asked = {"text": "python-code", "samples": 99, "length": 64}
    tokens, _ = timing._timed_texts(build_plan(tiny_recipe(calibration=asked)))
    assert tokens == 14 * 64


def test_of_a_long_text_excerpts_are_timed(tiny_recipe, monkeypatch, tmp_path):
    """However long it is, and they tell how many tokens it has."""
    read = []
    tokens_of = timing.tokens_of_document
    monkeypatch.setattr(
        timing, "tokens_of_document", lambda t, text: read.append(len(text)) or tokens_of(t, text)
    )
    for name in ("long.txt", "longer.txt"):
        text = tmp_path / name
        text.write_text("These are words. " * (40_000 if name == "long.txt" else 400_000))
        asked = {"text": str(text), "samples": 10**6, "length": 64}
        plan = build_plan(tiny_recipe(calibration=asked))
        tokens, seconds = timing._timed_texts(plan)
        wanted = len(tokens_of(load_tokenizer(plan.checkpoint), text.read_text()))
        assert tokens == pytest.approx(wanted, rel=0.01) and seconds > 0
    assert read == [16384] * 32


@pytest.mark.parametrize(
    "rules",
    [(EXPERTS, GPTQ_ATTENTION), (EXPERTS, ATTENTION), (RTN,), (TWO_SIDED | {"match": "layers.*"},)],
)
def test_what_is_sent_is_what_was_planned(tiny_recipe, tmp_path, rules):
    recipe = tiny_recipe(*rules, output={"path": str(tmp_path / "out"), "shard": "60KB"})
    expected = sharing_of(build_plan(recipe), 5).moved_bytes

    def sent(team: Team) -> int:
        pipeline.quantize(recipe, team=team)
        return team.traffic.sent_bytes

    # Beside that there are counts and reports; and rows are not spread quite evenly.
    assert sum(together(5, sent)) == pytest.approx(expected, rel=0.1, abs=300_000)


def test_what_processes_hold_and_do_falls_until_each_has_an_expert(tmp_path, tiny_recipe):
    """With Grok-1's real shapes, of two layers."""
    write_hollow_grok_1(tmp_path / "grok-1", layers=2)
    shutil.copy(TOY_PATH / "tokenizer.model", tmp_path / "grok-1")
    experts = EXPERTS | {"group": 128, "hessian_block": 8192}
    rules = (experts, {"match": "layers.*", "method": "copy"})
    asked = {"samples": 128, "length": 2048}
    model = {"path": str(tmp_path / "grok-1")}
    plan = build_plan(tiny_recipe(*rules, model=model, calibration=asked))
    alone, eight, many = (sharing_of(plan, size) for size in (1, 8, 32))
    assert alone.peak_bytes == peak_step(plan).bytes
    assert (alone.moved_bytes, alone.share) == (0, 1)
    # Rows and outputs of two experts of each token; attention, which one copies for all.
    routed = 2 * 2 * 262_144 * 6144 * 2
    attention = sum(plan.packed_bytes(unit) for unit in plan.units_of(0) if unit.expert is None)
    assert eight.moved_bytes == pytest.approx(2 * (routed * 7 / 8 + attention * 7), rel=1e-6)
    assert eight.share == pytest.approx(1 / 8, rel=1e-3)
    assert eight.share * 0.9 < many.share < eight.share  # an expert is not divided
    # With whole Hessians too few tokens reach an expert, and owners get the inputs of all.
    rules = (experts | {"hessian_block": None}, rules[1])
    blended = sharing_of(build_plan(tiny_recipe(*rules, model=model, calibration=asked)), 8)
    everyone = 2 * 8 * 262_144 * 6144 * 2 * 7 / 8
    assert blended.moved_bytes - eight.moved_bytes == pytest.approx(everyone, rel=1e-6)
    # States of 1/8 of all rows in the place of all; routed inputs and outputs of one expert.
    assert alone.peak_bytes - eight.peak_bytes > 7e9
    assert 5e9 < eight.device_bytes == alone.device_bytes < 8e9


def test_downs_that_are_solved_in_turn_take_as_long_with_many(tiny_recipe):
    plan = build_plan(tiny_recipe(TWO_SIDED, ATTENTION))
    two, four = (sharing_of(plan, size).share for size in (2, 4))
    in_turn = 2 * four - two  # what is divided takes half as long
    assert 0.1 < in_turn < four
    assert two == pytest.approx(in_turn + (1 - in_turn) / 2)


def test_methods_that_several_processes_cannot_carry_out_are_refused(tiny_recipe, monkeypatch):
    plan = build_plan(tiny_recipe(EXPERTS, ATTENTION))
    monkeypatch.setattr(METHODS["gptq"], "revises", True)
    with pytest.raises(InputError, match="gptq"):
        sharing_of(plan, 2)
    assert sharing_of(plan, 1).share == 1
