"""Drawing: plots as inline SVG that a stylesheet colours and any width can scale.

All plots share one width and one band for layers, so that plots above each other line up.
Colours are classes (`q0`-`q7`, `e0`-`e7`, `d0`-`d6`, `s1`, `s2`); the page says what they look
like on light, on dark and on paper. Marks carry the exact number in `data-value`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log, log10

WIDTH = 440
_LEFT, _RIGHT = 56, 428
_STEPS, _HALF_STEPS = 8, 3
_WIDEST_BAR, _LINE = 56, 17


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


Show = Callable[[float], str]


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
    body = [_level(y(_stretch(share)), label) for share, label in _SHARES]
    body += [_tick(x(value), y.start, show(value)) for value in _ticks(x)]
    body += [_marker(x(value), 12 + _LINE * i, y.start, n) for i, (n, value) in enumerate(markers)]
    points = [(x(q.mark.value), y(_stretch(q.share)), q) for q in drawn]
    body.append(_polyline([(px, py) for px, py, _ in points], "s1"))
    body += [_dot(px, py, "s1", q.mark, f"{q.name}: {show(q.mark.value)}") for px, py, q in points]
    return _svg(title, y.start + 44, [*body, _axis_title(y.start + 38, x_title)])


def bar_chart(
    title: str, marks: Sequence[Mark], show: Show, show_tick: Show, x_title: str
) -> str:
    """One bar per layer, from zero."""
    y = Axis(0, _round_up(max((m.value for m in marks), default=0.0)), 190, 22)
    band = (_RIGHT - _LEFT) / max(len(marks), 1)
    width = min(band * 0.72, _WIDEST_BAR)
    body = [_level(y(value), show_tick(value)) for value in _ticks(y, 4)]
    for index, mark in enumerate(marks):
        x, height = _centre(index, len(marks)) - width / 2, y.start - y(mark.value)
        label = f"{x_title} {index}: {show(mark.value)}"
        shape = _box(x, y.start - height, width, max(height, 0.5))
        body.append(f'<rect class="s1" {shape}{mark.data}>{_title(label)}</rect>')
        if band >= 52:
            body.append(_text(x + width / 2, y.start - height - 6, show(mark.value), "mid ink"))
    return _svg(title, 236, [*body, _baseline(y.start), *_layer_ticks(len(marks), 190, x_title)])


def line_chart(title: str, series: Sequence[Series], show: Show, x_title: str) -> str:
    """A line for each of at most two series over layers; gaps where a layer has no mark."""
    values = [m.value for s in series for m in s.marks if m]
    top = 14 + _LINE * len(series)
    y = Axis(*_round_out(min(values), max(values)), top + 160, top)
    count = max(len(s.marks) for s in series)
    body = [_level(y(value), show(value)) for value in _ticks(y, 4)]
    for number, line in enumerate(series, 1):
        points = [(_centre(i, count), y(m.value), m) for i, m in enumerate(line.marks) if m]
        body.append(_polyline([(px, py) for px, py, _ in points], f"s{number}"))
        body += [
            _dot(px, py, f"s{number}", m, f"{line.name}: {show(m.value)}", fine=count > 20)
            for px, py, m in points
        ]
        body += _legend_entry(_LEFT, 12 + _LINE * (number - 1), f"s{number}", line.name)
    return _svg(title, y.start + 46, [*body, *_layer_ticks(count, y.start, x_title)])


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
    width, height = (_RIGHT - _LEFT) / len(columns), min(26.0, max(7.0, 420 / count))
    step = _Steps.of([m.value for column in columns for m in column if m], palette)
    every = ceil(14 / height)
    body = [_text(_LEFT - 8, 8 + height * (e + 0.5) + 4.5, str(e), "end")
            for e in range(0, count, every)]  # fmt: skip
    for i, column in enumerate(columns):
        for e, mark in enumerate(column):
            if mark is None:
                continue
            x, y, shade = _LEFT + i * width, 8 + e * height, step(mark.value)
            label = f"{names[0]} {i}, {names[1]} {e}: {show(mark.value)}{mark.note}"
            shape = _box(x, y, width, height)
            body.append(f'<rect class="c {shade}" {shape}{mark.data}>{_title(label)}</rect>')
            if width >= 52 and height >= 20:
                side = f"mid pass {'hi' if step.strong(mark.value) else 'ink'}"
                body.append(_text(x + width / 2, y + height / 2 + 4.5, show(mark.value), side))
    bottom = 8 + count * height
    body.append(_text(13, (8 + bottom) / 2, names[1], "mid", turned=True))
    body += _layer_ticks(len(columns), bottom, names[0])
    return _svg(title, bottom + 78, [*body, *_scale(step, show, bottom + 56)])


def size_bars(title: str, sizes: Sequence[tuple[str, Mark, str]]) -> str:
    """Horizontal bars (name, bytes, label), the first one being the subject."""
    longest = max(mark.value for _, mark, _ in sizes) or 1
    body = []
    for index, (name, mark, label) in enumerate(sizes):
        y, length = 46 * index, mark.value / longest * (WIDTH - 4)
        body.append(_text(2, y + 14, name, "start ink"))
        body.append(_text(WIDTH - 2, y + 14, label, "end"))
        shape, shade = _box(2, y + 21, max(length, 1), 13), "s1" if index == 0 else "s0"
        body.append(f'<rect class="{shade}" {shape}{mark.data}>{_title(label)}</rect>')
    return _svg(title, 46 * len(sizes) - 6, body)


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
        f'<rect class="c {step.palette}{i}" {_box(start + i * width, y, width, 13)}/>'
        for i in range(step.count)
    ]
    body.append(_text(start - 8, y + 11, show(step.low), "end"))
    return [*body, _text(start + step.count * width + 8, y + 11, show(step.high), "start")]


# Heights of the percentiles in a quantile plot: the logit of the share, minimum and maximum beyond.
_REACH = 9.2
_SHARES = ((1.0, "max"), (0.999, "99.9 %"), (0.99, "99 %"), (0.9, "90 %"), (0.5, "50 %"),
           (0.1, "10 %"), (0.01, "1 %"), (0.001, "0.1 %"), (0.0, "min"))  # fmt: skip


def _stretch(share: float) -> float:
    return _REACH * (2 * share - 1) if share in (0, 1) else log(share / (1 - share))


def _value_axis(values: Sequence[float], log_x: bool) -> Axis:
    low, high = min(values), max(values)
    if not log_x:
        reach = max(abs(low), abs(high)) * 1.05 or 1.0
        return Axis(-reach, reach, _LEFT, _RIGHT)
    low = max(low, high * 1e-12)
    return Axis(low / 1.5, high * 1.5, _LEFT, _RIGHT, log=True)


def _ticks(axis: Axis, most: int = 5) -> list[float]:
    """Round values inside the axis, at most about `most` of them."""
    if axis.log:
        first, last = ceil(log10(axis.low)), floor(log10(axis.high))
        every = max(1, ceil((last - first + 1) / (most + 1)))
        return [10.0**e for e in range(last, first - 1, -every)][::-1]
    step = _round_step((axis.high - axis.low) / most)
    first, last = ceil(axis.low / step - 1e-9), floor(axis.high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** floor(log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)


def _round_up(value: float) -> float:
    """A round number a little above: the end of an axis from zero."""
    return ceil(value * 1.02 / (step := _round_step(value / 4))) * step if value > 0 else 1.0


def _round_out(low: float, high: float) -> tuple[float, float]:
    """Round ends around shares; a flat line gets some room below it."""
    step = _round_step(max(high - low, 0.004) / 3)
    return floor(low / step - 0.01) * step, min(ceil(high / step) * step, 1.0)


def _centre(index: int, count: int) -> float:
    return _LEFT + (index + 0.5) * (_RIGHT - _LEFT) / count


def _layer_ticks(count: int, y: float, name: str) -> list[str]:
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, count) if count / n <= 12 or n >= count)
    ticks = [_text(_centre(i, count), y + 17, str(i), "mid") for i in range(0, count, every)]
    return [*ticks, _axis_title(y + 36, name)]


def _svg(title: str, height: float, body: Sequence[str]) -> str:
    label = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {_n(height)}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(body)}</svg>"
    )


def _level(y: float, label: str) -> str:
    return _rule(_LEFT, y, _RIGHT, y, "level") + _text(_LEFT - 8, y + 4.5, label, "end")


def _tick(x: float, y: float, label: str) -> str:
    return _rule(x, y, x, y + 5, "base") + _text(x, y + 19, label, "mid")


def _baseline(y: float) -> str:
    return _rule(_LEFT, y, _RIGHT, y, "base")


def _marker(x: float, label_y: float, bottom: float, name: str) -> str:
    """A dashed line whose name stands on the side with more room."""
    side, shift = ("end", -6) if x > WIDTH / 2 else ("start", 6)
    label = _text(x + shift, label_y, name, f"{side} ink")
    return _rule(x, label_y - 10, x, bottom, "mark") + label


def _rule(x1: float, y1: float, x2: float, y2: float, shade: str) -> str:
    ends = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
    return f'<line class="{shade}" {ends}/>'


def _polyline(points: Sequence[tuple[float, float]], shade: str) -> str:
    path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    return f'<polyline class="line {shade}" points="{path}"/>'


def _dot(x: float, y: float, shade: str, mark: Mark, label: str, fine: bool = False) -> str:
    place = f'cx="{_n(x)}" cy="{_n(y)}" r="{2.5 if fine else 4}"'
    return f'<circle class="{shade}{" fine" * fine}" {place}{mark.data}>{_title(label)}</circle>'


def _legend_entry(x: float, y: float, shade: str, name: str) -> list[str]:
    line = f'<polyline class="line {shade}" points="{_n(x)},{_n(y)} {_n(x + 18)},{_n(y)}"/>'
    dot = f'<circle class="{shade}" cx="{_n(x + 9)}" cy="{_n(y)}" r="4"/>'
    return [line, dot, _text(x + 26, y + 4.5, name, "start ink")]


def _axis_title(y: float, text: str) -> str:
    return _text((_LEFT + _RIGHT) / 2, y, text, "mid")


def _text(x: float, y: float, text: str, side: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
    return f'<text class="{side}" x="{_n(x)}" y="{_n(y)}"{turn}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
