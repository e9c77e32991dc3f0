"""Grok-1's tokenizer in transformers' form; transformers itself has none."""

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class Grok1Tokenizer(SentencePieceBackend):
    """Grok-1's SentencePiece model as it is: its own encode and decode, no tokens added."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(tokens)

    def _convert_id_to_token(self, index: int) -> str:
        # Models have rows for more tokens than there are; transformers decodes those to nothing.
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else ""
