"""The tokenizer metadata of a GGUF file, made from the tokenizer files of the checkpoint."""

import json
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece

from grokquant.errors import InputError
from grokquant.families.tokenizer import (
    SENTENCEPIECE,
    VOCABULARIES,
    has_tokenizer,
    read_tokenizer,
)
from grokquant.files.gguf_header import Value
from grokquant.files.json_objects import read_json_object
from grokquant.types import Source

# llama.cpp's numbers for kinds of tokens (enum llama_token_type).
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
# Scores of tokens that SentencePiece does not know, as the converter of llama.cpp has them.
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0
_SPACE = "▁"  # SentencePiece's sign for a space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# How texts are split before merging: llama.cpp's names (src/llama-vocab.cpp) and the steps of a
# tokenizer.json before its bytes: patterns, each digit alone, or the pattern of GPT-2, which
# ByteLevel has built in.
GPT_2 = "GPT-2"
DIGITS = "digits"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_CASES_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT_2,),
    "smollm": (DIGITS, GPT_2),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_WORDS + r"\p{N}" + _REST,),
    "tekken": (_CASES % ("", "") + r"\p{N}" + _CASES_REST,),
    "gpt-4o": (_CASES % (_SHORT_FORMS, _SHORT_FORMS) + r"\p{N}{1,3}" + _CASES_REST,),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3),
}
_NAMES = {steps: name for name, steps in CUTS.items()}

# A file names up to three tokens that end a text: eos, eot and eom. llama.cpp knows these by their
# texts as well (src/llama-vocab.cpp, special_eog_ids).
_FURTHER_ENDS = ("eot", "eom")
_KNOWN_ENDS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
}
# Any text: what a tokenizer puts around it does not depend on it.
_PROBE = "a"
_WAY_OUT = "; `output.tokenizer: none` writes the file without it"


def vocabulary(source: Source) -> dict[str, Value]:
    """Metadata of the tokenizer of `source`; without one llama.cpp still accepts token ids.

    llama.cpp adds the tokens before and after a text that the tokenizer itself adds, ends a text
    where the model's generation config does, and finds the chat templates. Raises InputError for a
    tokenizer that llama.cpp cannot have.
    """
    if not has_tokenizer(source):
        return {"tokenizer.ggml.model": "none"}
    files = {path.name: path for path in source.tokenizer_files}
    path = next(files[name] for name in VOCABULARIES if name in files)
    tokenizer: Any = read_tokenizer(source)
    try:
        found = _tokens(files, path, tokenizer, source.config["vocab_size"])
        return found | _special_tokens(source, path, tokenizer) | _templates(tokenizer)
    except _Unsupported as reason:
        raise InputError(f"{path}: {reason}{_WAY_OUT}") from None


class _Unsupported(Exception):
    """Why llama.cpp cannot have a tokenizer."""


