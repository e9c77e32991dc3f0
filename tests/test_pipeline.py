"""From a recipe to an output: everything planned is there, everything else is as it was."""

import json
import os
import shutil
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
from grokquant.job import fingerprint, pipeline
from grokquant.job.layer import LayerQuantizer
from grokquant.job.plan import build_plan
from grokquant.job.shards import ShardWriter
from grokquant.job.verify import verify
from grokquant.job.workdir import States, WorkDirectory
from grokquant.reporting.terminal import RunProgress
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
    with pytest.raises(GateError, match=r"fell back to rtn, max_fallbacks = 0.01 allows 0: layers"):
        pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}))
    assert not (tmp_path / "out").exists()
    # What was committed before stays, for a run that allows more.
    committed = {p.name for p in (tmp_path / "out.partial" / "files").glob("model-*")}
    assert committed == {"model-00001-of-00003.safetensors"}
    pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}, max_fallbacks=1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_experts_with_few_tokens_are_blended(tiny_recipe):
    recipe = tiny_recipe(experts={"blend_tokens": 10**6})
    report = report_of(pipeline.quantize(recipe))
    notes = [row["note"] for row in report["units"] if row["method"] == "gptq"]
    assert all("blended with all tokens" in note for note in notes)
    recipe = tiny_recipe(experts={"blend_tokens": 0})
    plain = report_of(pipeline.quantize(recipe, overwrite=True))
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
    progress = RunProgress()
    output = pipeline.quantize(tiny_recipe(), progress)  # with the usual max_fallbacks
    report = report_of(output)
    named = [line for line in progress.summary(output) if "no calibration token" in line]
    assert [line.partition(":")[0] for line in named] == [
        "layers.0.experts.0",
        "layers.1.experts.0",
    ]
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
        plan, output = build_plan(recipe), pipeline.quantize(recipe, overwrite=True)
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
    outputs = (pipeline.quantize(tiny_recipe(), overwrite=True) for _ in range(2))
    sums = [(output / "SHA256SUMS").read_text() for output in outputs]
    assert sums[0] == sums[1]


def test_the_written_recipe_makes_the_same_files(tiny_recipe):
    from grokquant.recipe import load_recipe

    recipe = tiny_recipe()
    written = pipeline.quantize(recipe) / "recipe.yaml"
    assert load_recipe(written) == recipe.published()
    places = [f"model.path={recipe.model.path}", f"output.path={recipe.output.path}"]
    places.append(f"calibration.text={recipe.calibration.text}")
    assert load_recipe(written, places) == recipe


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
        verify(pipeline.quantize(tiny_recipe(ATTENTION), overwrite=True))
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
    with pytest.warns(UserWarning, match="out: stale.txt in it will be deleted with the old"):
        assert pipeline.quantize(tiny_recipe(EXPERTS), overwrite=True) == output
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
    for part in ("quantized_by: grokquant", "int4 g32 sym (gptq)", "bits per weight"):
        assert part in card


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in output.rglob("*") if path.is_file())
    return {str(p.relative_to(output)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def test_a_finished_result_is_not_made_again(tiny_recipe, tmp_path, monkeypatch):
    output = pipeline.quantize(tiny_recipe())
    before = stamps(tmp_path)
    monkeypatch.setattr(pipeline, "_fill", None)  # nothing is computed
    assert pipeline.quantize(tiny_recipe()) == output
    assert stamps(tmp_path) == before


def test_a_finished_result_is_known_wherever_it_and_its_source_are(
    tiny_recipe, tiny_release, tmp_path, monkeypatch
):
    pipeline.quantize(tiny_recipe()).rename(tmp_path / "renamed")
    shutil.copytree(tiny_release, tmp_path / "moved")  # other times
    elsewhere = {"path": str(tmp_path / "moved")}
    monkeypatch.setattr(pipeline, "_fill", None)
    pipeline.quantize(tiny_recipe(model=elsewhere, output={"path": str(tmp_path / "renamed")}))


def test_the_calibration_text_is_not_tokenized_to_know_a_result(
    tiny_recipe, text_file, tmp_path, monkeypatch
):
    text = shutil.copyfile(text_file, tmp_path / "text.txt")
    calibration = {"text": str(text), "samples": 16, "length": 64}
    pipeline.quantize(tiny_recipe(calibration=calibration))
    asked: list[object] = []
    monkeypatch.setattr(pipeline, "_fill", None)
    monkeypatch.setattr(pipeline, "calibration_rows", lambda *_: asked.append(1) or (1 / 0))
    pipeline.quantize(tiny_recipe(calibration=calibration))
    assert not asked
    monkeypatch.undo()
    text.write_bytes(b"\xef\xbb\xbf" + text_file.read_bytes())  # other bytes, the same tokens
    monkeypatch.setattr(pipeline, "_fill", None)
    pipeline.quantize(tiny_recipe(calibration=calibration))


def test_what_a_result_was_made_from_holds_no_private_path(tiny_recipe, tiny_release, tmp_path):
    source = shutil.copytree(tiny_release, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"_name_or_path": str(tmp_path)}
    (source / "config.json").write_text(json.dumps(config))
    made_from = report_of(pipeline.quantize(tiny_recipe(model={"path": str(source)})))["made_from"]
    assert str(tmp_path) not in json.dumps(made_from)
    assert made_from["config"]["hidden_size"] == 128


def test_a_finished_result_with_more_fallbacks_than_allowed_now(tiny_recipe):
    pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}, max_fallbacks=1.0))
    with pytest.raises(InputError, match=r"8 of 8 matrices experts\.gate fell back .*allows 0"):
        pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}))


