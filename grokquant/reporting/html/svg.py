"""The elements of a plot: axes, marks, lines, labels. All plots share one width.

Marks carry the number that they stand for in `data-value`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH = 440
LEFT, RIGHT = 56, 428


@dataclass(frozen=True)
class Axis:
    """Maps values `low`..`high` to coordinates `start`..`end`, on a logarithm if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (map(log10, (self.low, self.high, value)) if self.log
                            else (self.low, self.high, value))  # fmt: skip
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


@dataclass(frozen=True)
class Mark:
    """A value in a plot. Where it comes from a number of the report, `path` is the JSON pointer
    of that number and `stored` the number, if it is not the value itself."""

    value: float
    path: str = ""
    stored: float | None = None
    note: str = ""

    @property
    def data(self) -> str:
        stored = self.value if self.stored is None else self.stored
        return f' data-path="{escape(self.path)}" data-value="{stored!r}"' if self.path else ""


def svg(title: str, height: float, body: Sequence[str], kind: str = "") -> str:
    """A drawing with a name; those of the `kind` "top" do not sink to the foot of their figure."""
    label, name = escape(title), f'class="{kind}" ' if kind else ""
    return (
        f'<svg {name}viewBox="0 0 {WIDTH} {_n(height)}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(body)}</svg>"
    )


def level(y: float, label: str, right: float = RIGHT) -> str:
    return rule(LEFT, y, right, y, "level") + text_at(LEFT - 8, y + 4.5, label, "end")


def tick(x: float, y: float, label: str) -> str:
    return rule(x, y, x, y + 5, "base") + text_at(x, y + 19, label, "mid")


def baseline(y: float) -> str:
    return rule(LEFT, y, RIGHT, y, "base")


def marker(x: float, label_y: float, bottom: float, name: str) -> str:
    """A dashed line whose name stands on the side with more room."""
    side, shift = ("end", -6) if x > WIDTH / 2 else ("start", 6)
    label = text_at(x + shift, label_y, name, f"{side} ink")
    return rule(x, label_y - 10, x, bottom, "mark") + label


def rule(x1: float, y1: float, x2: float, y2: float, shade: str) -> str:
    ends = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
    return f'<line class="{shade}" {ends}/>'


def polyline(points: Sequence[tuple[float, float]], shade: str) -> str:
    path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    return f'<polyline class="line {shade}" points="{path}"/>'


def dot(x: float, y: float, shade: str, mark: Mark, label: str, fine: bool = False) -> str:
    place = f'cx="{_n(x)}" cy="{_n(y)}" r="{2.5 if fine else 4}"'
    return f'<circle class="{shade}{" fine" * fine}" {place}{mark.data}>{tooltip(label)}</circle>'


def shape(corners: Sequence[tuple[float, float]], kind: str, mark: Mark, label: str) -> str:
    """A filled outline that stands for a number."""
    path = "L".join(f"{_n(x)},{_n(y)}" for x, y in corners)
    named = tooltip(label) if label else ""
    return f'<path class="{kind}" d="M{path}Z"{mark.data}>{named}</path>'


def legend_entry(x: float, y: float, shade: str, name: str) -> list[str]:
    line = f'<polyline class="line {shade}" points="{_n(x)},{_n(y)} {_n(x + 18)},{_n(y)}"/>'
    dot = f'<circle class="{shade}" cx="{_n(x + 9)}" cy="{_n(y)}" r="4"/>'
    return [line, dot, text_at(x + 26, y + 4.5, name, "start ink")]


def axis_title(y: float, text: str) -> str:
    return text_at((LEFT + RIGHT) / 2, y, text, "mid")


def text_at(x: float, y: float, text: str, side: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
    return f'<text class="{side}" x="{_n(x)}" y="{_n(y)}"{turn}>{escape(text)}</text>'


def box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'


def tooltip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def ticks(axis: Axis, most: int = 5) -> list[float]:
    """Round values inside the axis, at most about `most` of them."""
    if axis.log:
        return _decades(axis, most)
    step = _round_step((axis.high - axis.low) / most)
    first, last = ceil(axis.low / step - 1e-9), floor(axis.high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def _decades(axis: Axis, most: int) -> list[float]:
    """Powers of ten; between few of them also their doubles and fives."""
    first, last = ceil(log10(axis.low) - 1e-9), floor(log10(axis.high) + 1e-9)
    if last - first < 2:
        steps = (m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5))
        return [x for x in steps if axis.low <= x * 1.001 and x <= axis.high * 1.001]
    every = max(1, ceil((last - first + 1) / (most + 1)))
    return [10.0**e for e in range(last, first - 1, -every)][::-1]


def _round_step(rough: float) -> float:
    power = 10.0 ** floor(log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)


def round_up(value: float) -> float:
    """A round number a little above: the end of an axis from zero."""
    return ceil(value * 1.02 / (step := _round_step(value / 4))) * step if value > 0 else 1.0


def round_out(low: float, high: float) -> tuple[float, float]:
    """Round ends around shares; a flat line gets some room below it."""
    step = _round_step(max(high - low, 0.004) / 3)
    return floor(low / step - 0.01) * step, min(ceil(high / step) * step, 1.0)
