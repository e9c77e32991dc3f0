"""Two checkpoints on the same tokens, streamed side by side: neither has to fit in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grokquant.checkpoint import Checkpoint
from grokquant.devices import CPU
from grokquant.evaluation.cache import Cache, key_of
from grokquant.evaluation.likelihoods import Batch, Likelihood, Pair, likelihoods
from grokquant.evaluation.passage import Choices, choices
from grokquant.evaluation.report import Forced, Layer
from grokquant.evaluation.statistics import TokenFigures, compare_logits
from grokquant.evaluation.teacher_forcing import (
    SMALLEST_NORM,
    LayerProbe,
    ReferenceStream,
    agreeing,
    router_agreement,
    same_set,
)
from grokquant.parallel import ALONE, Team
from grokquant.streaming.blocks import BlockwiseModel, Rows
from grokquant.streaming.stream import Stream, own_rows
from grokquant.streaming.whole import running
from grokquant.threads import slices

# Windows that the reference runs a second time, for the noise floor: in another batch order.
_REPEATED = 4
# Where products are in bfloat16, it runs one token in so many in float32, which takes up to four
# times as long: a twentieth of what both models take. Fewer than so many would say little.
_ONE_EXACT_IN = 40
_EXACT = 64
# Tokens of the reference, in whole windows, that also pass each quantized layer: enough for shares
# of tokens to 1 %, and the states of Grok-1 for them are 200 MB.
_FORCED = 8192
# Logits of each model held at once (positions x vocabulary): 128 MiB in float32.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Windows:
    """Token ids `rows` [windows, time] of a text; positions from `first` on are scored."""

    rows: Tensor
    first: int = 1


@dataclass(frozen=True)
class Comparison:
    """The measurements of two models on the same texts.

    `figures`, `layers` and `first_change` are about the first text, `further` holds the figures of
    the others. `first_change` [tokens] is the first layer in which a scored token goes to other
    experts than in the reference, -1 if there is none; None for a dense model. `noise` compares the
    reference with itself, in float32 and in another batch order, on some windows. `answers` are the
    log-likelihoods of the requested pairs under the quantized model and under the reference.
    `choices` are the tokens that both rank first at the end of the first window.
    """

    figures: TokenFigures
    layers: list[Layer]
    noise: TokenFigures
    choices: Choices
    first_change: Tensor | None = None
    further: list[TokenFigures] = field(default_factory=list)
    answers: tuple[dict[Pair, Likelihood], dict[Pair, Likelihood]] = ({}, {})


# Called with each layer as soon as it is measured, and with the number of layers.
LayerDone = Callable[[Layer, int], None]


def compare_texts(
    quantized: Checkpoint,
    reference: Checkpoint,
    texts: Sequence[Windows],
    requests: Sequence[Batch] = (),
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
    forced: bool = True,
    cache: Cache | None = None,
    team: Team = ALONE,
    products: torch.dtype = torch.float32,
) -> Comparison:
    """Runs both models over all `texts` and `requests`, layer by layer, each layer read once.

    With `forced`, the reference's states of some windows of the first text also pass each quantized
    layer; with a `cache`, layers of the reference are read only if they are not in it. Arithmetic
    is float32 but for `products` of experts. Members of a `team` share the rows, and all of them
    get the same result.
    """
    base = running(reference, device=device, products=products)
    model = running(quantized, device=device, twin=base, products=products)
    rows = texts[0].rows
    traced = rows[: max(1, _FORCED // rows.shape[1]) if forced else 0]
    repeated = _repeated(rows, base).flip(0)
    first = texts[0].first if repeated.shape[1] == rows.shape[1] else 1
    batches = [*(Rows(text.rows) for text in texts), *(batch.rows for batch in requests)]
    lead = max(len(traced), len(repeated))
    parts = own_rows(team, base, [batch.tokens for batch in batches], lead)
    batches = [batch[part] for batch, part in zip(batches, parts, strict=True)]
    # What the first member has beside its own rows comes first, as they do.
    traced, repeated = (team.only_first(more, more[:0]) for more in (traced, repeated))
    both = [Rows(repeated), *batches]
    entry = None
    if cache:
        entry = cache.entry(key_of(reference, both, len(traced), device, products))
    theirs = ReferenceStream(base, both, len(traced), entry, team)
    own = Stream(model, [Rows(traced), *batches], team)
    layers, changes = _run_layers(own, theirs, layer_done)
    texts_here = [
        Windows(text.rows[part], text.first) for text, part in zip(texts, parts, strict=False)
    ]
    asked = [batch.of_rows(part) for batch, part in zip(requests, parts[len(texts) :], strict=True)]
    figures = [_joined(team, found) for found in _scores(own, theirs, texts_here)]
    pairs = [pair for batch in requests for pair in batch.pairs]
    return Comparison(
        figures=figures[0],
        layers=layers,
        noise=_joined(team, _noise(theirs, Windows(repeated.flip(0), first))),
        choices=Choices(**team.once(lambda: vars(_choices(own, theirs, texts_here[0])))),
        first_change=changes.of(texts[0]),
        further=figures[1:],
        answers=(
            dict(zip(pairs, _answers(own, asked, len(texts)), strict=True)),
            dict(zip(pairs, _answers(theirs, asked, len(texts)), strict=True)),
        ),
    )


def _choices(own: Stream, theirs: Stream, text: Windows) -> Choices:
    """At the end of the first window, which the first member has."""
    return choices(own.model, own.hidden[1][0], theirs.model, theirs.hidden[1][0], text.rows[0])


def _joined(team: Team, own: TokenFigures) -> TokenFigures:
    """The figures of the tokens of all members, in order."""
    columns = torch.stack(list(vars(own).values()), dim=1)  # (tokens, figures)
    return TokenFigures(*team.joined(columns).unbind(1))


def _run_layers(
    own: Stream, theirs: ReferenceStream, layer_done: LayerDone | None
) -> tuple[list[Layer], "_Changes"]:
    """Takes both models through all layers side by side."""
    layers: list[Layer] = []
    changes = _Changes(own.team)
    total = len(theirs.model.layers)
    for index in range(total):
        theirs.run_layer(index)
        alone = _run_layer(own, index, theirs)
        layers.append(_layer_figures(index, own, theirs, alone))
        changes.add(index, own, theirs)
        if layer_done:
            layer_done(layers[-1], total)
    return layers, changes


def _run_layer(own: Stream, index: int, theirs: ReferenceStream) -> Forced | None:
    """Takes the quantized model through a layer that the reference has just passed; its batch 0 are
    the reference's states."""
    probe = None
    if theirs.windows:
        own.hidden[0] = theirs.entered
        count = own.model.family.num_experts(own.model.config, index)
        probe = LayerProbe(own.tokens_of(0), theirs.trace, count)
    own.run_layer(index, probe)

    def figures() -> dict:
        return probe.figures(own.hidden[0], theirs.left).model_dump() if probe else {}

    found = own.team.once(figures)
    return Forced.model_validate(found) if found else None


