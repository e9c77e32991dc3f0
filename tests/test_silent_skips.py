"""What other tools have lost without a word: here each ends in an error, or is right."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.match import match_name
from conftest import seal, unit_of
from safetensors.torch import load_file, save_file
from test_families import MODELS, SIZES, SPARSE, saved  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import GateError, InputError
from grokquant.families import FAMILIES
from grokquant.formats.compressed_tensors import FORMAT as compressed_tensors
from grokquant.formats.gptq import FORMAT as gptq
from grokquant.grids import Scheme
from grokquant.job import pipeline
from grokquant.job.plan import build_plan
from grokquant.job.verify import verify
from grokquant.recipe import parse_recipe
from grokquant.reporting.inspection import describe
from grokquant.reporting.terminal import RunProgress, print_description
from grokquant.runtime.load import load
from grokquant.sources import safetensors_directory

EVERYTHING = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def recipe_of(source: Path, output: Path, *rules: dict):
    values = {"model": {"path": str(source)}, "quantize": list(rules) or [EVERYTHING]}
    return parse_recipe(values | {"output": {"path": str(output)}})


def edit(path: Path, change) -> None:
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def fused(saved, tmp_path):  # noqa: F811
    """A copy of a model with the 3-D experts that transformers 5 has in memory."""

    def make(family: str) -> Path:
        model, path = saved(family)
        path = shutil.copytree(path, tmp_path / "source")
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


# --- experts that are in the file and not found, or the other way round


@pytest.mark.parametrize("family", SPARSE)
def test_fused_experts_are_all_quantized(fused, tmp_path, family):
    rule = EVERYTHING | {"match": "layers.*.experts.*"}
    source = fused(family)
    output = pipeline.quantize(recipe_of(source, tmp_path / "out", rule))
    config = open_checkpoint(source).config
    known = open_checkpoint(source).family
    sparse = sum(known.num_experts(config, layer) for layer in range(2))
    report = json.loads((output / "quantization-report.json").read_text())
    experts = [unit["name"] for unit in report["units"]]
    assert len(experts) == len(set(experts)) == 3 * sparse > 0
    assert not any(".experts." in name for name in report["kept"])
    schemes = {name: ref.scheme for name, ref in open_checkpoint(output).units()}
    assert all(schemes[name].bits == 4 for name in experts)


def test_fused_experts_under_another_name_are_missed_aloud(fused):
    path = fused("mixtral")
    edit(path, lambda t: t.update({FUSED + "_weights": t.pop(FUSED)}))
    assert "block_sparse_moe.experts.0.w1.weight is missing" in refusal(path)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_expert_less_is_missed(fused, family):
    path = fused(family)
    edit(path, lambda t: t.update({FUSED: t[FUSED][:3]}))
    assert "experts.3." in (found := refusal(path)) and found.endswith("is missing")


def test_one_expert_more_is_noticed(fused):
    path = fused("qwen3_moe")
    last = "model.layers.1.mlp.experts.gate_up_proj"
    edit(path, lambda t: t.update({last: torch.cat((t[last], t[last][:1]))}))
    assert "mlp.experts.4.gate_proj.weight: qwen3-moe has no such parameter" in refusal(path)


def test_experts_of_which_the_config_says_nothing_are_noticed(saved, tmp_path):  # noqa: F811
    path = shutil.copytree(saved("qwen3_moe")[1], tmp_path / "source")
    edit_config(path, mlp_only_layers=[0, 1])
    assert "layers.1.mlp.gate_proj.weight is missing" in refusal(path)


def test_layers_of_which_the_config_says_nothing_are_noticed(saved, tmp_path):  # noqa: F811
    path = shutil.copytree(saved("mixtral")[1], tmp_path / "source")
    edit_config(path, num_hidden_layers=1)
    assert "tensor model.layers.1." in (found := refusal(path)) and "has no such parameter" in found


def test_gate_and_up_that_do_not_halve_are_refused(fused):
    path = fused("olmoe")
    edit(path, lambda t: t.update({FUSED: t[FUSED][:, :-1]}))
    assert f"{FUSED} has shape [4, 63, 64], which is not one of experts" in refusal(path)


def test_transposed_experts_are_refused(fused):
    path = fused("mixtral")
    edit(path, lambda t: t.update({FUSED: t[FUSED].transpose(1, 2)}))
    assert "experts.0.w1.weight has shape [32, 192], config.json says [96, 64]" in refusal(path)


def test_names_of_transformers_4(saved):  # noqa: F811
    """Experts one by one, as the model cards have them."""
    endings = {
        "mixtral": "block_sparse_moe.experts.3.w2.weight",
        "qwen2_moe": "mlp.experts.3.down_proj.weight",
        "qwen3_moe": "mlp.experts.3.down_proj.weight",
        "olmoe": "mlp.experts.3.down_proj.weight",
        "deepseek_v2": "mlp.experts.3.down_proj.weight",
    }
    for family, ending in endings.items():
        model, path = saved(family)
        name = f"model.layers.1.{ending}"
        W = load_file(path / "model.safetensors")[name]
        experts = model.get_submodule("model.layers.1.mlp.experts")
        assert torch.equal(W, experts.down_proj[3])
        assert torch.equal(open_checkpoint(path).source.tensors[name].read(), W)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_of_a_fused_file_one_expert_is_read(fused, monkeypatch, family):
    """gpt-oss has the rows of gate and up in turns: both are read for either."""
    read, whole = [], safetensors_directory._load

    def counting(*args):
        tensor = whole(*args)
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(safetensors_directory, "_load", counting)
    tensors = open_checkpoint(fused(family)).source.tensors
    names = [name for name in tensors if "layers.0." in name and ".experts.2." in name]
    matrices = [name for name in names if not name.endswith("bias")]
    assert len(matrices) == 3 and not read
    for name in matrices:
        read.clear()
        size = tensors[name].read().numel()
        turns = family == "gpt_oss" and "down" not in name
        assert sum(read) == size * (2 if turns else 1)


# --- rules and patterns


def test_rules_that_reach_no_expert_are_named(saved, tmp_path):  # noqa: F811
    """Names of modules, as other tools want them, are no names of ours."""
    source = saved("mixtral")[1]
    for match in ("*mlp.experts*", "re:.*experts.*", "Linear", "*.w1", "layers.*.experts.*.w?"):
        with pytest.raises(InputError, match="matches no matrix"):
            build_plan(recipe_of(source, tmp_path / "x", EVERYTHING | {"match": match}))


@pytest.mark.parametrize("family", MODELS)
def test_gate_is_no_router(family):
    """No pattern of an output's config means the router and an expert's gate at once."""
    config = AutoConfig.for_model(family, **SIZES | MODELS[family])
    (known,) = (f for f in FAMILIES.values() if f.config_class is type(config))
    units = [unit_of(m.tensor, Scheme(4, 32), (64, 64)) for m in known.units(config)]
    stems = {unit.tensor.removesuffix(".weight") for unit in units}
    routers = [name.removesuffix(".weight") for name in known.routers(config)]
    assert bool(routers) == (family in SPARSE) and not stems & set(routers)
    written = compressed_tensors.quantization_config(units, [*routers, "lm_head"])
    (group,) = written["config_groups"].values()
    named = [target for target in group["targets"] if target != "Linear"]
    for router in [*routers, "lm_head"]:
        assert any(match_name(router, target) for target in written["ignore"])
        assert not any(match_name(router, target) for target in named)
    for stem in stems:
        assert not any(match_name(stem, target) for target in written["ignore"])
        assert any(match_name(stem, target) for target in named)
    rules = gptq.quantization_config(units, [*routers, "lm_head"])["dynamic"]
    skipped = ["re:" + rule[2:] for rule in rules if rule.startswith("-:")]
    assert all(any(match_name(router, rule) for rule in skipped) for router in routers)
    assert not any(match_name(stem, rule) for rule in skipped for stem in stems)


def test_a_rule_for_gates_leaves_the_router_alone(saved, tmp_path):  # noqa: F811
    source = saved("qwen2_moe")[1]
    rule = EVERYTHING | {"match": "*gate*"}
    output = pipeline.quantize(recipe_of(source, tmp_path / "out", rule))
    found, wanted = (open_checkpoint(path).source.tensors for path in (output, source))
    quantized = {name for name, ref in found.items() if ref.scheme}
    experts = {f"mlp.experts.{expert}.gate_proj" for expert in range(4)}
    ends = {name.removesuffix(".weight").split(".", 3)[3] for name in quantized}
    assert ends == {*experts, "mlp.shared_expert.gate_proj", "mlp.gate_proj"}
    for name in wanted.keys() - quantized:
        assert torch.equal(found[name].read(), wanted[name].read()), name


@pytest.mark.parametrize("family", SPARSE)
def test_all_that_is_no_matrix_stays_bit_for_bit(saved, tmp_path, family):  # noqa: F811
    """Routers, gates of shared experts, norms, biases, sinks, embedding, head."""
    source = saved(family)[1]
    output = pipeline.quantize(recipe_of(source, tmp_path / "out"))
    found, wanted = (open_checkpoint(path).source.tensors for path in (output, source))
    assert found.keys() == wanted.keys()
    kept = [name for name, ref in found.items() if ref.scheme is None]
    checkpoint = open_checkpoint(source)
    assert set(checkpoint.family.routers(checkpoint.config)) <= set(kept)
    for name in kept:
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name].read(), wanted[name].read()), name


# --- what a finished output holds, and what is loaded of it


@pytest.fixture
def finished(saved, tmp_path) -> Path:  # noqa: F811
    return pipeline.quantize(recipe_of(saved("mixtral")[1], tmp_path / "out"))


def in_file_of(output: Path, name: str) -> Path:
    index = json.loads((output / "model.safetensors.index.json").read_text())
    return output / index["weight_map"][name]


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2"


def test_an_expert_left_in_bf16_is_found(finished):
    """Everything else of the forgery is in order: index, checksums, report."""
    file = in_file_of(finished, EXPERT + ".weight_packed")
    tensors = load_file(file)
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        tensors.pop(f"{EXPERT}.{part}")
    tensors[EXPERT + ".weight"] = torch.ones(64, 96).bfloat16()
    save_file(tensors, file)
    index = finished / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    kept = {n: f for n, f in content["weight_map"].items() if not n.startswith(EXPERT)}
    content["weight_map"] = kept | {EXPERT + ".weight": file.name}
    index.write_text(json.dumps(content))
    seal(finished)
    with pytest.raises(GateError, match=r"experts.2.down: planned as int4 g32 sym, but stored as"):
        verify(finished)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_an_expert_that_is_not_there_is_not_made_up(finished, part):
    file = in_file_of(finished, f"{EXPERT}.{part}")
    tensors = load_file(file)
    tensors.pop(f"{EXPERT}.{part}")
    save_file(tensors, file)
    for use in (load, open_checkpoint, lambda path: grokquant.evaluate(path, path)):
        with pytest.raises(InputError, match=part):
            use(finished)


@pytest.mark.parametrize("family", SPARSE)
def test_a_loaded_model_has_every_stored_weight(saved, tmp_path, family):  # noqa: F811
    """Every expert in its own place, in an output, too."""
    output = pipeline.quantize(recipe_of(saved(family)[1], tmp_path / "out"))
    checkpoint = open_checkpoint(output)
    tensors, known = checkpoint.source.tensors, checkpoint.family
    model, _ = load(output, packed=False)
    assert not any(p.is_meta for p in model.parameters())
    for index, layer in enumerate(known.layers(model)):
        experts = known.experts_of(layer)
        for expert in range(known.num_experts(checkpoint.config, index)):
            names = known.expert_tensors(index, expert)
            W = {part: tensors[name].read().bfloat16() for part, name in names.items()}
            gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            if known.transposed:
                gate_up, down = gate_up.T, down.T
            rows = len(gate_up) // 2
            gate = gate_up[::2] if known.interleaved else gate_up[:rows]
            up = gate_up[1::2] if known.interleaved else gate_up[rows:]
            assert torch.equal(gate, W["gate"]) and torch.equal(up, W["up"])
            assert torch.equal(down, W["down"])
    for name, parameter in model.named_parameters():
        stored = tensors.get(known.tensor_name(name))
        if stored is not None:
            assert torch.equal(parameter, stored.read().to(parameter.dtype)), name


@pytest.mark.parametrize("output_format", ["compressed-tensors", "bf16"])
def test_transformers_does_not_make_up_experts_of_grok(tiny_recipe, tmp_path, output_format):
    method = {"method": "rtn", "bits": 8, "group": 32}
    rule = {"match": "layers.*"} | ({"method": "keep"} if output_format == "bf16" else method)
    output = {"path": str(tmp_path / "out"), "format": output_format}
    path = pipeline.quantize(tiny_recipe(rule, output=output))
    tokens = torch.tensor([[5, 6, 7]])
    found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(tokens).logits
    wanted = load(path, packed=False)[0](tokens).logits  # experts added up in another order
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_transformers_does_not_make_up_what_a_file_lacks_of_grok(tiny_release, tmp_path):
    load(tiny_release, packed=False)[0].save_pretrained(tmp_path / "x")
    missing = "model.layers.0.self_attn.q_proj.weight"
    edit(tmp_path / "x", lambda tensors: tensors.pop(missing))
    with pytest.raises(InputError, match="q_proj.* would randomize it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "x")


def test_transformers_loads_what_it_saved_of_grok(tiny_release, tmp_path):
    model, _ = load(tiny_release, packed=False)
    model.save_pretrained(tmp_path / "x")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not info["missing_keys"]
    wanted = dict(model.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in again.named_parameters())
    opened, release = (open_checkpoint(p).source.tensors for p in (tmp_path / "x", tiny_release))
    assert opened.keys() == release.keys()
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert torch.equal(opened[name].read(), release[name].read())


# --- models inside of others


@pytest.mark.parametrize(
    "name", ["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"]
)
def test_text_models_inside_of_others_are_refused_by_name(saved, tmp_path, name):  # noqa: F811
    path = shutil.copytree(saved("gemma3_text")[1], tmp_path / "source")
    edit_config(path, architectures=[name], text_config={"model_type": "gemma3_text"})
    message = refusal(path)
    assert f"{name!r} is not known; transformers has no multimodal model of this name" in message
    assert "(known: Grok1ForCausalLM, " in message
    with pytest.raises(InputError, match=name):
        pipeline.quantize(recipe_of(path, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_not_read_are_named_everywhere(fused, tmp_path, capsys):
    source = fused("mixtral")
    shutil.copyfile(source / "model.safetensors", source / "old.safetensors")
    note = f"{source}: the weights are those of model.safetensors; not read: old.safetensors"
    assert describe(source)["notes"] == [note]
    capsys.readouterr()
    print_description(describe(source))
    assert capsys.readouterr().err == f"grokquant: {note}\n"
    with RunProgress() as progress:
        pipeline.quantize(recipe_of(source, tmp_path / "out"), progress)
    assert f"grokquant: {note}\n" in capsys.readouterr().err
    assert describe(tmp_path / "out")["notes"] == []
    with pytest.warns(UserWarning, match="not read: old.safetensors"):
        load(source)
