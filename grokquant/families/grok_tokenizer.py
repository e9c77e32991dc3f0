"""Grok-1's tokenizer in transformers' form; transformers itself has none."""

from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

# What is added to texts, by add_bos_token and add_eos_token of a tokenizer_config.json.
_PATTERNS = {(True, False): "bos", (False, True): "eos", (True, True): "bos_eos"}


class Grok1Tokenizer(SentencePieceBackend):
    """Grok-1's SentencePiece model as it is: its own encode and decode, no tokens added unless its
    config asks for them."""

    def __init__(self, **kwargs: Any) -> None:
        added = (kwargs.get("add_bos_token") is True, kwargs.get("add_eos_token") is True)
        kwargs.setdefault("special_tokens_pattern", _PATTERNS.get(added, "none"))
        super().__init__(**kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(tokens)

    def _convert_id_to_token(self, index: int) -> str:
        # Models have rows for more tokens than there are; transformers decodes those to nothing.
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else ""
