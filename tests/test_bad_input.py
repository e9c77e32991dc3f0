"""Whatever a user can get wrong: one line that names it, the documented exit code, no debris."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ATTENTION, EXPERTS, seal
from make_release import write_random_release
from safetensors.torch import load_file, save_file

from grokquant.cli import main
from grokquant.errors import InputError
from grokquant.files.links import refuse_no_place
from grokquant.recipe import load_recipe
from grokquant.sources.pickles import read_array, read_headers
from grokquant.toy.release_writer import write_leaf

# What a run may say before it fails: the plan, how much text there is, blocks.
PROGRESS = re.compile(
    r".* -> .*|[┏┃┡│└].*|[\d,]+ weights, .*|calibration: .*|layer \d+: .*"
    r"|(?:GIVES WRONG RESULTS|runs in|not in|not tried with).*"
)
SHARD = "model-00002-of-00003.safetensors"


class Place:
    """A user's folder: `source` to read, `recipe.yaml`, `text.txt`, and `out` to be written."""

    def __init__(self, root: Path, text: Path) -> None:
        self.root, self.source, self.out = root, root / "source", root / "out"
        self.text, self.recipe = root / "text.txt", root / "recipe.yaml"
        shutil.copyfile(text, self.text)
        self.values = {
            "model": {"path": str(self.source)},
            "calibration": {"text": str(self.text), "samples": 4, "length": 64},
            "quantize": [EXPERTS, ATTENTION],
            "max_fallbacks": 1.0,
            "output": {"path": str(self.out)},
        }
        self.write_recipe()

    def write_recipe(self) -> None:
        self.recipe.write_text(json.dumps(self.values))  # YAML holds JSON

    def snapshot(self) -> dict[str, str]:
        """Every file below the folder with a digest of what it holds, committed work left out."""
        paths = [path for path in self.root.rglob("*") if "out.partial" not in path.parts]
        return {str(path.relative_to(self.root)): _digest(path) for path in paths}

    def fails(self, *arguments: object, code: int = 2) -> str:
        """The complaint of a command that must fail without a trace of itself."""
        lines = self.complaints(*arguments, code=code)
        assert len(lines) == 1, lines
        return lines[0]

    def faults(self, directory: Path) -> str:
        """What `verify` finds, a line for each fault."""
        return "\n".join(self.complaints("verify", directory, code=1))

    def complaints(self, *arguments: object, code: int) -> list[str]:
        before = self.snapshot()
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        lines = [line for line in result.stderr.splitlines() if not PROGRESS.fullmatch(line)]
        assert (result.exit_code, result.stdout) == (code, "") and lines, result.output
        assert result.stderr.endswith("\n".join(lines) + "\n")
        assert all(line.startswith("grokquant: ") for line in lines)
        assert self.snapshot() == before
        self._check_partial()
        return [line.removeprefix("grokquant: ") for line in lines]

    def _check_partial(self) -> None:
        """A work directory is there only if something is committed in it, and nothing half-done."""
        partial = self.out.with_name("out.partial")
        if partial.is_dir() and (partial / "run.json").exists():
            assert any((partial / "journal").iterdir())
            assert not list(partial.rglob("*.tmp"))

    def quantizing_fails(self, *changes: str, code: int = 2) -> str:
        options = [part for change in changes for part in ("--set", change)]
        return self.fails("quantize", self.recipe, *options, code=code)


def _digest(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return str(path.lstat().st_mode)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path, tiny_release, text_file) -> Place:
    shutil.copytree(tiny_release, tmp_path / "source")
    return Place(tmp_path, text_file)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tiny_release, text_file) -> Path:
    """The tiny release, quantized; to be copied, not touched."""
    root = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_release, root / "source")
    made = Place(root, text_file)
    result = CliRunner().invoke(main, ["quantize", str(made.recipe)])
    assert result.exit_code == 0, result.output
    return made.out


@pytest.fixture
def hf(tmp_path, quantized, text_file) -> Place:
    """A folder whose source is a Hugging Face directory, our own output."""
    shutil.copytree(quantized, tmp_path / "source")
    return Place(tmp_path, text_file)


def edit_json(path: Path, **changes: object) -> None:
    """Sets keys; `a__b` is b in a, and ... removes a key."""
    content = json.loads(path.read_text())
    for keys, value in changes.items():
        *parents, last = keys.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
        if value is ...:
            del part[last]
    path.write_text(json.dumps(content))


# --- a release that is damaged