class _Changes:
    """The first layer in which each token of the first text goes to other experts."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.first: Tensor | None = None  # (tokens,)

    def add(self, index: int, own: Stream, theirs: Stream) -> None:
        if own.chosen is None or theirs.chosen is None:
            return
        changed = ~same_set(own.chosen[1], theirs.chosen[1])
        if self.first is None:
            self.first = torch.full(changed.shape, -1)
        self.first[changed & (self.first < 0)] = index

    def of(self, text: Windows) -> Tensor | None:
        """For the positions whose next tokens are scored: [tokens]."""
        if self.first is None:
            return None
        everyones = self.team.joined(self.first)
        return everyones.view_as(text.rows)[:, text.first - 1 : -1].flatten()


def _layer_figures(index: int, own: Stream, theirs: Stream, alone: Forced | None) -> Layer:
    """Figures of the layer that both have just run, on the first text."""
    team = own.team
    error = _relative_error(team, own.hidden[1], theirs.hidden[1])
    if own.chosen is None or theirs.chosen is None:
        return Layer(layer=index, relative_error=error, forced=alone)
    chosen = own.chosen[1]  # (tokens, k)
    chosen_base = theirs.chosen[1]
    count = theirs.model.family.num_experts(theirs.model.config, index)
    loads, loads_base = (
        team.total(torch.bincount(experts.flatten(), minlength=count))
        for experts in (chosen, chosen_base)
    )
    return Layer(
        **dict(router_agreement(team.joined(agreeing(chosen, chosen_base)))),
        layer=index,
        relative_error=error,
        tokens_per_expert=tuple(loads.tolist()),
        reference_tokens_per_expert=tuple(loads_base.tolist()),
        load_shift=(loads - loads_base).abs().sum().item() / (2 * loads.sum().item()),
        forced=alone,
    )


def _relative_error(team: Team, x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| of the states [rows, time, hidden] of all members, added up
    row by row."""
    squares = torch.zeros(len(x), 2, dtype=torch.float64)
    for row, (own, base) in enumerate(zip(x, reference, strict=True)):
        squares[row, 0] = (own - base).double().square().sum()
        squares[row, 1] = base.double().square().sum()
    error, norm = team.joined(squares).sum(0).sqrt().tolist()
    return error / max(norm, SMALLEST_NORM)


