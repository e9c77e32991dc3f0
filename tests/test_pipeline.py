"""From a recipe to an output: everything planned is there, everything else is as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from conftest import ATTENTION, EXPERTS, run_stored_layer, seal
from safetensors.torch import load_file, save_file

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import GateError, GrokquantError, InputError
from grokquant.job import pipeline
from grokquant.job.layer import LayerQuantizer
from grokquant.job.plan import build_plan
from grokquant.job.shards import ShardWriter
from grokquant.job.verify import verify
from grokquant.job.workdir import States
from grokquant.streaming.blocks import CALIBRATION_DTYPE, BlockwiseModel
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer


def report_of(output) -> dict:
    return json.loads((output / "quantization-report.json").read_text())


def test_every_planned_unit_is_there_with_its_bits(tiny_recipe):
    one_expert = EXPERTS | {"match": "layers.*.experts.3.*", "method": "rtn", "bits": 8}
    output = pipeline.quantize(tiny_recipe(one_expert, EXPERTS, ATTENTION))
    for name, ref in open_checkpoint(output).units():
        bits = 8 if ".experts.3." in name or ".attention." in name else 4
        assert ref.scheme is not None and ref.scheme.bits == bits, name
    rows = report_of(output)["units"]
    assert len(rows) == 2 * (4 + 4 * 3)
    assert {row["method"] for row in rows} == {"gptq", "rtn", "copy"}


def test_what_is_not_quantized_is_untouched(tiny_recipe, tiny_release):
    source, output = (
        open_checkpoint(p).source.tensors
        for p in (tiny_release, pipeline.quantize(tiny_recipe(EXPERTS)))
    )
    assert set(source) == set(output)
    for name in source:
        if ".experts." not in name:
            assert output[name].dtype == source[name].dtype
            assert torch.equal(output[name].read(), source[name].read()), name


@pytest.mark.parametrize("group", ["release", 128, 32])
def test_copy_takes_the_integers_of_the_release(tiny_recipe, tiny_release, group):
    rule = {"match": "layers.*", "method": "copy", "group": group}
    output = open_checkpoint(pipeline.quantize(tiny_recipe(rule)))
    source = dict(open_checkpoint(tiny_release).units())
    for name, ref in output.units():
        stored, copied = source[name].read_quantized(), ref.read_quantized()
        assert torch.equal(stored.codes, copied.codes)
        assert torch.equal(stored.dequantize(), copied.dequantize())
        if group == "release":
            assert torch.equal(stored.scales, copied.scales)


def test_compressed_tensors_reads_the_output(tiny_recipe):
    output = pipeline.quantize(tiny_recipe())
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    ours = open_checkpoint(output).source.tensors
    tensors = {n: t for f in output.glob("*.safetensors") for n, t in load_file(f).items()}
    stems = [name.removesuffix(".weight_packed") for name in tensors if name.endswith("packed")]
    assert len(stems) == 2 * (4 + 4 * 3)
    for stem in stems:
        (scheme,) = [g for g in groups if any(match_name(stem, t) for t in g.targets)]
        own = {
            k.removeprefix(stem + "."): v for k, v in tensors.items() if k.startswith(stem + ".")
        }
        weight = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
        assert torch.equal(weight, ours[f"{stem}.weight"].read())


def test_later_blocks_see_the_errors_of_earlier_ones(tiny_recipe):
    """The hidden states of the run are those of the model that it wrote."""
    recipe = tiny_recipe()
    plan = build_plan(recipe)
    rows = calibration_rows(recipe.calibration, load_tokenizer(plan.checkpoint), plan.checkpoint)
    running = BlockwiseModel(plan.checkpoint, CALIBRATION_DTYPE)
    states = States(running.embed(rows))

    def emit(*_: object) -> None: ...

    for index in range(2):
        states = LayerQuantizer(plan, running, index, emit, lambda _: None).run(states)
    written = BlockwiseModel(open_checkpoint(pipeline.quantize(recipe)), CALIBRATION_DTYPE)
    after = written.embed(rows)
    for index in range(2):
        written.load_layer(index)
        after = run_stored_layer(written, index, after)
    assert torch.equal(states.hidden, after)


def test_attention_can_be_quantized_by_gptq(tiny_recipe):
    rule = {"match": "layers.*.attention.*", "method": "gptq", "bits": 4, "group": 64}
    rows = report_of(pipeline.quantize(tiny_recipe(rule)))["units"]
    assert len(rows) == 2 * 4
    # Error feedback lowers the error of the outputs below that of the weights.
    assert all(row["output_error"] < row["relative_error"] for row in rows)


def test_starved_experts_fall_back_and_are_named(tiny_recipe):
    recipe = tiny_recipe(experts={"min_tokens": 10**6}, max_fallbacks=1.0)
    report = report_of(pipeline.quantize(recipe))
    assert len(report["fallbacks"]) == 2 * 4 * 3
    fallen = [row for row in report["units"] if row["fallback"]]
    assert all(row["method"] == "rtn" and "experts.min_tokens" in row["fallback"] for row in fallen)


def test_more_fallbacks_than_allowed_end_the_run(tiny_recipe, tmp_path):
    with pytest.raises(
        GateError, match=r"fell back to rtn, max_fallbacks = 0.01 allows 0 \(layers"
    ):
        pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}))
    assert not (tmp_path / "out").exists()
    # What was committed before stays, for a run that allows more.
    committed = {p.name for p in (tmp_path / "out.partial" / "files").glob("model-*")}
    assert committed == {"model-00001-of-00003.safetensors"}
    pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}, max_fallbacks=1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_experts_with_few_tokens_are_blended(tiny_recipe):
    report = report_of(pipeline.quantize(tiny_recipe(experts={"blend_tokens": 10**6})))
    notes = [row["note"] for row in report["units"] if row["method"] == "gptq"]
    assert all("blended with all tokens" in note for note in notes)
    plain = report_of(pipeline.quantize(tiny_recipe(experts={"blend_tokens": 0})))
    assert not any(row["note"] for row in plain["units"])


def test_a_dead_expert_is_rounded_not_zeroed(tiny_recipe, tiny_release, monkeypatch):
    """An expert that no token reaches keeps the error of rtn, it does not become zeros."""
    from grokquant.families.grok_model import GrokRouter

    plain = GrokRouter.forward

    def never_expert_0(self, x):
        logits, _, _ = plain(self, x)
        logits[:, 0] = -torch.inf
        return logits, *logits.softmax(-1).topk(self.top_k, dim=-1)

    monkeypatch.setattr(GrokRouter, "forward", never_expert_0)
    output = pipeline.quantize(tiny_recipe(max_fallbacks=0.5))
    report = report_of(output)
    assert [tokens[0] for tokens in report["tokens_per_expert"]] == [0, 0]
    dead = [row for row in report["units"] if ".experts.0." in row["name"]]
    assert all(row["tokens"] == 0 and row["fallback"] for row in dead)
    assert all(row["relative_error"] < 0.2 for row in dead)


def test_no_data_is_read_where_no_method_needs_it(tiny_recipe):
    rule = EXPERTS | {"method": "rtn"}
    recipe = tiny_recipe(rule, calibration={"text": "missing.txt"})
    assert verify(pipeline.quantize(recipe)) == 2 * 4 * 3


def test_plan_knows_the_bytes(tiny_recipe):
    for rules in ([EXPERTS, ATTENTION], [EXPERTS | {"method": "rtn", "symmetric": False}]):
        recipe = tiny_recipe(*rules)
        plan, output = build_plan(recipe), pipeline.quantize(recipe)
        files = sorted(output.glob("*.safetensors"))
        tensors = [t for file in files for t in load_file(file).values()]
        assert plan.tensor_bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert open_checkpoint(output).stored_bytes == plan.tensor_bytes
        assert {f.name: f.stat().st_size for f in files} == {
            file.name: file.layout.size for file in plan.files
        }
        assert plan.output_bytes == sum(file.stat().st_size for file in files)
        assert report_of(output)["output_bytes"] == plan.output_bytes


def test_shards_and_index(tiny_recipe, tmp_path):
    output = {"path": str(tmp_path / "out"), "shard": "100KB"}
    path = pipeline.quantize(tiny_recipe(output=output))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 5 and {s.name for s in shards} == set(index["weight_map"].values())
    for shard in shards:
        tensors = load_file(shard)
        assert set(tensors) == {n for n, s in index["weight_map"].items() if s == shard.name}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        experts = {name.split(".")[5] for name in tensors if ".experts." in name}
        assert size <= 100_000 or len(experts) <= 1  # an expert is not split
        assert len({name.split(".")[2] for name in tensors if ".layers." in name}) <= 1
    verify(path)


def test_the_same_recipe_gives_the_same_bytes(tiny_recipe, tmp_path):
    sums = [(pipeline.quantize(tiny_recipe()) / "SHA256SUMS").read_text() for _ in range(2)]
    assert sums[0] == sums[1]


def test_the_written_recipe_makes_the_same_files(tiny_recipe):
    from grokquant.recipe import load_recipe

    recipe = tiny_recipe()
    assert load_recipe(pipeline.quantize(recipe) / "recipe.yaml") == recipe


def test_a_run_that_committed_nothing_leaves_nothing(tiny_recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(tiny_recipe())
    assert list(tmp_path.iterdir()) == []


def test_a_lost_unit_fails_the_run(tiny_recipe, tmp_path, monkeypatch):
    """The worst complaint about quantizers: a matrix that silently stays as it was."""
    whole = build_plan(tiny_recipe())
    name = "layers.1.experts.2.down"
    promised = replace(whole.units[name], scheme=replace(whole.units[name].scheme, bits=8))
    plan = replace(whole, units=whole.units | {name: promised})
    from grokquant.job.verify import verify_against_plan

    output = pipeline.quantize(tiny_recipe())
    with pytest.raises(GateError, match=f"{name}: planned as int8 g32 sym, but stored as int4"):
        verify_against_plan(output, plan)


def test_an_unplanned_tensor_is_noticed(tiny_recipe):
    plan = build_plan(tiny_recipe())
    writer = ShardWriter(None, plan, None)  # type: ignore[arg-type]
    with pytest.raises(GrokquantError, match="differs from the plan"):
        writer.write({"model.norm.weight": torch.zeros(3)})


def test_foreign_directories_are_refused_and_kept(tiny_recipe, tmp_path):
    precious = tmp_path / "out" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(InputError, match="not empty and was not made by grokquant"):
        pipeline.quantize(tiny_recipe())
    assert precious.read_text() == "years of work"


def test_a_link_leads_to_the_disk_that_is_meant(tiny_recipe, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large" / "result")
    for _ in range(2):
        verify(pipeline.quantize(tiny_recipe(ATTENTION)))
        assert [p.name for p in (tmp_path / "large").iterdir()] == ["result"]
        assert {p.name for p in tmp_path.iterdir()} == {"large", "out"}
        assert (tmp_path / "out").is_symlink()


def test_a_mount_point_is_refused_at_the_start(tiny_recipe, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(InputError, match="out: is a mount point; choose a directory inside it"):
        pipeline.quantize(tiny_recipe())


def test_an_earlier_result_is_replaced_whole(tiny_recipe, tmp_path):
    output = pipeline.quantize(tiny_recipe())
    (output / "stale.txt").write_text("from the first run")
    assert pipeline.quantize(tiny_recipe(EXPERTS)) == output
    assert not (output / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_verify_finds_every_flipped_byte_and_missing_file(tiny_recipe):
    output = pipeline.quantize(tiny_recipe())
    assert verify(output) == 2 * (4 + 4 * 3)
    shard = output / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for position in (0, 9, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        shard.write_bytes(flipped)
        with pytest.raises(GateError, match="checksum"):
            verify(output)
    shard.unlink()
    with pytest.raises(GateError, match="is missing"):
        verify(output)


def test_verify_finds_non_finite_scales(tiny_recipe):
    output = pipeline.quantize(tiny_recipe())
    shard = output / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0, 0] = torch.inf
    save_file(tensors, shard)
    seal(output)
    with pytest.raises((GateError, InputError), match="non-finite"):
        verify(output)


def test_model_card_says_what_it_is(tiny_recipe):
    card = (pipeline.quantize(tiny_recipe()) / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    for part in ("base_model_relation: quantized", "int4 g32 sym (gptq)", "bits per weight"):
        assert part in card