def leaf(source: Path, index: int) -> Path:
    return source / "ckpt-0" / f"tensor{index:05d}_000"


def swap(source: Path, first: int, second: int) -> None:
    a, b = leaf(source, first).read_bytes(), leaf(source, second).read_bytes()
    leaf(source, first).write_bytes(b)
    leaf(source, second).write_bytes(a)


def poison(source: Path, index: int) -> None:
    """Makes the last float of a file NaN: a scale where there are scales."""
    path = leaf(source, index)
    *codes, floats = (read_array(path, header).clone() for header in read_headers(path))
    floats.view(-1)[-1] = torch.nan
    write_leaf(path, (*codes, floats) if codes else floats)


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


def pickled(source: Path, index: int, value: object, protocol: int) -> None:
    leaf(source, index).write_bytes(pickle.dumps(value, protocol=protocol))


def misshape(source: Path, index: int, *shape: int) -> None:
    scales = torch.ones(*shape[:-2], 1, shape[-1]).bfloat16()
    write_leaf(leaf(source, index), (torch.ones(shape).char(), scales))


# 0 embedding, 1 final norm; then per layer 0-2 experts, 3-6 attention, 7-10 norms, 11 router.
RELEASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "source: no such directory"),
    "a file": (lambda s: (shutil.rmtree(s), s.write_text("x")), "source: is a file, expected"),
    "empty": (lambda s: (shutil.rmtree(s), s.mkdir()), "source: the directory is empty"),
    "something else": (
        lambda s: (shutil.rmtree(s), s.mkdir(), (s / "notes.txt").write_text("x")),
        "source: not a checkpoint",
    ),
    "no shards": (
        lambda s: (shutil.rmtree(s / "ckpt-0"), (s / "ckpt-0").mkdir()),
        "ckpt-0: no release files",
    ),
    "missing shard": (lambda s: leaf(s, 7).unlink(), "tensor00007_000: missing"),
    "extra shard": (
        lambda s: shutil.copyfile(leaf(s, 7), leaf(s, 99)),
        "tensor00099_000",
    ),
    "truncated shard": (
        lambda s: os.truncate(leaf(s, 3), 5000),
        "tensor00003_000: not a Grok-1 tensor file: truncated",
    ),
    "empty shard": (lambda s: os.truncate(leaf(s, 3), 0), "tensor00003_000"),
    "longer shard": (
        lambda s: leaf(s, 3).write_bytes(leaf(s, 3).read_bytes() + b"x"),
        "tensor00003_000",
    ),
    "shard is a directory": (
        lambda s: (leaf(s, 3).unlink(), leaf(s, 3).mkdir()),
        "tensor00003_000: cannot be read: it is a directory, not a file",
    ),
    "dangling shard": (
        lambda s: (leaf(s, 3).unlink(), leaf(s, 3).symlink_to("nowhere")),
        "tensor00003_000",
    ),
    "swapped shards": (lambda s: swap(s, 2, 3), "tensor0000"),
    "swapped layers": (lambda s: swap(s, 9, 13), "tensor00009_000"),
    "protocol 2": (lambda s: pickled(s, 9, np.ones(128, "f4"), 2), "protocol 4"),
    "protocol 5": (lambda s: pickled(s, 9, np.ones(128, "f4"), 5), "protocol 4"),
    "malicious": (lambda s: pickled(s, 9, Malicious(), 4), "tensor00009_000"),
    "another object": (lambda s: pickled(s, 9, {"w": 1}, 4), "tensor00009_000"),
    "wrong shape": (lambda s: misshape(s, 3, 4, 128, 256), "tensor00003_000: transformer/"),
    "wrong norm": (lambda s: write_leaf(leaf(s, 1), torch.ones(64)), "tensor00001_000"),
    "NaN in expert scales": (lambda s: poison(s, 2), "tensor00002_000: transformer/"),
    "NaN in attention scales": (lambda s: poison(s, 19), "tensor00019_000: transformer/"),
    "NaN in a norm": (lambda s: poison(s, 21), "tensor00021_000: transformer/"),
    "NaN in the final norm": (lambda s: poison(s, 1), "tensor00001_000: language_model/"),
    "NaN in a router": (lambda s: poison(s, 13), "tensor00013_000: transformer/"),
    "NaN in the embedding": (lambda s: poison(s, 0), "tensor00000_000: language_model/"),
    "config cut off": (lambda s: os.truncate(s / "config.json", 20), "config.json: not valid JSON"),
    "config a list": (lambda s: (s / "config.json").write_text("[]"), "config.json: expected a"),
    "config binary": (lambda s: (s / "config.json").write_bytes(b"\xff\0"), "config.json"),
    "config missing": (lambda s: (s / "config.json").unlink(), "must also give num_attention"),
    "config without multiplier": (
        lambda s: edit_json(s / "config.json", output_multiplier_scale=...),
        "config.json must also give output_multiplier_scale",
    ),
    "config contradicts": (
        lambda s: edit_json(s / "config.json", hidden_size=64),
        "config.json: hidden_size is 64, but the files have 128",
    ),
    "config other layers": (
        lambda s: edit_json(s / "config.json", num_hidden_layers=3),
        "tensor00026_000",
    ),
    "config text": (lambda s: edit_json(s / "config.json", rope_theta="x"), "rope_theta must be"),
    "tokenizer missing": (lambda s: (s / "tokenizer.model").unlink(), "no tokenizer.model"),
    "tokenizer broken": (
        lambda s: (s / "tokenizer.model").write_bytes(b"x" * 999),
        "tokenizer.model: cannot be read as a tokenizer",
    ),
    "tokenizer empty": (lambda s: (s / "tokenizer.model").write_bytes(b""), "tokenizer.model: "),
    "tokenizer.json broken": (
        lambda s: (s / "tokenizer.model").rename(s / "tokenizer.json"),
        "tokenizer.json: not valid JSON",
    ),
}


