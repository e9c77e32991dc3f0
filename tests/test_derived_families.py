"""Families derived from transformers' own models: a sample; `make test-families` tries all."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from try_families import (
    IMAGE_TEXT,
    TOKENS,
    passes,
    relative,
    rules_of,
    save_tiny_model,
    streamed_logits,
    try_family,
)

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.job import pipeline
from grokquant.job.plan import build_plan
from grokquant.recipe import parse_recipe
from grokquant.runtime.load import load
from grokquant.streaming.blocks import Rows
from grokquant.streaming.stream import Stream
from grokquant.streaming.whole import WholeModel, running

BASELINES = Path(__file__).parent.parent / "eval" / "baselines"
# One of each kind.
SAMPLE = {
    "olmo2": "dense",
    "bloom": "layers return tuples and get an own mask for each row",
    "deepseek_v3": "shared experts, buffers in files, low-rank attention",
    "qwen3_next": "layers with linear attention",
    "granitemoe": "files hold all experts of a layer as one tensor",
    "llama4_text": "experts that do not run one by one",
    "gemma3": "images and text",
    "kimi_k25": "files join queries, keys and values of the image part",
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_derived_family_does_all_that_a_family_does(kind, tmp_path):
    found = try_family(kind, tmp_path)
    assert found["derived"] and passes(found), found


def test_the_table_has_a_row_for_every_kind_that_transformers_names():
    rows = json.loads((BASELINES / "families.json").read_text())
    assert set(rows) == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *IMAGE_TEXT}
    assert all(row["passes"] or row.keys() & {"rtn", "refused", "untried"} for row in rows.values())


@torch.no_grad()
def test_a_model_runs_whole_if_its_layers_get_more_than_states(tmp_path):
    """Of inkling2, the head reads what entered earlier layers."""
    model = save_tiny_model("inkling2_text", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert isinstance(running(checkpoint), WholeModel) and not checkpoint.family.runs_experts
    assert "fit into memory" in checkpoint.family.notice
    wanted = load(tmp_path / "model", dtype=torch.float32)[0](TOKENS).logits
    assert relative(streamed_logits(tmp_path / "model"), wanted) < 1e-5
    assert model.config.num_hidden_layers == checkpoint.num_layers


@pytest.mark.parametrize(
    ("kind", "match"), [("llama4_text", "layers.*.experts.*"), ("dbrx", "layers.*.mlp.*")]
)
def test_gptq_is_refused_where_experts_do_not_run_one_by_one(tmp_path, kind, match):
    save_tiny_model(kind, tmp_path / "model")
    rule = {"match": match, "method": "gptq", "bits": 4, "group": 32}
    output = {"path": str(tmp_path / "out")}
    content = {"model": {"path": str(tmp_path / "model")}, "quantize": [rule], "output": output}
    with pytest.raises(InputError, match=r"quantize\[0\]\.method: gptq needs .* use rtn"):
        build_plan(parse_recipe(content))


@pytest.fixture(scope="module")
def with_extra_tensors(tmp_path_factory):
    """A model with tensors for predicting several tokens, which transformers does not read."""
    source = tmp_path_factory.mktemp("extra") / "model"
    save_tiny_model("deepseek_v3", source)
    tensors = load_file(source / "model.safetensors")
    extra = {
        "model.layers.61.eh_proj.weight": torch.randn(8, 16).bfloat16(),
        "model.layers.3.enorm.weight": torch.randn(8).bfloat16(),  # the model has three
        "mtp.0.proj.weight": torch.randn(8, 8).bfloat16(),
    }
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    return source, extra


def test_code_that_sets_the_weights_of_linear_modules_is_found(with_extra_tensors, tmp_path):
    """transformers runs it on packed modules, which have none."""
    save_tiny_model("nanochat", tmp_path)
    assert open_checkpoint(tmp_path).family.joins
    assert not open_checkpoint(with_extra_tensors[0]).family.joins


@pytest.mark.parametrize(("fate", "word"), [("carry", "carried over"), ("leave_out", "left out")])
def test_tensors_beyond_the_model_are_named_and_carried_over_or_left_out(
    with_extra_tensors, tmp_path, fate, word
):
    source, extra = with_extra_tensors
    checkpoint = open_checkpoint(source)
    assert checkpoint.extra_tensors == extra.keys()
    rules = rules_of(checkpoint, "rtn")
    output = {"path": str(tmp_path / "out"), "extra_tensors": fate}
    content = {"model": {"path": str(source)}, "quantize": rules, "output": output}
    recipe = parse_recipe(content)
    (note,) = (note for note in build_plan(recipe).checkpoint.notices if "layers.61" in note)
    assert f"3 tensors are no part of deepseek-v3 in transformers, and are {word}" in note
    assert "1 in model.layers.3, 1 in model.layers.61, 1 in mtp.0" in note
    made = open_checkpoint(pipeline.quantize(recipe))
    held = made.source.tensors.keys() & extra.keys()
    assert held == (extra.keys() if fate == "carry" else set())
    for name in held:
        assert torch.equal(made.source.tensors[name].read(), extra[name])


def test_layers_that_config_json_does_not_count_are_refused(with_extra_tensors, tmp_path):
    source, _ = with_extra_tensors
    shutil.copytree(source, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unexpected tensor model\.layers\.3\.enorm"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        ("rwkv", {"rescale_every": 6}, r"changes rwkv\.blocks\.0\.\S+ while .* to 0, such as resc"),
        (
            "hrm_text",
            {},
            r"_module\.layers\.0\.\S+ and others of hrm_text are one tensor",
        ),
    ],
)
def test_an_architecture_of_another_form_is_refused_with_a_way_out(
    tmp_path, kind, changes, complaint
):
    save_tiny_model(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=complaint) as caught:
        open_checkpoint(tmp_path)
    assert "extending.md" in str(caught.value) and "\n" not in str(caught.value)


def rounded(source, rules, output):
    """A model quantized by rules for rtn in int4."""
    rules = [{"match": match, "method": "rtn", "bits": 4, "group": 32} for match in rules]
    content = {"model": {"path": str(source)}, "quantize": rules, "output": {"path": str(output)}}
    return pipeline.quantize(parse_recipe(content))


@torch.no_grad()
def test_matrices_stored_as_in_by_out_are_quantized_and_kept_alike(tmp_path):
    """GPT-2 as it was published: Conv1D, names without their prefix, and causal masks."""
    model = save_tiny_model("gpt2", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 8, 8).tril() for n in range(3)}
    save_file(tensors | masks, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "model")
    assert not checkpoint.extra_tensors
    # The square c_proj of the attention stays: only its name tells which way round it is.
    out = rounded(
        tmp_path / "model", ["layers.*.mlp.*", "layers.*.attention.c_attn"], tmp_path / "out"
    )
    made = open_checkpoint(out).source.tensors
    names = [m.tensor for m in checkpoint.matrices() if made[m.tensor].scheme]
    assert len(names) == 9
    for name in names:
        ours = made[name].read()
        theirs = model.get_parameter(checkpoint.family.module_weight(name))
        assert 0 < relative(ours, theirs.T) < 0.2
        theirs.copy_(ours.T)
    wanted = model(TOKENS).logits
    for packed in (True, False):
        found = load(out, dtype=torch.float32, packed=packed)[0](TOKENS).logits
        assert relative(found, wanted) < 1e-5
    assert relative(streamed_logits(out), wanted) < 1e-5


@torch.no_grad()
def test_experts_that_return_their_input_need_no_tensors(tmp_path):
    """Published files of LongCat have none for them; those of transformers' class have."""
    model = save_tiny_model("longcat_flash", tmp_path / "model")
    wanted = model(TOKENS).logits
    file = tmp_path / "model" / "model.safetensors"
    unused = re.compile(r"\.experts\.[45]\.")
    tensors = {name: t for name, t in load_file(file).items() if not unused.search(name)}
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.num_experts == 4
    out = rounded(tmp_path / "model", ["layers.*.experts.*"], tmp_path / "out")
    ours = load(out, dtype=torch.float32, packed=False)[0](TOKENS).logits
    packed = type(model).from_pretrained(out, dtype=torch.float32)
    assert relative(packed(TOKENS).logits, ours) < 1e-5
    assert not [m.name for m in checkpoint.matrices() if "router" in m.name]
    found = load(tmp_path / "model", dtype=torch.float32)[0](TOKENS).logits
    assert relative(found, wanted) < 1e-5
    assert relative(streamed_logits(tmp_path / "model"), wanted) < 1e-5


