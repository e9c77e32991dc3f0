"""The input that several matrices share, and what rounding needs of it."""

from collections.abc import Callable
from dataclasses import dataclass

from grokquant.calibration.hessian import Hessian
from grokquant.methods.gptq import Feedback, UnusableHessian, factorize
from grokquant.recipe import Rule


@dataclass
class Site:
    """The input that units share. Its Hessian and factors are made once, when first needed.

    `build` makes the Hessian, in blocks of so many columns if it is given a number. `refusal` says
    why it is not to be used, `note` what was done to it.
    """

    tokens: int
    build: Callable[[int | None], Hessian]
    refusal: str | None = None
    note: str | None = None
    _made: tuple[tuple, Feedback] | None = None

    def feedback(self, rule: Rule) -> Feedback:
        """Raises UnusableHessian with the reason.

        The factors take the memory of the Hessian; for a rule unlike the last it is built again.
        """
        if self.refusal:
            raise UnusableHessian(self.refusal)
        key = (rule.damping, rule.act_order, rule.hessian_block)
        if self._made is None or self._made[0] != key:
            self._made = None
            blocks = self.build(rule.hessian_block).blocks
            self._made = key, factorize(blocks, rule.damping, rule.act_order)
        return self._made[1]