@pytest.mark.parametrize("damage", RELEASES)
def test_damaged_release(place, damage, monkeypatch):
    monkeypatch.chdir(place.root)  # where a malicious pickle would leave its mark
    act, complaint = RELEASES[damage]
    act(place.source)
    assert complaint in place.quantizing_fails()


@pytest.mark.parametrize("command", ["inspect", "generate", "plan"])
def test_every_command_refuses_a_damaged_release(place, command):
    os.truncate(leaf(place.source, 3), 5000)
    target = place.recipe if command == "plan" else place.source
    options = ["--prompt", "x"] if command == "generate" else []
    assert "tensor00003_000" in place.fails(command, target, *options)


def test_tokenizer_larger_than_the_vocabulary(place):
    shutil.rmtree(place.source / "ckpt-0")
    write_random_release(place.source, layers=1, hidden=128, ffn=256, head_dim=64, vocab=100)
    message = place.quantizing_fails()
    assert "tokenizer.model: 2048 tokens, but the model's vocabulary has 100" in message


def test_broken_tokenizer_where_no_text_is_needed(place):
    (place.source / "tokenizer.model").write_bytes(b"x" * 999)
    message = place.quantizing_fails("quantize=[{match: '*', method: copy}]")
    assert "tokenizer.model: cannot be read as a tokenizer" in message


# --- a Hugging Face directory that is damaged


def flip(path: Path, *positions: int) -> None:
    raw = bytearray(path.read_bytes())
    for position in positions:
        raw[position] ^= 0xFF
    path.write_bytes(raw)


