"""Elements of a drawing as SVG text: lines, labels, dots, bars. All drawings share one width.

Elements that stand for a number of the report carry its JSON pointer in `data-path` and its full
precision in `data-value`. Colours are classes of the stylesheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grokquant.escaping import html_text
from grokquant.reporting.json_pointer import Datum

# Units of the viewBox; on a phone of 390 px one is about 0.8 px. The plot lies between LEFT, which
# leaves room for labels such as "99.9 %", and RIGHT, which leaves half a dot.
WIDTH = 440
LEFT = 56
RIGHT = 428
# From the middle of digits down to their baseline, at the font size of the stylesheet.
TEXT_DROP = 4.5
_DOT = 4
_FINE_DOT = 2.5


@dataclass(frozen=True)
class Mark:
    """A value to draw. `source` is the number of the report behind it, if there is one: the value
    itself or, for a derived value, the number that it is derived from."""

    value: float
    source: Datum | None = None
    note: str = ""

    @property
    def attributes(self) -> str:
        if self.source is None:
            return ""
        pointer = html_text(self.source.pointer)
        return f' data-path="{pointer}" data-value="{self.source.value!r}"'


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float


def mark_of(datum: Datum | None) -> Mark | None:
    return None if datum is None else Mark(datum.value, datum)


def drawing(title: str, height: float, elements: Sequence[str], kind: str = "") -> str:
    """A whole drawing with an accessible name; `kind` "top" keeps it at the top of its figure."""
    label = html_text(title)
    name = f'class="{kind}" ' if kind else ""
    return (
        f'<svg {name}viewBox="0 0 {WIDTH} {_short(height)}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(elements)}</svg>"
    )


def gridline(y: float, label: str, right: float = RIGHT) -> str:
    return segment(LEFT, y, right, y, "level") + text(LEFT - 8, y + TEXT_DROP, label, "end")


def x_tick(x: float, y: float, label: str) -> str:
    return segment(x, y, x, y + 5, "base") + text(x, y + 19, label, "mid")


def baseline(y: float) -> str:
    return segment(LEFT, y, RIGHT, y, "base")


def reference_line(x: float, label_y: float, bottom: float, name: str) -> str:
    """A dashed vertical line with its name on the side that has more room."""
    on_the_left = x > WIDTH / 2
    label_x = x - 6 if on_the_left else x + 6
    label = text(label_x, label_y, name, "end ink" if on_the_left else "start ink")
    return segment(x, label_y - 10, x, bottom, "mark") + label


def segment(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    start = f'x1="{_short(x1)}" y1="{_short(y1)}"'
    end = f'x2="{_short(x2)}" y2="{_short(y2)}"'
    return f'<line class="{kind}" {start} {end}/>'


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
    return f'<polyline class="line {kind}" points="{path}"/>'


def dot(x: float, y: float, kind: str, mark: Mark, label: str, fine: bool = False) -> str:
    circle = _circle(x, y, _FINE_DOT if fine else _DOT)
    kinds = f"{kind} fine" if fine else kind
    return f'<circle class="{kinds}" {circle}{mark.attributes}>{_tooltip(label)}</circle>'


def outline(corners: Sequence[tuple[float, float]], kind: str, mark: Mark, label: str) -> str:
    """A closed shape that stands for a number."""
    path = "L".join(f"{_short(x)},{_short(y)}" for x, y in corners)
    return f'<path class="{kind}" d="M{path}Z"{mark.attributes}>{_tooltip(label)}</path>'


def rect(box: Box, kind: str, mark: Mark | None = None, label: str = "") -> str:
    place = f'x="{_short(box.x)}" y="{_short(box.y)}"'
    size = f'width="{_short(box.width)}" height="{_short(box.height)}"'
    attributes = mark.attributes if mark else ""
    return f'<rect class="{kind}" {place} {size}{attributes}>{_tooltip(label)}</rect>'


def legend_entry(x: float, y: float, kind: str, name: str) -> str:
    sample = polyline([(x, y), (x + 18, y)], kind)
    circle = f'<circle class="{kind}" {_circle(x + 9, y, _DOT)}/>'
    return sample + circle + text(x + 26, y + TEXT_DROP, name, "start ink")


def axis_title(y: float, title: str) -> str:
    return text((LEFT + RIGHT) / 2, y, title, "mid")


def text(x: float, y: float, words: str, kind: str, turned: bool = False) -> str:
    """`kind` says which end of the words is at `x` (start, mid, end), and their colour."""
    place = f'x="{_short(x)}" y="{_short(y)}"'
    turn = f' transform="rotate(-90 {_short(x)} {_short(y)})"' if turned else ""
    return f'<text class="{kind}" {place}{turn}>{html_text(words)}</text>'


def _circle(x: float, y: float, radius: float) -> str:
    return f'cx="{_short(x)}" cy="{_short(y)}" r="{radius}"'


def _tooltip(label: str) -> str:
    return f"<title>{html_text(label)}</title>" if label else ""


def _short(value: float) -> str:
    """A coordinate to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")
