"""Axes of plots: values to coordinates, and the round values at which they get ticks."""

from dataclasses import dataclass
from math import ceil, floor, log10

# Ends and ticks that miss a round value by rounding errors alone count as hitting it.
_SLACK = 1e-9
# A flat line of shares still gets an axis this long, or its ticks would all read the same.
_SHORTEST = 0.004


@dataclass(frozen=True)
class Axis:
    """Maps values `low`..`high` to coordinates `start`..`end`, on a logarithmic scale if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        share = self._share(value)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _share(self, value: float) -> float:
        if self.log:
            return log10(value / self.low) / log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def ticks(axis: Axis, most: int = 5) -> list[float]:
    """Round values inside the axis, about `most` of them or fewer."""
    if axis.log:
        return _decades(axis, most)
    step = _round_step((axis.high - axis.low) / most)
    first = ceil(axis.low / step - _SLACK)
    last = floor(axis.high / step + _SLACK)
    return [step * i for i in range(first, last + 1)]


def _decades(axis: Axis, most: int) -> list[float]:
    """Powers of ten; on a short axis also their doubles and fives."""
    first = ceil(log10(axis.low) - _SLACK)
    last = floor(log10(axis.high) + _SLACK)
    if last - first < 2:
        steps = (m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5))
        return [x for x in steps if axis.low <= x * 1.001 and x <= axis.high * 1.001]
    every = max(1, ceil((last - first + 1) / (most + 1)))
    return [10.0**e for e in range(last, first - 1, -every)][::-1]


def round_up(value: float) -> float:
    """A round number a little above `value`: the end of an axis from zero."""
    if value <= 0:
        return 1.0
    step = _round_step(value / 4)
    return ceil(value * 1.02 / step) * step


def round_out(low: float, high: float) -> tuple[float, float]:
    """Round ends around shares, at most 1; the lower end lies below `low`."""
    step = _round_step(max(high - low, _SHORTEST) / 3)
    return floor(low / step - 0.01) * step, min(ceil(high / step) * step, 1.0)


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** floor(log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