def edit_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors, now all in one shard, with index and checksums to match."""
    tensors = {}
    for shard in source.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    change(tensors)
    save_file(tensors, source / SHARD, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    edit_json(index, weight_map={name: SHARD for name in tensors})
    seal(source)


def set_to(tensors: dict[str, torch.Tensor], name: str, value: object) -> None:
    tensors[name].view(-1)[0] = value


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1"
NORM = "model.layers.1.pre_moe_norm.weight"
GROUP = "quantization_config__config_groups__group_0__"
INT4 = "quantization_config__config_groups__group_2__"
HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda s: (s / "config.json").unlink(), "config.json: cannot be read"),
    "config broken": (lambda s: os.truncate(s / "config.json", 99), "config.json: not valid JSON"),
    "header damaged": (lambda s: flip(s / SHARD, 9), f"{SHARD}: header"),
    "header huge": (lambda s: flip(s / SHARD, 6), f"{SHARD}: header of"),
    "header cut": (lambda s: os.truncate(s / SHARD, 50), f"{SHARD}: truncated"),
    "truncated": (lambda s: os.truncate(s / SHARD, 100_000), f"{SHARD}: truncated: "),
    "shard missing": (lambda s: (s / SHARD).unlink(), f"{SHARD}: no such file"),
    "index missing": (
        lambda s: (s / "model.safetensors.index.json").unlink(),
        "shards without model.safetensors.index.json",
    ),
    "index broken": (
        lambda s: (s / "model.safetensors.index.json").write_text("{"),
        "index.json: not valid JSON",
    ),
    "index points outside": (
        lambda s: edit_json(
            s / "model.safetensors.index.json", weight_map={NORM: "../elsewhere.safetensors"}
        ),
        "'../elsewhere.safetensors' is not a plain",
    ),
    "index to another file": (
        lambda s: edit_json(s / "model.safetensors.index.json", weight_map={NORM: "b.safetensors"}),
        "b.safetensors: no such file",
    ),
    "index to an absent tensor": (
        lambda s: edit_json(s / "model.safetensors.index.json", weight_map={"x.y": SHARD}),
        f"{SHARD}: tensor 'x.y' is missing, the index places it here",
    ),
    "norm missing": (lambda s: edit_tensors(s, lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "scales missing": (
        lambda s: edit_tensors(s, lambda t: t.pop(EXPERT + ".weight_scale")),
        f"{EXPERT}.weight_scale is missing",
    ),
    "expert missing": (
        lambda s: edit_tensors(s, lambda t: [t.pop(n) for n in [*t] if n.startswith(EXPERT)]),
        f"{EXPERT}.weight is missing",
    ),
    "norm misshapen": (
        lambda s: edit_tensors(s, lambda t: t.update({NORM: torch.ones(5)})),
        f"{NORM} has shape [5], config.json says [128]",
    ),
    "codes flat": (
        lambda s: edit_tensors(s, lambda t: t.update({EXPERT + ".weight_packed": torch.ones(5)})),
        f"{EXPERT}.weight_packed is torch.float32 [5]",
    ),
    "codes are floats": (
        lambda s: edit_tensors(
            s, lambda t: t.update({EXPERT + ".weight_packed": torch.ones(256, 16)})
        ),
        f"{EXPERT}.weight_packed is torch.float32",
    ),
    "shapes disagree": (
        lambda s: edit_tensors(s, lambda t: set_to(t, EXPERT + ".weight_shape", 7)),
        f"{EXPERT}.weight_shape contradicts",
    ),
    "NaN in scales": (
        lambda s: edit_tensors(s, lambda t: set_to(t, EXPERT + ".weight_scale", torch.nan)),
        f"{EXPERT}.weight_scale' holds non-finite values",
    ),
    "infinite norm": (
        lambda s: edit_tensors(s, lambda t: set_to(t, NORM, torch.inf)),
        f"{NORM}' holds non-finite values",
    ),
    "architecture unknown": (
        lambda s: edit_json(s / "config.json", architectures=["Grok9ForCausalLM"]),
        "config.json: the architecture 'Grok9ForCausalLM' is not known",
    ),
    "architecture odd": (lambda s: edit_json(s / "config.json", architectures=[1]), "config.json"),
    "architecture missing": (
        lambda s: edit_json(s / "config.json", architectures=...),
        "config.json: architectures must be a list of one name",
    ),
    "quant method unknown": (
        lambda s: edit_json(s / "config.json", quantization_config__quant_method="exl3"),
        "config.json: quantization_config.quant_method: 'exl3' cannot be read (compressed-tensors",
    ),
    "quant config odd": (
        lambda s: edit_json(s / "config.json", quantization_config=[1]),
        "config.json: quantization_config.quant_method: None cannot be read",
    ),
    "no groups": (
        lambda s: edit_json(s / "config.json", quantization_config__config_groups=...),
        "quantization_config.config_groups: Field required",
    ),
    "3 bits": (
        lambda s: edit_json(s / "config.json", **{GROUP + "weights__num_bits": 3}),
        "config_groups.group_0.weights.num_bits: Input should be 4 or 8, not 3",
    ),
    "activations odd": (
        lambda s: edit_json(s / "config.json", **{GROUP + "input_activations": {"num_bits": {}}}),
        "group_0.input_activations.num_bits: Input should be a valid integer",
    ),
    "no regular expression": (
        lambda s: edit_json(s / "config.json", **{GROUP + "targets": ["re:("]}),
        "group_0.targets.0: not a regular expression",
    ),
    "nobody's target": (
        lambda s: edit_json(s / "config.json", quantization_config__config_groups={}),
        "config.json: no config group targets",
    ),
    "group does not divide": (
        lambda s: edit_json(s / "config.json", **{INT4 + "weights__group_size": 30}),
        "experts.0.w1.weight: 128 input features are not divisible by group 30",
    ),
    "other groups": (
        lambda s: edit_json(s / "config.json", **{INT4 + "weights__group_size": 64}),
        "w1.weight_scale is torch.bfloat16 [256, 4], int4 g64 sym needs torch.bfloat16 [256, 2]",
    ),
    "multiplier missing": (
        lambda s: edit_json(s / "config.json", embedding_multiplier_scale=...),
        "must also give embedding_multiplier_scale",
    ),
    "heads": (
        lambda s: edit_json(s / "config.json", num_attention_heads=3),
        "q_proj.weight has shape [128, 128], config.json says [192, 128]",
    ),
    "odd heads": (
        lambda s: edit_json(s / "config.json", num_attention_heads=3, num_key_value_heads=2),
        "config.json: num_attention_heads is not a multiple of num_key_value_heads",
    ),
    "negative size": (
        lambda s: edit_json(s / "config.json", hidden_size=-128),
        "config.json: hidden_size must be a positive whole number, not -128",
    ),
    "million layers": (
        lambda s: edit_json(s / "config.json", num_hidden_layers=10**6),
        "model.layers.2.self_attn.q_proj.weight is missing",
    ),
    "top 9": (
        lambda s: edit_json(s / "config.json", num_experts_per_tok=9),
        "config.json: num_experts_per_tok is larger than num_local_experts",
    ),
    "odd token": (lambda s: edit_json(s / "config.json", pad_token_id="x"), "pad_token_id must be"),
}  # fmt: skip


@pytest.mark.parametrize("damage", HF)
def test_damaged_hugging_face_directory(hf, damage):
    act, complaint = HF[damage]
    act(hf.source)
    message = hf.fails("generate", hf.source, "--prompt", "x", "--tokens", 1, "--dequantize")
    assert complaint in message


@pytest.mark.parametrize("damage", ["scales missing", "infinite norm", "NaN in scales"])
def test_verify_and_eval_find_the_damage_too(hf, tiny_release, damage):
    act, complaint = HF[damage]
    act(hf.source)
    assert complaint in hf.faults(hf.source)
    options = ("--text", hf.text, "--samples", 2, "--length", 32)
    assert complaint in hf.fails("eval", hf.source, "--reference", tiny_release, *options)


def test_weights_too_large_to_run(hf, tiny_release):
    """Finite numbers whose products are not."""
    edit_tensors(hf.source, lambda t: t[EXPERT + ".weight_scale"].fill_(3e38))
    options = ("--text", hf.text, "--samples", 2, "--length", 32)
    message = hf.fails("eval", hf.source, "--reference", tiny_release, *options)
    assert message == f"{hf.source}: the outputs of layer 1 are not finite"


def test_a_config_cannot_meddle_with_transformers(hf):
    """Fields that are not Grok's have no effect: some of them would choose code paths."""
    odd = {"sliding_window": "x", "attn_implementation": "x", "to_dict": 1, "id2label": 5}
    edit_json(hf.source / "config.json", **odd, auto_map={"AutoConfig": "evil.Config"})
    result = CliRunner().invoke(main, ["inspect", str(hf.source)])
    assert result.exit_code == 0
    note = "grok-1 has no such settings, left out: sliding_window, attn_implementation, to_dict"
    assert note in result.stderr and len(result.stderr.splitlines()) == 1


