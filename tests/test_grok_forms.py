"""Grok-1 in every form that is published gives what the release gives."""

import json
import shutil
from os.path import relpath
from pathlib import Path

import grok_forms
import pytest
import torch
from conftest import own_text
from safetensors.torch import load_file, save_file

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.toy import TOY_PATH

LINEAR, LINEAR_V, LINEAR_1 = (
    f"model.layers.0.moe_block.experts.1.{n}.weight" for n in ("linear", "linear_v", "linear_1")
)


@pytest.fixture(scope="module")
def forms(tiny_release, tmp_path_factory):
    """The directory of a form, written once."""
    made: dict[str, Path] = {}

    def form(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp("forms") / name
            made[name] = grok_forms.FORMS[name](path, open_checkpoint(tiny_release))
            shutil.copyfile(TOY_PATH / "tokenizer.model", path / "tokenizer.model")
        return made[name]

    return form


@pytest.fixture
def copy(forms, tmp_path):
    return lambda name: shutil.copytree(forms(name), tmp_path / name)


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def stored(path: Path) -> dict[str, torch.Tensor]:
    files = (load_file(file) for file in sorted(path.glob("*.safetensors")))
    return {name: value for file in files for name, value in file.items()}


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        for ref in open_checkpoint(path).source.tensors.values():
            ref.read()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", grok_forms.FORMS)
def test_tensors_and_config_are_those_of_the_release(forms, tiny_release, form):
    found, wanted = open_checkpoint(forms(form)), open_checkpoint(tiny_release)
    tensors = found.source.tensors
    assert tensors.keys() == wanted.source.tensors.keys()
    for name, ref in wanted.source.tensors.items():
        read = tensors[name].read()
        assert read.dtype == ref.dtype and torch.equal(read, ref.read()), name
        for first, rows in tensors[name].row_blocks():
            assert torch.equal(rows, read[first : first + len(rows)]), name
    # Of the wrong defaults of the port no position is left, so that the real Grok-1's hold.
    positions = {"max_position_embeddings": 8192} if form == "keyfan" else {}
    assert found.source.config == wanted.source.config | positions
    assert found.config.to_dict() == wanted.config.to_dict() | positions
    assert found.parameters == wanted.parameters


@pytest.mark.parametrize("form", grok_forms.FORMS)
def test_results_are_those_of_the_release(forms, tiny_release, text_file, tmp_path, form):
    """Bit for bit, under our names, whatever the source calls them."""

    def quantize(source: Path, output: Path) -> Path:
        rule = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
        return pipeline.quantize(
            parse_recipe(
                {
                    "model": {"path": str(source)},
                    "quantize": [rule],
                    "output": {"path": str(output)},
                    "eval": {"text": relpath(text_file), "samples": 2, "length": 64},
                }
            )
        )

    output, wanted = quantize(forms(form), tmp_path / "a"), quantize(tiny_release, tmp_path / "b")
    found, expected = stored(output), stored(wanted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["Grok1ForCausalLM"] and config["model_type"] == "grok-1"
    assert config["num_local_experts"] == 4 and "num_experts" not in config
    names_no_positions = form == "keyfan"  # Grok-1's are 8192, the tiny one's 512
    report = grokquant.evaluate(
        output, tiny_release, any_reference=names_no_positions, text=own_text(output)
    )
    assert ("max_position_embeddings" in str(report.reference_note)) == names_no_positions
    assert report.kld.mean.value > 0
    assert grokquant.evaluate(output, forms(form), text=own_text(output)).kld == report.kld
    model, _ = grokquant.load(output)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape == (1, 6)


def test_gate_is_not_up(copy, tiny_release):
    """Shapes cannot tell linear from linear_v: values can."""
    path = copy("hpcai")
    grok_forms.swap(path, LINEAR, LINEAR_V)
    swapped, wanted = (open_checkpoint(place).source.tensors for place in (path, tiny_release))
    w1, w3 = (f"model.layers.0.block_sparse_moe.experts.1.{w}.weight" for w in ("w1", "w3"))
    assert torch.equal(swapped[w1].read(), wanted[w3].read())
    assert not torch.equal(swapped[w1].read(), wanted[w1].read())


# --- what is refused


def test_transposed_matrices_are_refused(copy):
    path = copy("hpcai")
    edit(path / "model.safetensors", lambda t: t.update({LINEAR: t[LINEAR].T.contiguous()}))
    assert "w1.weight has shape [128, 256], config.json says [256, 128]" in refusal(path)


def test_down_in_the_place_of_up_is_refused(copy):
    path = copy("hpcai")
    grok_forms.swap(path, LINEAR_V, LINEAR_1)
    assert "experts.1.w3.weight has shape [128, 256]" in refusal(path)


def test_two_names_for_one_tensor_are_refused(copy):
    path = copy("hpcai")
    ours = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    edit(path / "model.safetensors", lambda t: t.update({ours: t[LINEAR].clone()}))
    assert f"{ours} occurs under two names" in refusal(path)


@pytest.mark.parametrize("form", ["hpcai", "keyfan"])
def test_a_head_of_its_own_is_not_lost_silently(copy, form, text_file, tmp_path):
    path = copy(form)
    edit(path / "model.safetensors", lambda t: t["lm_head.weight"].view(-1)[-1].add_(1))
    rule = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
    output = {"path": str(tmp_path / "out")}
    recipe = {"model": {"path": str(path)}, "quantize": [rule], "output": output}
    with pytest.raises(InputError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        pipeline.quantize(parse_recipe(recipe))
    assert not (tmp_path / "out").exists()
    assert "lm_head.weight differs" in refusal(path)
    edit(path / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(3, 128)}))
    assert "lm_head.weight has shape [3, 128]" in refusal(path)


def test_a_tensor_that_nobody_asks_for_is_named(copy):
    path = copy("sglang")
    extra = "model.layers.0.block_sparse_moe.experts.7.w1.weight"
    edit(path / "model.safetensors", lambda t: t.update({extra: torch.ones(256, 128)}))
    assert f"unexpected tensor {extra}: grok-1 has no such parameter" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_act": "silu"}, 'hidden_act is "silu", which Grok-1 does not support'),
        ({"residual_moe": True}, "moe_intermediate_size must be"),
        ({"final_logit_softcapping": 50}, "final_logit_softcapping is 50"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_type is "yarn"'),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0, rope_parameters says"),
        ({"rope_parameters": 5}, "rope_parameters must be an object"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true"),
    ],
)
def test_settings_that_grok_1_has_not(copy, changes, complaint):
    path = copy("sglang")
    edit_config(path, **changes)
    assert complaint in refusal(path)


def test_only_the_wrong_defaults_of_the_port_are_overruled(copy):
    path = copy("keyfan")
    assert open_checkpoint(path).config.rope_theta == 10000
    assert open_checkpoint(path).config.max_position_embeddings == 8192
    edit_config(path, rope_theta=50000.0)
    assert open_checkpoint(path).config.rope_theta == 50000
    edit_config(path, hidden_act="relu")
    assert 'hidden_act is "relu"' in refusal(path)


def test_rotary_settings_as_transformers_5_has_them(copy):
    path = copy("hpcai")
    edit_config(path, rope_parameters={"rope_theta": 20000.0, "rope_type": "default"})
    assert open_checkpoint(path).config.rope_theta == 20000


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00019.bin", "x-000.bin", "model.pth"])
def test_pickles_are_named_and_not_opened(tmp_path, name):
    (tmp_path / "config.json").write_text('{"architectures": ["GrokForCausalLM"]}')
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match=f"{name}: is a pickle, which could run .* safetensors"):
        open_checkpoint(tmp_path)


