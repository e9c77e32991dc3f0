"""The tokenizer metadata of a GGUF file, made from the tokenizer files of the checkpoint."""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from grokquant.errors import InputError
from grokquant.families.tokenizer import SENTENCEPIECE, VOCABULARIES, read_tokenizer
from grokquant.files.gguf_header import Value
from grokquant.types import Source

# llama.cpp's numbers for kinds of tokens (enum llama_token_type).
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
_BYTE = 6
# Scores of tokens that SentencePiece does not know, as the converter of llama.cpp has them.
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0

# How texts are split before merging: patterns of tokenizer.json files and llama.cpp's names
# (src/llama-vocab.cpp). ByteLevel alone has GPT-2's built in.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


def vocabulary(source: Source) -> dict[str, Value]:
    """Metadata of the tokenizer. Without a tokenizer llama.cpp still accepts token ids.

    No beginning-of-text token is added, so that texts are scored as in other engines.
    """
    files = {path.name: path for path in source.tokenizer_files}
    if files.keys().isdisjoint(VOCABULARIES):
        return {"tokenizer.ggml.model": "none"}
    tokenizer: Any = read_tokenizer(source)
    size = source.config["vocab_size"]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend else None
    if SENTENCEPIECE in files and (content is None or _cut_of(content) is None):
        found = _sentencepiece(files[SENTENCEPIECE], tokenizer, size)
    else:
        path = next(files[name] for name in VOCABULARIES if name in files)
        found = _byte_level(path, content or {}, size)
    special = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    for name, field in special.items():
        if isinstance(number := source.config.get(field), int):
            found[f"tokenizer.ggml.{name}_token_id"] = number
    return found | {"tokenizer.ggml.add_bos_token": False}


def _sentencepiece(path: Path, tokenizer: Any, size: int) -> dict[str, Value]:
    """The tokens under their ids in `tokenizer`, with the scores of the SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores = [_PADDING_SCORE] * size
    kinds = [_UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            raise InputError(f"{path}: {number + 1} tokens, but vocab_size is {size}")
        tokens[number] = token
        piece = pieces.get(token)
        scores[number] = _ADDED_SCORE if piece is None else model.get_score(piece)
        kinds[number] = _NORMAL if piece is None else _kind(model, piece)
    for number, added in tokenizer.added_tokens_decoder.items():
        if kinds[number] == _NORMAL:
            kinds[number] = _CONTROL if added.special else _USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def _kind(model: sentencepiece.SentencePieceProcessor, number: int) -> int:
    checks = {
        _UNKNOWN: model.is_unknown,
        _CONTROL: model.is_control,
        _BYTE: model.is_byte,
        _UNUSED: model.is_unused,
    }
    return next((kind for kind, holds in checks.items() if holds(number)), _NORMAL)


def _byte_level(path: Path, content: dict, size: int) -> dict[str, Value]:
    """Byte-level BPE, the tokenizer of GPT-2 and its successors; `content` as in tokenizer.json."""
    try:
        model = content["model"]
        added = content.get("added_tokens") or []
        numbers = {int(number): token for token, number in model["vocab"].items()}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        cut = _cut(content["pre_tokenizer"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: not a byte-level BPE tokenizer, the only kind that gguf supports"
        ) from None
    if cut is None:
        known = ", ".join(("gpt-2", *_PATTERNS.values()))
        raise InputError(f"{path}: pre_tokenizer: gguf supports only those of {known}")
    kinds = dict.fromkeys(numbers, _NORMAL)
    for token in added:
        numbers[int(token["id"])] = str(token["content"])
        kinds[int(token["id"])] = _CONTROL if token.get("special") else _USER_DEFINED
    if max(numbers, default=0) >= size:
        raise InputError(f"{path}: {max(numbers) + 1} tokens, but vocab_size is {size}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [numbers.get(n, f"[PAD{n}]") for n in range(size)],
        "tokenizer.ggml.token_type": [kinds.get(n, _UNUSED) for n in range(size)],
        "tokenizer.ggml.merges": merges,
    }


def _cut_of(content: dict) -> str | None:
    cutting = content.get("pre_tokenizer")
    return _cut(cutting) if cutting else None


def _cut(pre_tokenizer: dict) -> str | None:
    """llama.cpp's name for this way to split texts, None if it has none."""
    *before, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return "gpt-2" if last.get("use_regex", True) else None
    if len(before) > 1 or before[0]["type"] != "Split" or last.get("use_regex", True):
        return None
    return _PATTERNS.get(str(before[0]["pattern"].get("Regex")))