def test_a_run_goes_on_when_source_and_work_directory_have_moved(
    tiny_recipe, tiny_release, tmp_path, monkeypatch
):
    source = shutil.copytree(tiny_release, tmp_path / "source")
    with pytest.raises(GateError):
        pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}, model={"path": str(source)}))
    source.rename(tmp_path / "moved")
    (tmp_path / "out.partial").rename(tmp_path / "out2.partial")
    resumed: list[int] = []
    monkeypatch.setattr(
        pipeline.Silence, "continuing", lambda _, done, files, damaged: resumed.append(done)
    )
    elsewhere = {
        "model": {"path": str(tmp_path / "moved")},
        "output": {"path": str(tmp_path / "out2")},
    }
    pipeline.quantize(tiny_recipe(experts={"min_tokens": 10**6}, max_fallbacks=1.0, **elsewhere))
    assert resumed == [1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"quantize": [EXPERTS | {"bits": 8}, ATTENTION]},
            r"recipe\.quantize\[0\]\.bits was 4, now 8",
        ),
        ({"quantize": [ATTENTION]}, r"recipe\.quantize was .*"),
    ],
)
def test_a_finished_result_of_something_else_is_kept(tiny_recipe, tmp_path, change, named):
    output = pipeline.quantize(tiny_recipe())
    (output / "evaluation").mkdir()
    (output / "evaluation" / "report.json").write_text("{}")
    before = stamps(tmp_path)
    ways = "choose another output.path, or overwrite=True .* and deletes evaluation/ in it"
    with pytest.raises(InputError, match=f"of something else: {named}; {ways}$"):
        pipeline.quantize(tiny_recipe(**change))
    assert stamps(tmp_path) == before
    with pytest.warns(UserWarning, match="out: evaluation/ in it will be deleted"):
        pipeline.quantize(tiny_recipe(**change), overwrite=True)
    assert not (output / "evaluation").exists()
    verify(output)


