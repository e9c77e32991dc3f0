"""Plots of several runs: each has a colour, a shape and its name beside what is drawn for it.

Six colours that stay apart for colour-blind readers; a seventh run begins them again with other
shapes and dashed lines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi, sin

from grokquant.reporting.html.charts import Series, Show, layer_ticks
from grokquant.reporting.html.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    Mark,
    axis_title,
    level,
    polyline,
    round_out,
    rule,
    shape,
    svg,
    text_at,
    tick,
    ticks,
)

COLOURS = 6
# Room that a letter takes at most, on a phone, and a line of them.
_LETTER, _LINE = 8.4, 16
_NAME_ROOM, _LONGEST = 148, 16
_TOP, _HEIGHT = 26, 250

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A run at `x` and `y`, whose interval is `low` to `high`; open unless it is on the front."""

    name: str
    run: int
    x: Mark
    y: Mark
    low: float
    high: float
    on_front: bool


def key(run: int) -> str:
    """The mark of a run by itself, for a table."""
    drawn = _symbol(run, 8, 8, "", Mark(0.0), "")
    return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{drawn}</svg>'


def scatter(
    title: str, points: Sequence[Point], show: Show, x_title: str, y_title: str, log_y: bool = False
) -> str:
    """Runs by size (rightwards) and loss (upwards), with intervals and the front as stairs.

    On a logarithm, what is 0 or less lies at the foot.
    """
    y = _loss_axis(points, log_y)
    sizes = [point.x.value for point in points]
    room = (max(sizes) - min(sizes)) * 0.12 or 0.5
    x = Axis(min(sizes) - room, max(sizes) + room, LEFT, RIGHT)
    body = [level(y(value), show(value)) for value in ticks(y, 4)]
    body += [tick(x(value), y.start, f"{value:g}") for value in ticks(x)]
    body.append(_stairs(points, x, y))
    places = _side_by_side([(x(point.x.value), y(point.y.value)) for point in points])
    for point, (px, _) in zip(points, places, strict=True):
        ends = y(max(point.low, y.low)), y(max(point.high, y.low))
        body.append(rule(px, ends[0], px, ends[1], f"whisker {_colour(point.run)}"))
    for point, (px, py) in zip(points, places, strict=True):
        label = f"{point.name}: {show(point.y.value)} at {point.x.value:.2f} bits per weight"
        body.append(_symbol(point.run, px, py, "" if point.on_front else "open", point.y, label))
    body += _names(points, places)
    body += [text_at(2, 12, y_title, "start"), axis_title(y.start + 38, x_title)]
    return svg(title, y.start + 44, body)