# --- files of ranks

RANK_0 = "pytorch_model-00000-TP-000.safetensors"
RANK_1 = "pytorch_model-00000-TP-001.safetensors"
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


def test_ranks_without_an_index(copy, tiny_release):
    path = copy("presharded")
    (path / "model.safetensors.index.json").unlink()
    found, wanted = (open_checkpoint(place).source.tensors for place in (path, tiny_release))
    assert all(torch.equal(found[name].read(), wanted[name].read()) for name in wanted)


def test_eight_ranks(tiny_release, tmp_path):
    grok_forms.write_presharded(tmp_path / "x", open_checkpoint(tiny_release), ranks=8)
    found, wanted = (open_checkpoint(p).source.tensors for p in (tmp_path / "x", tiny_release))
    assert all(torch.equal(found[name].read(), wanted[name].read()) for name in wanted)


def test_what_all_ranks_have_as_a_whole_must_be_the_same(copy, tiny_release):
    path = copy("presharded")
    gate = load_file(path / RANK_0.replace("000.", "common."))[GATE]
    edit(path / RANK_0.replace("000.", "common."), lambda t: t.pop(GATE))
    (path / "model.safetensors.index.json").unlink()
    for file in (RANK_0, RANK_1):
        edit(path / file, lambda t: t.update({GATE: gate.clone()}))
    assert torch.equal(open_checkpoint(path).source.tensors[GATE].read(), gate)
    edit(path / RANK_1, lambda t: t[GATE].add_(1))
    assert f"{GATE} differs between rank 000 and rank 001" in refusal(path)


def test_incomplete_ranks_are_refused(copy):
    path = copy("presharded")
    edit(path / RANK_1, lambda t: t.pop(W1))
    assert f"the files of rank 001 have no tensor '{W1}'" in refusal(path)
    for file in path.glob("*-TP-001*"):
        file.unlink()
    assert "q_proj.weight has shape [64, 128], config.json says [128, 128]" in refusal(path)
    for file in path.glob("*-TP-000*"):
        file.rename(path / file.name.replace("000.safe", "002.safe"))
    assert "files of rank 002, but none of rank 000" in refusal(path)


def test_misshapen_parts_are_refused(copy):
    path = copy("presharded")
    edit(path / RANK_1, lambda t: t.update({W1: t[W1][:, :64].contiguous()}))
    assert "[128, 64] in the files of rank 001, torch.bfloat16 [128, 128]" in refusal(path)


def test_parts_in_two_files_are_refused(copy):
    path = copy("presharded")
    part = load_file(path / RANK_0)[W1]
    edit(path / RANK_0.replace("00000", "00001"), lambda t: t.update({W1: part}))
    assert f"tensor '{W1}' is also in another file" in refusal(path)


def test_an_index_of_more_than_there_is_is_refused(copy):
    path = copy("presharded")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.x"] = RANK_0
    index.write_text(json.dumps(content))
    assert "tensor 'model.layers.9.x' is in no rank file" in refusal(path)


def test_quantized_ranks_are_refused(copy):
    path = copy("presharded")
    edit_config(path, quantization_config={"quant_method": "fp8"})
    assert "quantized models split over ranks" in refusal(path)
