"""Two checkpoints on the same tokens, streamed side by side: neither has to fit in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grokquant.calibration.blocks import BlockwiseModel, Rows
from grokquant.checkpoint import Checkpoint
from grokquant.devices import CPU
from grokquant.evaluation.likelihoods import Batch, Likelihood, Pair, likelihoods
from grokquant.evaluation.statistics import TokenFigures, compare_logits
from grokquant.evaluation.streaming import Stream

# Windows of the reference that run a second time in another batch order: the noise floor.
_REPEATED = 4
# Positions whose logits of both models are held at once, and how many of them in float64.
_POSITIONS_AT_ONCE, _POSITIONS_COMPARED = 512, 64


@dataclass(frozen=True)
class LayerFigures:
    """How far one layer of the quantized model is from the reference on its own path.

    `relative_error` is ||h_q - h|| / ||h|| of the layer's output; router agreements are shares of
    tokens; loads count the tokens of each expert. A dense layer has neither.
    """

    layer: int
    relative_error: float
    router_top1: float | None
    router_top2_set: float | None
    tokens_per_expert: list[int]
    reference_tokens_per_expert: list[int]


@dataclass(frozen=True)
class Windows:
    """Token ids `rows` [windows, time] of a text; those from place `first` of each are scored."""

    rows: Tensor
    first: int = 1


@dataclass(frozen=True)
class Comparison:
    """`figures` are those of the first text, as are those of layers; `further` of the others.

    `noise_kld` is the mean KLD of the reference against itself in another batch order; `answers`
    the log-likelihoods of the pairs, those of the quantized model first.
    """

    figures: TokenFigures
    layers: list[LayerFigures]
    noise_kld: float
    further: list[TokenFigures] = field(default_factory=list)
    answers: tuple[dict[Pair, Likelihood], dict[Pair, Likelihood]] = ({}, {})


# Told about each layer, with the number of all layers, as soon as it is done.
LayerDone = Callable[[LayerFigures, int], None]


def compare_checkpoints(
    quantized: Checkpoint,
    reference: Checkpoint,
    rows: Tensor,
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
) -> Comparison:
    """Runs both models over token ids `rows` [windows, time], layer by layer, each read once.

    Every token but the first of each window is scored. Arithmetic is float32.
    """
    return compare_both(quantized, reference, [Windows(rows)], layer_done=layer_done, device=device)


def compare_both(
    quantized: Checkpoint,
    reference: Checkpoint,
    texts: Sequence[Windows],
    asked: Sequence[Batch] = (),
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
) -> Comparison:
    """Runs both models over all `texts` and over what is `asked`, layer by layer, each read once.

    Arithmetic is float32.
    """
    base = BlockwiseModel(reference, device=device)
    model = BlockwiseModel(quantized, device=device, twin=base)
    batches = [*(Rows(text.rows) for text in texts), *(batch.rows for batch in asked)]
    repeated = texts[0].rows[:_REPEATED].flip(0)
    own, theirs = Stream(model, batches), Stream(base, [*batches, Rows(repeated)])
    layers = []
    for index in range(reference.config.num_hidden_layers):
        own.run_layer(index)
        theirs.run_layer(index)
        figures = _layer_figures(index, own, theirs)
        layers.append(figures)
        if layer_done:
            layer_done(figures, reference.config.num_hidden_layers)
    same, again = theirs.hidden[0][: len(repeated)], theirs.hidden[-1].flip(0)
    noise = _score(base, again, base, same, Windows(repeated.flip(0), texts[0].first))
    figures_of = [
        _score(model, h, base, h_base, text)
        for h, h_base, text in zip(own.hidden, theirs.hidden, texts, strict=False)
    ]
    answers = _answers(own, asked, len(texts)), _answers(theirs, asked, len(texts))
    return Comparison(figures_of[0], layers, noise.kld.mean().item(), figures_of[1:], answers)


def _answers(stream: Stream, asked: Sequence[Batch], texts: int) -> dict[Pair, Likelihood]:
    """What a model says of the pairs; their batches come after those of the texts."""
    found: dict[Pair, Likelihood] = {}
    for batch, hidden in zip(asked, stream.hidden[texts:], strict=False):
        found |= likelihoods(stream.model, batch, hidden)
    return found


def _layer_figures(index: int, own: Stream, theirs: Stream) -> LayerFigures:
    """Figures of the layer that both have just run, on the first text."""
    hidden, hidden_base, base = own.hidden[0], theirs.hidden[0], theirs.model
    error = ((hidden - hidden_base).norm() / hidden_base.norm()).item()
    if own.chosen is None or theirs.chosen is None:
        return LayerFigures(index, error, None, None, [], [])
    chosen, chosen_base = own.chosen[0], theirs.chosen[0]  # (tokens, k)
    count = base.family.num_experts(base.config, index)
    same_set = (chosen.sort(-1).values == chosen_base.sort(-1).values).all(-1)
    return LayerFigures(
        layer=index,
        relative_error=error,
        router_top1=(chosen[:, 0] == chosen_base[:, 0]).double().mean().item(),
        router_top2_set=same_set.double().mean().item(),
        tokens_per_expert=torch.bincount(chosen.flatten(), minlength=count).tolist(),
        reference_tokens_per_expert=torch.bincount(chosen_base.flatten(), minlength=count).tolist(),
    )


def _score(
    model: BlockwiseModel, hidden: Tensor, base: BlockwiseModel, hidden_base: Tensor, text: Windows
) -> TokenFigures:
    parts = []
    for window, own, theirs in zip(text.rows, hidden, hidden_base, strict=True):
        for start in range(text.first - 1, len(window) - 1, _POSITIONS_AT_ONCE):
            positions = slice(start, min(start + _POSITIONS_AT_ONCE, len(window) - 1))
            targets = window[positions.start + 1 : positions.stop + 1]
            logits, logits_base = (
                m.logits(h[None, positions])[0] for m, h in ((model, own), (base, theirs))
            )
            pieces = (t.split(_POSITIONS_COMPARED) for t in (logits, logits_base, targets))
            parts += [compare_logits(*piece) for piece in zip(*pieces, strict=True)]
    return TokenFigures.cat(parts)