def test_copy_from_a_source_without_integers(hf):
    """A matrix in bf16 has no integers that copy could take."""

    def multiply_out(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".self_attn." in name]:
            del tensors[name]
        for layer in range(2):
            for part, rows in (("q", 128), ("k", 64), ("v", 64), ("o", 128)):
                name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
                tensors[name] = torch.ones(rows, 128).bfloat16()

    edit_tensors(hf.source, multiply_out)
    message = hf.quantizing_fails()
    assert message == (
        "layers.0.attention.q: method copy needs a quantized source, but it has bfloat16; "
        "use unquantized or rtn"
    )


# --- recipes


RECIPES = {
    "quantize[0].group=48": "override quantize[0].group: ",
    "quantize[0].groups=32": "override quantize[0].groups: unknown key, did you mean",
    "quantize[0].bits=5": "override quantize[0].bits: expected 2, 3, 4 or 8, not 5",
    "quantize[0].method=awq": "override quantize[0].method: ",
    "quantize[5].bits=4": "override quantize[5].bits: quantize is a list",
    "quantize[0].match=layers.*.mlp.*": "recipe: quantize[0].match: 'layers.*.mlp.*' matches no",
    "quantize=[]": "override quantize: ",
    "output.shards=5GB": "override output.shards: unknown key, did you mean output.shard?",
    "output.shard=5 parsecs": "override output.shard: expected a size",
    "output.format=ggml": "override output.format: ",
    "model.path=": "override model.path: ",
    'model.path="\\ud800"': "override model.path: expected a path",
    "model.config=absent.json": "absent.json: cannot be read",
    "calibration.length=4": "override calibration.length: ",
    "calibration.text=wikitext": "override calibration.text: expected python-docs",
    "calibration.text=absent.txt": "absent.txt: cannot be read: No such file",
    "output.path": "override output.path: expected KEY=VALUE",
    "=": "override =: expected KEY=VALUE",
}


