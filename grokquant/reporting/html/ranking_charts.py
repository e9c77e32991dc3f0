"""Charts of several models: each has a colour, a shape and its name beside what is drawn for it.

Six colours that stay apart for colour-blind readers; a seventh model starts over with other shapes
and dashed lines. A model's number, from 0, decides its colour and shape.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi, sin

from grokquant.reporting.html.axis import Axis, round_out, ticks
from grokquant.reporting.html.charts import Series, Show, layer_ticks
from grokquant.reporting.html.svg import (
    LEFT,
    RIGHT,
    TEXT_DROP,
    WIDTH,
    Mark,
    axis_title,
    drawing,
    gridline,
    outline,
    polyline,
    segment,
    text,
    x_tick,
)

COLOURS = 6
# The most room that a letter takes, at the larger font of a phone, and a line of them.
_LETTER = 8.4
_LINE = 16
# Names stand at the right of lines: room for them, and how many letters fit into it.
_NAME_ROOM = 148
_LONGEST_NAME = 16
# The scatter plot lies below the title of its vertical axis.
_TOP = 26
_HEIGHT = 250
_FOOT = _TOP + _HEIGHT
_RADIUS = 5  # of a marker
# Points of equal size are drawn this far apart, so that their intervals do not cover each other.
_BESIDE = 7
# Where the baseline of a name may lie below that of its point, the best first: beside the point,
# then line by line away from it.
_NAME_OFFSETS = (TEXT_DROP, 21, -13, 37, -29, 53, -45, 69)
# A long line of many layers gets markers on about this many of them.
_MARKERS = 8

XY = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A model at `x` and `y`, whose interval is `low` to `high`; open unless it is on the front."""

    name: str
    model: int
    x: Mark
    y: Mark
    low: float
    high: float
    on_front: bool


@dataclass(frozen=True)
class Line:
    """A series over layers, with the number of its model."""

    model: int
    series: Series


def legend_key(model: int) -> str:
    """The marker of a model by itself, for a table."""
    marker = _marker(model, (8, 8), "", Mark(0.0), "")
    return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{marker}</svg>'


def scatter(
    title: str, points: Sequence[Point], show: Show, x_title: str, y_title: str, log_y: bool = False
) -> str:
    """Models by size (rightwards) and loss (upwards), with intervals and the front as stairs.

    On a logarithmic axis values of 0 or less lie at the foot.
    """
    x = _size_axis(points)
    y = _loss_axis(points, log_y)
    places = _side_by_side([(x(point.x.value), y(point.y.value)) for point in points])
    elements = [gridline(y(value), show(value)) for value in ticks(y, 4)]
    elements += [x_tick(x(value), y.start, f"{value:g}") for value in ticks(x)]
    elements.append(_stairs(points, x, y))
    for point, (px, _) in zip(points, places, strict=True):
        low = y(max(point.low, y.low))
        high = y(max(point.high, y.low))
        elements.append(segment(px, low, px, high, f"whisker {_colour(point.model)}"))
    for point, place in zip(points, places, strict=True):
        label = f"{point.name}: {show(point.y.value)} at {point.x.value:.2f} bits per weight"
        kind = "" if point.on_front else "open"
        elements.append(_marker(point.model, place, kind, point.y, label))
    elements += _names_of_points(points, places)
    elements += [text(2, 12, y_title, "start"), axis_title(y.start + 38, x_title)]
    return drawing(title, y.start + 44, elements)


def lines_by_layer(title: str, lines: Sequence[Line], show: Show, x_title: str) -> str:
    """A line for each model over layers, named at its end."""
    right = RIGHT - _NAME_ROOM
    count = max(len(line.series.marks) for line in lines)
    values = [mark.value for line in lines for mark in line.series.marks if mark]
    height = max(170, _LINE * len(lines))  # names at the ends need a line each
    x = Axis(-0.5, count - 0.5, LEFT, right)
    y = Axis(*round_out(min(values), max(values)), 14 + height, 14)
    elements = [gridline(y(value), show(value), right) for value in ticks(y, 4)]
    for line in lines:
        elements += _model_line(line, x, y, show)
    elements += _names_of_lines(lines, x, y)
    return drawing(
        title, y.start + 46, [*elements, *layer_ticks(range(count), y.start, x_title, x)]
    )


