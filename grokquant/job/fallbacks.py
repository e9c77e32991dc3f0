"""How many matrices may fall back to a simpler method, and what helps if more do."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from grokquant.errors import GateError
from grokquant.job.plan import Plan

# An expert that no token reaches is dead if an average one gets this many times `min_tokens`: then
# the router avoids it, and more text would not reach it either.
_DEAD = 4
# More tokens than are needed just so: experts of later layers may get fewer.
_MARGIN = 2
_NAMED = 3


@dataclass(frozen=True)
class Fallen:
    """A matrix that fell back: its name, the tokens that reached it, and the reason."""

    name: str
    tokens: int | None
    reason: str


@dataclass
class Fallbacks:
    """The matrices of a run that fell back, by kind; `rows` sequences of `length` tokens."""

    plan: Plan
    rows: int
    length: int
    by_kind: dict[str, dict[str, Fallen]] = field(default_factory=dict)

    def add(self, fallen: Fallen) -> None:
        """Counts a matrix, but for those of dead experts."""
        if not self._is_dead(fallen):
            kind = self.plan.units[fallen.name].kind
            self.by_kind.setdefault(kind, {})[fallen.name] = fallen

    def check(self) -> None:
        """Raises GateError if more matrices of a kind fell back than the recipe allows."""
        for kind in self.by_kind:
            if excess := self._excess(kind):
                raise GateError(f"{excess}: {self._named(kind)}; {self._remedy(kind)}")

    def excess(self) -> str | None:
        """The first kind of which too many fell back, in words."""
        return next(filter(None, map(self._excess, self.by_kind)), None)

    def _excess(self, kind: str) -> str | None:
        limit = self.plan.recipe.max_fallbacks
        number = len(self.by_kind[kind])
        total = self._units_of_kind[kind]
        if number <= limit * total:
            return None
        text = f"{number} of {total} matrices {kind} fell back to rtn"
        return f"{text}, max_fallbacks = {limit:g} allows {int(limit * total)}"

    @cached_property
    def _units_of_kind(self) -> Counter[str]:
        return Counter(unit.kind for unit in self.plan.units.values())

    def _is_dead(self, fallen: Fallen) -> bool:
        checkpoint = self.plan.checkpoint
        routed = self.rows * self.length * checkpoint.experts_per_token
        average = routed / max(checkpoint.num_experts, 1)
        return fallen.tokens == 0 and average >= _DEAD * self.plan.recipe.experts.min_tokens

    def _named(self, kind: str) -> str:
        fallen = [*self.by_kind[kind].values()]
        more = f" and {len(fallen) - _NAMED} more" if len(fallen) > _NAMED else ""
        return "; ".join(f"{each.name}: {each.reason}" for each in fallen[:_NAMED]) + more

    def _remedy(self, kind: str) -> str:
        """What to change, with the numbers of this run."""
        fallen = self.by_kind[kind].values()
        ways = [*self._more_tokens([each.tokens for each in fallen if each.tokens is not None])]
        share = ceil(100 * len(fallen) / self._units_of_kind[kind]) / 100
        ways.append(
            f"max_fallbacks={share:g} or more accepts them, and resumes this run where it is"
        )
        return "; ".join(ways)

    def _more_tokens(self, tokens: list[int]) -> Iterator[str]:
        """How many sequences give the expert with the fewest `tokens` enough of them."""
        settings = self.plan.recipe.calibration
        fewest = min(tokens, default=None)
        least = self.plan.recipe.experts.min_tokens
        if fewest is None or fewest >= least:
            return
        wanted = _MARGIN * ceil(self.rows * least / max(fewest, 1))
        if self.rows < settings.samples:
            yield (
                f"{settings.text} gives only {self.rows} sequences of {self.length} tokens: set "
                f"calibration.text to a longer one, of about {wanted * self.length} tokens"
            )
        else:
            yield f"calibration.samples={wanted} would give them enough, {self.rows} were used"
        yield "calibration.text should be like what the model is used for, and varied"


def fallen_in(rows: Iterable[Mapping]) -> list[Fallen]:
    """Those among the rows of a report."""
    return [
        Fallen(row["name"], row.get("tokens"), row["fallback"])
        for row in rows
        if row.get("fallback")
    ]


def dead_experts(rows: Iterable[Mapping]) -> list[str]:
    """The experts that no token of the calibration text reached, among the rows of a report."""
    names = (each.name.rpartition(".")[0] for each in fallen_in(rows) if each.tokens == 0)
    return list(dict.fromkeys(names))
