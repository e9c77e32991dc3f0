"""JSON with one value changed, as damage or malice would leave it."""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

Place = tuple[str | int, ...]

# ... removes a value.
VALUES = (..., None, -1, 0, 1.5, -0.5, 10**5, 10**12, 10**400, "x", [], {}, [None], True, math.nan)
_ITEMS = 12  # of a list or an object of that many alike, the first


def places(content: Any, above: Place = ()) -> Iterator[Place]:
    """Where a tree holds a value; inner nodes and their values both."""
    alike = isinstance(content, list) or len(content) > 100
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for number, (key, value) in enumerate(items):
        if alike and number >= _ITEMS:
            break
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def changed(content: Any, place: Place, value: object) -> Any:
    """A copy with another value in a place."""
    copy = deepcopy(content)
    part = copy
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    if value is ...:
        del part[place[-1]]
    return copy


def mutations(content: Any, *added: str) -> list[tuple[Place, object]]:
    """Every place with every value, and so for keys that are not there."""
    new = [(key,) for key in added if key not in content]
    return [(place, value) for place in [*places(content), *new] for value in VALUES]
