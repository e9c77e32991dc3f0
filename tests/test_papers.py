"""What outputs say of themselves: model card, names, GGUF metadata, and nothing of the machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from gguf.utility import size_label
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from shipped_tokenizers import ROWS, TEMPLATE, json_with_config, sentencepiece_model
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.cli import main
from grokquant.containers.gguf_general import file_name
from grokquant.errors import InputError
from grokquant.files.gguf_header import GgufTensor
from grokquant.files.published import is_repository, published_path
from grokquant.job import pipeline
from grokquant.job.convert import conversion_recipe
from grokquant.job.plan import build_plan
from grokquant.job.verify import verify
from grokquant.recipe import Recipe, load_recipe, parse_recipe
from grokquant.reporting.publish import publish
from grokquant.sources.origin import front_matter, origin_of
from grokquant.types import Origin, Source

SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Q8 = {"match": "layers.*", "method": "rtn", "grid": "q8_0"}
INT4 = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
CARD = """---
license: other
license_name: Acme Community
license_link: LICENSE
language: [en, no]
tags: [x]
---
# Model
"""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """A random Mixtral without a tokenizer."""
    path = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def copied(mixtral: Path, path: Path, tokenizer: bool = True) -> Path:
    shutil.copytree(mixtral, path)
    if tokenizer:
        json_with_config(path)
    return path


def recipe_of(
    source: Path, path: Path, rule: dict, form: str, tokenizer: str = "source", **sections: object
) -> Recipe:
    output = {"path": str(path), "format": form, "tokenizer": tokenizer}
    values = {"model": {"path": str(source)}, "quantize": [rule], "output": output}
    return parse_recipe(values | sections)


@pytest.fixture
def cached(mixtral, tmp_path) -> Path:
    """The model as a download cache has it, with the card of its publisher."""
    place = tmp_path / "hub" / "models--acme--Mixer-v0.1-Chat" / "snapshots" / "0123abcd"
    source = copied(mixtral, place)
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("terms")
    sampling = {"eos_token_id": [2, 0], "temperature": 0.6, "top_k": 20}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    return source


# The model card


def card_of(output: Path) -> ModelCard:
    return ModelCard.load(output / "README.md", ignore_metadata_errors=False)


def test_the_card_has_what_the_hub_asks_for(cached, tmp_path):
    output = pipeline.quantize(recipe_of(cached, tmp_path / "out", INT4, "compressed-tensors"))
    found = card_of(output).data.to_dict()
    assert found == {
        "license": "other",
        "license_name": "acme-community",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en", "no"],
        "base_model": "acme/Mixer-v0.1-Chat",
        "base_model_relation": "quantized",
        "quantized_by": "grokquant",
        "tags": ["mixtral", "mixture-of-experts", "compressed-tensors"],
    }
    validate_repo_id(found["base_model"])
    assert (output / "LICENSE").read_text() == "terms"
    text = card_of(output).text
    assert "https://huggingface.co/acme/Mixer-v0.1-Chat" in text and "stored integers" not in text
    assert 'grokquant.load("out")' in text and 'from_pretrained("out")' in text
    assert "--set model.path=acme/Mixer-v0.1-Chat" in text and "llama-cli" not in text
    assert json.loads((output / "quantization-report.json").read_text())["source"] == (
        "acme/Mixer-v0.1-Chat"
    )


def test_a_conversion_has_the_base_model_of_its_source(cached, tmp_path):
    first = pipeline.quantize(recipe_of(cached, tmp_path / "q8", Q8, "compressed-tensors"))
    output = pipeline.quantize(conversion_recipe(first, "gguf", tmp_path / "converted"))
    verify(output)
    found = card_of(output)
    assert (found.data.base_model, found.data.license_link) == ("acme/Mixer-v0.1-Chat", "LICENSE")
    assert found.data.library_name == "gguf" and "with its stored integers" in found.text
    assert "| Q8_0 (copy) |" in found.text
    assert f"llama-cli -m converted/{next(output.glob('*.gguf')).name}" in found.text
    report = json.loads((output / "quantization-report.json").read_text())
    assert list(report["schemes"]) == ["Q8_0 (copy)"]
    tensors = dict(open_checkpoint(output).units())
    assert {ref.stored_as for ref in tensors.values()} == {"Q8_0"}


def test_unquantized_models_need_nothing_but_transformers(mixtral, tmp_path):
    source = copied(mixtral, tmp_path / "source")
    rule = {"match": "*", "method": "keep"}
    output = pipeline.quantize(recipe_of(source, tmp_path / "out", rule, "bf16"))
    assert "import grokquant  #" not in card_of(output).text
    assert "base_model" not in card_of(output).data.to_dict()
    AutoModelForCausalLM.from_pretrained(output)


def test_datasets_of_the_hub_are_named(toy_plan):
    from grokquant.job.card import front_matter as written

    assert written(toy_plan("acme/texts:all:train"))["datasets"] == ["acme/texts"]
    assert "datasets" not in written(toy_plan("python-docs"))
    assert "datasets" not in written(toy_plan("acme/texts.jsonl"))


@pytest.fixture
def toy_plan():
    def make(text: str):
        rule = {"match": "*", "method": "gptq", "bits": 4, "group": 32}
        calibration = {"calibration": {"text": text}}
        return build_plan(recipe_of(Path("toy"), Path("out"), rule, "gptq", **calibration))

    return make


@pytest.mark.parametrize(
    "name", ["a\n---\nlicense: mit", "x: [y", "`<b>|", "- #'\"{", "a b\t\x1b[1m"]
)
def test_no_name_breaks_the_card_or_the_recipe(mixtral, tmp_path, name):
    source = copied(mixtral, tmp_path / "s" / name)
    (source / "README.md").write_text("---\nlicense: |\n  mit\n  ---\n  x: y\n---\n")
    output = pipeline.quantize(recipe_of(source, tmp_path / "o" / name, Q8, "gguf"))
    found = card_of(output).data.to_dict()
    assert found["library_name"] == "gguf" and found["quantized_by"] == "grokquant"
    assert load_recipe(output / "recipe.yaml").model.path == name
    assert not any(c in card_of(output).text for c in "\x1b\t")
    file = next(output.glob("*.gguf")).name
    assert file.replace("-", "").replace(".", "").replace("_", "").isalnum()
    open_checkpoint(output)


@pytest.mark.parametrize(
    ("card", "files", "found"),
    [
        ("license: mit", (), ("mit", None, None)),
        ("license: mit # yes", (), ("mit", None, None)),
        ("license: other\nlicense_name: X Y", ("LICENSE",), ("other", "x-y", None)),
        ("license: other\nlicense_link: LICENSE", ("LICENSE",), ("other", None, "LICENSE")),
        ("license: other\nlicense_link: LICENSE", (), ("other", None, None)),
        ("license: other\nlicense_link: https://x.y/z", (), ("other", None, "https://x.y/z")),
        ("license: My own", (), ("other", "my-own", None)),
        ("x: 1", ("LICENSE.txt",), ("other", "see-license-file", "LICENSE.txt")),
        ("license: [mit]", (), (None, None, None)),
        ("a: *b\nlicense: mit\nc: [", (), ("mit", None, None)),
    ],
)
def test_licences(tmp_path, card, files, found):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    origin = origin_of(tmp_path, {}, {name: tmp_path / name for name in files})
    assert (origin.licence, origin.licence_name, origin.licence_link) == found


@pytest.mark.parametrize(
    ("place", "config", "card", "base"),
    [
        ("models--a--B/snapshots/0", {}, "", "a/B"),
        ("models--a--B/snapshots/0/sub", {}, "", "a/B"),
        ("models--gpt2/snapshots/0", {}, "", None),
        ("models--a--B/refs", {}, "", None),
        ("B", {"_name_or_path": "a/B"}, "", "a/B"),
        ("my-tune", {"_name_or_path": "a/B"}, "", None),
        ("B", {"_name_or_path": "/home/a/B"}, "", None),
        ("x", {}, "base_model: a/B\nbase_model_relation: quantized", "a/B"),
        ("x", {}, "base_model: a/B\nbase_model_relation: finetune", None),
        ("x", {}, "base_model: ../B\nbase_model_relation: quantized", None),
    ],
)
def test_base_models(tmp_path, place, config, card, base):
    path = tmp_path / place
    path.mkdir(parents=True)
    (path / "README.md").write_text(f"---\n{card}\n---\n")
    assert origin_of(path, config, {}).base_model == base


LONG = [f"a/{'b' * length}" for length in (96, 97)]
SHORT = ("a/b", "a/b.c_d-e", "_a/b", "a", "a/b/c", "a--b/c", "a/..b", "a/b.git", "-a/b", "a/b.")


@pytest.mark.parametrize("name", [*SHORT, *LONG, "a/b:", "/b", "a/"])
def test_repositories_are_those_of_the_hub(name):
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_repository(name)
    else:
        assert is_repository(name) == ("/" in name)


def test_front_matter_of_any_kind_is_survived(tmp_path):
    card = tmp_path / "README.md"
    for text in ("", "---", "---\n" * 3, "---\nlicense: &a [*a]\n---", "---\nlicense: !x y\n---\n"):
        card.write_text(text)
        assert "license" not in front_matter(card) or front_matter(card)["license"] != "mit"


# Names and metadata of GGUF files


def tensors(experts: int, inner: int, kind: str = "Q4_K") -> list[GgufTensor]:
    found = [GgufTensor("token_embd.weight", "BF16", (1000, 512))]
    if experts:
        found.append(GgufTensor("blk.0.ffn_up_exps.weight", kind, (experts, inner, 512)))
    return [*found, GgufTensor("blk.0.ffn_up.weight", kind, (inner, 512))]


@pytest.mark.parametrize("experts", [0, 2, 8])
@pytest.mark.parametrize("inner", [1, 10, 1000, 15_000, 200_000, 9_000_000])
def test_sizes_in_names_are_those_of_llama_cpp_s_converter(tmp_path, experts, inner):
    own = tensors(experts, inner)
    expert = inner * 512 if experts else 0
    shared = 1000 * 512 + inner * 512
    label = size_label(shared + experts * expert, shared, expert, experts)
    source = Source(tmp_path, "safetensors", {}, {}, origin=Origin("Model"))
    assert file_name(source, own, 0, 1) == f"Model-{label}-Q4_K.gguf"
    assert file_name(source, own, 1, 12) == f"Model-{label}-Q4_K-00002-of-00012.gguf"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B-Instruct-v0.1-Q4_K.gguf"),
        ("Qwen3-46B-A3B", "Qwen3-46B-A3B-Q4_K.gguf"),
        ("some model 46b", "some-model-46b-Q4_K.gguf"),
        ("tuned-32k", "tuned-32k-8x46B-Q4_K.gguf"),
        ("7B", "7B-8x46B-Q4_K.gguf"),
        ("../.hidden\n", "hidden-8x46B-Q4_K.gguf"),
        ("", "model-8x46B-Q4_K.gguf"),
        ("x" * 300, f"{'x' * 100}-8x46B-Q4_K.gguf"),
    ],
)
def test_names_of_files(tmp_path, name, file):
    """All of 46 billion weights are in one tensor here, so that a size is that of one expert."""
    big = [GgufTensor("blk.0.ffn_up_exps.weight", "Q4_K", (8, 1, 5_750_000_000))]
    big.append(GgufTensor("output.weight", "Q4_K", (1, 40_000_000_000)))
    source = Source(tmp_path, "safetensors", {}, {}, origin=Origin(name))
    if name.startswith(("Mixtral", "Qwen", "some")):
        big = [GgufTensor("output.weight", "Q4_K", (1, 46_000_000_000))]
    assert file_name(source, big, 0, 1) == file


def test_gguf_metadata(cached, tmp_path):
    output = pipeline.quantize(recipe_of(cached, tmp_path / "out", Q8, "gguf"))
    verify(output)  # makes the header again, from what lies in the result
    (file,) = output.glob("*.gguf")
    assert file.name == "Mixer-v0.1-Chat-2x86K-Q8_0.gguf"
    found = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    general = {
        "type": "model",
        "architecture": "llama",
        "name": "Mixer-v0.1-Chat",
        "basename": "Mixer-v0.1-Chat",
        "size_label": "2x86K",
        "quantized_by": "grokquant",
        "quantization_version": 2,
        "file_type": 7,
        "license": "other",
        "license.name": "acme-community",
        "license.link": "LICENSE",
        "languages": ["en", "no"],
        "tags": ["text-generation"],
        "base_model.count": 1,
        "base_model.0.name": "Mixer-v0.1-Chat",
        "base_model.0.organization": "acme",
        "base_model.0.repo_url": "https://huggingface.co/acme/Mixer-v0.1-Chat",
        "sampling.top_k": 20,
        "sampling.temp": pytest.approx(0.6),
    }
    assert {k[8:]: v for k, v in found.items() if k.startswith("general.")} == general
    tokens = {name: found.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    assert tokens == {"bos": 3, "eos": 2, "eot": 0}
    assert found["tokenizer.ggml.add_bos_token"] and not found["tokenizer.ggml.add_eos_token"]
    assert found["tokenizer.chat_template"] == TEMPLATE


# Sources without a tokenizer


def test_a_source_without_tokenizer_is_refused_for_gguf_unless_asked(mixtral, tmp_path):
    for use in (build_plan, pipeline.quantize):
        with pytest.raises(InputError, match=r"output.tokenizer: \S+ has none; `none` writes"):
            use(recipe_of(mixtral, tmp_path / "out", Q8, "gguf"))
    assert list(tmp_path.iterdir()) == []
    recipe = recipe_of(mixtral, tmp_path / "out", Q8, "gguf", tokenizer="none")
    assert "has no tokenizer" in build_plan(recipe).notes[0]
    reader = GGUFReader(next(pipeline.quantize(recipe).glob("*.gguf")))
    assert reader.fields["tokenizer.ggml.model"].contents() == "none"


def test_convert_names_its_own_option(mixtral, tmp_path):
    made = pipeline.quantize(recipe_of(mixtral, tmp_path / "q8", Q8, "compressed-tensors"))
    command = ["convert", str(made), "--format", "gguf", "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "--tokenizer: " in refused.output
    done = CliRunner().invoke(main, [*command, "--tokenizer", "none"])
    assert done.exit_code == 0 and "has no tokenizer" in done.output


def test_a_tokenizer_that_gguf_cannot_have_can_be_left_out(mixtral, tmp_path):
    source = copied(mixtral, tmp_path / "source")
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"gguf supports only .*; `output.tokenizer: none`"):
        build_plan(recipe_of(source, tmp_path / "out", Q8, "gguf"))
    recipe = recipe_of(source, tmp_path / "out", Q8, "gguf", tokenizer="none")
    assert (pipeline.quantize(recipe) / "tokenizer.json").is_file()  # for transformers


def test_other_formats_say_that_there_is_no_tokenizer(mixtral, tmp_path):
    plan = build_plan(recipe_of(mixtral, tmp_path / "out", INT4, "gptq"))
    assert plan.notes == (f"{mixtral}: has no tokenizer, so the output has none either",)
    needing = INT4 | {"method": "gptq"}
    with pytest.raises(InputError, match="no tokenizer.model or tokenizer.json beside it"):
        build_plan(recipe_of(mixtral, tmp_path / "out", needing, "gptq"))
    with pytest.raises(InputError, match="output.tokenizer: none is allowed with format gguf only"):
        build_plan(recipe_of(mixtral, tmp_path / "out", INT4, "gptq", tokenizer="none"))


# Nothing of the machine


MARKER = b"HIDDENPLACE"


def holding(directory: Path) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if MARKER in path.read_bytes()]


@pytest.mark.parametrize(("form", "grid"), [("compressed-tensors", INT4), ("gguf", Q8)])
def test_no_published_file_tells_where_it_was_made(mixtral, text_file, tmp_path, form, grid):
    home = tmp_path / MARKER.decode()
    source = copied(mixtral, home / "source")
    (source / "tokenizer.json").unlink()
    (elsewhere := tmp_path / "trained").mkdir()  # the model holds the path of its training text
    sentencepiece_model(elsewhere)
    shutil.copyfile(elsewhere / "tokenizer.model", source / "tokenizer.model")
    text = str(shutil.copyfile(text_file, home / "text.txt"))
    config = json.loads((source / "config.json").read_text())
    config["_name_or_path"] = str(home / "checkpoint")
    (source / "config.json").write_text(json.dumps(config))
    settings = {"text": text, "samples": 2, "length": 32}
    rule = grid | {"method": "gptq"}
    sections = {"calibration": settings, "eval": settings, "max_fallbacks": 1}
    output = pipeline.quantize(recipe_of(source, home / "out", rule, form, **sections))
    section = {"text": text, "protocol": "hf", "samples": 2, "length": 32, "bos": False}
    (home / "suite.yaml").write_text(json.dumps({"texts": [section]}))
    report = grokquant.evaluate(output, source, suite=str(home / "suite.yaml"))
    publish(report, output)
    assert holding(output) == []
    assert (report.quantized.path, report.reference.path) == ("out", "source")
    assert (report.suite.name, report.protocol.text) == ("suite.yaml", "text.txt")
    recipe = load_recipe(output / "recipe.yaml")
    assert (recipe.model.path, recipe.output.path) == ("source", "out")
    assert recipe.calibration.text == recipe.eval.text == "text.txt"
    assert "set model.path to a directory with source" in (output / "recipe.yaml").read_text()
    with pytest.raises(InputError, match="names text.txt, which is not here; give its path"):
        grokquant.evaluate(output, source)
    again = [f"model.path={source}", f"output.path={home / 'again'}", f"calibration.text={text}"]
    made = pipeline.quantize(load_recipe(output / "recipe.yaml", again))
    for file in output.glob("*.safetensors"):
        assert (made / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("toy", "toy"),
        ("runs/out", "runs/out"),
        ("../x", "../x"),
        ("/home/me/x", "x"),
        ("~/x/y", "y"),
        ("/", "model"),
        ("/c/models--a--B/snapshots/0", "a/B"),
        ("hub/name:config:split", "hub/name:config:split"),
    ],
)
def test_published_paths(path, published):
    assert published_path(path) == published
