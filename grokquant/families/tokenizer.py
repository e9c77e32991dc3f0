"""The tokenizer beside a checkpoint: the one that transformers' AutoTokenizer makes of its files.

A tokenizer.model that has no tokenizer.json beside it is SentencePiece's own affair: transformers
would convert it, which needs more packages and may change a token.
"""

from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from grokquant.errors import InputError
from grokquant.families.grok_tokenizer import Grok1Tokenizer
from grokquant.families.tokenizer_files import check_tokenizer_files
from grokquant.memory import refused
from grokquant.types import Source

SENTENCEPIECE = "tokenizer.model"
# A vocabulary comes from one of these. transformers prefers them in this order.
VOCABULARIES = ("tokenizer.json", "vocab.json", SENTENCEPIECE)
# transformers warns of texts that are longer than a model's positions. We cut them ourselves.
_LONG_TEXT = "sequence-length-is-longer-than-the-specified-maximum"


def has_tokenizer(source: Source) -> bool:
    """Whether a vocabulary lies beside the weights."""
    return any(path.name in VOCABULARIES for path in source.tokenizer_files)


def no_tokenizer(source: Source) -> InputError:
    text = "no tokenizer.model or tokenizer.json beside it; get it from where the weights came from"
    return InputError(f"{source.path}: {text}")


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`. Code beside it is never run.

    Raises InputError if there is none or its files cannot be read.
    """
    files = {path.name: path for path in source.tokenizer_files}
    path = next((files[name] for name in VOCABULARIES if name in files), None)
    if path is None:
        raise no_tokenizer(source)
    check_tokenizer_files(source.tokenizer_files)
    with refused(f"{path}: cannot be read as a tokenizer"):
        tokenizer = _sentencepiece(files) if path.name == SENTENCEPIECE else _auto(path.parent)
        len(tokenizer)  # and is one that works
    tokenizer.deprecation_warnings[_LONG_TEXT] = True
    return tokenizer


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, without special ones. Raises InputError where the tokenizer fails."""
    where = Path(getattr(tokenizer, "name_or_path", "tokenizer"))
    with refused(f"{where}: the tokenizer fails"):
        return tokenizer(text, add_special_tokens=False).input_ids


def _auto(directory: Path) -> PreTrainedTokenizerBase:
    known = (directory / "config.json").is_file()
    config = None if known else PreTrainedConfig()
    loaded: Any = AutoTokenizer.from_pretrained(
        directory, config=config, local_files_only=True, trust_remote_code=False
    )
    return loaded


def _sentencepiece(files: dict[str, Path]) -> Grok1Tokenizer:
    """The SentencePiece model, with the names and tokens that the files beside it add."""
    path = files[SENTENCEPIECE]
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {
        "pad_token": model.pad_id(),
        "bos_token": model.bos_id(),
        "eos_token": model.eos_id(),
        "unk_token": model.unk_id(),
    }
    # SentencePiece gives -1 for a special token that the model does not have.
    special = {name: model.id_to_piece(number) for name, number in ids.items() if number >= 0}
    if len(files) == 1:
        return Grok1Tokenizer(vocab_file=str(path), **special)
    # Without `legacy` transformers would rewrite the model.
    tokenizer = Grok1Tokenizer.from_pretrained(path.parent, legacy=True, local_files_only=True)
    for name, token in special.items():
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, token)
    return tokenizer
