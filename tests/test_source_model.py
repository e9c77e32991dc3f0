"""A result knows which model it was made from, in whatever form that is; others are refused."""

import json
import shutil
from dataclasses import replace
from os.path import relpath
from pathlib import Path

import grok_forms
import pytest
import torch
from click.testing import CliRunner
from conftest import ATTENTION, EXPERTS
from make_release import write_random_release
from safetensors.torch import load_file, save_file
from shipped_tokenizers import byte_level
from test_families import MODELS, saved  # noqa: F401

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.cli import main
from grokquant.errors import InputError
from grokquant.evaluation.report import read_report
from grokquant.evaluation.same_model import other_model
from grokquant.job import pipeline
from grokquant.job.convert import conversion_recipe
from grokquant.job.source_model import fingerprint_of, recorded_models
from grokquant.recipe import parse_recipe
from grokquant.reporting.publish import publish
from grokquant.reporting.rows import markdown_table

COPY = {"match": "layers.*", "method": "copy"}
REPORT = "quantization-report.json"


def quantized(source: Path, output: Path, *rules: dict, **section: object) -> Path:
    return pipeline.quantize(
        parse_recipe(
            {
                "model": {"path": str(source)},
                "quantize": list(rules),
                "output": {"path": str(output)} | section,
            }
        )
    )