def _tokens(files: Mapping[str, Path], path: Path, tokenizer: Any, size: int) -> dict[str, Value]:
    """The tokens under their ids, `size` of them, and what splits texts into them."""
    if (count := max(tokenizer.get_vocab().values(), default=0) + 1) > size:
        raise InputError(f"{path}: {count} tokens, but vocab_size is {size}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend else {}
    if SENTENCEPIECE in files and _cut_of(content) is None:
        return _sentencepiece(files[SENTENCEPIECE], tokenizer, size)
    if (content.get("model") or {}).get("byte_fallback"):
        return _byte_fallback(content, tokenizer, size)
    return _byte_level(content, size)


def _special_tokens(source: Source, path: Path, tokenizer: Any) -> dict[str, Value]:
    """Tokens that have a meaning, and which of them are added to every text."""
    before, after = _added(tokenizer)
    if len(before) > 1 or len(after) > 1:
        raise _Unsupported(
            f"adds {len(before)} tokens before and {len(after)} after every text, but llama.cpp "
            "adds one at most"
        )
    config = source.config
    bos, pad = (
        getattr(tokenizer, name) if getattr(tokenizer, name) is not None else config.get(name)
        for name in ("bos_token_id", "pad_token_id")
    )
    ends = _ends(source, tokenizer)
    eos = next(iter(after or _first(ends, tokenizer.eos_token_id)), None)
    ids = {"bos": before[0] if before else bos, "eos": eos, "padding": pad}
    ids |= _further_ends([end for end in ends if end != eos], tokenizer)
    found: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": number
        for name, number in ids.items()
        if isinstance(number, int)
    }
    added = {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    return found | {f"tokenizer.ggml.{name}": value for name, value in added.items()}


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after every text."""
    plain = tokenizer(_PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(_PROBE).input_ids
    starts = range(len(whole) - len(plain) + 1)
    start = next((n for n in starts if whole[n : n + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def _ends(source: Source, tokenizer: Any) -> list[int]:
    """The tokens at which generation ends: those of generation_config.json, else of config.json,
    else the tokenizer's."""
    path = source.beside.get("generation_config.json")
    stated = (read_json_object(path) if path else {}).get("eos_token_id")
    stated = source.config.get("eos_token_id") if stated is None else stated
    stated = tokenizer.eos_token_id if stated is None else stated
    listed = stated if isinstance(stated, list) else [stated]
    known = range(source.config["vocab_size"])
    return list(dict.fromkeys(end for end in listed if type(end) is int and end in known))


def _first(ends: list[int], preferred: int | None) -> list[int]:
    """`ends` with the preferred one first, if it is among them."""
    return sorted(ends, key=lambda end: end != preferred)


def _further_ends(ends: list[int], tokenizer: Any) -> dict[str, int]:
    """A key for each of `ends`; those that llama.cpp knows by their texts may go without."""
    texts = dict(zip(ends, tokenizer.convert_ids_to_tokens(ends), strict=True))
    ordered = sorted(ends, key=lambda end: texts[end] in _KNOWN_ENDS)
    unnamed = [texts[end] for end in ordered[len(_FURTHER_ENDS) :]]
    if others := [text for text in unnamed if text not in _KNOWN_ENDS]:
        raise _Unsupported(
            f"{len(ends) + 1} tokens end a text, but GGUF has no place for {others[0]!r:.60}"
        )
    return dict(zip((f"{name}" for name in _FURTHER_ENDS), ordered, strict=False))


def _templates(tokenizer: Any) -> dict[str, Value]:
    """The chat templates: the default one, and the others by name."""
    templates = getattr(tokenizer, "chat_template", None) or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    # Names of keys, as llama.cpp's converter makes them.
    named = {
        "".join(c if c.isascii() and c.isalnum() else "_" for c in name): template
        for name, template in templates.items()
    }
    default = named.pop("default", None)
    found: dict[str, Value] = {} if default is None else {"tokenizer.chat_template": default}
    found |= {f"tokenizer.chat_template.{name}": named[name] for name in sorted(named)}
    return found | ({"tokenizer.chat_templates": sorted(named)} if named else {})


def _sentencepiece(path: Path, tokenizer: Any, size: int) -> dict[str, Value]:
    """The tokens under their ids in `tokenizer`, with the scores of the SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    scores = {piece: model.get_score(number) for piece, number in pieces.items()}
    kinds = {piece: _kind(model, number) for piece, number in pieces.items()}
    return _scored(tokenizer, size, scores, kinds) | {
        "tokenizer.ggml.unknown_token_id": model.unk_id()
    }


def _byte_fallback(content: dict, tokenizer: Any, size: int) -> dict[str, Value]:
    """SentencePiece's BPE as a tokenizer.json holds it: the order of merges gives the scores.

    llama.cpp joins the two neighbours whose join is the token of the highest score. The merges say
    the same if each way to join a token is among them and those of a token follow each other.
    """
    model = content["model"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    joined = [left + right for left, right in merges]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(joined))}
    unknown = model.get("unk_token")
    kinds = {t: BYTE if _BYTE_TOKEN.fullmatch(t) else NORMAL for t in model["vocab"]}
    kinds |= {unknown: UNKNOWN} if unknown in kinds else {}
    added = {str(token["content"]) for token in content.get("added_tokens") or []}
    plain = {token for token, kind in kinds.items() if kind == NORMAL and token not in added}
    ways = {(t[:k], t[k:]) for t in plain for k in range(1, len(t))}
    possible = {way for way in ways if plain.issuperset(way)}
    if not possible <= set(merges) or len(ranks) != sum(1 for _ in groupby(joined)):
        raise _Unsupported("its merges are not those of a SentencePiece model")
    if not _is_metaspace(content):
        raise _Unsupported("its normalizer or pre_tokenizer is not that of a SentencePiece model")
    scores = {token: -float(ranks.get(token, 0)) for token in model["vocab"]}
    found = _scored(tokenizer, size, scores, kinds)
    number = model["vocab"].get(unknown)
    return found | ({} if number is None else {"tokenizer.ggml.unknown_token_id": number})


def _is_metaspace(content: dict) -> bool:
    """Whether a tokenizer.json writes spaces as SentencePiece does, and does nothing else."""
    normalizer = content.get("normalizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = [{"type": "Prepend", "prepend": _SPACE}]
    cutting = content.get("pre_tokenizer")
    if cutting is None:
        return steps in ([*before, spaces], [spaces])
    metaspace = cutting["type"] == "Metaspace" and cutting.get("replacement") == _SPACE
    return not steps and metaspace and cutting.get("split") is False


def _scored(
    tokenizer: Any, size: int, known_scores: Mapping[str, float], known_kinds: Mapping[str, int]
) -> dict[str, Value]:
    """The metadata of a SentencePiece vocabulary; `known` are its own tokens, others were added."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores = [_PADDING_SCORE] * size
    kinds = [UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number] = token
        scores[number] = known_scores.get(token, _ADDED_SCORE)
        kinds[number] = known_kinds.get(token, NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        if kinds[number] == NORMAL:
            kinds[number] = CONTROL if added.special else USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": tokenizer.tokenize(_PROBE)[0].startswith(_SPACE),
    }


def _kind(model: sentencepiece.SentencePieceProcessor, number: int) -> int:
    checks = {
        UNKNOWN: model.is_unknown,
        CONTROL: model.is_control,
        BYTE: model.is_byte,
        UNUSED: model.is_unused,
    }
    return next((kind for kind, holds in checks.items() if holds(number)), NORMAL)


def _byte_level(content: dict, size: int) -> dict[str, Value]:
    """Byte-level BPE, the tokenizer of GPT-2 and its successors; `content` as in tokenizer.json."""
    try:
        model = content["model"]
        added = content.get("added_tokens") or []
        numbers = {int(number): token for token, number in model["vocab"].items()}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        cut = _cut(content["pre_tokenizer"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Unsupported(
            "gguf supports byte-level BPE and SentencePiece's BPE, and this is neither"
        ) from None
    if cut is None:
        known = ", ".join(CUTS)
        raise _Unsupported(f"pre_tokenizer: gguf supports only those of {known}")
    kinds = dict.fromkeys(numbers, NORMAL)
    for token in added:
        numbers[int(token["id"])] = str(token["content"])
        kinds[int(token["id"])] = CONTROL if token.get("special") else USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [numbers.get(n, f"[PAD{n}]") for n in range(size)],
        "tokenizer.ggml.token_type": [kinds.get(n, UNUSED) for n in range(size)],
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
    steps = [_step(step) for step in before]
    steps += [GPT_2] if last.get("use_regex", True) else []
    return _NAMES.get(tuple(str(step) for step in steps))


def _step(step: dict) -> str | None:
    if step["type"] == "Digits" and step.get("individual_digits"):
        return DIGITS
    isolated = step["type"] == "Split" and step.get("behavior", "Isolated") == "Isolated"
    if not isolated or step.get("invert"):
        return None
    return step["pattern"].get("Regex")