@torch.no_grad()
def test_parameters_that_layers_share_are_quantized_once(tmp_path):
    model = save_tiny_model("zamba", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    shared = [m for m in checkpoint.matrices() if "shared_transf" in m.tensor]
    assert {m.layer for m in shared} == {1} and len(shared) == 7
    out = rounded(tmp_path / "model", ["layers.1.shared.*"], tmp_path / "out")
    made = open_checkpoint(out).source.tensors
    for matrix in shared:
        model.get_parameter(matrix.tensor).copy_(made[matrix.tensor].read())
    wanted = model(TOKENS).logits
    for packed in (True, False):
        found = load(out, dtype=torch.float32, packed=packed)[0](TOKENS).logits
        assert relative(found, wanted) < 1e-5
    assert relative(streamed_logits(out), wanted) < 1e-5


@torch.no_grad()
def test_buffers_have_the_dtype_that_transformers_gives_them(tmp_path):
    """Of falcon_h1, a buffer multiplies states: in float32 a model in bfloat16 would be another."""
    model = save_tiny_model("falcon_h1", tmp_path)
    found = load(tmp_path)[0](TOKENS).logits
    wanted = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)(TOKENS).logits
    assert torch.equal(found, wanted)


def test_code_of_transformers_that_does_not_run_is_named(tmp_path):
    """That of xlstm mixes dtypes in bfloat16, on rows of 64 tokens or more."""
    save_tiny_model("xlstm", tmp_path)
    model = running(open_checkpoint(tmp_path), torch.bfloat16)
    Stream(model, [Rows(TOKENS)]).run_layer(0)  # shorter rows
    stream = Stream(model, [Rows(TOKENS.repeat(1, 2))])
    with pytest.raises(InputError, match=r"layer 0: .* xlstm .* bfloat16 on rows of 96 .*rtn"):
        stream.run_layer(0)


