"""The input that some matrices share, and its Hessian: made when first needed, and once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor

from grokquant.calibration.hessian import Hessian, accumulate, blend
from grokquant.methods.method import Aim, UnusableHessian

T = TypeVar("T")
# Makes an iterator over inputs [some tokens, features], each time it is called.
Inputs = Callable[[], Iterator[Tensor]]
# Makes a Hessian, in diagonal blocks of this many columns; None makes a full one.
BuildHessian = Callable[[int | None], Hessian]


@dataclass(frozen=True)
class Prior:
    """The Hessian of all tokens, for an expert that saw too few: it counts as `tokens` tokens."""

    everyone: BuildHessian
    tokens: float


@dataclass
class Site:
    """`tokens` inputs of `features` features, which the matrices of one site read.

    `refusal` says why the Hessian must not be used; `prior` is blended with it. `aim` is what the
    outputs should be; `held_out` has inputs that are kept out of the Hessian.
    """

    tokens: int
    features: int
    inputs: Inputs
    refusal: str | None = None
    prior: Prior | None = None
    aim: Aim | None = None
    held_out: "Site | None" = None
    _made: tuple[object, object] | None = None

    @property
    def note(self) -> str | None:
        """What a reader of the report should know of the Hessian."""
        if self.prior is None:
            return None
        prior = f"{self.prior.tokens:.0f}"
        return f"{self.tokens} tokens, blended with all tokens as a prior of {prior}"

    def take_aim(self, aims: list[Aim], inputs: list[Inputs]) -> None:
        """Sets the aim of its own tokens, and a second one for tokens that are held out.

        `inputs` are those of either; what is held out is a site of its own.
        """
        self.aim = aims[0]
        for aim, held_out in zip(aims[1:], inputs[1:], strict=True):
            self.held_out = Site(len(aim.weights), self.features, held_out, aim=aim)

    def hessian(self, block: int | None, weighted: bool = False) -> list[Tensor]:
        """The diagonal blocks of the Hessian, of `block` columns each; None makes one of all.

        With `weighted`, tokens count by the weights of the aim. Raises UnusableHessian with the
        reason.
        """
        if self.refusal:
            raise UnusableHessian(self.refusal)
        inputs = self._weighted_inputs() if weighted else self.inputs()
        own = accumulate(inputs, self.features, block)
        if self.prior is not None:
            own = blend(own, self.prior.everyone(block), self.prior.tokens)
        return own.blocks

    def _weighted_inputs(self) -> Iterator[Tensor]:
        """Inputs times the square roots of their weights, in the inputs' dtype."""
        assert self.aim is not None
        start = 0
        for X in self.inputs():
            weights = self.aim.weights[start : start + len(X)].to(X.device)
            start += len(X)
            yield (X * weights.sqrt().unsqueeze(1)).to(X.dtype)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """The result of `make`, cached until `key` changes.

        Factors take the memory of a Hessian, so the old ones go before new ones are made.
        """
        if self._made is None or self._made[0] != key:
            self._made = None
            self._made = key, make()
        return cast(T, self._made[1])
