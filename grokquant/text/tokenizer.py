"""The tokenizer that belongs to a checkpoint."""

import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.families.grok_tokenizer import Grok1Tokenizer
from grokquant.files.atomic import commit, temporary, write_json
from grokquant.types import Source


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises InputError if there is none or it does not fit."""
    tokenizer = _read(checkpoint)
    vocabulary = checkpoint.config.vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"{checkpoint.source.tokenizer_files[0]}: {len(tokenizer)} tokens, "
            f"but the model's vocabulary has {vocabulary}"
        )
    return tokenizer


def write_tokenizer(source: Source, directory: Path) -> None:
    """Copies the tokenizer's files, with a tokenizer_config.json for transformers if missing."""
    files = {path.name: path for path in source.tokenizer_files}
    for name, path in files.items():
        with temporary(directory / name) as copy:
            shutil.copyfile(path, copy)
            commit(copy, directory / name)
    if "tokenizer.model" in files and "tokenizer_config.json" not in files:
        tokenizer = _open(files["tokenizer.model"])
        config = {"tokenizer_class": type(tokenizer).__name__} | tokenizer.special_tokens_map
        write_json(directory / "tokenizer_config.json", config)


def _read(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    files = {path.name: path for path in checkpoint.source.tokenizer_files}
    if not files:
        raise InputError(
            f"{checkpoint.source.path}: no tokenizer.model or tokenizer.json beside it"
        )
    # The original SentencePiece model first: a tokenizer.json is converted from it.
    path = files.get("tokenizer.model") or files.get("tokenizer.json") or next(iter(files.values()))
    return _open(path)


def _open(path: Path) -> PreTrainedTokenizerBase:
    try:
        if path.name == "tokenizer.model":
            return _sentencepiece(path)
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # both libraries raise bare exceptions for a broken file
        raise InputError(
            f"{path}: cannot be read as a tokenizer: {error}".splitlines()[0]
        ) from None


def _sentencepiece(path: Path) -> Grok1Tokenizer:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {
        "pad": model.pad_id(),
        "bos": model.bos_id(),
        "eos": model.eos_id(),
        "unk": model.unk_id(),
    }
    # SentencePiece gives -1 for a special token that the model does not have.
    special = {f"{name}_token": model.id_to_piece(i) for name, i in ids.items() if i >= 0}
    return Grok1Tokenizer(vocab_file=str(path), **special)