def edited(path: Path, change) -> Path:
    """The directory, with `change` applied to the tensors of its only file."""
    (file,) = path.glob("*.safetensors")
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def edit_config(path: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def differences_of(result: Path, reference: Path) -> str | None:
    other = other_model(open_checkpoint(result), open_checkpoint(reference))
    return other and other.differences


# --- the fingerprint


@pytest.mark.parametrize("form", grok_forms.FORMS)
def test_grok_has_one_fingerprint_in_every_form(tiny_release, tmp_path, form):
    """int8 pickles, and bf16 under the names, in the dtypes and shards of each port."""
    release = open_checkpoint(tiny_release)
    path = grok_forms.FORMS[form](tmp_path / form, release)
    shutil.copyfile(tiny_release / "tokenizer.model", path / "tokenizer.model")
    port = fingerprint_of(open_checkpoint(path))
    own = fingerprint_of(release)
    if form == "keyfan":  # its config names no positions, and Grok-1 has more than the tiny one
        assert own.config["max_position_embeddings"] == 512
        own.config["max_position_embeddings"] = 8192
    assert port == own and len(own.tensors) > 20


@pytest.mark.parametrize("output_format", ["compressed-tensors", "gptq", "gguf"])
def test_the_same_integers_have_one_fingerprint_in_every_format(saved, tmp_path, output_format):  # noqa: F811
    """Scales in bfloat16 and float16, experts in stacks, rows of heads in another order."""
    first = quantized(
        saved("mixtral")[1],
        tmp_path / "first",
        {"match": "layers.*", "method": "rtn", "bits": 8, "group": 32},
        shard="100KB",
    )
    second = quantized(first, tmp_path / "second", COPY, format=output_format)
    dense = quantized(first, tmp_path / "bf16", COPY | {"method": "unquantized"}, format="bf16")
    known = fingerprint_of(open_checkpoint(first))
    assert fingerprint_of(open_checkpoint(second)) == known
    assert fingerprint_of(open_checkpoint(dense)) == known
    assert known != fingerprint_of(open_checkpoint(saved("mixtral")[1]))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gemma3_text"])
def test_other_dtypes_and_fused_experts_are_the_same_model(saved, tmp_path, family):  # noqa: F811
    model, path = saved(family)
    other = shutil.copytree(path, tmp_path / "other")
    fused = {name: value.float().contiguous() for name, value in model.state_dict().items()}
    if family == "gemma3_text":
        fused["lm_head.weight"] = fused["model.embed_tokens.weight"].clone()
    save_file(fused, other / "model.safetensors", metadata={"format": "pt"})
    edit_config(other, dtype="float32", use_cache=False, transformers_version="4.0.0")
    assert fingerprint_of(open_checkpoint(other)) == fingerprint_of(open_checkpoint(path))


@pytest.mark.parametrize("family", MODELS)
def test_what_the_fingerprint_samples_is_in_every_family(saved, family):  # noqa: F811
    checkpoint = open_checkpoint(saved(family)[1])
    sampled = fingerprint_of(checkpoint).tensors
    assert set(checkpoint.family.routers(checkpoint.config)) <= sampled.keys()
    assert "model.norm.weight" in sampled and "model.embed_tokens.weight" in sampled
    named = {m.tensor for m in checkpoint.matrices() if not m.expert}
    assert named <= sampled.keys()  # two layers: the first and the last
    others = {m.tensor for m in checkpoint.matrices() if m.expert}
    assert others.isdisjoint(sampled)


def test_no_matrix_of_a_release_is_read_whole(tiny_release):
    checkpoint = open_checkpoint(tiny_release)
    matrices = {matrix.tensor for matrix in checkpoint.matrices()}

    def too_much():
        raise AssertionError

    tensors = {
        name: replace(ref, load=too_much) if name in matrices else ref
        for name, ref in checkpoint.source.tensors.items()
    }
    lazy = replace(checkpoint, source=replace(checkpoint.source, tensors=tensors))
    assert fingerprint_of(lazy) == fingerprint_of(checkpoint)


def test_a_part_of_a_release_is_what_the_whole_has_there(tiny_release):
    index = (slice(3, 20), slice(5, 70))
    for _, ref in open_checkpoint(tiny_release).units():
        assert torch.equal(ref.load_part(index), ref.read()[index])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_no_expert_of_a_fused_file_is_read_whole(saved, tmp_path, family):  # noqa: F811
    """One of them is stored transposed, with the rows of gate and up in turns."""
    model, path = saved(family)
    path = shutil.copytree(path, tmp_path / "fused")
    fused = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(fused, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    index = (slice(3, 20), slice(5, 30))
    for name, ref in checkpoint.source.tensors.items():
        if ".experts." in name:
            part = index[: len(ref.shape)]
            assert torch.equal(ref.load_part(part), ref.read()[part]), name


def test_a_zero_is_a_zero(saved, tmp_path):  # noqa: F811
    """Some formats cannot hold -0."""
    path = shutil.copytree(saved("llama")[1], tmp_path / "llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    prints = []
    for zero in (0.0, -0.0):
        edited(path, lambda t, zero=zero: t[name].__setitem__((0, 0), zero))
        prints.append(fingerprint_of(open_checkpoint(path)))
    assert prints[0] == prints[1]


# --- what a result is compared with


@pytest.fixture(scope="module")
def source(saved) -> Path:  # noqa: F811
    return saved("mixtral")[1]


@pytest.fixture(scope="module")
def result(source, text_file, tmp_path_factory) -> Path:
    recipe = {
        "model": {"path": str(source)},
        "quantize": [{"match": "layers.*.experts.*", "method": "rtn", "bits": 4, "group": 32}],
        "output": {"path": str(tmp_path_factory.mktemp("result") / "int4")},
        "eval": {"text": relpath(text_file), "samples": 2, "length": 32},
    }
    return pipeline.quantize(parse_recipe(recipe))


@pytest.fixture
def other(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "other")


@pytest.fixture
def older(result, tmp_path) -> Path:
    """A result whose report does not say what it was made from."""
    path = shutil.copytree(result, tmp_path / "older")
    report = json.loads((path / REPORT).read_text())
    del report["source_models"]
    (path / REPORT).write_text(json.dumps(report))
    return path


def _weights(path: Path) -> None:
    edited(path, lambda t: t["model.layers.1.self_attn.q_proj.weight"].add_(0.1))


def _router(path: Path) -> None:
    edited(path, lambda t: t["model.layers.1.block_sparse_moe.gate.weight"].add_(0.1))


def _tokenizer(path: Path) -> None:
    (path / "tokenizer.model").unlink()
    byte_level(path)


CHANGES = {
    "positions": (
        lambda path: edit_config(path, max_position_embeddings=64),
        "max_position_embeddings is 128, the reference has 64",
    ),
    "rotation": (
        lambda path: edit_config(path, rope_parameters={"rope_theta": 7.0, "rope_type": "default"}),
        "rope_parameters is {'rope_theta': 1000000.0, 'rope_type': 'default'}, "
        "the reference has {'rope_theta': 7.0, 'rope_type': 'default'}",
    ),
    "tokenizer": (_tokenizer, "the tokenizer is one of 2048 tokens ("),
    "router": (_router, "sampled tensors have other values, such as model.layers.1.block_sparse"),
    "weights": (_weights, "tensors have other values, such as model.layers.1.self_attn.q_proj"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_reference_is_refused_with_both_values(result, other, text_file, change):
    CHANGES[change][0](other)
    with pytest.raises(InputError) as caught:
        grokquant.evaluate(result, other, str(text_file), quick=True)
    assert str(caught.value).startswith(f"any_reference: needed to compare {result} with {other}")
    assert CHANGES[change][1] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "weights"])
def test_results_of_earlier_versions_are_compared_by_what_was_kept(older, source, other, change):
    assert differences_of(older, source) is None
    CHANGES[change][0](other)
    assert CHANGES[change][1] in differences_of(older, other)


def test_another_architecture_is_named(result, saved, text_file):  # noqa: F811
    with pytest.raises(InputError, match=r"family is mixtral, the reference has olmoe"):
        grokquant.evaluate(result, saved("olmoe")[1], str(text_file))


def test_a_model_of_another_tool_is_another_only_if_nothing_is_equal(older, source, other):
    """Some tools fold scales into norms and routers."""
    (older / REPORT).unlink()
    foreign = open_checkpoint(older)
    assert other_model(foreign, open_checkpoint(source)) is None
    _router(other)
    found = other_model(foreign, open_checkpoint(other))
    assert not found.certain and found.note.startswith("The reference may be another model")
    edited(other, lambda tensors: [value.add_(0.1) for value in tensors.values()])
    assert other_model(foreign, open_checkpoint(other)).certain


def test_norms_of_ones_tell_nothing(older, other):
    """A random model has them; here all else is another model's."""
    (older / REPORT).unlink()
    file = next(file for file in older.glob("*.safetensors"))
    for path in (older, other):
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            for name, value in tensors.items():
                if value.ndim == 1:
                    tensors[name] = torch.ones_like(value)
                elif path == other:
                    tensors[name] = value + 0.1
            save_file(tensors, file, metadata={"format": "pt"})
    assert other_model(open_checkpoint(older), open_checkpoint(other)).certain


def test_a_result_of_a_result_is_compared_with_either_source(result, source, tmp_path):
    second = pipeline.quantize(conversion_recipe(result, "compressed-tensors", tmp_path / "2"))
    third = pipeline.quantize(conversion_recipe(second, "bf16", tmp_path / "third"))
    assert len(recorded_models(third)) == 2  # the second has the same values as the result
    for path in (second, third):
        assert differences_of(path, source) is None
        assert differences_of(path, result) is None


def test_the_report_begins_with_another_reference(result, other, text_file, tmp_path):
    _router(other)
    output = shutil.copytree(result, tmp_path / "copy")
    text = ["--any-reference", "--quick", "--samples", "1", "--text", str(text_file)]
    command = ["eval", str(output), "--reference", str(other), *text]
    refused = CliRunner().invoke(main, [part for part in command if part != "--any-reference"])
    assert refused.exit_code == 2 and not (output / "evaluation").exists()
    assert refused.stderr.startswith(f"grokquant: --any-reference: needed to compare {output}")
    printed = CliRunner().invoke(main, command)
    assert printed.exit_code == 0, printed.output
    found = read_report(output / "evaluation")
    note = found.reference_note
    assert note.startswith("The reference is another model than the source: 1 of ")
    assert printed.stdout.startswith(note + "\n")
    written = json.loads((output / "evaluation" / "report.json").read_text())
    assert list(written)[:2] == ["schema", "reference_note"]
    body = (output / "evaluation" / "report.html").read_text().partition("<header>")[2]
    assert body.startswith(f"<p><b>{note}</b></p>")
    table = (output / "README.md").read_text().partition("<!-- evaluation -->\n")[2]
    assert table.startswith(note)


def test_a_report_about_the_source_has_no_such_line(result, source, text_file, tmp_path):
    text = str(text_file)
    report = grokquant.evaluate(result, source, text, 1, quick=True, any_reference=True)
    assert report.reference_note is None and "reference_note" not in report.to_json()
    page = publish(report, result, tmp_path / "published")[1].read_text()
    assert report.protocol.arithmetic == "float32 on the stored weights"
    for text in (page, markdown_table(report), json.dumps(report.to_json())):
        assert "dequantized" not in text and "integers" not in text


def test_a_record_that_is_none_is_named(result, source, text_file, tmp_path):
    path = shutil.copytree(result, tmp_path / "copy")
    report = json.loads((path / REPORT).read_text())
    for broken in ([{"schema": "x"}], 3, [3], [report["source_models"][0] | {"tensors": {"a": 1}}]):
        (path / REPORT).write_text(json.dumps(report | {"source_models": broken}))
        with pytest.raises(InputError, match=r"quantization-report.json: source_models: "):
            grokquant.evaluate(path, source, str(text_file))


def test_grok_in_another_form_is_the_source(tiny_release, tmp_path):
    output = quantized(tiny_release, tmp_path / "out", EXPERTS | {"method": "rtn"}, ATTENTION)
    port = grok_forms.write_hpcai(tmp_path / "port", open_checkpoint(tiny_release))
    assert differences_of(output, port) is None
    write_random_release(
        tmp_path / "seed",
        layers=2,
        hidden=128,
        ffn=256,
        heads=2,
        kv_heads=1,
        head_dim=64,
        vocab=2048,
        seed=3,
    )
    assert "sampled tensors have other values" in differences_of(output, tmp_path / "seed")
