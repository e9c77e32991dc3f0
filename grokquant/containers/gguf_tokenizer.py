"""The tokenizer of a GGUF file as the files that transformers reads: the inverse of
`gguf_vocabulary`.

    tokenizer.ggml.model   llama   SentencePiece: tokens, scores, kinds -> tokenizer.model
                           gpt2    byte-level BPE: tokens, merges, pre  -> tokenizer.json
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from grokquant.containers.gguf_vocabulary import (
    BYTE,
    CONTROL,
    CUTS,
    DIGITS,
    GPT_2,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from grokquant.errors import InputError
from grokquant.families.tokenizer import VOCABULARIES
from grokquant.types import Source

_KEY = "tokenizer.ggml."
# Cuts of other names that are these.
_SAME_CUT = {
    "default": "gpt-2",
    "gpt2": "gpt-2",
    "olmo": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "dbrx": "llama-bpe",
    "glm4": "llama-bpe",
    "chatglm-bpe": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2",
    "megrez": "qwen2",
    "llama4": "gpt-4o",
}
# llama.cpp takes whole words of these as they are, and begins texts with bos unless told otherwise.
_WHOLE_WORDS = ("llama-bpe", "tekken")
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_KINDS = frozenset((NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE))
# Field numbers of SentencePiece's protocol buffers (sentencepiece_model.proto), a type of model.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _UNK, _BOS, _EOS, _PAD = 3, 35, 40, 41, 42, 43
_NAME, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 3, 4, 5
_BPE = 2


class _Unknown(Exception):
    """Why a tokenizer cannot be made."""


def with_tokenizer(source: Source) -> Source:
    """`source` with files of the tokenizer that its metadata describe, unless some lie beside it.

    A line names what cannot be made; the model is still read. Raises InputError for metadata that
    contradict themselves.
    """
    beside = {path.name for path in source.tokenizer_files}
    kind = source.metadata.get(_KEY + "model", "none")
    if not beside.isdisjoint(VOCABULARIES) or kind == "none":
        return source
    held = TemporaryDirectory(prefix="grokquant-")
    directory = Path(held.name)
    try:
        _write(source, str(kind), directory)
    except _Unknown as reason:
        note = f"{source.path}: has no tokenizer that can be read: {reason}"
        return replace(source, notes=(*source.notes, note))
    files = tuple(sorted(directory.iterdir()))
    return replace(source, tokenizer_files=files, held=held)


def _write(source: Source, kind: str, directory: Path) -> None:
    """Writes the files of the tokenizer into `directory`."""
    tokens = _listed(source, "tokens", str)
    kinds = _listed(source, "token_type", int) or [NORMAL] * len(tokens)
    if not tokens or len(kinds) != len(tokens) or not _KINDS.issuperset(kinds):
        raise InputError(f"{source.path}: {_KEY}token_type does not fit its {len(tokens)} tokens")
    if len(set(tokens)) < len(tokens):
        raise _Unknown(f"{_KEY}tokens has a token twice")
    special = dict(_special(source, tokens))
    config: dict[str, Any] = {key: tokens[number] for key, number in special.items()}
    if kind == "llama":
        added = _sentencepiece(source, tokens, kinds, special, directory)
        config |= {"added_tokens_decoder": added, "legacy": True}
        config |= {"add_bos_token": _adds(source, "bos", True)}
        config |= {"add_eos_token": _adds(source, "eos", False)}
    elif kind == "gpt2":
        _byte_level(source, tokens, kinds, special, directory)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        raise _Unknown(f"{_KEY}model is {kind[:40]!r}")
    template = source.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    config["clean_up_tokenization_spaces"] = False
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _listed(source: Source, key: str, kind: type) -> list[Any]:
    """The list under a key, empty if there is none. Raises InputError for anything else."""
    found = source.metadata.get(_KEY + key, [])
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        raise InputError(f"{source.path}: {_KEY}{key} is no list of {kind.__name__}")
    return found


def _special(source: Source, tokens: list[str]) -> Iterator[tuple[str, int]]:
    for role, name in _ROLES.items():
        number = source.metadata.get(f"{_KEY}{role}_token_id")
        if isinstance(number, int) and number < len(tokens):
            yield name, number


def _adds(source: Source, name: str, default: bool) -> bool:
    """Whether llama.cpp adds the token of this role to every text."""
    return bool(source.metadata.get(f"{_KEY}add_{name}_token", default))


# --- byte-level BPE


def _byte_level(
    source: Source,
    tokens: list[str],
    kinds: list[int],
    special: dict[str, int],
    directory: Path,
) -> None:
    stated = str(source.metadata.get(_KEY + "pre", "default"))
    cut = _SAME_CUT.get(stated, stated)
    if cut not in CUTS:
        raise _Unknown(f"{_KEY}pre is {stated[:40]!r} (known: {', '.join((*CUTS, *_SAME_CUT))})")
    added = [
        {"id": number, "content": token, "special": kind == CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    words = {token: n for n, token in enumerate(tokens) if kinds[n] != UNUSED}
    merges = [merge.split(" ", 1) for merge in _listed(source, "merges", str)]
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
    }
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": cut in _WHOLE_WORDS, "vocab": words, "merges": merges}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(_steps(CUTS[cut]))},
        "post_processor": _around(source, tokens, special, cut in _WHOLE_WORDS),
        "decoder": _bytes(use_regex=True),
        "model": model,
    }
    text = json.dumps(content, ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")


def _steps(cut: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The steps of a cut as a tokenizer.json has them, bytes last."""
    for step in cut:
        if step == DIGITS:
            yield {"type": "Digits", "individual_digits": True}
        elif step != GPT_2:
            pattern = {"Regex": step}
            yield {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    yield _bytes(use_regex=cut[-1] == GPT_2)


def _bytes(use_regex: bool) -> dict[str, Any]:
    found = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return found | {"use_regex": use_regex}


def _around(
    source: Source, tokens: list[str], special: dict[str, int], begins: bool
) -> dict[str, Any] | None:
    """What adds tokens before and after each text, None if there are none to add."""
    before = ["bos_token"] if _adds(source, "bos", begins) and "bos_token" in special else []
    after = ["eos_token"] if _adds(source, "eos", False) and "eos_token" in special else []
    if not before and not after:
        return None

    def whole(text: str, number: int) -> list[dict[str, Any]]:
        def token(name: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": tokens[special[name]], "type_id": number}}

        middle = {"Sequence": {"id": text, "type_id": number}}
        return [*map(token, before), middle, *map(token, after)]

    around = {
        tokens[special[name]]: {
            "id": tokens[special[name]],
            "ids": [special[name]],
            "tokens": [tokens[special[name]]],
        }
        for name in before + after
    }
    single = whole("A", 0)
    pair = single + whole("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": around}


# --- SentencePiece


def _sentencepiece(
    source: Source,
    tokens: list[str],
    kinds: list[int],
    special: dict[str, int],
    directory: Path,
) -> dict[str, Any]:
    """Writes the model; returns the tokens at which a text is cut first, for transformers."""
    scores = _listed(source, "scores", float)
    if len(scores) != len(tokens):
        raise InputError(f"{source.path}: {_KEY}scores does not fit its {len(tokens)} tokens")
    unknown = special.get("unk_token", kinds.index(UNKNOWN) if UNKNOWN in kinds else 0)
    kinds = [UNKNOWN if number == unknown else kind for number, kind in enumerate(kinds)]
    kinds = [NORMAL if k == UNKNOWN and n != unknown else k for n, k in enumerate(kinds)]
    pieces = b"".join(
        _message(_PIECES, _text(_PIECE, token) + _float(_SCORE, score) + _whole(_TYPE, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    missing = -1  # SentencePiece's own sign for a token that there is not
    trainer = _whole(_MODEL_TYPE, _BPE) + _whole(_BYTE_FALLBACK, int(BYTE in kinds))
    trainer += _whole(_UNK, unknown)
    for field, name in ((_BOS, "bos_token"), (_EOS, "eos_token"), (_PAD, "pad_token")):
        trainer += _whole(field, special.get(name, missing))
    prefix = bool(source.metadata.get(_KEY + "add_space_prefix", True))
    normalizer = _text(_NAME, "identity") + _whole(_DUMMY_PREFIX, int(prefix))
    normalizer += _whole(_REMOVE_SPACES, 0) + _whole(_ESCAPE_SPACES, 1)
    model = pieces + _message(_TRAINER, trainer) + _message(_NORMALIZER, normalizer)
    (directory / "tokenizer.model").write_bytes(model)
    return {
        str(number): {"content": token, "special": kind != USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    }


def _message(field: int, content: bytes) -> bytes:
    """A field of bytes: number and wire type 2, length, content."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _whole(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % (1 << 64))


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have their highest bit set."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
