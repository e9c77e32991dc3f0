"""The tokenizer of a checkpoint is the one that AutoTokenizer makes of the same directory."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from shipped_tokenizers import (
    PIECES,
    ROWS,
    TEMPLATE,
    WAYS,
    added_to_sentencepiece,
    byte_level,
    docstrings,
    json_with_config,
    json_with_map,
    sentencepiece_model,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.containers.gguf_vocabulary import vocabulary
from grokquant.errors import InputError
from grokquant.job import pipeline
from grokquant.recipe import parse_recipe
from grokquant.text.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "hello"}]
TEXTS = ["", " two  blanks", "naïve 漢字 \U0001f600\n\n\tend", "<|im_start|>user<|im_end|> <s> x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama without a tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=ROWS, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def source(model, tmp_path) -> Path:
    """The model in a directory of its own, to which a tokenizer can be added."""
    path = tmp_path / "source"
    path.mkdir()
    for file in model.iterdir():
        shutil.copyfile(file, path / file.name)
    return path


class Notes(pipeline.Silence):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def quantized(source: Path, progress: pipeline.Silence | None = None) -> Path:
    rule = {"match": "layers.*", "method": "rtn", "bits": 8, "group": 32}
    output = {"path": str(source.parent / "out")}
    content = {"model": {"path": str(source)}, "quantize": [rule], "output": output}
    return pipeline.quantize(parse_recipe(content), progress)


def assert_same(found: PreTrainedTokenizerBase, wanted: PreTrainedTokenizerBase) -> None:
    assert type(found) is type(wanted)
    assert found.get_vocab() == wanted.get_vocab()
    for text in [*TEXTS, *docstrings()]:
        assert found(text).input_ids == wanted(text).input_ids
        plain = wanted(text, add_special_tokens=False).input_ids
        assert found(text, add_special_tokens=False).input_ids == plain
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(found, name) == getattr(wanted, name), name
    for number in range(ROWS):
        assert found.decode([number]) == wanted.decode([number]), number
    if wanted.chat_template:
        applied = wanted.apply_chat_template(CHAT, tokenize=False)
        assert found.apply_chat_template(CHAT, tokenize=False) == applied != ""


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_shipped_it_is_that_of_transformers(way, source, capfd):
    WAYS[way](source)
    wanted = AutoTokenizer.from_pretrained(source)
    capfd.readouterr()
    assert_same(load_tokenizer(open_checkpoint(source)), wanted)
    assert capfd.readouterr().err == ""
    output = quantized(source)
    assert_same(AutoTokenizer.from_pretrained(output), wanted)
    assert_same(grokquant.load(output)[1], wanted)


def test_a_lone_sentencepiece_model_is_read_as_it_is(source):
    model = sentencepiece_model(source)
    tokenizer = load_tokenizer(open_checkpoint(source))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.bos_id(), model.eos_id())
    for text in docstrings():
        assert tokenizer(text).input_ids == model.encode(text)
    assert tokenizer.decode(list(range(PIECES, ROWS))) == ""


def test_names_beside_a_sentencepiece_model_count(source):
    """As Llama 2 and Mixtral were first published: no tokenizer.json."""
    model = sentencepiece_model(source)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "</s>"}))
    (source / "added_tokens.json").write_text(json.dumps({"<|im_start|>": PIECES}))
    tokenizer = load_tokenizer(open_checkpoint(source))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (model.bos_id(), model.eos_id())
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("<|im_start|>", add_special_tokens=False).input_ids == [PIECES]
    config = (quantized(source) / "tokenizer_config.json").read_bytes()
    assert config == (source / "tokenizer_config.json").read_bytes()


def test_files_that_agree_are_not_mentioned(source):
    added_to_sentencepiece(source)
    quantized(source, notes := Notes())
    assert notes.lines == []


def test_another_sentencepiece_model_is_named(source):
    added_to_sentencepiece(source)
    content = json.loads((source / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["▁the"], ids["▁a"] = ids["▁a"], ids["▁the"]
    (source / "tokenizer.json").write_text(json.dumps(content))
    quantized(source, notes := Notes())
    assert len(notes.lines) == 1
    found = re.search(
        r"tokenizer.model: '▁(the|a)' has id .*; so for 2 of 400 tokens", notes.lines[0]
    )
    assert found


def test_a_damaged_sentencepiece_model_that_is_not_used_is_named(source):
    added_to_sentencepiece(source)
    (source / "tokenizer.model").write_bytes(b"x" * 99)
    quantized(source, notes := Notes())
    assert notes.lines == [f"{source / 'tokenizer.model'}: is damaged, but tokenizer.json is used"]


def test_other_added_and_special_tokens_are_named(source):
    json_with_config(source)
    (source / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 300}))
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    used = AutoTokenizer.from_pretrained(source).eos_token
    quantized(source, notes := Notes())
    added, special = notes.lines
    assert "added_tokens.json: '<|im_end|>' has id 300, but the tokenizer, which is used" in added
    other = {"<|im_end|>", "<|endoftext|>"} - {used}
    assert special.endswith(f"eos_token is {other.pop()!r}, but the tokenizer uses {used!r}")


def test_a_tokenizer_s_own_code_is_never_run(source):
    json_with_map(source)
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(f"open({str(source / 'ran')!r}, 'w')")
    try:
        load_tokenizer(open_checkpoint(source))
    except InputError as error:
        assert str(error).startswith(f"{source / 'tokenizer.json'}: cannot be read as a tokenizer")
    assert not (source / "ran").exists()


@pytest.mark.parametrize("way", WAYS)
def test_gguf_has_the_same_tokens(way, source, tmp_path):
    WAYS[way](source)
    tokenizer = load_tokenizer(open_checkpoint(source))
    checkpoint = open_checkpoint(source)
    found = vocabulary(checkpoint.source)
    tokens = {token: n for n, token in enumerate(found["tokenizer.ggml.tokens"])}
    assert len(tokens) == ROWS and tokenizer.get_vocab().items() <= tokens.items()
    kinds = found["tokenizer.ggml.token_type"]
    for number, token in tokenizer.added_tokens_decoder.items():
        assert kinds[number] == (2 if token.content == "<unk>" else 3), token


GGML = "tokenizer.ggml."


def gguf_metadata(source: Path) -> dict[str, object]:
    return dict(vocabulary(open_checkpoint(source).source))


@pytest.mark.parametrize("way", WAYS)
def test_gguf_adds_what_the_tokenizer_adds_and_has_its_templates(way, source):
    WAYS[way](source)
    wanted = AutoTokenizer.from_pretrained(source)
    found = gguf_metadata(source)
    bare, whole = wanted("x", add_special_tokens=False).input_ids, wanted("x").input_ids
    bos, eos = (found[f"{GGML}add_{name}_token"] for name in ("bos", "eos"))
    framed = [found[f"{GGML}bos_token_id"]] * bos + bare + [found[f"{GGML}eos_token_id"]] * eos
    assert framed == whole
    templates = wanted.chat_template or {}
    templates = {"default": templates} if isinstance(templates, str) else dict(templates)
    assert found.get("tokenizer.chat_template") == templates.pop("default", None)
    assert found.get("tokenizer.chat_templates", []) == sorted(templates)
    for name, template in templates.items():
        assert found[f"tokenizer.chat_template.{name}"] == template


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_a_sentencepiece_model_whose_config_asks_for_bos_and_eos(source, bos, eos):
    model = sentencepiece_model(source)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bos, "add_eos_token": eos}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    plain = model.encode("hello")
    added = [model.bos_id()] * bos + plain + [model.eos_id()] * eos
    assert load_tokenizer(open_checkpoint(source))("hello").input_ids == added
    found = gguf_metadata(source)
    assert (found[f"{GGML}add_bos_token"], found[f"{GGML}add_eos_token"]) == (bos, eos)


def test_tokens_around_a_text_that_gguf_cannot_name_are_refused(source):
    byte_level(source, bos="<|begin|>")
    content = json.loads((source / "tokenizer.json").read_text())
    start = content["post_processor"]["single"][0]
    content["post_processor"]["single"].insert(0, start)
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="adds 2 tokens before .*; `output.tokenizer: none`"):
        gguf_metadata(source)


@pytest.mark.parametrize(
    ("listed", "config", "found"),
    [
        ([2, 0], None, {"eos": 2, "eot": 0}),
        ([0, 5, 2], None, {"eos": 2, "eot": 5, "eom": 0}),
        (None, [7, 2], {"eos": 2, "eot": 7}),
        (7, [2], {"eos": 7}),
        (None, None, {"eos": 2}),
        # llama.cpp knows <|endoftext|> (0) by its text.
        ([0, 5, 7, 2], None, {"eos": 2, "eot": 5, "eom": 7}),
        ([5, 7, 6, 2], None, None),
    ],
)
def test_gguf_names_every_token_that_ends_a_text(source, listed, config, found):
    json_with_config(source)  # its eos is <|im_end|>, 2
    (source / "generation_config.json").unlink()
    if listed is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | {"eos_token_id": config}))
    if found is None:
        with pytest.raises(InputError, match="4 tokens end a text, but GGUF has no place for"):
            gguf_metadata(source)
        return
    names = ("eos", "eot", "eom")
    values = {name: gguf_metadata(source).get(f"{GGML}{name}_token_id") for name in names}
    assert values == dict.fromkeys(names) | found


def spm_tokens(found: dict, text: str) -> list[int]:
    """llama.cpp's tokens of a text: the two neighbours with the best join are joined, again and
    again (src/llama-vocab.cpp, llm_tokenizer_spm_session)."""
    ids = {token: number for number, token in enumerate(found[f"{GGML}tokens"])}
    scores = found[f"{GGML}scores"]
    prefix = " " if found[f"{GGML}add_space_prefix"] and text else ""
    parts = list((prefix + text).replace(" ", "▁"))
    while True:
        joins = [a + b for a, b in pairwise(parts)]
        best = max((scores[ids[join]] for join in joins if join in ids), default=None)
        if best is None:
            break
        at = next(n for n, join in enumerate(joins) if join in ids and scores[ids[join]] == best)
        parts[at : at + 2] = [joins[at]]
    whole = ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in parts)
    return [number for numbers in whole for number in numbers]


@pytest.mark.parametrize("metaspace", [False, True])
def test_a_tokenizer_json_of_sentencepiece_s_kind_gives_the_same_tokens(source, metaspace):
    """As fine-tunes are saved: tokenizer.json alone."""
    added_to_sentencepiece(source)
    (source / "tokenizer.model").unlink()
    if metaspace:
        content = json.loads((source / "tokenizer.json").read_text())
        cutting = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
        content |= {"normalizer": None, "pre_tokenizer": cutting | {"split": False}}
        (source / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(open_checkpoint(source))
    found = gguf_metadata(source)
    assert found[f"{GGML}model"] == "llama" and found[f"{GGML}unknown_token_id"] == 0
    kinds = dict(zip(found[f"{GGML}tokens"], found[f"{GGML}token_type"], strict=True))
    assert [kinds[t] for t in ("<unk>", "</s>", "<|im_end|>", "<0x0A>", "▁the")] == [2, 3, 3, 6, 1]
    for text in [*TEXTS[:3], *docstrings()]:
        if metaspace:  # adds no space to a text that begins with one, as llama.cpp does
            text = text.lstrip(" ")
        assert spm_tokens(found, text) == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("change", ["merge missing", "merges mixed", "normalizer"])
def test_a_tokenizer_json_that_only_looks_like_sentencepiece_is_refused(source, change):
    added_to_sentencepiece(source)
    (source / "tokenizer.model").unlink()
    content = json.loads((source / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    if change == "merge missing":
        del merges[-1]
    elif change == "merges mixed":
        several = next(
            n for n in range(len(merges)) if "".join(merges[n]) == "".join(merges[n + 1])
        )
        merges.append(merges.pop(several))
    else:
        content["normalizer"]["normalizers"].append({"type": "Lowercase"})
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tokenizer.json: its \S+ .*; `output.tokenizer: none`"):
        gguf_metadata(source)