def test_other_unknown_tensors_are_refused(tmp_path):
    save_tiny_model("olmo2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.extra": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"unexpected tensor model\.extra: olmo2 has no such"):
        open_checkpoint(tmp_path)


def test_tensors_that_a_model_inside_the_model_does_not_read_are_carried_over(tmp_path):
    """Files of gemma3n have keys of layers that take them from others."""
    save_tiny_model("gemma3n_text", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = "model.layers.2.self_attn.k_proj.weight"
    assert extra not in tensors
    like = tensors["model.layers.1.self_attn.k_proj.weight"]
    both = tensors | {extra: like.clone()}
    save_file(both, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.source.tensors[extra].read(), like)
    assert any(extra.removesuffix(".self_attn.k_proj.weight") in n for n in checkpoint.notices)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "rule", "count"),
    [("dbrx", "layers.*.mlp.w*", 6), ("jetmoe", "layers.*.*put_linear", 12)],
)
def test_experts_of_another_form_are_rounded_to_nearest(tmp_path, kind, rule, count):
    """Those of DBRX are rows of a matrix, those of JetMoE [experts, out, in]."""
    model = save_tiny_model(kind, tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.family.notice is None
    matrices = list(checkpoint.matrices())
    assert not [m.name for m in matrices if "router" in m.name]
    out = rounded(tmp_path / "model", [rule], tmp_path / "out")
    made = open_checkpoint(out).source.tensors
    names = [m.tensor for m in matrices if made[m.tensor].scheme]
    assert len(names) == count
    for name in names:
        held = model.get_parameter(checkpoint.family.module_weight(name))
        ours = made[name].read().view(held.shape)
        assert 0 < relative(ours, held) < 0.2
        held.copy_(ours)
    wanted = model(TOKENS).logits
    assert relative(load(out, dtype=torch.float32)[0](TOKENS).logits, wanted) < 1e-5
    assert relative(streamed_logits(out), wanted) < 1e-5


def test_code_beside_the_weights_is_not_used(tmp_path):
    save_tiny_model("olmo2", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "modeling_evil.py").write_text("raise SystemExit('ran')")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert "auto_map" not in checkpoint.source.config
    assert any("auto_map" in note for note in checkpoint.notices)
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("num_hidden_layers", 10**6, "num_hidden_layers is 1000000, more than 4096"),
        ("hidden_size", -3, "transformers makes no model of it"),
        ("model_type", "nothing", "'Olmo2ForCausalLM' is not known .*extending.md"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(tmp_path, field, value, complaint):
    save_tiny_model("olmo2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(InputError, match=complaint) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_matrices_that_no_token_reaches_get_no_inputs(tmp_path):
    """Those of cross-attention, where a decoder runs without its encoder; gptq falls back then."""
    save_tiny_model("bart", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    running_model = running(checkpoint, torch.float32)
    hidden = running_model.embed(TOKENS)
    for matrix in checkpoint.matrices():
        if matrix.layer:
            continue
        width = checkpoint.source.tensors[matrix.tensor].shape[1]
        tokens = 0 if "encoder_attn" in matrix.tensor else TOKENS.numel()
        assert running_model.inputs_of(0, matrix.tensor, hidden).shape == (tokens, width)
