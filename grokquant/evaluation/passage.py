"""What each model would say next, token by token, at the end of a window of the text."""

from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grokquant.evaluation.report import Generated, NextToken, Passage
from grokquant.streaming.blocks import BlockwiseModel

_TOKENS = 48  # some lines of text
_BEFORE = 96  # tokens that are shown before them
# Tokens before one, with which it is decoded: spaces and characters may begin in them.
_CONTEXT = 4


@dataclass(frozen=True)
class Choices:
    """`tokens` [time] of a window. Of its last n: the token that a model ranks first, and its
    probability, `own` and `own_p` [n] of the quantized model, `base` and `base_p` of the other."""

    tokens: list[int]
    own: list[int]
    own_p: list[float]
    base: list[int]
    base_p: list[float]

    @property
    def before(self) -> list[int]:
        """The tokens before the last n."""
        return self.tokens[: -len(self.own)]


def choices(
    model: BlockwiseModel,
    hidden: Tensor,
    base: BlockwiseModel,
    hidden_base: Tensor,
    tokens: Tensor,
) -> Choices:
    """Those at the end of a window, from what the last layers returned [time, hidden]."""
    count = min(_TOKENS, len(tokens) - 1)
    own, own_p = _first(model, hidden[-count - 1 : -1])
    first, first_p = _first(base, hidden_base[-count - 1 : -1])
    return Choices(tokens.tolist(), own, own_p, first, first_p)


def _first(model: BlockwiseModel, hidden: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token after each position of hidden [n, hidden], and its probability."""
    logits = model.logits(hidden[None])[0]  # (n, vocabulary)
    top, where = logits.max(dim=1)
    p = (top - logits.logsumexp(dim=1)).exp().clamp(0, 1)
    return where.tolist(), p.tolist()


def passage(
    found: Choices, continued: list[list[int]] | str, tokenizer: PreTrainedTokenizerBase
) -> Passage:
    """The choices as text, and beside them what both models write in the place of the passage: the
    tokens of the quantized model and of the other, or why there are none."""
    tokens = found.tokens
    start = len(tokens) - len(found.own)
    rows = []
    for number, position in enumerate(range(start, len(tokens))):
        context = tokens[max(0, position - _CONTEXT) : position]
        rows.append(
            NextToken(
                text=_decoded(tokenizer, context, tokens[position]),
                reference=_decoded(tokenizer, context, found.base[number]),
                reference_p=found.base_p[number],
                quantized=_decoded(tokenizer, context, found.own[number]),
                quantized_p=found.own_p[number],
            )
        )
    before = str(tokenizer.decode(tokens[max(0, start - _BEFORE) : start]))
    if isinstance(continued, str):
        return Passage(before=before, tokens=tuple(rows), not_generated=continued)
    own, base = continued
    generated = _generated(tokens[:start], own, base, tokenizer)
    return Passage(before=before, tokens=tuple(rows), generated=generated)


def _generated(
    prompt: list[int], own: list[int], base: list[int], tokenizer: PreTrainedTokenizerBase
) -> Generated:
    pairs = zip(own, base, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Generated(
        reference=_texts(prompt, base, tokenizer),
        quantized=_texts(prompt, own, tokenizer),
        same=same,
    )


def _texts(
    prompt: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """The text of each token that follows a prompt."""
    whole = [*prompt, *tokens]
    places = range(len(prompt), len(whole))
    return tuple(
        _decoded(tokenizer, whole[max(0, place - _CONTEXT) : place], whole[place])
        for place in places
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, context: list[int], token: int) -> str:
    """The text that a token adds to that of the tokens before it."""
    before = str(tokenizer.decode(context))
    whole = str(tokenizer.decode([*context, token]))
    # A token may complete a character, whose beginning was shown as a replacement.
    return whole[len(before) :] if whole.startswith(before) else whole[len(before) - 1 :]