@pytest.mark.parametrize("change", RECIPES)
def test_wrong_settings(place, change):
    assert place.quantizing_fails(change).startswith(RECIPES[change])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "recipe.yaml: cannot be read: No such file or directory"),
        ("", "recipe.yaml"),
        ("model: [", "recipe.yaml:1:"),
        ("model:\n  path: toy\nmodel: {}\n", "recipe.yaml:3:1: duplicate key model"),
        ("model:\n  paht: toy\n", "recipe.yaml:2:3: model.paht: unknown key, did you mean"),
        ("- a\n", "recipe.yaml:1:1: expected a mapping of keys"),
        ("model: {path: toy}\nquantize: [{match: '*', method: copy}]\n", "output: required"),
        (b"\xff\xfe", "recipe.yaml: not UTF-8 text"),
    ],
)
def test_wrong_recipe(place, text, complaint):
    place.recipe.unlink()
    if text is not None:
        place.recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in ("quantize", "plan"):
        assert complaint in place.fails(command, place.recipe)


def test_recipe_is_a_directory(place):
    """It is taken for a model."""
    recipes = place.root / "recipes"
    recipes.mkdir()
    assert place.fails("plan", recipes) == f"{recipes}: the directory is empty"
    with pytest.raises(InputError, match="cannot be read: it is a directory, not a file"):
        load_recipe(recipes)


def test_group_that_does_not_divide(place):
    shutil.rmtree(place.source / "ckpt-0")
    write_random_release(place.source, layers=1, hidden=96, ffn=160, vocab=2048)
    message = place.quantizing_fails("quantize[0].group=64", "quantize[1].method=keep")
    assert message == "layers.0.experts.0.gate: 96 input features are not divisible by group 64"


# --- text