def _model_line(line: Line, x: Axis, y: Axis, show: Show) -> list[str]:
    """A line with its markers; on a long one most are hidden, but for where they are pointed at."""
    marks = [(i, mark) for i, mark in enumerate(line.series.marks) if mark]
    dash = " dash" if line.model >= COLOURS else ""
    path = [(x(i), y(mark.value)) for i, mark in marks]
    elements = [polyline(path, _colour(line.model) + dash)]
    every = max(1, len(line.series.marks) // _MARKERS)
    for i, mark in marks:
        kind = "" if i % every == line.model % every else "hidden"
        label = f"{line.series.name}, layer {i}: {show(mark.value)}"
        elements.append(_marker(line.model, (x(i), y(mark.value)), kind, mark, label))
    return elements


def _names_of_lines(lines: Sequence[Line], x: Axis, y: Axis) -> Iterator[str]:
    """Each name at the right, with a leader from the end of its line."""
    ends = [_end(line, x, y) for line in lines]
    heights = _spread([py for _, py in ends], y.start)
    for line, (px, py), height in zip(lines, ends, heights, strict=True):
        leader = f"leader {_colour(line.model)}"
        yield segment(px + 6, py, x.end + 22, height, leader)
        name = _shortened(line.series.name)
        yield text(x.end + 26, height + TEXT_DROP, name, "start ink")


def _end(line: Line, x: Axis, y: Axis) -> XY:
    return [(x(i), y(mark.value)) for i, mark in enumerate(line.series.marks) if mark][-1]


def _size_axis(points: Sequence[Point]) -> Axis:
    sizes = [point.x.value for point in points]
    room = (max(sizes) - min(sizes)) * 0.12 or 0.5
    return Axis(min(sizes) - room, max(sizes) + room, LEFT, RIGHT)


def _loss_axis(points: Sequence[Point], log_y: bool) -> Axis:
    ends = [end for point in points for end in (point.low, point.high, point.y.value)]
    if not log_y:
        low = min(ends)
        high = max(ends)
        room = (high - low) * 0.08 or abs(high) * 0.01 or 1.0
        return Axis(low - room, high + room, _FOOT, _TOP)
    positive = [end for end in ends if end > 0] or [1.0]
    values = [point.y.value for point in points if point.y.value > 0] or [1.0]
    low = max(min(positive), min(values) / 4)  # intervals near zero would stretch the axis
    return Axis(low / 1.6, max(positive) * 1.6, _FOOT, _TOP, log=True)


def _side_by_side(places: Sequence[XY]) -> list[XY]:
    """Places of points, those of equal size moved apart so that their intervals can be told."""
    moved: list[XY] = []
    for i, (x, y) in enumerate(places):
        same = [j for j, (other, _) in enumerate(places) if abs(x - other) < 1]
        position = sum(j < i for j in same)
        moved.append((x + _BESIDE * (position - (len(same) - 1) / 2), y))
    return moved


def _stairs(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The front: what lies above it or to its right is beaten."""
    front = sorted((point.x.value, point.y.value) for point in points if point.on_front)
    if not front:
        return ""
    corners = []
    above = y.end
    for size, loss in front:
        height = y(max(loss, y.low))
        corners += [(x(size), above), (x(size), height)]
        above = height
    return polyline([*corners, (RIGHT, above)], "front")


@dataclass(frozen=True)
class _Extent:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "_Extent") -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)

    @property
    def inside(self) -> bool:
        """Whether it is within the drawing."""
        across = self.left >= LEFT and self.right <= WIDTH
        return across and self.top >= 14 and self.bottom <= _FOOT


@dataclass(frozen=True)
class _Spot:
    """Where a name may stand: its anchor, what it covers, whether it needs a leader."""

    side: str
    x: float
    y: float
    extent: _Extent
    leader: bool


def _names_of_points(points: Sequence[Point], places: Sequence[XY]) -> Iterator[str]:
    """Each name beside its point or, with a leader, where it covers nothing."""
    taken = [_Extent(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    for i in sorted(range(len(points)), key=lambda i: places[i][1]):
        px, py = places[i]
        name = _shortened(points[i].name)
        spots = list(_spots(px, py, len(name) * _LETTER))
        free = [s for s in spots if not any(s.extent.overlaps(extent) for extent in taken)]
        spot = (free or spots)[0]
        taken.append(spot.extent)
        if spot.leader:
            end = spot.y + 3 if spot.y < py else spot.y - 11
            yield segment(px, py, spot.x, end, f"leader {_colour(points[i].model)}")
        yield text(spot.x, spot.y, name, f"{spot.side} ink halo")


def _spots(px: float, py: float, width: float) -> Iterator[_Spot]:
    """Places for a name of a point that are inside the drawing, the best first."""
    for offset in _NAME_OFFSETS:
        leader = offset != TEXT_DROP
        gap = 6 if leader else 10
        y = py + offset
        right = _Extent(px + gap, y - 12, px + gap + width, y + 3)
        left = _Extent(px - gap - width, y - 12, px - gap, y + 3)
        if right.inside:
            yield _Spot("start", right.left, y, right, leader)
        if left.inside:
            yield _Spot("end", left.right, y, left, leader)
    # Nothing fits: on the left, wherever that is.
    extent = _Extent(px - 10 - width, py - 7, px - 10, py + 8)
    yield _Spot("end", px - 10, py + TEXT_DROP, extent, False)


def _spread(heights: Sequence[float], foot: float) -> list[float]:
    """Heights at least a line apart, in the same order, none below `foot`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    above = 6.0 - _LINE
    for i in order:
        placed[i] = max(placed[i], above + _LINE)
        above = placed[i]
    below = foot + _LINE
    for i in reversed(order):
        placed[i] = min(placed[i], below - _LINE)
        below = placed[i]
    return placed


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _colour(model: int) -> str:
    return f"s{model % COLOURS + 1}"


def _marker(model: int, place: XY, kind: str, mark: Mark, label: str) -> str:
    x, y = place
    shape = _SHAPES[(model + model // COLOURS) % len(_SHAPES)]
    corners = [(x + _RADIUS * dx, y + _RADIUS * dy) for dx, dy in shape]
    return outline(corners, f"m {_colour(model)} {kind}".strip(), mark, label)


def _polygon(corners: int, turn: float = 0.0, reach: float = 1.0) -> list[XY]:
    """A regular polygon around 0, its first corner upwards and then turned clockwise."""
    angles = (turn + 2 * pi * i / corners for i in range(corners))
    return [(reach * sin(a), -reach * cos(a)) for a in angles]


def _quarter_turns(corner: XY, quarters: int) -> XY:
    x, y = corner
    for _ in range(quarters):
        x, y = -y, x
    return x, y


_ARM = ((-0.35, -0.35), (-0.35, -1.1), (0.35, -1.1))
_CROSS = [_quarter_turns(corner, quarters) for quarters in range(4) for corner in _ARM]
# Reaches make all of them look equally large.
_SHAPES = (
    _polygon(20),  # disc
    _polygon(4, pi / 4, 1.25),  # square
    _polygon(3, 0, 1.3),  # triangle
    _polygon(4, 0, 1.3),  # diamond
    _polygon(3, pi, 1.3),  # triangle on its tip
    _CROSS,
)
