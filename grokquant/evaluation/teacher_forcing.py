"""Teacher forcing: each quantized layer on the reference's own hidden states, its error alone.

The states of some windows of the reference pass every layer of the quantized model together with
those on its own path, so its weights are read once. Experts go further: each gets just what the
reference's experts got, so that their outputs can be subtracted token by token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grokquant.evaluation.cache import Entry
from grokquant.streaming.blocks import BlockwiseModel, Expert, Rows
from grokquant.streaming.stream import Stream, View

_LEAST = 1e-20  # of a norm that is divided by


@dataclass(frozen=True)
class Routers:
    """Shares of tokens for which two routers agree: on the first expert, on the first two in any
    order, on all in any order."""

    router_top1: float
    router_top2_set: float
    router_set: float


@dataclass(frozen=True)
class Forced:
    """One layer alone, as in the report's part of this name."""

    tokens: int
    block_error: float
    attention_error: float
    experts_error: float | None = None
    router_top1: float | None = None
    router_top2_set: float | None = None
    router_set: float | None = None
    damage: tuple[float, ...] = ()


def routers(chosen: Tensor, reference: Tensor) -> Routers:
    """Agreement of experts [tokens, k], those with the largest gates first."""
    return Routers(
        router_top1=(chosen[:, 0] == reference[:, 0]).double().mean().item(),
        router_top2_set=same_set(chosen[:, :2], reference[:, :2]).double().mean().item(),
        router_set=same_set(chosen, reference).double().mean().item(),
    )


def same_set(chosen: Tensor, reference: Tensor) -> Tensor:
    """Whether each token has the same experts [tokens, k] in any order: [tokens]."""
    return (chosen.sort(-1).values == reference.sort(-1).values).all(-1)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||."""
    return ((x - reference).norm() / reference.norm().clamp_min(_LEAST)).item()


class Lesson(View):
    """What the reference does with the first `tokens`: also what each expert adds for a token,
    `contributions` [tokens, k, hidden], its gate included."""

    def __init__(self, tokens: int) -> None:
        super().__init__(slice(0, tokens))
        self.contributions: Tensor | None = None

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        super().route(x, experts, gates)
        assert self.experts is not None
        self.contributions = torch.zeros((*self.experts.shape, x.shape[1]))

    def expert(self, number: int, expert: Expert, routed: Tensor) -> Expert:
        """The same expert, overheard: it is run on the `routed` tokens in their order."""
        assert self.experts is not None and self.gates is not None
        assert self.contributions is not None
        contributions, gates = self.contributions, self.gates
        token, slot = torch.where(self.experts == number)
        passed = 0

        def overheard(x: Tensor) -> Tensor:
            nonlocal passed
            y = expert(x)
            t, k = (t[passed : passed + len(y)] for t in (token, slot))
            contributions[t, k] = gates[t, k, None] * y[: len(t)].float().cpu()
            passed += len(y)
            return y

        return overheard

    def tensors(self) -> dict[str, Tensor]:
        """All that a `Lesson` holds, by name."""
        held = {name: getattr(self, name) for name in _LESSON}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


_LESSON = ("attention", "inputs", "experts", "gates", "contributions")


class Exam(View):
    """A quantized layer: also what its experts do with the inputs of the `lesson`."""

    def __init__(self, tokens: slice, lesson: Lesson, model: BlockwiseModel, count: int) -> None:
        super().__init__(tokens)
        self.lesson, self.device = lesson, model.device
        self.damage = torch.zeros(count, dtype=torch.float64)
        self.missed = torch.zeros(0)  # what is wrong with the mixed outputs, [tokens, hidden]

    def route(self, x: Tensor, experts: Tensor, gates: Tensor) -> None:
        super().route(x, experts, gates)
        assert self.lesson.inputs is not None
        self.missed = torch.zeros_like(self.lesson.inputs)

    def expert(self, number: int, expert: Expert, routed: Tensor) -> Expert:
        taught = self.lesson
        assert taught.experts is not None and taught.gates is not None
        assert taught.inputs is not None and taught.contributions is not None
        for token, slot in BlockwiseModel.parts(*torch.where(taught.experts == number)):
            y = expert(taught.inputs[token].to(self.device)).float().cpu()  # (part, hidden)
            wrong = taught.gates[token, slot, None] * y - taught.contributions[token, slot]
            self.damage[number] += wrong.double().square().sum()
            self.missed.index_add_(0, token, wrong)
        return expert

    def figures(self, left: Tensor, left_reference: Tensor) -> Forced:
        """The layer's figures; it made `left` [rows, time, hidden] of what the reference makes
        `left_reference` of."""
        taught, tokens = self.lesson, left.shape[0] * left.shape[1]
        block = relative_error(left, left_reference)
        attention = relative_error(self.attention, taught.attention)
        if self.experts is None or taught.experts is None or taught.contributions is None:
            return Forced(tokens, block, attention)
        mixed, total = taught.contributions.sum(1), self.damage.sum()
        return Forced(
            tokens,
            block,
            attention,
            experts_error=(self.missed.norm() / mixed.norm().clamp_min(_LEAST)).item(),
            **vars(routers(self.experts, taught.experts)),
            damage=tuple((self.damage / total if total > 0 else self.damage).tolist()),
        )


class Teacher(Stream):
    """The reference on its way, with a `lesson` of each layer for the first `windows` rows.

    What is in the cache is taken from there: then the layer's weights are not read.
    """

    def __init__(
        self, model: BlockwiseModel, batches: list[Rows], windows: int, cache: Entry | None = None
    ) -> None:
        super().__init__(model, batches)
        self.windows, self.cache = windows, cache
        self.entered = self.hidden[0][:windows]
        self.lesson = Lesson(0)

    @property
    def left(self) -> Tensor:
        """The states of the first windows after the layer, [windows, time, hidden]."""
        return self.hidden[0][: self.windows]

    def run_layer(self, index: int, view: View | None = None) -> None:
        self.entered = self.left
        self.lesson = Lesson(self.windows * self.hidden[0].shape[1])
        kept = self.cache.read(index) if self.cache else None
        if kept is None:
            super().run_layer(index, self.lesson if self.windows else None)
            if self.cache:
                self.cache.write(index, self._tensors(), len(self.model.layers))
        else:
            self._restore(kept)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"hidden.{i}": hidden for i, hidden in enumerate(self.hidden)}
        named |= {f"chosen.{i}": chosen.short() for i, chosen in enumerate(self.chosen or ())}
        return named | (self.lesson.tensors() if self.windows else {})

    def _restore(self, kept: dict[str, Tensor]) -> None:
        parts = range(len(self.batches))
        self.hidden = [kept[f"hidden.{i}"] for i in parts]
        routed = "chosen.0" in kept
        self.chosen = tuple(kept[f"chosen.{i}"].long() for i in parts) if routed else None
        for name in _LESSON:
            setattr(self.lesson, name, kept.get(name))
