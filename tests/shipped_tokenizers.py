"""Tokenizers trained on docstrings, in the ways in which they are shipped beside checkpoints."""

import inspect
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

PIECES = 400
# A model has rows for more tokens than its tokenizer knows.
ROWS = 448
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
)
CHAT = ["<|im_start|>", "<|im_end|>"]


def docstrings() -> list[str]:
    """Docstrings of the standard library, which every Python has."""
    members = [
        member for module in (inspect, textwrap, shutil, json) for member in vars(module).values()
    ]
    return [doc for member in members if isinstance(doc := getattr(member, "__doc__", None), str)]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))


def byte_level(directory: Path, bos: str | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer as tokenizer.json, `bos` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=["<|endoftext|>", *CHAT, "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(docstrings(), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def sentencepiece_model(directory: Path) -> sentencepiece.SentencePieceProcessor:
    text = directory / "text"
    text.write_text("\n".join(docstrings()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def converted(directory: Path, added: list[str]) -> None:
    """tokenizer.json of the SentencePiece model in `directory`, with tokens that it lacks."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    splits = [(piece[:k], piece[k:]) for piece in ids for k in range(1, len(piece))]
    merges = [(a, b) for a, b in splits if a in ids and b in ids]
    merges.sort(key=lambda pair: ids[pair[0] + pair[1]])
    bpe = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    before = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(before)
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *added]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(directory / "tokenizer.json"))


def json_alone(directory: Path) -> None:
    byte_level(directory)


def json_with_config(directory: Path) -> None:
    byte_level(directory, bos="<|begin|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    write_json(directory / "tokenizer_config.json", config | {"model_max_length": 64})


def json_with_map(directory: Path) -> None:
    byte_level(directory)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>"}}
    names["eos_token"] |= {"lstrip": False, "rstrip": False, "normalized": False}
    write_json(directory / "special_tokens_map.json", names | {"pad_token": "<|endoftext|>"})


def template_file(directory: Path) -> None:
    json_with_map(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools " + TEMPLATE)


def template_list(directory: Path) -> None:
    byte_level(directory)
    templates = [{"name": "default", "template": TEMPLATE}]
    templates.append({"name": "rag", "template": "rag " + TEMPLATE})
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    write_json(directory / "tokenizer_config.json", config | {"chat_template": templates})


def vocabulary_and_merges(directory: Path) -> None:
    tokenizer = byte_level(directory)
    tokenizer.model.save(str(directory))
    (directory / "tokenizer.json").unlink()
    added = {str(PIECES): {"content": "<extra>", "special": True}}
    for entry in added.values():
        entry |= {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    config |= {"pad_token": "<|endoftext|>", "added_tokens_decoder": added}
    write_json(directory / "tokenizer_config.json", config)


def added_to_sentencepiece(directory: Path) -> None:
    sentencepiece_model(directory)
    converted(directory, CHAT)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "added_tokens.json", {"<|im_start|>": PIECES, "<|im_end|>": PIECES + 1})


def sentencepiece_alone(directory: Path) -> None:
    """With the class that our outputs name, since transformers needs more packages for others."""
    sentencepiece_model(directory)
    config = {"tokenizer_class": "Grok1Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(directory / "tokenizer_config.json", config | {"unk_token": "<unk>"})


WAYS: dict[str, Callable[[Path], None]] = {
    way.__name__: way
    for way in (
        json_alone,
        json_with_config,
        json_with_map,
        template_file,
        template_list,
        vocabulary_and_merges,
        added_to_sentencepiece,
        sentencepiece_alone,
    )
}
