"""`from_pretrained` of transformers on every kind of output: what it does alone, and with us."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_families import MODELS, SIZES, SPARSE, TOKENS, relative
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging as transformers_logging

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.runtime.generate import generate_text
from grokquant.runtime.packed import PackedMatrix
from grokquant.types import QTensor

INT4 = [{"match": "*", "method": "rtn", "bits": 4, "group": 32, "scale": "absmax"}]
RULES = {
    "int4": INT4,
    "int8": [INT4[0] | {"bits": 8}],
    "asymmetric": [INT4[0] | {"symmetric": False}],
    "mixed": [INT4[0] | {"match": "*.experts.1.*", "bits": 8}, *INT4],
    "layers": [INT4[0] | {"match": "layers.1.*", "bits": 8}, *INT4],
    "partly": [{"match": "*.experts.1.up", "method": "keep"}, *INT4],
    "attention": [{"match": "*.experts.*", "method": "keep"}, *INT4],
    "experts": [{"match": "*attention*", "method": "keep"}, *INT4],
    "nf4": [{"match": "*", "method": "rtn", "grid": "nf4", "group": 32, "scale": "absmax"}],
    "q8_0": [{"match": "*", "method": "rtn", "grid": "q8_0", "scale": "absmax"}],
    "keep": [{"match": "*", "method": "keep"}],
}
# What transformers 5.23 with compressed-tensors 0.20 reads rightly without us.
ALONE = [f for f in MODELS if f != "gpt_oss"]


@pytest.fixture(scope="module")
def output_of(tmp_path_factory) -> Callable[..., Path]:
    """The output of a family, a recipe and a format, made once."""
    made: dict[tuple, Path] = {}

    def source(family: str) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES | MODELS[family])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():  # norms and biases of their own, too
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(path := tmp_path_factory.mktemp(family))
        return path

    def make(family: str, rules: str = "int4", form: str = "compressed-tensors") -> Path:
        if (family,) not in made:
            made[family,] = source(family)
        if (family, rules, form) not in made:
            path = tmp_path_factory.mktemp("made") / f"{family}-{rules}-{form}"
            output = {"path": str(path), "format": form}
            recipe = {
                "model": {"path": str(made[family,])},
                "quantize": RULES[rules],
                "output": output | ({"tokenizer": "none"} if form == "gguf" else {}),
            }
            made[family, rules, form] = pipeline.quantize(parse_recipe(recipe))
        return made[family, rules, form]

    return make


@pytest.fixture
def alone(monkeypatch) -> None:
    """transformers as it is without us."""
    for method in ("compressed-tensors", "gptq"):
        kind = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, method, kind.__base__)


def from_pretrained(path: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@contextmanager
def unrounded() -> Iterator[None]:
    """Products of codes and scales stay in float32, as in the kernel that multiplies with codes."""
    rounded = QTensor.dequantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QTensor, "dequantize", lambda matrix, dtype=None: rounded(in_float32(matrix)))
        yield


def in_float32(matrix: QTensor) -> QTensor:
    offsets = None if matrix.offsets is None else matrix.offsets.float()
    return replace(matrix, scales=matrix.scales.float(), offsets=offsets)


def check(path: Path, **options: object) -> nn.Module:
    """Loads an output with us, packed: in float32 it computes what the dequantized model does."""
    model, info = from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16 and not any(p.is_meta for p in model.parameters())
    with unrounded(), torch.no_grad():
        wanted, _ = grokquant.load(path, dtype=torch.float32, packed=False)
        exact = from_pretrained(path, dtype=torch.float32, **options)
        for tokens in (TOKENS, TOKENS[:1, :16]):  # many: dequantized; few: by the kernel
            assert relative(exact(tokens).logits, wanted(tokens).logits) < 1e-5
    assert model.num_parameters() == wanted.num_parameters()
    packed = {m.ref.name for m in model.modules() if isinstance(m, PackedMatrix)}
    quantized = {ref.name for _, ref in open_checkpoint(path).units() if ref.scheme}
    assert quantized <= packed and bool(quantized) == bool(packed)
    return model


def test_a_model_with_a_tied_head_loads_without_a_warning(output_of, monkeypatch, caplog):
    path = output_of("gemma2")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    model = from_pretrained(path)
    transformers_logging.set_verbosity(verbosity)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "tied" not in caplog.text


@pytest.mark.parametrize("rules", ["int4", "int8"])
@pytest.mark.parametrize("family", ALONE)
@torch.no_grad()
def test_transformers_alone_reads_one_grid(output_of, alone, family, rules):
    path = output_of(family, rules)
    options = {"experts_implementation": "eager"} if family in SPARSE else {}
    model = from_pretrained(path, **options)
    assert not any(isinstance(module, PackedMatrix) for module in model.modules())
    assert torch.equal(model(TOKENS).logits, grokquant.load(path, packed=False)[0](TOKENS).logits)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("rules", ["int4", "int8"])
def test_with_us_everything_stays_packed(output_of, family, rules):
    check(output_of(family, rules))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize(
    "rules", ["asymmetric", "mixed", "layers", "partly", "attention", "experts"]
)
def test_what_transformers_alone_cannot_read(output_of, family, rules):
    check(output_of(family, rules))


@pytest.mark.parametrize(("rules", "form"), [("int4", "gptq"), ("nf4", "bitsandbytes")])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe"])
def test_other_formats(output_of, family, rules, form):
    check(output_of(family, rules, form))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_heads_that_the_checkpoint_lacks_are_missing(output_of, family):
    path = output_of(family)
    options = {"output_loading_info": True}
    _, info = AutoModelForSequenceClassification.from_pretrained(path, **options)
    assert info["missing_keys"] == {"score.weight"}
    _, info = AutoModelForCausalLM.from_pretrained(path, **options)
    assert info["missing_keys"] == set()


def test_other_formats_of_a_dense_model(output_of):
    check(output_of("llama", "int8", "gptq"))


@pytest.mark.parametrize("rules", ["asymmetric", "mixed", "layers", "partly", "attention"])
@torch.no_grad()
def test_that_it_really_cannot(output_of, alone, rules):
    """If one of these passes one day, what quantizer.py says of it is no longer true."""
    path = output_of("mixtral", rules)
    try:
        found = from_pretrained(path)(TOKENS).logits
    except (RuntimeError, ValueError):
        return
    assert relative(found, grokquant.load(path, packed=False)[0](TOKENS).logits) > 0.03


@torch.no_grad()
def test_gpt_oss_alone_is_random(output_of, alone):
    path = output_of("gpt_oss")
    model, info = from_pretrained(path, output_loading_info=True)
    assert any("experts.gate_up_proj" in name for name in info["missing_keys"])
    assert (
        relative(model(TOKENS).logits, grokquant.load(path, packed=False)[0](TOKENS).logits) > 0.1
    )


@pytest.mark.parametrize(
    ("family", "form"), [("mixtral", "bf16"), ("mixtral", "gguf"), ("gpt_oss", "bf16")]
)
def test_nothing_quantized(output_of, family, form):
    check(output_of(family, "keep", form), experts_implementation="eager")


def bytes_of(parts: dict[str, torch.Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize(
    ("rules", "form", "bits"),
    [("int4", "compressed-tensors", 4.5), ("nf4", "bitsandbytes", 5), ("q8_0", "gguf", 8.5)],
)
def test_experts_take_the_memory_of_their_file(output_of, rules, form, bits):
    path = output_of("mixtral", rules, form)
    model, units = from_pretrained(path), dict(open_checkpoint(path).units())
    experts = [ref for name, ref in units.items() if ".experts." in name]
    stored, weights = sum(r.stored_bytes for r in experts), sum(prod(r.shape) for r in experts)
    assert model.matrix_cache.nbytes == 0
    with torch.no_grad():
        model(TOKENS[:1, :16])
    held = model.matrix_cache.held.items()
    found = sum(
        part.nbytes for name, parts in held if ".experts." in name for part in parts.values()
    )
    assert stored == pytest.approx(found, rel=0.18)  # of each scale the kernel has a zero, too
    assert 8 * found / weights == pytest.approx(bits, rel=0.25)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2", "gemma3_text"])
def test_generates_the_same_tokens(output_of, family):
    path = output_of(family)
    options = {"dtype": torch.float32}
    with unrounded():
        models = [
            from_pretrained(path, **options),
            grokquant.load(path, **options)[0],
            grokquant.load(path, packed=False, **options)[0],
        ]
        made = [m.generate(TOKENS[:1, :8], max_new_tokens=12, do_sample=False) for m in models]
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[2])


@torch.no_grad()
def test_in_another_dtype(output_of):
    path = output_of("mixtral")
    model = from_pretrained(path, dtype=torch.float32)
    wanted = grokquant.load(path, dtype=torch.float32, packed=False)[0](TOKENS).logits
    assert model.dtype == torch.float32 and relative(model(TOKENS).logits, wanted) < 1e-5


def test_a_packed_model_is_not_saved(output_of, tmp_path):
    path = output_of("mixtral")
    for model in (from_pretrained(path), grokquant.load(path)[0]):
        with pytest.raises(InputError, match="copy its directory instead"):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_others_made_goes_to_their_loaders(output_of, tmp_path):
    """compressed-tensors without our mark, as llm-compressor writes it."""
    shutil.copytree(output_of("mixtral"), tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["quantization_config"].pop("quantized_by") == "grokquant"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    model = from_pretrained(tmp_path / "theirs")
    assert isinstance(model.hf_quantizer, CompressedTensorsHfQuantizer)
    assert not any(isinstance(module, PackedMatrix) for module in model.modules())


def test_a_damaged_output_is_named(output_of, tmp_path):
    shutil.copytree(output_of("mixtral"), tmp_path / "x")
    index = tmp_path / "x" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight_scale"
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"x: {name} is missing"):
        from_pretrained(tmp_path / "x")


def test_importing_us_imports_no_package_of_a_format():
    script = "import grokquant, sys; print({'bitsandbytes', 'compressed_tensors'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


GROK = {
    "int4-compressed-tensors": INT4,
    "mixed-compressed-tensors": RULES["mixed"],
    "int8-compressed-tensors": RULES["int8"],
    "int4-gptq": INT4,
    "nf4-bitsandbytes": RULES["nf4"],
    "q8_0-gguf": RULES["q8_0"],
}


@pytest.fixture
def grok_output(tiny_recipe, tmp_path) -> Callable[..., Path]:
    def make(form: str, *rules: dict, shard: str = "500MB") -> Path:
        output = {"path": str(tmp_path / form), "format": form, "shard": shard}
        return pipeline.quantize(tiny_recipe(*rules, output=output))

    return make


@pytest.mark.parametrize("kind", GROK)
def test_grok(grok_output, kind):
    _, _, form = kind.partition("-")
    model = check(grok_output(form, *GROK[kind]))
    assert type(model).__name__ == "Grok1ForCausalLM"


def test_a_split_of_gguf_files(grok_output):
    output = grok_output("gguf", *RULES["q8_0"], shard="200KB")
    assert len(list(output.glob("*.gguf"))) > 1
    check(output)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_gguf_of_other_families(output_of, family):
    path = output_of(family, "q8_0", "gguf")
    assert not list(path.glob("*.safetensors"))
    check(path)


@torch.no_grad()
def test_grok_in_bf16_and_saved_again(grok_output, tmp_path):
    output = grok_output("bf16", *RULES["keep"])
    model, info = from_pretrained(output, output_loading_info=True, experts_implementation="eager")
    assert not any(info.values()), info
    wanted = grokquant.load(output, packed=False)[0](TOKENS).logits
    assert torch.equal(model(TOKENS).logits, wanted)
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.experts.1.w3.weight" in names
    assert torch.equal(grokquant.load(tmp_path / "saved")[0](TOKENS).logits, wanted)


def test_text_from_packed_matrices(grok_output):
    output = str(grok_output("compressed-tensors", *INT4))
    said = [generate_text(output, "The ", 6, packed=packed).text for packed in (False, True)]
    assert said[0] == said[1] and len(said[0]) > 4


def test_a_model_larger_than_its_memory_says_the_same(grok_output):
    output = str(grok_output("compressed-tensors", *INT4))
    pieces: list[str] = []
    made = generate_text(output, "The ", 6, max_memory=20_000, write=pieces.append)
    wanted = generate_text(output, "The ", 6)
    assert made.text == wanted.text == "".join(pieces)
    assert made.hit_rate < wanted.hit_rate and made.bytes_read > 4 * wanted.bytes_read


@torch.no_grad()
def test_the_limit_holds(grok_output):
    model, _ = grokquant.load(grok_output("compressed-tensors", *INT4), max_memory="50KB")
    cache = model.matrix_cache
    held = []
    make_room = cache._make_room
    cache._make_room = lambda expected: (make_room(expected), held.append(cache.nbytes + expected))
    model(TOKENS[:1, :9])
    assert len(held) > 20 and 30_000 < max(held) <= 50_000


@pytest.mark.parametrize("size", ["20", "many", "-1GB"])
def test_a_limit_that_is_no_size(grok_output, size):
    with pytest.raises(InputError, match="expected a size"):
        grokquant.load("toy", max_memory=size)


@torch.no_grad()
def test_only_experts_with_tokens_are_read(grok_output):
    model, _ = grokquant.load(grok_output("compressed-tensors", *INT4))
    model(TOKENS[:1, :1])
    read = {name for name in model.matrix_cache.held if ".experts." in name}
    layers = model.config.num_hidden_layers
    assert len(read) == 3 * layers * model.config.num_experts_per_tok


PROMPTS = ["The function returns the", "If the list is empty, the value of the object is"]


@pytest.fixture(scope="module")
def toy_models(tmp_path_factory) -> tuple:
    """The toy in int4, packed and dequantized, in float32; its tokenizer, padding on the left."""
    output = {"path": str(tmp_path_factory.mktemp("toy") / "out")}
    recipe = parse_recipe({"model": {"path": "toy"}, "quantize": INT4, "output": output})
    path = pipeline.quantize(recipe)
    packed = from_pretrained(path, dtype=torch.float32)
    with unrounded():
        dense, _ = grokquant.load(path, dtype=torch.float32, packed=False)
    return packed, dense, AutoTokenizer.from_pretrained(path, padding_side="left")


def test_prompts_in_a_batch_go_on_as_they_do_alone(toy_models):
    """The shorter one is padded on the left."""
    packed, dense, tokenizer = toy_models
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch.attention_mask[0, 0] == 0 and batch.attention_mask[1].all()
    how = {"max_new_tokens": 16, "do_sample": False}
    together = packed.generate(**batch, **how)[:, batch.input_ids.shape[1] :]
    for model in (packed, dense):
        for row, prompt in zip(together, PROMPTS, strict=True):
            tokens = tokenizer([prompt], return_tensors="pt")
            alone = model.generate(**tokens, **how)
            assert torch.equal(alone[0, tokens.input_ids.shape[1] :], row)


def test_sampling_with_a_seed_makes_the_same_tokens_packed(toy_models):
    *models, tokenizer = toy_models
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    made = {seed: [] for seed in range(3)}
    for seed, rows in made.items():
        for model in models:
            torch.manual_seed(seed)
            rows.append(model.generate(**batch, max_new_tokens=16, do_sample=True, top_k=0))
    assert all(torch.equal(*rows) for rows in made.values())
    assert not torch.equal(made[0][0], made[1][0])
