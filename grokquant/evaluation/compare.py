"""Two checkpoints on the same tokens, streamed side by side: neither has to fit in memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grokquant.calibration.blocks import BlockwiseModel
from grokquant.checkpoint import Checkpoint
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.evaluation.statistics import TokenFigures, compare_logits

# Windows of the reference that run a second time in another batch order: the noise floor.
_REPEATED = 4
# Logits of each model that are held at once, all of the vocabulary of some positions.
_LOGITS_AT_ONCE = 2**25


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
class Comparison:
    """`figures` of the scored tokens, `noise` of the reference against itself in another batch
    order, for some of its windows."""

    figures: TokenFigures
    layers: list[LayerFigures]
    noise: TokenFigures


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
    base = BlockwiseModel(reference, device=device)
    model = BlockwiseModel(quantized, device=device, twin=base)
    repeated = rows[:_REPEATED].flip(0)
    hidden = model.embed(rows)
    hidden_base = base.embed(torch.cat((rows, repeated)))
    layers = []
    for index in range(reference.config.num_hidden_layers):
        hidden, chosen = _run_layer(model, index, hidden)
        hidden_base, chosen_base = _run_layer(base, index, hidden_base)
        kept = hidden_base[: len(rows)]
        figures = _layer_figures(index, hidden, kept, chosen, chosen_base, base)
        layers.append(figures)
        if layer_done:
            layer_done(figures, reference.config.num_hidden_layers)
    own, again = hidden_base[: len(repeated)], hidden_base[len(rows) :].flip(0)
    noise = _score(base, again, base, own, rows[: len(repeated)])
    scored = _score(model, hidden, base, hidden_base[: len(rows)], rows)
    return Comparison(scored, layers, noise)


def _run_layer(model: BlockwiseModel, index: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Hidden states after the layer and the experts chosen for each token [tokens, k], if any.

    Raises InputError where the weights are so large that the states are not finite.
    """
    chosen: list[Tensor] = []
    mix = model.stored_experts(index)

    def watched(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        chosen.append(experts)
        return mix(x, experts, gates)

    model.load_layer(index)
    hidden = model.run_layer(index, hidden, watched)
    model.free_layer(index)
    if not torch.isfinite(hidden).all():
        raise InputError(f"{model.source.path}: the outputs of layer {index} are not finite")
    return hidden, chosen[0] if chosen else None


def _layer_figures(
    index: int,
    hidden: Tensor,
    hidden_base: Tensor,
    chosen: Tensor | None,  # (tokens, k)
    chosen_base: Tensor | None,  # (tokens and more, k)
    base: BlockwiseModel,
) -> LayerFigures:
    error = ((hidden - hidden_base).norm() / hidden_base.norm()).item()
    if chosen is None or chosen_base is None:
        return LayerFigures(index, error, None, None, [], [])
    count, chosen_base = base.family.num_experts(base.config, index), chosen_base[: len(chosen)]
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
    model: BlockwiseModel, hidden: Tensor, base: BlockwiseModel, hidden_base: Tensor, rows: Tensor
) -> TokenFigures:
    parts = []
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    for window, own, theirs in zip(rows, hidden, hidden_base, strict=True):
        for start in range(0, len(window) - 1, at_once):
            positions = slice(start, min(start + at_once, len(window) - 1))
            targets = window[positions.start + 1 : positions.stop + 1]
            logits, logits_base = (
                m.logits(h[None, positions])[0] for m, h in ((model, own), (base, theirs))
            )
            parts.append(compare_logits(logits, logits_base, targets))
    return TokenFigures.cat(parts)
