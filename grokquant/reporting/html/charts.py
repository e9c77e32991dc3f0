"""Charts as inline SVG that a stylesheet colours and any width can scale.

All share one band for layers, so that charts above each other line up. Colours are classes
(`q0`-`q7`, `e0`-`e7`, `d0`-`d6`, `s0`-`s6`): the page says what they look like on light, on dark
and on paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log

from grokquant.reporting.html.axis import Axis, round_out, round_up, ticks
from grokquant.reporting.html.svg import (
    LEFT,
    RIGHT,
    TEXT_DROP,
    WIDTH,
    Box,
    Mark,
    axis_title,
    baseline,
    dot,
    drawing,
    gridline,
    legend_entry,
    polyline,
    rect,
    reference_line,
    text,
    x_tick,
)

# Palettes, by the letter of their classes: from the least to the greatest value, or around zero.
BLUES = "q"
ORANGES = "e"
DIVERGING = "d"
_SHADES = 8  # of blues and oranges
_HALF_SHADES = 3  # of the diverging palette, on either side of the one for zero

# Heights of the plots, about half of their width: all steps are still told apart on a phone.
_BARS = 168
_LINES = 160
_QUANTILES = 210
# Heat maps share this among their rows; a row is high enough to see its colour, and no higher than
# a line of text needs.
_HEAT_MAP = 420
_LEAST_ROW = 7
_MOST_ROW = 26

# A line of the legend, or of names of reference lines.
_LINE = 17
# Few layers leave bars with room between them, rather than one wide block.
_WIDEST_BAR = 56
_BAR_SHARE = 0.72  # of the band of a layer
# Cells and bars narrower or lower than these have no room for their number.
_ROOM = 52
_ROOM_HEIGHT = 20
_ROW_LABELS = 14  # least distance between them
_MOST_LAYER_LABELS = 12
# More dots than these on a line run into each other unless they are small.
_COARSE_DOTS = 20
_LONGEST_NAME = 36  # letters that fit into the width

# Quantile plots stretch both tails: heights are the logit of the share, ln(s / (1 - s)). 99.9 % is
# at 6.9; minimum and maximum, whose logits are infinite, are drawn at this height.
_EXTREME = 9.2
_SHARES = (
    (1.0, "max"), (0.999, "99.9 %"), (0.99, "99 %"), (0.9, "90 %"), (0.5, "50 %"),
    (0.1, "10 %"), (0.01, "1 %"), (0.001, "0.1 %"), (0.0, "min"),
)  # fmt: skip
# The least value that a logarithmic axis reaches down to, as a part of the greatest.
_LOG_FLOOR = 1e-12

Show = Callable[[float], str]


@dataclass(frozen=True)
class Quantile:
    """`share` of all tokens lies below the mark; 0 is the minimum, 1 the maximum."""

    name: str
    share: float
    mark: Mark


@dataclass(frozen=True)
class Series:
    """A mark per layer; None leaves a gap."""

    name: str
    marks: Sequence[Mark | None]

    def positive(self) -> "Series":
        """The series as a logarithmic axis can show it: with gaps for values of 0."""
        marks = [mark if mark and mark.value > 0 else None for mark in self.marks]
        return Series(self.name, marks)


@dataclass(frozen=True)
class Bar:
    name: str
    mark: Mark
    label: str


def quantile_plot(
    title: str,
    quantiles: Sequence[Quantile],
    show: Show,
    x_title: str,
    references: Sequence[tuple[str, float]] = (),
    log_x: bool = False,
) -> str:
    """Share of tokens (upwards, tails stretched) below a value (rightwards).

    `references` are vertical lines with a name. A logarithmic axis leaves out values of 0 or less.
    """
    if log_x:
        quantiles = [quantile for quantile in quantiles if quantile.mark.value > 0]
        references = [reference for reference in references if reference[1] > 0]
    top = 14 + _LINE * len(references)
    y = Axis(-_EXTREME, _EXTREME, top + _QUANTILES, top)
    values = [q.mark.value for q in quantiles] + [value for _, value in references]
    x = _value_axis(values or [1.0], log_x)
    elements = [gridline(y(_stretch(share)), label) for share, label in _SHARES]
    elements += [x_tick(x(value), y.start, show(value)) for value in ticks(x)]
    for i, (name, value) in enumerate(references):
        elements.append(reference_line(x(value), 12 + _LINE * i, y.start, name))
    points = [(x(q.mark.value), y(_stretch(q.share))) for q in quantiles]
    elements.append(polyline(points, "s1"))
    for (px, py), q in zip(points, quantiles, strict=True):
        elements.append(dot(px, py, "s1", q.mark, f"{q.name}: {show(q.mark.value)}"))
    elements.append(axis_title(y.start + 38, x_title))
    return drawing(title, y.start + 44, elements)


def bar_chart(
    title: str,
    marks: Sequence[Mark | None],
    show: Show,
    show_tick: Show,
    x_title: str,
    layers: Sequence[int] | None = None,
) -> str:
    """One bar per layer, from zero; none where there is no mark.

    `layers` are the layers' numbers, unless all are there.
    """
    layers = layers or range(len(marks))
    top = 22  # room for the number on the highest bar
    highest = max((mark.value for mark in marks if mark), default=0.0)
    y = Axis(0, round_up(highest), top + _BARS, top)
    elements = _gridlines(y, show_tick)
    for i, mark in enumerate(marks):
        if mark is not None:
            label = f"{x_title} {layers[i]}: {show(mark.value)}{mark.note}"
            elements += _bar(i, len(marks), mark, y, label, show(mark.value))
    elements += [baseline(y.start), *layer_ticks(layers, y.start, x_title)]
    return drawing(title, y.start + 46, elements)


def _bar(i: int, count: int, mark: Mark, y: Axis, label: str, number: str) -> list[str]:
    band = (RIGHT - LEFT) / count
    width = min(band * _BAR_SHARE, _WIDEST_BAR)
    height = y.start - y(mark.value)
    middle = _centre(i, count)
    box = Box(middle - width / 2, y.start - height, width, max(height, 0.5))
    bar = rect(box, "s1", mark, label)
    if band < _ROOM:
        return [bar]
    return [bar, text(middle, box.y - 6, number, "mid ink")]


def line_chart(
    title: str, series: Sequence[Series], show: Show, x_title: str, log_y: bool = False
) -> str:
    """A line for each of at most three series over layers; gaps where a layer has no mark.

    A logarithmic axis leaves out values of 0.
    """
    if log_y:
        series = [line.positive() for line in series]
    count = max(len(line.marks) for line in series)
    y = _series_axis(series, 14 + _LINE * len(series), log_y)
    elements = _gridlines(y, show)
    for i, line in enumerate(series):
        kind = f"s{i + 1}"
        elements += _series_line(line, y, count, kind, show)
        elements.append(legend_entry(LEFT, 12 + _LINE * i, kind, line.name))
    elements += layer_ticks(range(count), y.start, x_title)
    return drawing(title, y.start + 46, elements)


def _series_axis(series: Sequence[Series], top: float, log_y: bool) -> Axis:
    values = [mark.value for line in series for mark in line.marks if mark] or [1.0]
    low = min(values)
    high = max(values)
    ends = (low / 1.2, high * 1.2) if log_y else round_out(low, high)
    return Axis(*ends, top + _LINES, top, log_y)


def _series_line(line: Series, y: Axis, count: int, kind: str, show: Show) -> list[str]:
    points = [(_centre(i, count), y(mark.value), mark) for i, mark in enumerate(line.marks) if mark]
    fine = count > _COARSE_DOTS
    dots = [
        dot(px, py, kind, mark, f"{line.name}: {show(mark.value)}", fine) for px, py, mark in points
    ]
    return [polyline([(px, py) for px, py, _ in points], kind), *dots]


def heat_map(
    title: str,
    columns: Sequence[Sequence[Mark | None]],
    show: Show,
    palette: str,
    names: tuple[str, str] = ("layer", "expert"),
    rows: Sequence[str] = (),
) -> str:
    """Cells coloured by value: a column per layer, a row per expert; None stays empty.

    `rows` name the rows, which otherwise have numbers.
    """
    grid = _Grid(len(columns), max(len(column) for column in columns))
    values = [mark.value for column in columns for mark in column if mark]
    scale = _ColourScale.of(values, palette)
    elements = grid.row_labels(rows)
    for i, column in enumerate(columns):
        for e, mark in enumerate(column):
            if mark is not None:
                row = rows[e] if rows else f"{names[1]} {e}"
                label = f"{names[0]} {i}, {row}: {show(mark.value)}{mark.note}"
                elements += _cell(grid.cell(i, e), mark, scale, label, show(mark.value))
    if not rows:
        elements.append(text(13, (grid.TOP + grid.bottom) / 2, names[1], "mid", turned=True))
    elements += layer_ticks(range(len(columns)), grid.bottom, names[0])
    elements += _colour_legend(scale, show, grid.bottom + 56)
    return drawing(title, grid.bottom + 78, elements)


@dataclass(frozen=True)
class _Grid:
    """Where the cells of a heat map lie."""

    columns: int
    rows: int

    TOP = 8  # half a row label

    @property
    def width(self) -> float:
        return (RIGHT - LEFT) / self.columns

    @property
    def height(self) -> float:
        return min(_MOST_ROW, max(_LEAST_ROW, _HEAT_MAP / self.rows))

    @property
    def bottom(self) -> float:
        return self.TOP + self.rows * self.height

    def cell(self, column: int, row: int) -> Box:
        x = LEFT + column * self.width
        return Box(x, self.TOP + row * self.height, self.width, self.height)

    def row_labels(self, names: Sequence[str] = ()) -> list[str]:
        """Names or numbers of rows, few enough not to touch."""
        every = ceil(_ROW_LABELS / self.height)
        shown = names or [str(row) for row in range(self.rows)]
        return [
            text(LEFT - 8, self.TOP + self.height * (row + 0.5) + TEXT_DROP, shown[row], "end")
            for row in range(0, self.rows, every)
        ]


@dataclass(frozen=True)
class _ColourScale:
    """Which shade of a palette a value gets."""

    low: float
    high: float
    palette: str

    @staticmethod
    def of(values: Sequence[float], palette: str) -> "_ColourScale":
        if palette == DIVERGING:
            reach = max(map(abs, values), default=0.0)
            return _ColourScale(-reach, reach, palette)
        return _ColourScale(min(values, default=0.0), max(values, default=0.0), palette)

    @property
    def count(self) -> int:
        return 2 * _HALF_SHADES + 1 if self.palette == DIVERGING else _SHADES

    def index(self, value: float) -> int:
        flat = self.high <= self.low
        if self.palette == DIVERGING:
            return _HALF_SHADES + (0 if flat else round(value / self.high * _HALF_SHADES))
        share = 0.0 if flat else (value - self.low) / (self.high - self.low)
        return min(floor(share * _SHADES), _SHADES - 1)

    def strong(self, value: float) -> bool:
        """Whether text on the shade must turn to the other colour."""
        index = self.index(value)
        if self.palette == DIVERGING:
            return abs(index - _HALF_SHADES) == _HALF_SHADES
        return index >= _SHADES // 2

    def shade(self, value: float) -> str:
        return f"{self.palette}{self.index(value)}"


def _cell(box: Box, mark: Mark, scale: _ColourScale, label: str, number: str) -> list[str]:
    cell = rect(box, f"c {scale.shade(mark.value)}", mark, label)
    if box.width < _ROOM or box.height < _ROOM_HEIGHT:
        return [cell]
    kind = "mid pass hi" if scale.strong(mark.value) else "mid pass ink"
    middle = (box.x + box.width / 2, box.y + box.height / 2 + TEXT_DROP)
    return [cell, text(*middle, number, kind)]


def _colour_legend(scale: _ColourScale, show: Show, y: float) -> list[str]:
    """The shades of a heat map with the value at either end."""
    width = 18
    start = (WIDTH - scale.count * width) / 2
    end = start + scale.count * width
    shades = [
        rect(Box(start + i * width, y, width, 13), f"c {scale.palette}{i}")
        for i in range(scale.count)
    ]
    low = text(start - 8, y + 11, show(scale.low), "end")
    return [*shades, low, text(end + 8, y + 11, show(scale.high), "start")]


def horizontal_bars(title: str, bars: Sequence[Bar]) -> str:
    """Bars with their name and label above them; the first one is the subject."""
    pitch = 46
    longest = max(bar.mark.value for bar in bars) or 1
    elements = []
    for i, bar in enumerate(bars):
        y = pitch * i
        length = max(bar.mark.value, 0) / longest * (WIDTH - 4)
        elements.append(text(2, y + 14, _shortened(bar.name), "start ink"))
        elements.append(text(WIDTH - 2, y + 14, bar.label, "end"))
        box = Box(2, y + 21, max(length, 1), 13)
        elements.append(rect(box, "s1" if i == 0 else "s0", bar.mark, bar.label))
    return drawing(title, pitch * len(bars) - 6, elements, "top")


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _gridlines(y: Axis, show: Show) -> list[str]:
    return [gridline(y(value), show(value)) for value in ticks(y, 4)]


def _stretch(share: float) -> float:
    if share in (0, 1):
        return _EXTREME * (2 * share - 1)
    return log(share / (1 - share))


def _value_axis(values: Sequence[float], log_x: bool) -> Axis:
    """The axis of a quantile plot; one that is not logarithmic has zero in its middle."""
    low = min(values)
    high = max(values)
    if not log_x:
        reach = max(abs(low), abs(high)) * 1.05 or 1.0
        return Axis(-reach, reach, LEFT, RIGHT)
    low = max(low, high * _LOG_FLOOR)
    return Axis(low / 1.5, high * 1.5, LEFT, RIGHT, log=True)


def _centre(index: int, count: int) -> float:
    """The middle of the band of a layer."""
    return LEFT + (index + 0.5) * (RIGHT - LEFT) / count


def layer_ticks(layers: Sequence[int], y: float, name: str, axis: Axis | None = None) -> list[str]:
    """Numbers of layers below a chart, few enough to read; on the band of all charts or an `axis`
    of layers."""
    count = len(layers)
    every = _label_step(count)
    shown = range(0, count, every)
    labels = [
        text(axis(i) if axis else _centre(i, count), y + 17, str(layers[i]), "mid") for i in shown
    ]
    middle = (axis.start + axis.end) / 2 if axis else (LEFT + RIGHT) / 2
    return [*labels, text(middle, y + 36, name, "mid")]


def _label_step(count: int) -> int:
    """The least power of two that leaves few enough labels."""
    every = 1
    while count / every > _MOST_LAYER_LABELS:
        every *= 2
    return every
