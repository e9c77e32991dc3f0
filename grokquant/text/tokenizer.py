"""The tokenizer that belongs to a checkpoint, and its files in an output."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.families.remote_code import RemoteCode
from grokquant.families.tokenizer import SENTENCEPIECE, VOCABULARIES, read_tokenizer
from grokquant.files.atomic import copy_file, sha256, write_json
from grokquant.files.json_objects import read_json_object
from grokquant.types import Source

CONFIG = "tokenizer_config.json"
AUTO_MAP = "auto_map"  # the key of both configs that names classes in Python files
# transformers finds a tokenizer's class by one of these.
_NAMES_ITS_CLASS = ("tokenizer.json", CONFIG)
_NAMES_SPECIAL_TOKENS = {CONFIG, "special_tokens_map.json"}
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises InputError if there is none or it does not fit."""
    source = checkpoint.source
    tokenizer = read_tokenizer(source)
    vocabulary = checkpoint.text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"{source.tokenizer_files[0]}: {len(tokenizer)} tokens, "
            f"but the model's vocabulary has {vocabulary}"
        )
    return tokenizer


def write_tokenizer(source: Source, directory: Path, code: RemoteCode | None = None) -> list[str]:
    """Copies the tokenizer's files. Where transformers has no tokenizer for the type of model, a
    SentencePiece model gets a tokenizer_config.json. That names no code but `code`, the file of
    classes that the output carries. Returns what the files disagree about."""
    files = {path.name: path for path in source.tokenizer_files}
    for name, path in files.items():
        copy_file(path, directory, name)
    found = read_json_object(files[CONFIG]) if CONFIG in files else {}
    config = {key: value for key, value in found.items() if key != AUTO_MAP}
    notes = []
    if files.keys() & set(VOCABULARIES):
        tokenizer = read_tokenizer(source)
        unknown = source.config.get("model_type") not in TOKENIZER_MAPPING_NAMES
        if SENTENCEPIECE in files and files.keys().isdisjoint(_NAMES_ITS_CLASS) and unknown:
            config = {"tokenizer_class": type(tokenizer).__name__} | tokenizer.special_tokens_map
        if code and type(tokenizer).__name__ == code.tokenizer:
            config |= {AUTO_MAP: code.tokenizer_auto_map}
        notes = list(_disagreements(files, tokenizer))
    if config != found:
        write_json(directory / CONFIG, config)
    return notes


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of a file of a tokenizer; an output's is that of its source, since `auto_map`, which
    names code and is not carried over, does not count."""
    if path.name != CONFIG:
        return sha256(path)
    content = read_json_object(path)
    content.pop(AUTO_MAP, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _disagreements(files: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Where two files beside a checkpoint contradict each other, and which of them counts."""
    known = tokenizer.get_vocab()
    if SENTENCEPIECE in files and "tokenizer.json" in files:
        yield from _other_pieces(files[SENTENCEPIECE], known)
    if "added_tokens.json" in files:
        path = files["added_tokens.json"]
        yield from _other_ids(path, read_json_object(path), known, "the tokenizer")
    for file in sorted(_NAMES_SPECIAL_TOKENS & files.keys()):
        named = read_json_object(files[file])
        for name in _SPECIAL_TOKENS:
            token = named.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and content != (used := getattr(tokenizer, name)):
                yield f"{files[file]}: {name} is {content!r}, but the tokenizer uses {used!r}"


def _other_pieces(path: Path, known: dict[str, int]) -> Iterator[str]:
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        yield f"{path}: is damaged, but tokenizer.json is used"
        return
    pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    yield from _other_ids(path, pieces, known, "tokenizer.json")


def _other_ids(path: Path, theirs: dict, known: dict[str, int], counts: str) -> Iterator[str]:
    differing = [token for token, number in theirs.items() if known.get(token) != number]
    if differing:
        token = differing[0]
        yield (
            f"{path}: {token!r} has id {theirs[token]}, but {counts}, which is used, "
            f"has {known.get(token)}; so for {len(differing)} of {len(theirs)} tokens"
        )