def _answers(stream: Stream, requests: Sequence[Batch], texts: int) -> list[Likelihood]:
    """A model's answers to all requests, of which some rows are here; their batches come after
    batch 0 and those of the texts."""
    found: list[Likelihood] = []
    for batch, hidden in zip(requests, stream.hidden[1 + texts :], strict=True):
        size = stream.model.rows_at_once(batch.rows.tokens.shape[1])
        for part in slices(0, len(hidden), size):
            found += likelihoods(stream.model, batch.of_rows(part), hidden[part]).values()
    rows = torch.tensor(found, dtype=torch.float64).view(-1, 2)
    return [(total, bool(greedy)) for total, greedy in stream.team.joined(rows).tolist()]


def _scores(own: Stream, theirs: Stream, texts: Sequence[Windows]) -> list[TokenFigures]:
    passed = zip(own.hidden[1:], theirs.hidden[1:], texts, strict=False)
    return [_score(own.model, h, theirs.model, h_base, text) for h, h_base, text in passed]


def _repeated(rows: Tensor, base: BlockwiseModel) -> Tensor:
    """The first of the windows [windows, time], or the beginning of the first one."""
    if base.products == base.dtype:
        return rows[:_REPEATED]
    tokens = max(rows.numel() // _ONE_EXACT_IN, _EXACT)
    return rows[: min(max(1, tokens // rows.shape[1]), _REPEATED), :tokens]


def _noise(theirs: Stream, text: Windows) -> TokenFigures:
    """The reference against itself, on the windows `text` that it ran twice."""
    again = theirs.hidden[0].flip(0)
    first = theirs.hidden[1][: len(again), : text.rows.shape[1]]
    return _score(theirs.model, again, theirs.model, first, text)


def _score(
    model: BlockwiseModel, hidden: Tensor, base: BlockwiseModel, hidden_base: Tensor, text: Windows
) -> TokenFigures:
    """Compares next-token logits, some positions of a window at a time; `hidden` and `hidden_base`
    [windows, time, hidden] are what the last layers returned."""
    parts = [TokenFigures(*torch.empty(5, 0, dtype=torch.float64))]  # a member may have no rows
    at_once = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    for window, own, theirs in zip(text.rows, hidden, hidden_base, strict=True):
        for start in range(text.first - 1, len(window) - 1, at_once):
            positions = slice(start, min(start + at_once, len(window) - 1))
            targets = window[positions.start + 1 : positions.stop + 1]
            logits = model.logits(own[None, positions])[0]  # (positions, vocabulary)
            logits_base = base.logits(theirs[None, positions])[0]
            parts.append(compare_logits(logits, logits_base, targets))
    return TokenFigures.cat(parts)