def run_lines(
    title: str, series: Sequence[Series], runs: Sequence[int], show: Show, x_title: str
) -> str:
    """A line for each run over layers, named at its end."""
    right = RIGHT - _NAME_ROOM
    values = [m.value for line in series for m in line.marks if m]
    height = max(170, _LINE * len(series))
    y = Axis(*round_out(min(values), max(values)), 14 + height, 14)
    count = max(len(line.marks) for line in series)
    x = Axis(-0.5, count - 0.5, LEFT, right)
    body = [level(y(value), show(value), right) for value in ticks(y, 4)]
    ends = []
    for line, run in zip(series, runs, strict=True):
        points = [(x(i), y(m.value), m) for i, m in enumerate(line.marks) if m]
        dash = " dash" * (run >= COLOURS)
        body.append(polyline([(px, py) for px, py, _ in points], _colour(run) + dash))
        every = max(1, count // 8)
        for i, (px, py, mark) in enumerate(points):
            small = "" if i % every == run % every else "hidden"
            label = f"{line.name}, layer {i}: {show(mark.value)}"
            body.append(_symbol(run, px, py, small, mark, label))
        ends.append((points[-1][1], points[-1][0]))
    heights = _spread([end[0] for end in ends], 14 + height)
    for line, run, (py, px), at in zip(series, runs, ends, heights, strict=True):
        body.append(rule(px + 6, py, right + 22, at, f"leader {_colour(run)}"))
        body.append(text_at(right + 26, at + 4.5, _short(line.name), "start ink"))
    return svg(title, y.start + 46, [*body, *layer_ticks(range(count), y.start, x_title, x)])


def _loss_axis(points: Sequence[Point], log_y: bool) -> Axis:
    ends = [end for point in points for end in (point.low, point.high, point.y.value)]
    if not log_y:
        low, high = min(ends), max(ends)
        room = (high - low) * 0.08 or abs(high) * 0.01 or 1.0
        return Axis(low - room, high + room, _TOP + _HEIGHT, _TOP)
    found = [end for end in ends if end > 0] or [1.0]
    values = [point.y.value for point in points if point.y.value > 0] or [1.0]
    low = max(min(found), min(values) / 4)
    return Axis(low / 1.6, max(found) * 1.6, _TOP + _HEIGHT, _TOP, log=True)


def _side_by_side(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places of points with those of one size moved apart, so that their intervals can be told."""
    moved: list[tuple[float, float]] = []
    for x, y in places:
        same = sum(abs(x - other) < 1 for other, _ in places)
        before = sum(abs(x - other) < 1 for other, _ in places[: len(moved)])
        moved.append((x + 7 * (before - (same - 1) / 2), y))
    return moved


def _stairs(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The front: whatever lies above it or to its right is beaten."""
    front = sorted((point.x.value, point.y.value) for point in points if point.on_front)
    corners, above = [], y.end
    for size, loss in front:
        corners += [(x(size), above), (x(size), y(max(loss, y.low)))]
        above = corners[-1][1]
    return polyline([*corners, (RIGHT, above)], "front") if front else ""


def _names(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Each name beside its point or, tied to it by a line, where it covers nothing."""
    taken: list[Box] = [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    for index in sorted(range(len(points)), key=lambda i: places[i][1]):
        px, py = places[index]
        name = _short(points[index].name)
        spots = list(_spots(px, py, len(name) * _LETTER))
        free = [spot for spot in spots if not any(_overlap(spot.box, box) for box in taken)]
        spot = (free or spots)[0]
        taken.append(spot.box)
        if spot.tied:
            foot = spot.y + 3 if spot.y < py else spot.y - 11
            yield rule(px, py, spot.x, foot, f"leader {_colour(points[index].run)}")
        yield text_at(spot.x, spot.y, name, f"{spot.side} ink halo")


@dataclass(frozen=True)
class _Spot:
    """Where a name may stand: its anchor, the box that it takes, whether a line must lead there."""

    side: str
    x: float
    y: float
    box: Box
    tied: bool


def _spots(px: float, py: float, wide: float) -> Iterator[_Spot]:
    """The places around a point that are inside the drawing, the nearest first."""
    for dy in (4.5, 21, -13, 37, -29, 53, -45, 69):
        tied = dy != 4.5
        near = 6 if tied else 10
        for side, x, start in (
            ("start", px + near, px + near),
            ("end", px - near, px - near - wide),
        ):
            box = (start, py + dy - 12, start + wide, py + dy + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 14
            if inside and box[3] <= _TOP + _HEIGHT:
                yield _Spot(side, x, py + dy, box, tied)
    yield _Spot("end", px - 10, py + 4.5, (px - 10 - wide, py - 7, px - 10, py + 8), False)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _spread(heights: Sequence[float], foot: float) -> list[float]:
    """Heights at least a line apart, in the same order, none below `foot`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = dict(enumerate(heights))
    above = 6.0 - _LINE
    for i in order:
        placed[i] = above = max(placed[i], above + _LINE)
    below = foot + _LINE
    for i in reversed(order):
        placed[i] = below = min(placed[i], below - _LINE)
    return [placed[i] for i in range(len(heights))]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]


def _colour(run: int) -> str:
    return f"s{run % COLOURS + 1}"


def _symbol(run: int, x: float, y: float, kind: str, mark: Mark, label: str) -> str:
    corners = _SHAPES[(run + run // COLOURS) % len(_SHAPES)]
    points = [(x + 5 * dx, y + 5 * dy) for dx, dy in corners]
    return shape(points, f"m {_colour(run)} {kind}".strip(), mark, label)


def _round(corners: int, turn: float = 0.0, reach: float = 1.0) -> list[tuple[float, float]]:
    angles = (turn + 2 * pi * i / corners for i in range(corners))
    return [(reach * sin(a), -reach * cos(a)) for a in angles]


def _turned(corner: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = corner
    for _ in range(quarters):
        x, y = -y, x
    return x, y


_CORNER = ((-0.35, -0.35), (-0.35, -1.1), (0.35, -1.1))
_CROSS = [(x, y) for turn in range(4) for x, y in (_turned(corner, turn) for corner in _CORNER)]
# Disc, square, triangle, diamond, triangle on its tip, cross.
_SHAPES = (
    _round(20), _round(4, pi / 4, 1.25), _round(3, 0, 1.3), _round(4, 0, 1.3), _round(3, pi, 1.3),
    _CROSS,
)  # fmt: skip
