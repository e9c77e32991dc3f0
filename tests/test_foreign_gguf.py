"""GGUF files of other programs are opened, and are the models that they were made from."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from foreign_gguf import MODELS, TEXTS, random_model, rows, write_gguf

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.evaluation.models import check_comparable
from grokquant.evaluation.same_model import other_model
from grokquant.families.tokenizer import read_tokenizer
from grokquant.files.gguf_header import DENSE, OTHER_BLOCKS, TYPES, read_metadata
from grokquant.job import pipeline
from grokquant.job.default_recipe import values_for
from grokquant.recipe import parse_recipe
from grokquant.sources import gguf_directory
from grokquant.toy import TOY_PATH


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_dequantized_weights(name, tmp_path):
    model = random_model(name)
    path = tmp_path / "Some-Q8_0.gguf"
    write_gguf(path, name, model)
    loaded, _ = grokquant.load(path, dtype=torch.float32, packed=False)
    assert (loaded(rows()).logits - model(rows()).logits).abs().max() < 1e-5


def test_experts_may_lie_alone(tmp_path):
    model = random_model("mixtral")
    write_gguf(tmp_path / "stacked.gguf", "mixtral", model)
    write_gguf(tmp_path / "alone.gguf", "mixtral", model, stacked=False)
    stacked, alone = (open_checkpoint(tmp_path / f"{n}.gguf").source for n in ("stacked", "alone"))
    for name, ref in stacked.tensors.items():
        assert torch.equal(alone.tensors[name].read(), ref.read()), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_joined_tensors_are_read_as_their_parts(name, tmp_path):
    model = random_model(name)
    write_gguf(tmp_path / "apart.gguf", name, model)
    write_gguf(tmp_path / "joined.gguf", name, model, joined=True)
    stored = {t.name for t in gguf.GGUFReader(tmp_path / "joined.gguf").tensors}
    assert "blk.1.attn_qkv.weight" in stored and "blk.1.attn_k.weight" not in stored
    assert ("blk.1.ffn_gate_up_exps.weight" in stored) == (name not in ("llama", "qwen2"))
    apart, joined = (open_checkpoint(tmp_path / f"{n}.gguf").source for n in ("apart", "joined"))
    assert apart.config == joined.config
    for tensor, ref in apart.tensors.items():
        found = joined.tensors[tensor]
        assert (found.stored_bytes, found.stored_as) == (ref.stored_bytes, ref.stored_as)
        assert torch.equal(found.read(), ref.read()), tensor


def test_joined_tensors_without_whole_parts_are_refused(tmp_path):
    model = random_model("llama")
    write_gguf(tmp_path / "x.gguf", "llama", model, joined=True, llama__attention__key_length=17)
    with pytest.raises(InputError, match=r"attn_qkv.weight does not divide into attn_q, attn_k"):
        open_checkpoint(tmp_path / "x.gguf")


# --- types


@pytest.mark.parametrize("kind", [*TYPES, *OTHER_BLOCKS])
def test_values_are_those_of_the_gguf_package(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    assert (TYPES | OTHER_BLOCKS)[kind] == (number, *gguf.GGML_QUANT_SIZES[number])
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = random_model("llama", **sizes)
    write_gguf(tmp_path / "x.gguf", "llama", model, kind)
    source = open_checkpoint(tmp_path / "x.gguf").source
    for name, parameter in model.named_parameters():
        assert torch.equal(source.tensors[name].read().float(), parameter.data), name
        if parameter.ndim == 2 and kind not in DENSE:
            assert source.tensors[name].stored_as == kind


# --- tokenizers


def tokenizer_keys(directory: Path, kind: str) -> dict:
    """The metadata of the tokenizer in a directory, as the gguf package makes them."""
    vocabulary = {"llama": gguf.vocab.SentencePieceVocab, "gpt2": gguf.vocab.BpeVocab}[kind]
    found = list(vocabulary(directory).all_tokens())
    keys = {
        "model": kind,
        "tokens": [token.decode() for token, _, _ in found],
        "token_type": [int(kind) for _, _, kind in found],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
    }
    if kind == "llama":
        keys |= {"scores": [float(score) for _, score, _ in found], "unknown_token_id": 3}
    return {f"tokenizer__ggml__{key}": value for key, value in keys.items()}


@pytest.fixture(scope="module")
def with_toy_tokenizer(tmp_path_factory) -> Path:
    """A directory with src, a Mixtral in bf16, and Some-Q8_0.gguf, what another program made of
    it."""
    directory = tmp_path_factory.mktemp("foreign")
    model = random_model("mixtral", vocab_size=2048).bfloat16()
    model.save_pretrained(directory / "src")
    shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "src" / "tokenizer.model")
    keys = tokenizer_keys(directory / "src", "llama")
    keys |= {"tokenizer__ggml__add_bos_token": False, "tokenizer__chat_template": "{{ messages }}"}
    keys |= {"general__license": "apache-2.0"}
    write_gguf(directory / "Some-Q8_0.gguf", "mixtral", model.float(), "Q8_0", **keys)
    return directory


def test_the_tokenizer_is_the_one_in_the_metadata(with_toy_tokenizer):
    own = open_checkpoint(with_toy_tokenizer / "src").source
    source = open_checkpoint(with_toy_tokenizer / "Some-Q8_0.gguf").source
    theirs, ours = read_tokenizer(own), read_tokenizer(source)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    assert ours.chat_template == "{{ messages }}"
    assert source.licence == "apache-2.0"
    held = source.tokenizer_files[0]
    del source
    assert not held.exists()


# --- files


@pytest.mark.parametrize("name", ["llama", "deepseek_v2", "gemma", "gpt_oss"])
def test_the_model_that_it_was_made_from_is_known_as_such(name, tmp_path):
    model = random_model(name).bfloat16()
    model.save_pretrained(tmp_path / "in")
    keys = {f"tokenizer__ggml__{k}_token_id": n for n, k in enumerate(("padding", "bos", "eos"))}
    write_gguf(tmp_path / "x.gguf", name, model.float(), **keys)
    own, reference = open_checkpoint(tmp_path / "x.gguf"), open_checkpoint(tmp_path / "in")
    check_comparable(own, reference)
    other = other_model(own, reference)
    assert other and not other.certain and "embed_tokens" in other.differences
    changed = json.loads((tmp_path / "in" / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "in" / "config.json").write_text(json.dumps(changed))
    other = other_model(own, open_checkpoint(tmp_path / "in"))
    assert other and other.certain and "rms_norm_eps is 1e-05" in other.differences


def test_mistral_is_told_from_llama_by_its_name(tmp_path):
    write_gguf(tmp_path / "x.gguf", "llama", random_model("llama"), general__name="Mistral 7B")
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.family.name == "mistral" and checkpoint.config.sliding_window is None


def test_a_result_of_such_a_file_is_like_any_other(with_toy_tokenizer, tmp_path):
    file = with_toy_tokenizer / "Some-Q8_0.gguf"
    rules = [{"match": "layers.*.experts.*", "method": "rtn", "grid": "q4_0"}]
    rules += [{"match": "layers.*.attention.*", "method": "copy"}]
    written = {"path": str(tmp_path / "out"), "format": "gguf"}
    values = {"model": {"path": str(file)}, "quantize": rules, "output": written}
    output = pipeline.quantize(parse_recipe(values))
    made = open_checkpoint(output).source
    assert {made.tensors[name].stored_as for name in made.tensors} == {"Q4_0", "Q8_0", "float32"}
    assert values_for(file)["output"]["path"] == "Some-Q8_0-int4"
    assert read_tokenizer(made)("def f(x):").input_ids


def test_the_directory_of_such_files_is_one_model(with_toy_tokenizer, tmp_path):
    file = with_toy_tokenizer / "Some-Q8_0.gguf"
    shutil.copyfile(file, tmp_path / file.name)
    bare = open_checkpoint(tmp_path)
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(with_toy_tokenizer / "src" / name, tmp_path / name)
    described = open_checkpoint(tmp_path)
    assert bare.source.tensors == described.source.tensors
    assert bare.config.to_dict() == described.config.to_dict()
    shutil.copyfile(file, tmp_path / "Other.gguf")
    with pytest.raises(InputError, match="holds 2 models, give one of its files: Other.gguf"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / file.name).source.tensors == bare.source.tensors


def damaged(path: Path, damage) -> Path:
    raw = path.read_bytes()
    place = path.with_name("damaged.gguf")
    place.write_bytes(damage(raw))
    return place


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda raw: raw[:-64],
            "damaged.gguf: truncated: '.*' ends after the file; download it again$",
        ),
        (lambda raw: raw[:300], "damaged.gguf: not a readable GGUF file: it ends within its"),
        (lambda raw: raw.replace(b"general.architecture", b"general.architectura", 1), "no gen"),
        (lambda raw: raw.replace(b"llama.block_count", b"llama.block_kount", 1), "block_count"),
        (lambda raw: raw.replace(b"blk.1.attn_q.weight", b"blk.1.attn_u.weight", 1), "q_proj.* is"),
        (lambda raw: b"<html>" + raw[6:], "damaged.gguf: "),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(with_toy_tokenizer, damage, complaint):
    path = damaged(with_toy_tokenizer / "Some-Q8_0.gguf", damage)
    with pytest.raises(InputError, match=complaint) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


def test_all_files_of_a_split_are_read(tmp_path):
    model = random_model("llama")
    whole = tmp_path / "Some.gguf"
    write_gguf(whole, "llama", model)
    write_gguf(tmp_path / "Split.gguf", "llama", model, split_max_tensors=8)
    parts = sorted(tmp_path.glob("Split-*.gguf"))
    assert len(parts) == 3
    expected = open_checkpoint(whole).source.tensors
    for part in parts:
        found = open_checkpoint(part).source
        assert found.weight_files == tuple(parts)
        for name, ref in expected.items():
            assert torch.equal(found.tensors[name].read(), ref.read()), name
    parts[1].unlink()
    with pytest.raises(InputError, match="Split-00002-of-00003.gguf: no such file"):
        open_checkpoint(parts[0])


WRONG = ("x", -1, 0, 1 << 31, 1e30, [1, 2], True, None)


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "deepseek_v2", "gpt_oss"])
def test_metadata_that_make_no_sense_end_in_one_line(name, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    write_gguf(path, name, random_model(name))
    metadata = read_metadata(path)
    for number, key in enumerate(metadata):
        for value in (WRONG[number % len(WRONG)], WRONG[(number + 3) % len(WRONG)]):
            changed = {k: value if k == key else metadata[k] for k in metadata}
            if value is None:
                del changed[key]
            monkeypatch.setattr(gguf_directory, "read_metadata", lambda file, c=changed: c)
            try:
                open_checkpoint(path)
            except InputError as error:
                assert "\n" not in str(error)
