"""Two checkpoints on the same tokens, streamed side by side: neither has to fit in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grokquant.checkpoint import Checkpoint
from grokquant.devices import CPU
from grokquant.evaluation.cache import Cache, key_of
from grokquant.evaluation.likelihoods import Batch, Likelihood, Pair, likelihoods
from grokquant.evaluation.statistics import TokenFigures, compare_logits
from grokquant.evaluation.teacher_forcing import (
    Exam,
    Forced,
    Teacher,
    relative_error,
    routers,
    same_set,
)
from grokquant.streaming.blocks import BlockwiseModel, Rows
from grokquant.streaming.stream import Stream

# Windows of the reference that run a second time in another batch order: the noise floor.
_REPEATED = 4
# Tokens of the reference, in whole windows, that are also led through each quantized layer.
_FORCED = 8192
# Logits of each model that are held at once, all of the vocabulary of some positions.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class LayerFigures:
    """How far one layer of the quantized model is from the reference on its own path.

    `relative_error` is ||h_q - h|| / ||h|| of the layer's output; router agreements are shares of
    tokens; loads count the tokens of each expert. A dense layer has neither. `forced` is about the
    layer alone.
    """

    layer: int
    relative_error: float
    router_top1: float | None = None
    router_top2_set: float | None = None
    router_set: float | None = None
    tokens_per_expert: tuple[int, ...] = ()
    reference_tokens_per_expert: tuple[int, ...] = ()
    load_shift: float | None = None
    forced: Forced | None = None


@dataclass(frozen=True)
class Windows:
    """Token ids `rows` [windows, time] of a text; those from place `first` of each are scored."""

    rows: Tensor
    first: int = 1


@dataclass(frozen=True)
class Comparison:
    """`figures` are those of the first text, as are those of layers; `further` of the others.

    `first_change` [tokens] is the first layer in which a scored token of the first text goes to
    other experts than in the reference, -1 where there is none; None for a dense model. `noise` is
    the reference against itself in another batch order, for some windows; `answers` are the
    log-likelihoods of the pairs, those of the quantized model first.
    """

    figures: TokenFigures
    layers: list[LayerFigures]
    noise: TokenFigures
    first_change: Tensor | None = None
    further: list[TokenFigures] = field(default_factory=list)
    answers: tuple[dict[Pair, Likelihood], dict[Pair, Likelihood]] = ({}, {})


# Told about each layer, with the number of all layers, as soon as it is done.
LayerDone = Callable[[LayerFigures, int], None]


def compare_texts(
    quantized: Checkpoint,
    reference: Checkpoint,
    texts: Sequence[Windows],
    asked: Sequence[Batch] = (),
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
    forced: bool = True,
    cache: Cache | None = None,
) -> Comparison:
    """Runs both models over all `texts` and over what is `asked`, layer by layer, each read once.

    With `forced`, windows of the first text also pass each quantized layer as the reference's
    states; with a `cache`, the reference's layers are read only if it has not got them. Arithmetic
    is float32.
    """
    base = BlockwiseModel(reference, device=device)
    model = BlockwiseModel(quantized, device=device, twin=base)
    rows = texts[0].rows
    lent = rows[: max(1, _FORCED // rows.shape[1]) if forced else 0]
    batches = [*(Rows(text.rows) for text in texts), *(batch.rows for batch in asked)]
    both = [*batches, Rows(rows[:_REPEATED].flip(0))]
    entry = cache.entry(key_of(reference, both, len(lent), device)) if cache else None
    theirs = Teacher(base, both, len(lent), entry)
    own = Stream(model, [*batches, Rows(lent)] if forced else batches)
    layers, changes = [], _Changes()
    for index in range(reference.config.num_hidden_layers):
        theirs.run_layer(index)
        alone = _run_layer(own, index, theirs)
        figures = _layer_figures(index, own, theirs, alone)
        changes.add(index, own, theirs)
        layers.append(figures)
        if layer_done:
            layer_done(figures, reference.config.num_hidden_layers)
    figures_of, noise = _scores(own, theirs, texts), _noise(theirs, texts[0])
    answers = _answers(own, asked, len(texts)), _answers(theirs, asked, len(texts))
    first_change = changes.of(texts[0])
    return Comparison(figures_of[0], layers, noise, first_change, figures_of[1:], answers)


def _run_layer(own: Stream, index: int, theirs: Teacher) -> Forced | None:
    """Takes the quantized model through a layer that the reference has just passed."""
    if not theirs.windows:
        own.run_layer(index)
        return None
    model, last = own.model, len(own.batches) - 1
    own.hidden[last] = theirs.entered
    count = model.family.num_experts(model.config, index)
    exam = Exam(own.tokens_of(last), theirs.lesson, model, count)
    own.run_layer(index, exam)
    return exam.figures(own.hidden[last], theirs.left)


class _Changes:
    """The first layer in which each token of the first text goes to other experts."""

    def __init__(self) -> None:
        self.first: Tensor | None = None  # (tokens,)

    def add(self, index: int, own: Stream, theirs: Stream) -> None:
        if own.chosen is None or theirs.chosen is None:
            return
        changed = ~same_set(own.chosen[0], theirs.chosen[0])
        if self.first is None:
            self.first = torch.full(changed.shape, -1)
        self.first[changed & (self.first < 0)] = index

    def of(self, text: Windows) -> Tensor | None:
        """Of the positions whose next tokens are scored: [tokens]."""
        if self.first is None:
            return None
        return self.first.view_as(text.rows)[:, text.first - 1 : -1].flatten()


def _layer_figures(index: int, own: Stream, theirs: Stream, alone: Forced | None) -> LayerFigures:
    """Figures of the layer that both have just run, on the first text."""
    error = relative_error(own.hidden[0], theirs.hidden[0])
    if own.chosen is None or theirs.chosen is None:
        return LayerFigures(index, error, forced=alone)
    chosen, chosen_base = own.chosen[0], theirs.chosen[0]  # (tokens, k)
    count = theirs.model.family.num_experts(theirs.model.config, index)
    loads, loads_base = (
        torch.bincount(experts.flatten(), minlength=count) for experts in (chosen, chosen_base)
    )
    return LayerFigures(
        layer=index,
        relative_error=error,
        **vars(routers(chosen, chosen_base)),
        tokens_per_expert=tuple(loads.tolist()),
        reference_tokens_per_expert=tuple(loads_base.tolist()),
        load_shift=(loads - loads_base).abs().sum().item() / (2 * chosen.numel()),
        forced=alone,
    )


def _answers(stream: Stream, asked: Sequence[Batch], texts: int) -> dict[Pair, Likelihood]:
    """What a model says of the pairs; their batches come after those of the texts."""
    found: dict[Pair, Likelihood] = {}
    for batch, hidden in zip(asked, stream.hidden[texts:], strict=False):
        found |= likelihoods(stream.model, batch, hidden)
    return found


def _scores(own: Stream, theirs: Stream, texts: Sequence[Windows]) -> list[TokenFigures]:
    passed = zip(own.hidden, theirs.hidden, texts, strict=False)
    return [_score(own.model, h, theirs.model, h_base, text) for h, h_base, text in passed]


def _noise(theirs: Stream, text: Windows) -> TokenFigures:
    """The reference against itself, on the windows that it ran twice."""
    again = theirs.hidden[-1].flip(0)
    first, model = theirs.hidden[0][: len(again)], theirs.model
    return _score(model, again, model, first, Windows(text.rows[: len(again)], text.first))


def _score(
    model: BlockwiseModel, hidden: Tensor, base: BlockwiseModel, hidden_base: Tensor, text: Windows
) -> TokenFigures:
    parts = []
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    for window, own, theirs in zip(text.rows, hidden, hidden_base, strict=True):
        for start in range(text.first - 1, len(window) - 1, at_once):
            positions = slice(start, min(start + at_once, len(window) - 1))
            targets = window[positions.start + 1 : positions.stop + 1]
            logits, logits_base = (
                m.logits(h[None, positions])[0] for m, h in ((model, own), (base, theirs))
            )
            parts.append(compare_logits(logits, logits_base, targets))
    return TokenFigures.cat(parts)
