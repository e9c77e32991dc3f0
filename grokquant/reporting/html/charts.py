"""Plots as inline SVG that a stylesheet colours and any width can scale.

All share one band for layers, so that plots above each other line up. Colours are classes
(`q0`-`q7`, `e0`-`e7`, `d0`-`d6`, `s0`-`s6`): the page says what they look like on light, on dark
and on paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log

from grokquant.reporting.html.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    Mark,
    axis_title,
    baseline,
    box,
    dot,
    legend_entry,
    level,
    marker,
    polyline,
    round_out,
    round_up,
    svg,
    text_at,
    tick,
    ticks,
    tooltip,
)

_STEPS, _HALF_STEPS = 8, 3
_WIDEST_BAR, _LINE = 56, 17
# Cells and bars narrower than this have no room for their number.
_ROOM = 52
_LONGEST_NAME = 36
# Heights of the percentiles in a quantile plot: the logit of the share, minimum and maximum beyond.
_REACH = 9.2
_SHARES = ((1.0, "max"), (0.999, "99.9 %"), (0.99, "99 %"), (0.9, "90 %"), (0.5, "50 %"),
           (0.1, "10 %"), (0.01, "1 %"), (0.001, "0.1 %"), (0.0, "min"))  # fmt: skip

Show = Callable[[float], str]


@dataclass(frozen=True)
class Quantile:
    """`share` of all tokens lies below the mark; 0 is the minimum, 1 the maximum."""

    name: str
    share: float
    mark: Mark


@dataclass(frozen=True)
class Series:
    name: str
    marks: Sequence[Mark | None]


def quantile_plot(
    title: str,
    quantiles: Sequence[Quantile],
    show: Show,
    x_title: str,
    markers: Sequence[tuple[str, float]] = (),
    log_x: bool = False,
) -> str:
    """Share of tokens (upwards, tails stretched) below a value (rightwards).

    `markers` are vertical lines with a name. On a logarithm, values of 0 or less are left out.
    """
    drawn = [q for q in quantiles if q.mark.value > 0 or not log_x]
    markers = [m for m in markers if m[1] > 0 or not log_x]
    top = 14 + _LINE * len(markers)
    y = Axis(-_REACH, _REACH, top + 210, top)
    values = [q.mark.value for q in drawn] + [value for _, value in markers]
    x = _value_axis(values or [1.0], log_x)
    body = [level(y(_stretch(share)), label) for share, label in _SHARES]
    body += [tick(x(value), y.start, show(value)) for value in ticks(x)]
    body += [marker(x(value), 12 + _LINE * i, y.start, n) for i, (n, value) in enumerate(markers)]
    points = [(x(q.mark.value), y(_stretch(q.share)), q) for q in drawn]
    body.append(polyline([(px, py) for px, py, _ in points], "s1"))
    body += [dot(px, py, "s1", q.mark, f"{q.name}: {show(q.mark.value)}") for px, py, q in points]
    return svg(title, y.start + 44, [*body, axis_title(y.start + 38, x_title)])


def bar_chart(
    title: str,
    marks: Sequence[Mark | None],
    show: Show,
    show_tick: Show,
    x_title: str,
    names: Sequence[int] | None = None,
) -> str:
    """One bar per layer, from zero; none where there is no mark.

    `names` are the layers' numbers, unless all are there.
    """
    names = names or range(len(marks))
    y = Axis(0, round_up(max((m.value for m in marks if m), default=0.0)), 190, 22)
    band = (RIGHT - LEFT) / max(len(marks), 1)
    width = min(band * 0.72, _WIDEST_BAR)
    body = [level(y(value), show_tick(value)) for value in ticks(y, 4)]
    for index, mark in enumerate(marks):
        if mark is None:
            continue
        x, height = _centre(index, len(marks)) - width / 2, y.start - y(mark.value)
        label = f"{x_title} {names[index]}: {show(mark.value)}{mark.note}"
        shape = box(x, y.start - height, width, max(height, 0.5))
        body.append(f'<rect class="s1" {shape}{mark.data}>{tooltip(label)}</rect>')
        if band >= _ROOM:
            body.append(text_at(x + width / 2, y.start - height - 6, show(mark.value), "mid ink"))
    return svg(title, 236, [*body, baseline(y.start), *layer_ticks(names, 190, x_title)])


def line_chart(
    title: str, series: Sequence[Series], show: Show, x_title: str, log_y: bool = False
) -> str:
    """A line for each of at most three series over layers; gaps where a layer has no mark.

    On a logarithm, values of 0 are left out.
    """
    drawn = [[m if m and (m.value > 0 or not log_y) else None for m in s.marks] for s in series]
    values = [m.value for marks in drawn for m in marks if m] or [1.0]
    top = 14 + _LINE * len(series)
    low, high = min(values), max(values)
    ends = (low / 1.2, high * 1.2) if log_y else round_out(low, high)
    y = Axis(*ends, top + 160, top, log_y)
    count = max(len(s.marks) for s in series)
    body = [level(y(value), show(value)) for value in ticks(y, 4)]
    for number, (line, marks) in enumerate(zip(series, drawn, strict=True), 1):
        points = [(_centre(i, count), y(m.value), m) for i, m in enumerate(marks) if m]
        body.append(polyline([(px, py) for px, py, _ in points], f"s{number}"))
        body += [
            dot(px, py, f"s{number}", m, f"{line.name}: {show(m.value)}", fine=count > 20)
            for px, py, m in points
        ]
        body += legend_entry(LEFT, 12 + _LINE * (number - 1), f"s{number}", line.name)
    return svg(title, y.start + 46, [*body, *layer_ticks(range(count), y.start, x_title)])


def heat_map(
    title: str,
    columns: Sequence[Sequence[Mark | None]],
    show: Show,
    palette: str,
    names: tuple[str, str] = ("layer", "expert"),
) -> str:
    """Cells coloured by value: a column per layer, a row per expert; None stays empty.

    Palette "d" is diverging around zero, "q" and "e" run from the least to the greatest value.
    """
    count = max(len(column) for column in columns)
    width, height = (RIGHT - LEFT) / len(columns), min(26.0, max(7.0, 420 / count))
    step = _Steps.of([m.value for column in columns for m in column if m], palette)
    every = ceil(14 / height)
    body = [text_at(LEFT - 8, 8 + height * (e + 0.5) + 4.5, str(e), "end")
            for e in range(0, count, every)]  # fmt: skip
    for i, column in enumerate(columns):
        for e, mark in enumerate(column):
            if mark is None:
                continue
            x, y, shade = LEFT + i * width, 8 + e * height, step(mark.value)
            label = f"{names[0]} {i}, {names[1]} {e}: {show(mark.value)}{mark.note}"
            shape = box(x, y, width, height)
            body.append(f'<rect class="c {shade}" {shape}{mark.data}>{tooltip(label)}</rect>')
            if width >= _ROOM and height >= 20:
                side = f"mid pass {'hi' if step.strong(mark.value) else 'ink'}"
                body.append(text_at(x + width / 2, y + height / 2 + 4.5, show(mark.value), side))
    bottom = 8 + count * height
    body.append(text_at(13, (8 + bottom) / 2, names[1], "mid", turned=True))
    body += layer_ticks(range(len(columns)), bottom, names[0])
    return svg(title, bottom + 78, [*body, *_scale(step, show, bottom + 56)])


def lying_bars(title: str, bars: Sequence[tuple[str, Mark, str]]) -> str:
    """Horizontal bars (name, value, label), the first one being the subject."""
    longest = max(mark.value for _, mark, _ in bars) or 1
    body = []
    for index, (name, mark, label) in enumerate(bars):
        y, length = 46 * index, max(mark.value, 0) / longest * (WIDTH - 4)
        body.append(text_at(2, y + 14, _shortened(name), "start ink"))
        body.append(text_at(WIDTH - 2, y + 14, label, "end"))
        shape, shade = box(2, y + 21, max(length, 1), 13), "s1" if index == 0 else "s0"
        body.append(f'<rect class="{shade}" {shape}{mark.data}>{tooltip(label)}</rect>')
    return svg(title, 46 * len(bars) - 6, body, "top")


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


@dataclass(frozen=True)
class _Steps:
    """Which shade of a palette a value gets."""

    low: float
    high: float
    palette: str

    @staticmethod
    def of(values: Sequence[float], palette: str) -> "_Steps":
        if palette == "d":
            reach = max(map(abs, values), default=0.0)
            return _Steps(-reach, reach, palette)
        return _Steps(min(values, default=0.0), max(values, default=0.0), palette)

    @property
    def count(self) -> int:
        return 2 * _HALF_STEPS + 1 if self.palette == "d" else _STEPS

    def index(self, value: float) -> int:
        if self.high <= self.low:
            return _HALF_STEPS if self.palette == "d" else 0
        if self.palette == "d":
            return _HALF_STEPS + round(value / self.high * _HALF_STEPS)
        share = (value - self.low) / (self.high - self.low)
        return min(floor(share * _STEPS), _STEPS - 1)

    def strong(self, value: float) -> bool:
        """Whether text on the shade must turn to the other colour."""
        index = self.index(value)
        return abs(index - _HALF_STEPS) > 2 if self.palette == "d" else index >= _STEPS // 2

    def __call__(self, value: float) -> str:
        return f"{self.palette}{self.index(value)}"


def _scale(step: _Steps, show: Show, y: float) -> list[str]:
    """The legend of a heat map: its shades with the value at either end."""
    width, start = 18, WIDTH / 2 - step.count * 9
    body = [
        f'<rect class="c {step.palette}{i}" {box(start + i * width, y, width, 13)}/>'
        for i in range(step.count)
    ]
    body.append(text_at(start - 8, y + 11, show(step.low), "end"))
    return [*body, text_at(start + step.count * width + 8, y + 11, show(step.high), "start")]


def _stretch(share: float) -> float:
    return _REACH * (2 * share - 1) if share in (0, 1) else log(share / (1 - share))


def _value_axis(values: Sequence[float], log_x: bool) -> Axis:
    low, high = min(values), max(values)
    if not log_x:
        reach = max(abs(low), abs(high)) * 1.05 or 1.0
        return Axis(-reach, reach, LEFT, RIGHT)
    low = max(low, high * 1e-12)
    return Axis(low / 1.5, high * 1.5, LEFT, RIGHT, log=True)


def _centre(index: int, count: int) -> float:
    return LEFT + (index + 0.5) * (RIGHT - LEFT) / count


def layer_ticks(layers: Sequence[int], y: float, name: str, axis: Axis | None = None) -> list[str]:
    """Numbers of layers below a plot, few enough to read; on the band of all plots or an `axis`."""
    count = len(layers)
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, count) if count / n <= 12 or n >= count)
    places = [axis(i) if axis else _centre(i, count) for i in range(0, count, every)]
    ticks = [
        text_at(x, y + 17, str(layer), "mid")
        for x, layer in zip(places, layers[::every], strict=True)
    ]
    middle = (axis.start + axis.end) / 2 if axis else (LEFT + RIGHT) / 2
    return [*ticks, text_at(middle, y + 36, name, "mid")]
