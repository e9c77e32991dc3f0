"""`verify` finds whatever is changed in a result, and names it."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import seal
from safetensors.torch import load_file, save_file

import grokquant
from grokquant.cli import main
from grokquant.errors import InputError
from grokquant.files.atomic import sha256
from grokquant.files.gguf_header import read_tensors
from grokquant.job import pipeline
from grokquant.job import seal as sealing
from grokquant.job.convert import conversion_recipe
from grokquant.job.verify import FaultsFound, faults, verify
from grokquant.recipe import parse_recipe
from grokquant.reporting.publish import publish

INT4 = {"bits": 4, "group": 32}
# Format, and the rule of all matrices but the queries of layer 0.
RULES: dict[str, tuple[str, dict]] = {
    "compressed-tensors": ("compressed-tensors", INT4),
    "zero points": ("compressed-tensors", {"bits": 8, "symmetric": False, "group": 32}),
    "gptq": ("gptq", {"bits": 3, "group": 32}),
    "bitsandbytes": ("bitsandbytes", {"grid": "nf4"}),
    "llm_int8": ("bitsandbytes", {"grid": "llm_int8"}),
    "gguf": ("gguf", {"grid": "q4_1"}),
    "bf16": ("bf16", {}),
}
UNITS = 2 * (4 + 4 * 3) - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory, smallest_release) -> Callable[[str], Path]:
    """A small result in a format; to be copied, not touched."""
    known: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            output_format, settings = RULES[name]
            rule = {"match": "layers.*", "method": "rtn"} | settings
            rules = [{"match": "layers.0.attention.q", "method": "unquantized"}, rule]
            if output_format == "bf16":
                rules = [{"match": "*", "method": "unquantized"}]
            place = tmp_path_factory.mktemp("made") / "out"
            output = {"path": str(place), "format": output_format, "shard": "20KB"}
            values = {"model": {"path": str(smallest_release)}, "quantize": rules, "output": output}
            known[name] = pipeline.quantize(parse_recipe(values))
        return known[name]

    return make


@pytest.fixture
def copied(made, tmp_path) -> Callable[[str], Path]:
    """A copy of a result, to be changed."""

    def copy(output_format: str) -> Path:
        return Path(shutil.copytree(made(output_format), tmp_path / output_format))

    return copy


@pytest.fixture
def result(copied) -> Path:
    return copied("compressed-tensors")


def found(directory: Path) -> dict[str, str | None]:
    """The text of each fault, with the file that it names as one to be made again."""
    return {fault.text: fault.file for fault in faults(directory)}


def forge(directory: Path) -> None:
    """Every checksum made anew, by whoever knows where they all are."""
    report = json.loads((directory / "quantization-report.json").read_text())
    card = directory / "README.md"
    card.write_text(card.read_text().partition("\n## Integrity")[0])
    sealing.seal(directory, report, {})


SHARD = "model-00003-of-00012.safetensors"


def cut_lines(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


# How to change a result, and parts of what is said about it.
LISTING: dict[str, tuple[Callable[[Path], object], str]] = {
    "emptied sums": (lambda r: (r / "SHA256SUMS").write_text(""), "SHA256SUMS: is empty"),
    "shortened sums": (lambda r: cut_lines(r / "SHA256SUMS"), "recipe.yaml: is no part of"),
    "a missing file": (lambda r: (r / SHARD).unlink(), f"{SHARD}: is missing"),
    "a missing card": (lambda r: (r / "README.md").unlink(), "README.md: is missing"),
    "a note": (lambda r: (r / "note.txt").write_text("x"), "note.txt: is no part of the result"),
    "a hidden note": (lambda r: (r / ".x").write_text("x"), ".x: is no part of the result"),
    "code": (lambda r: (r / "modeling.py").write_text("x"), "modeling.py: is code"),
    "a pickle": (lambda r: (r / "x.PKL").write_text("x"), "x.PKL: is a pickle"),
    "a FIFO": (lambda r: os.mkfifo(r / "fifo"), "fifo: is no part of the result"),
    "a doubled line": (
        lambda r: (r / "SHA256SUMS").write_text((r / "SHA256SUMS").read_text() * 2),
        "names config.json again",
    ),
    "a line of another form": (
        lambda r: (r / "SHA256SUMS").write_text((r / "SHA256SUMS").read_text() + "# x\n"),
        "is not a checksum and a name",
    ),
    "lines in another order": (
        lambda r: (r / "SHA256SUMS").write_text(
            "".join(reversed((r / "SHA256SUMS").read_text().splitlines(keepends=True)))
        ),
        "SHA256SUMS: is not as grokquant writes it",
    ),
    "a name that leads out": (
        lambda r: (r / "SHA256SUMS").write_text(
            (r / "SHA256SUMS").read_text().replace("  config", "  ../config")
        ),
        "SHA256SUMS:1: is not a checksum and a name",
    ),
}


@pytest.mark.parametrize("change", LISTING)
def test_the_list_of_files_is_closed(result, change):
    act, complaint = LISTING[change]
    act(result)
    assert any(complaint in text for text in found(result)), found(result)


def test_what_downloads_add_is_no_fault(result):
    (result / ".gitattributes").write_text("*.safetensors filter=lfs")
    (result / ".cache/huggingface/download").mkdir(parents=True)
    (result / ".cache/huggingface/download/config.json.metadata").write_text("x")
    assert found(result) == {}
    (result / ".cache/huggingface/x.py").write_text("x")
    assert any("x.py: is code" in text for text in found(result))


def test_code_is_named_even_where_the_sums_know_it(result):
    (result / "modeling.py").write_text("x")
    seal(result)
    assert f"{result / 'modeling.py'}: is code, which no result of grokquant holds" in found(result)


def flip_a_code(result: Path) -> None:
    flipped = bytearray((result / SHARD).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (result / SHARD).write_bytes(flipped)


def test_a_missing_file_is_named_once(result):
    (result / SHARD).unlink()
    assert found(result) == {f"{result / SHARD}: is missing": SHARD}


def test_every_fault_is_named_with_the_file_to_make_again(result):
    flip_a_code(result)
    (result / "note.txt").write_text("x")
    (result / "generation_config.json").unlink()
    texts = found(result)
    assert texts.pop(f"{result / SHARD}: does not match its checksum in SHA256SUMS") == SHARD
    assert texts.pop(f"{result / 'note.txt'}: is no part of the result") is None
    assert texts.pop(f"{result / 'generation_config.json'}: is missing") == "generation_config.json"
    with pytest.raises(
        FaultsFound, match="generation_config.json: is missing; 2 more faults"
    ) as caught:
        verify(result)
    assert len(caught.value.faults) == 3


# --- what is as it was made


@pytest.mark.parametrize("output_format", RULES)
def test_what_is_as_it_was_made_passes(made, output_format):
    assert found(made(output_format)) == {}
    assert verify(made(output_format)) == (0 if output_format == "bf16" else UNITS)


def test_what_says_more_of_itself_passes(smallest_release, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(smallest_release, source)
    card = "---\nlicense: other\nlicense_name: x\nlanguage: [de, no]\nbase_model: a/b\n---\n"
    (source / "README.md").write_text(card)
    (source / "LICENSE").write_text("x")
    sampling = {"temperature": 0.6, "top_k": 5, "eos_token_id": [2, 5]}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for output_format, group in ("gguf", 32), ("gptq", 64):
        rule = {"match": "*", "method": "rtn", "bits": 4, "group": group, "scale_dtype": "float16"}
        output = {"path": str(tmp_path / output_format), "format": output_format}
        values = {"model": {"path": str(source)}, "quantize": [rule], "output": output}
        assert found(pipeline.quantize(parse_recipe(values))) == {}


@pytest.mark.parametrize(
    ("first", "second"), [("compressed-tensors", "bf16"), ("gptq", "gptq"), ("gguf", "gguf")]
)
def test_what_is_converted_passes(made, tmp_path, first, second):
    again = pipeline.quantize(conversion_recipe(made(first), second, tmp_path / "again"))
    assert found(again) == {}


def test_a_forger_can_make_all_checksums_as_they_were(copied):
    for output_format in RULES:
        result = copied(output_format)
        digest = sha256(result / "SHA256SUMS")
        forge(result)
        assert verify(result, digest) is not None


def test_every_file_but_the_card_is_in_the_sums(made):
    directory = made("compressed-tensors")
    lines = (directory / "SHA256SUMS").read_text().splitlines()
    names = {path.name for path in directory.iterdir()} - {"SHA256SUMS", "README.md"}
    assert set(lines) == {f"{sha256(directory / name)}  {name}" for name in names}


def test_a_result_is_read_once(made, monkeypatch):
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    monkeypatch.setattr("grokquant.job.verify.sha256", counted)
    assert found(made("gptq")) == {}
    assert sorted(read) == sorted(set(read)) and SHARD in read


@pytest.fixture(scope="module")
def evaluated(made, smallest_release, text_file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "out"
    shutil.copytree(made("compressed-tensors"), output)
    settings = {"text": str(text_file), "samples": 1, "length": 32}
    publish(grokquant.evaluate(output, smallest_release, **settings), output)
    return output


EVALUATION: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda r: None, ""),
    "a figure in the card": (
        lambda r: rewrite(r / "README.md", "| Mean KLD | 0", "| Mean KLD | 1"),
        "README.md: its evaluation was changed by hand",
    ),
    "the report": (
        lambda r: rewrite(r / "evaluation/report.json", "1", "2"),
        "report.json: does not match its checksum",
    ),
    "a page too many": (
        lambda r: (r / "evaluation/x.html").write_text("x"),
        "x.html: is no part of the evaluation",
    ),
    "a page too few": (lambda r: (r / "evaluation/report.html").unlink(), "html: is missing"),
    "code": (lambda r: (r / "evaluation/x.py").write_text("x"), "x.py: is code"),
    "no sums": (lambda r: (r / "evaluation/SHA256SUMS").unlink(), "SHA256SUMS: is missing"),
}


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} has no {old}"
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("change", EVALUATION)
def test_an_evaluation_passes_as_it_was_written(evaluated, tmp_path, change):
    directory = shutil.copytree(evaluated, tmp_path / "result")
    act, complaint = EVALUATION[change]
    act(directory)
    texts = found(directory)
    assert any(complaint in text for text in texts) if complaint else texts == {}


# --- one file changed, and SHA256SUMS with it


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def config(**values: object) -> Callable[[Path], object]:
    return lambda r: edit_json(r / "config.json", lambda content: content.update(values))


def report(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda r: edit_json(r / "quantization-report.json", change)


def other_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\x9a\x06\x00")  # a field that no reader knows


# (how, the file that is named)
SEALED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another topk": (config(num_experts_per_tok=1), "config.json"),
    "another theta": (config(rope_theta=20000.0), "config.json"),
    "another epsilon": (config(rms_norm_eps=1e-6), "config.json"),
    "a key more": (config(use_cache=False), "config.json"),
    "another tokenizer": (other_tokenizer, "tokenizer.model"),
    "another recipe": (lambda r: rewrite(r / "recipe.yaml", "seed: 0", "seed: 1"), "recipe.yaml"),
    "other tokens": (
        lambda r: rewrite(r / "generation_config.json", "2", "1"),
        "generation_config.json",
    ),
    "an empty report": (
        lambda r: (r / "quantization-report.json").write_text("{}"),
        "quantization-report.json",
    ),
    "a better error": (
        report(lambda content: content["units"][0].update(relative_error=0.0)),
        "quantization-report.json",
    ),
    "another card": (lambda r: rewrite(r / "README.md", "# out", "# gout"), "README.md"),
}


@pytest.mark.parametrize("output_format", ["compressed-tensors", "gguf"])
@pytest.mark.parametrize("change", SEALED)
def test_changes_with_sums_to_match_are_named(copied, output_format, change):
    result = copied(output_format)
    act, file = SEALED[change]
    act(result)
    seal(result)
    assert file in found(result).values()


# --- one thing changed, and every checksum with it: what is said no longer agrees


def edit_tensors(directory: Path, ending: str, change: Callable[[torch.Tensor], object]) -> None:
    """Changes the first tensor whose name ends so, in place."""
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        name = next((name for name in tensors if name.endswith(ending)), None)
        if name:
            change(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(ending)


def poison_block(directory: Path, byte: int) -> None:
    """Makes a float16 of the first block of experts infinite."""
    for path in sorted(directory.glob("*.gguf")):
        for tensor in read_tensors(path):
            if "exps" in tensor.name:
                raw = bytearray(path.read_bytes())
                raw[tensor.offset + byte : tensor.offset + byte + 2] = b"\x00\x7c"
                path.write_bytes(raw)
                return


def edit_pair(directory: Path, key: str) -> None:
    """Adds one to a metadata value of a GGUF file."""
    path = min(directory.glob("*.gguf"))
    raw = bytearray(path.read_bytes())
    raw[raw.index(key.encode()) + len(key) + 4] += 1  # after its type
    path.write_bytes(raw)


def fill(value: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.view(-1)[:1].fill_(value)


def add_one(tensor: torch.Tensor) -> None:
    tensor.view(-1)[:1] += 1


CT, GPTQ, BNB, GGUF = "compressed-tensors", "gptq", "bitsandbytes", "gguf"
INDEX = "model.safetensors.index.json"
FORGED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "NaN in scales": (
        CT, lambda r: edit_tensors(r, ".weight_scale", fill(torch.nan)), "holds non-finite values",
    ),
    "infinite scales of int8": (
        "llm_int8", lambda r: edit_tensors(r, ".SCB", fill(torch.inf)), "non-finite",
    ),
    "another layout": (
        "llm_int8", lambda r: edit_tensors(r, ".weight_format", add_one), "weight_format has not",
    ),
    "infinite scales of gptq": (
        GPTQ, lambda r: edit_tensors(r, ".scales", fill(-torch.inf)), "holds non-finite values",
    ),
    "NaN in absmax": (
        BNB, lambda r: edit_tensors(r, ".absmax", fill(torch.nan)), "holds non-finite values",
    ),
    "an infinite scale of a block": (GGUF, lambda r: poison_block(r, 0), "non-finite scales"),
    "an infinite minimum of a block": (GGUF, lambda r: poison_block(r, 2), "non-finite scales"),
    "an infinite norm": (
        "bf16", lambda r: edit_tensors(r, "norm.weight", fill(torch.inf)), "non-finite values",
    ),
    "another zero point": (
        GPTQ, lambda r: edit_tensors(r, ".qzeros", add_one), "qzeros has not the values",
    ),
    "another order": (GPTQ, lambda r: edit_tensors(r, ".g_idx", add_one), "g_idx has not the"),
    "another table": (
        BNB, lambda r: edit_tensors(r, ".quant_map", add_one), "quant_map has not the values",
    ),
    "another dtype after unpacking": (
        BNB,
        lambda r: edit_tensors(r, "__nf4", lambda t: set_text(t, b"bfloat16", b"bfloat17")),
        "bitsandbytes__nf4 has not the values",
    ),
    "another shape": (
        CT, lambda r: edit_tensors(r, ".weight_shape", add_one), "weight_shape has not the values",
    ),
    "a topk that llama.cpp does not read in config.json": (
        GGUF, lambda r: edit_pair(r, "grok.expert_used_count"), "planned as 2, but stored as 3",
    ),
    "another topk": (
        CT, config(num_experts_per_tok=1), "num_experts_per_tok is not what source and recipe make",
    ),
    "another theta": (GGUF, config(rope_theta=7.0), "config.json: rope_theta is not that of the"),
    "another epsilon": ("bf16", config(rms_norm_eps=1e-6), "rms_norm_eps is not what source and"),
    "another tokenizer": (GPTQ, other_tokenizer, "tokenizer.model: is not the tokenizer of the"),
    "another norm": (
        CT,
        lambda r: edit_tensors(r, "model.norm.weight", add_one),
        "model.norm.weight is not that of the source",
    ),
    "another origin": (
        CT,
        report(lambda c: c["made_from"]["recipe"].update(experts={})),
        "made_from.recipe is not recipe.yaml",
    ),
    "no origin": (CT, report(lambda c: c.pop("source_models")), "cannot be read: KeyError"),
    "other bits in config.json": (
        CT, lambda r: rewrite(r / "config.json", '"symmetric": true', '"symmetric": false'), "",
    ),
    "a key of quantization_config": (
        CT,
        lambda r: rewrite(r / "config.json", '"quantization_status": "compressed"', '"x": 1'),
        "config.json: quantization_config is not what source and recipe make",
    ),
    "quantize_config.json": (
        GPTQ,
        lambda r: rewrite(r / "quantize_config.json", '"sym": true', '"sym": false'),
        "quantize_config.json: sym is not what source and recipe make",
    ),
    "total_size": (
        CT,
        lambda r: edit_json(r / INDEX, lambda c: c["metadata"].update(total_size=7)),
        f"{INDEX}: metadata is not what source and recipe make",
    ),
    "a tensor in another file": (
        CT, lambda r: rewrite(r / INDEX, "model-00004", "model-00005"), "is missing, the index",
    ),
    "a recipe of other bits": (
        CT,
        lambda r: rewrite(r / "recipe.yaml", "bits: 4", "bits: 8"),
        "planned as int8 g32 sym, but stored as int4 g32 sym",
    ),
    "a recipe that keeps more": (
        CT,
        lambda r: rewrite(r / "recipe.yaml", "layers.0.attention.q", "layers.*.attention.q"),
        "units are not the matrices that the recipe quantizes",
    ),
    "another comment": (
        CT, lambda r: rewrite(r / "recipe.yaml", "# The", "# the"), "yaml: is not as grokquant",
    ),
    "a recipe of another method": (
        CT,
        lambda r: rewrite(r / "recipe.yaml", "method: rtn", "method: gptq"),
        "grid, bits or method are not those of the recipe",
    ),
    "larger files": (
        CT,
        lambda r: rewrite(r / "recipe.yaml", "shard: 20KB", "shard: 60KB"),
        "00006.safetensors: planned",
    ),
    "a row fewer": (
        CT, report(lambda c: c["units"].pop()), "units are not the matrices that the recipe",
    ),
    "fewer bits": (CT, report(lambda c: c.update(bits_per_weight=4.0)), "bits_per_weight does"),
    "fewer bytes": (GGUF, report(lambda c: c.update(output_bytes=4)), "output_bytes does not"),
    "fewer bits of a matrix": (
        CT,
        report(lambda c: c["units"][0].update(bits_per_weight=4.0)),
        "layers.0.attention.k: grid, bits or method are not those of the recipe",
    ),
    "no fallbacks": (
        CT, report(lambda c: c["units"][0].update(fallback="few tokens")), "fallbacks does not",
    ),
    "code": (CT, lambda r: (r / "x.py").write_text("x"), "x.py: is code"),
}  # fmt: skip


def set_text(tensor: torch.Tensor, old: bytes, new: bytes) -> None:
    text = bytes(tensor.tolist())
    assert old in text
    tensor.copy_(torch.tensor(list(text.replace(old, new))))


@pytest.mark.parametrize("change", FORGED)
def test_what_no_longer_agrees_is_named_whatever_the_checksums_say(copied, change):
    output_format, act, complaint = FORGED[change]
    result = copied(output_format)
    act(result)
    forge(result)
    assert any(complaint in text for text in found(result)), found(result)


# --- the digest


def test_a_perfect_forgery_has_another_digest(made, result):
    digest = sha256(made("compressed-tensors") / "SHA256SUMS")
    assert verify(result, digest) == verify(result, digest.upper()) == UNITS
    flip_a_code(result)
    forge(result)
    assert verify(result) == UNITS
    with pytest.raises(
        FaultsFound, match=f"SHA256SUMS: has the digest [0-9a-f]{{64}}, not {digest}"
    ):
        verify(result, digest)
    with pytest.raises(InputError, match="digest: expected the 64 hexadecimal digits"):
        verify(result, "5c69")


def test_the_digest_is_in_the_card(made):
    directory = made("compressed-tensors")
    card = (directory / "README.md").read_text()
    (digest,) = re.findall(r"grokquant verify \. --digest ([0-9a-f]{64})\n", card)
    assert digest == sha256(directory / "SHA256SUMS")


def test_verify_as_a_command(made, result):
    digest = sha256(result / "SHA256SUMS")
    done = CliRunner().invoke(main, ["verify", str(result), "--digest", digest, "--json"])
    ok = {"output": str(result), "matrices": UNITS, "digest": digest, "faults": []}
    assert (done.exit_code, json.loads(done.stdout)) == (0, ok)
    (result / "note.txt").write_text("x")
    fault = {"file": None, "text": f"{result / 'note.txt'}: is no part of the result"}
    done = CliRunner().invoke(main, ["verify", str(result), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout) == ok | {"matrices": None, "faults": [fault]}
    done = CliRunner().invoke(main, ["verify", str(result), "--digest", "0" * 64])
    wrong = f"{result / 'SHA256SUMS'}: has the digest {digest}, not {'0' * 64}"
    lines = [f"grokquant: {text}" for text in (wrong, fault["text"])]
    assert (done.exit_code, done.stdout, done.stderr.splitlines()) == (1, "", lines)
    done = CliRunner().invoke(main, ["verify", str(result), "--digest", "x"])
    assert (done.exit_code, done.stderr[:22]) == (2, "grokquant: --digest: e")


def test_a_result_of_an_earlier_version_is_refused_in_one_line(result):
    def older(content: dict) -> None:
        content["schema"] = "grokquant.quantization/1"
        for key in ("files", "card", "checksum"):
            del content[key]

    report(older)(result)
    with pytest.raises(InputError, match="json: is of an earlier version of grokquant"):
        verify(result)


# --- anything, anywhere


def change_a_byte(path: Path, draw: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    place = draw.randrange(len(raw))
    raw[place] = (raw[place] + draw.randrange(1, 256)) % 256
    path.write_bytes(raw)
    return f"byte {place}"


VALUES = (7, 0.5, "x", None, [], {}, [{}])


def change_a_value(path: Path, draw: random.Random) -> str:
    content = json.loads(path.read_text())
    part: dict | list = content
    while True:
        key = draw.choice(sorted(part) if isinstance(part, dict) else range(len(part)))
        if not isinstance(part[key], (dict, list)) or not part[key]:
            break
        part = part[key]
    part[key] = draw.choice([v for v in VALUES if v != part[key]])
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return f"value at {key}"


def check_random_changes(directory: Path, seed: int, count: int) -> None:
    draw = random.Random(seed)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sealed_later = directory / "SHA256SUMS"
    for _ in range(count):
        path = draw.choice(files)
        kept = path.read_bytes()
        is_json = path.suffix == ".json" and draw.random() < 0.7
        what = (change_a_value if is_json else change_a_byte)(path, draw)
        assert next(faults(directory), None), f"{path.name}: {what}"
        if path != sealed_later:
            sums = sealed_later.read_bytes()
            seal(directory)
            assert next(faults(directory), None), f"{path.name}: {what}, sums to match"
            sealed_later.write_bytes(sums)
        path.write_bytes(kept)
    assert found(directory) == {}


@pytest.mark.parametrize("seed", range(len(RULES)))
def test_random_changes_are_all_found(copied, seed):
    check_random_changes(copied(list(RULES)[seed]), seed, 25)


def test_random_changes_of_an_evaluated_result_are_all_found(evaluated, tmp_path):
    check_random_changes(Path(shutil.copytree(evaluated, tmp_path / "result")), 7, 25)


@pytest.mark.slow
@pytest.mark.parametrize("output_format", RULES)
def test_a_thousand_random_changes_are_all_found(copied, output_format):
    check_random_changes(copied(output_format), 1, 1000)