def test_another_source_text_or_version_is_something_else(
    tiny_recipe, tiny_release, text_file, tmp_path, monkeypatch
):
    pipeline.quantize(tiny_recipe())
    changed = shutil.copytree(tiny_release, tmp_path / "changed")
    leaf = changed / "ckpt-0" / "tensor00002_000"
    raw = bytearray(leaf.read_bytes())
    raw[len(raw) // 2] ^= 1
    leaf.write_bytes(raw)
    with pytest.raises(InputError, match=r"else: source\.tensor00002_000 was \d+ bytes of"):
        pipeline.quantize(tiny_recipe(model={"path": str(changed)}))
    words = tmp_path / "words.txt"
    words.write_text(" ".join(text_file.read_text().split()[::-1]))
    calibration = {"text": str(words), "samples": 16, "length": 64}
    with pytest.raises(InputError, match="else: calibration text was"):
        pipeline.quantize(tiny_recipe(calibration=calibration))
    monkeypatch.setattr(fingerprint, "version", lambda name: "9.9")
    with pytest.raises(InputError, match=r"else: version\.grokquant was \S+, now 9\.9"):
        pipeline.quantize(tiny_recipe())


def test_a_finished_result_that_lost_something_is_named(tiny_recipe):
    output = pipeline.quantize(tiny_recipe(ATTENTION))
    shard = next(output.glob("model-00002*"))
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(InputError, match=f"already, but {shard.name} has {size - 1} bytes, not"):
        pipeline.quantize(tiny_recipe(ATTENTION))
    (output / "tokenizer.model").unlink()
    shard.unlink()
    with pytest.raises(InputError, match=f"already, but {shard.name} is missing"):
        pipeline.quantize(tiny_recipe(ATTENTION))


def test_a_result_of_a_former_version_is_something_else(tiny_recipe):
    output = pipeline.quantize(tiny_recipe(ATTENTION))
    report = report_of(output)
    del report["made_from"]
    (output / "quantization-report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="does not say what it was made from"):
        pipeline.quantize(tiny_recipe(ATTENTION))


def test_what_comes_during_a_run_is_not_replaced(tiny_recipe, tmp_path, monkeypatch):
    publish = WorkDirectory.publish

    def late(work: WorkDirectory, overwrite: bool) -> None:
        work.output.mkdir()
        (work.output / "quantization-report.json").write_text("of another run")
        publish(work, overwrite)

    monkeypatch.setattr(WorkDirectory, "publish", late)
    with pytest.raises(InputError, match="out: has been filled during the run"):
        pipeline.quantize(tiny_recipe(ATTENTION))
    monkeypatch.undo()
    assert (tmp_path / "out" / "quantization-report.json").read_text() == "of another run"
    (tmp_path / "out").rename(tmp_path / "other")
    verify(pipeline.quantize(tiny_recipe(ATTENTION)))


def test_small_tensors_of_large_sources_are_known_whole(
    tiny_recipe, tiny_release, tmp_path, monkeypatch
):
    source = shutil.copytree(tiny_release, tmp_path / "source")
    recipe = tiny_recipe(model={"path": str(source)})
    monkeypatch.setattr(fingerprint, "_HASHED_WHOLE", 0)
    monkeypatch.setattr(fingerprint, "content", lambda path, stride: path.name)  # no sample hits
    before = fingerprint.identity_of(build_plan(recipe))
    norm = min((source / "ckpt-0").iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(norm.read_bytes())
    raw[raw.rindex(b"\x80?")] ^= 1  # of a float32 that is 1.0
    norm.write_bytes(raw)
    now = fingerprint.identity_of(build_plan(recipe))
    assert fingerprint.difference(before, now).startswith("small tensors was ")


def test_large_sources_are_known_by_samples(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"")
    os.truncate(path, 100 * 2**20)
    whole = fingerprint.content(path, 32 * 2**20)
    for offset in (0, 32 * 2**20, 64 * 2**20 + 4095, 100 * 2**20 - 1):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
            file.flush()
            assert fingerprint.content(path, 32 * 2**20) != whole
            file.seek(offset)
            file.write(b"\0")
    assert fingerprint.content(path, 32 * 2**20) == whole