TEXTS = {
    "short": ("text.txt", b"three short words", "text.txt: the text has"),
    "empty": ("text.txt", b" \n ", "text.txt: holds no text"),
    "latin-1": ("text.txt", b"caf\xe9 " * 999, "text.txt: not UTF-8 text (byte 3)"),
    "jsonl": ("text.jsonl", b'{"text": "a"}\n{"text": \n', "text.jsonl:2: not valid JSON"),
    "field": ("text.jsonl", b'{"txt": "a"}\n', "text.jsonl:1: no field text, messages,"),
    "number": ("text.jsonl", b'{"text": 3}\n', 'text.jsonl:1: "text" should be a text'),
    "parquet": ("text.parquet", b"PAR1PAR1", "text.parquet: cannot be read as parquet"),
    "directory": ("text.txt", None, "text.txt: cannot be read: it is a directory"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_unusable_text(place, quantized, tiny_release, kind):
    name, content, complaint = TEXTS[kind]
    place.text.unlink()
    path = place.root / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert complaint in place.quantizing_fails(f"calibration.text={path}")
    message = place.fails("eval", quantized, "--reference", tiny_release, "--text", path)
    assert complaint in message
    assert message.endswith("only txt; name it by --field") == (kind == "field")


# --- where the result goes


def test_foreign_output_is_kept(place):
    place.out.mkdir()
    (place.out / "thesis.txt").write_text("years of work")
    assert "out: is not empty and was not made by grokquant" in place.quantizing_fails()


def test_output_is_a_file(place):
    place.out.write_text("x")
    assert "out: is a file" in place.quantizing_fails()


def test_output_below_a_file(place):
    place.out.write_text("x")
    message = place.quantizing_fails(f"output.path={place.out}/below")
    assert f"out/below: cannot be written: {place.out} is a file, not a directory" in message


@pytest.mark.parametrize("end", ["../out", "below/../../out", ".."])
def test_output_by_way_of_no_directory(place, end):
    """The system looks up `new` before `..`, so that a result could not take this name."""
    typed = f"{place.root}/new/{end}"
    message = place.quantizing_fails(f"output.path={typed}")
    assert message.startswith(f"{typed}: {place.root}/new")
    assert message.endswith(f" is no directory; write {Path(typed).resolve()} if you mean that")
    (place.root / "new" / "below").mkdir(parents=True)
    refuse_no_place(Path(typed))


def test_output_is_the_source(hf):
    """An output of ours may be replaced, but not by what is made from it."""
    change = "quantize=[{match: '*.experts.*', method: rtn, bits: 4, group: 32}]"
    (hf.root / "other").mkdir()
    for output in (hf.source, hf.root / "other" / ".." / "source"):
        message = hf.quantizing_fails(f"output.path={output}", change)
        assert "holds the model itself" in message


def test_too_little_disk(place, monkeypatch):
    usage = shutil.disk_usage(place.root)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "out: needs 1.62 MB, but only 1.00 MB are free" in place.quantizing_fails()


def test_an_earlier_result_survives_a_failure(place, quantized, monkeypatch):
    shutil.copytree(quantized, place.out)
    poison(place.source, 21)
    assert "tensor00021_000: " in place.fails("quantize", place.recipe, "--overwrite")
    checked = CliRunner().invoke(main, ["verify", str(place.out)])
    assert checked.exit_code == 0, checked.stderr


def test_an_earlier_result_comes_back_if_the_new_one_cannot_take_its_name(
    place, quantized, monkeypatch
):
    shutil.copytree(quantized, place.out)
    rename = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if path.name == "files":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    message = place.fails("quantize", place.recipe, "--overwrite")
    assert message == (
        f"{place.out}: cannot be written: Input/output error; run the same command to resume"
    )


def test_replacing_a_result_spares_what_lies_beside_it(place, quantized):
    for name in ("out", "out.old", "out.bak"):
        shutil.copytree(quantized, place.root / name)
    before = place.snapshot()
    again = ["quantize", str(place.recipe), "--overwrite"]
    assert CliRunner().invoke(main, again).exit_code == 0
    assert place.snapshot().keys() == before.keys()


def test_output_in_the_current_directory(place, monkeypatch):
    place.out.mkdir()
    monkeypatch.chdir(place.out)
    command = ["quantize", str(place.recipe), "--set", "output.path=."]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert CliRunner().invoke(main, ["verify", str(place.out)]).exit_code == 0


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system in memory; for root only."""
    directory = tmp_path / "disk"

    def mounted(options: str) -> Path:
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a file system can only be mounted by root")
        return directory

    yield mounted
    subprocess.run(["umount", str(directory)], check=False, capture_output=True)


@pytest.mark.parametrize("file", ["shard", "papers"])
def test_the_disk_fills_up(place, mount, quantized, monkeypatch, file):
    """However late that happens."""
    usage = shutil.disk_usage(place.root)
    shard = (quantized / SHARD).stat().st_size // 1024
    disk = mount(f"size={64 if file == 'shard' else shard + 16}k")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # as if it filled up later
    message = place.quantizing_fails(f"output.path={disk}/out")
    assert message.startswith(f"{disk}/out: cannot be written: ") and "No space left" in message
    assert list(disk.iterdir()) == []


def test_the_disk_fills_up_with_a_report(place, mount, quantized, tiny_release):
    disk = mount("size=16k")
    options = ("--reference", tiny_release, "--text", place.text, "--output", disk)
    command = ["eval", str(quantized), *map(str, options), "--samples", "2"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "Mean KLD" in result.stdout
    message = f"grokquant: {disk}: cannot be written: No space left on device"
    assert result.stderr.splitlines()[-1] == message
    assert list(disk.iterdir()) == []


def test_read_only_disk(place, mount, quantized, tiny_release):
    disk = mount("ro")
    message = place.quantizing_fails(f"output.path={disk}/out")
    assert f"{disk}/out: cannot be written: Read-only file system" in message
    options = ("--reference", tiny_release, "--text", place.text, "--output", f"{disk}/reports")
    assert f"{disk}/reports: cannot be written" in place.fails("eval", quantized, *options)


# --- eval, verify, generate


def test_reference_of_another_shape(place, quantized):
    shapes = {"layers": 3, "vocab": 1024, "hidden": 64, "experts": 8}
    fixed = dict(layers=2, hidden=128, ffn=256, kv_heads=1, head_dim=64, vocab=2048)
    for field, size in shapes.items():
        shutil.rmtree(place.source)
        write_random_release(place.source, **(fixed | {field: size}))
        message = place.fails("eval", quantized, "--reference", place.source)
        assert re.search(rf"out: \w*{field}\w* is \d+, the reference has {size}", message)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("length: 0", "recipe.yaml:1:1: length: unknown key"), ("[", "recipe.yaml:1:")],
)
def test_eval_of_an_output_with_a_broken_recipe(hf, tiny_release, content, complaint):
    (hf.source / "recipe.yaml").write_text(content)
    assert complaint in hf.fails("eval", hf.source, "--reference", tiny_release)


def test_reports_cannot_be_written(hf, tiny_release):
    hf.out.write_text("x")
    options = ("--text", hf.text, "--output", hf.out)
    message = hf.fails("eval", hf.source, "--reference", tiny_release, *options)
    assert message == f"{hf.out}: cannot be written: it is a file, not a directory"


def test_text_that_does_not_exist(place, quantized, tiny_release):
    command = ("eval", quantized, "--reference", tiny_release, "--text")
    assert place.fails(*command, "wikitext").startswith(
        "--text: expected python-docs, python-code, package-docs, a .txt"
    )
    message = place.fails(*command, "absent.jsonl")
    assert message.startswith("absent.jsonl: cannot be read: No such file or directory; looked in ")


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("source", "has no quantization-report.json"),
        ("absent", "no such directory"),
        ("recipe.yaml", "is a file, expected the directory of a checkpoint"),
    ],
)
def test_verify_of_something_else(place, target, complaint):
    assert complaint in place.fails("verify", place.root / target)


def test_verify_of_damaged_papers(hf):
    sums, report = hf.source / "SHA256SUMS", hf.source / "quantization-report.json"
    whole = sums.read_bytes()
    for content in (b"\xff\xff", b"0  ../text.txt\n"):
        sums.write_bytes(content)
        assert f"{sums}:1: is not a checksum" in hf.faults(hf.source)
    sums.write_bytes(whole.replace(b"a", b"b", 1))
    assert "does not match its checksum" in hf.faults(hf.source)
    sums.unlink()
    assert "SHA256SUMS: is missing" in hf.faults(hf.source)
    for content in ("{", "[]", '{"units": [{"name": "x"}]}', "[" * 100_000):
        report.write_text(content)
        seal(hf.source)
        assert f"{report}: cannot be read" in hf.faults(hf.source)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "caf\udce9"], "--prompt: is not UTF-8 text"),
        (["--prompt", "x", "--tokens", 512], "--tokens: 512 after a prompt of 1 exceed the"),
        (
            ["--prompt", "x", "--device", "abacus"],
            "--device: expected auto, cpu, cuda or cuda:N, not ",
        ),
        (
            ["--prompt", "x", "--device", "meta"],
            "--device: expected auto, cpu, cuda or cuda:N, not ",
        ),
    ],
)
def test_generate(place, options, complaint):
    assert complaint in place.fails("generate", place.source, *options)


def test_generate_without_a_tokenizer(place):
    (place.source / "tokenizer.model").unlink()
    assert "no tokenizer" in place.fails("generate", place.source, "--prompt", "x")


@pytest.mark.parametrize("command", ["inspect", "eval", "generate", "verify", "plan", "quantize"])
def test_names_that_no_disk_takes(place, command):
    options = {"eval": ["--reference", "toy"], "generate": ["--prompt", "x"]}.get(command, [])
    assert "File name too long" in place.fails(command, place.root / ("x" * 300), *options)


def test_output_name_that_no_disk_takes(place):
    message = place.quantizing_fails(f"output.path={place.root / ('x' * 300)}")
    assert "File name too long" in message


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_places_where_no_output_can_be(place, command):
    (place.root / "loop").symlink_to("loop")
    for path, complaint in (("/", "is the root"), ("loop", "loop of links"), ("loop/x", "loop of")):
        output = path if path == "/" else place.root / path
        message = place.fails(command, place.recipe, "--set", f"output.path={output}")
        assert message.startswith(f"{output}: ") and complaint in message


@pytest.mark.parametrize("command", ["inspect", "verify", "eval", "generate", "convert", "compare"])
def test_a_loop_of_links_as_model(place, command):
    (place.root / "loop").symlink_to("loop")
    options = {"eval": ["--reference", "toy"], "generate": ["--prompt", "x"]}.get(command, [])
    options += ["--format", "gguf"] if command == "convert" else []
    message = place.fails(command, place.root / "loop", *options)
    assert "loop" in message
