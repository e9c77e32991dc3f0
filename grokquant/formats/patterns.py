"""Regular expressions of configs, matched in a time that grows with the length of a name only.

A config may come from anybody, and Python's `re` takes years for `([a-z]+)+!` on a long name. Here
a pattern becomes an automaton: the set of states it may be in moves on character by character.

    a(b|c)+     0 --a--> 1 --b or c--> 2     2 is accepting, and goes on as 1 does

Of Python's syntax everything works that needs no way back: literals, classes, groups, alternatives,
quantifiers, anchors, and looking ahead at the start. The rest is refused by name.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 2000
MAX_STATES = 2000
_MAX_CACHED = 50_000
_ACCEPT = 0
_START = "start"
_END = "end"
_ANCHORS = {
    _constants.AT_BEGINNING: _START,
    _constants.AT_BEGINNING_STRING: _START,
    _constants.AT_END: _END,
    _constants.AT_END_STRING: _END,
}
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    _constants.CATEGORY_DIGIT: str.isdecimal,
    _constants.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    _constants.CATEGORY_SPACE: str.isspace,
    _constants.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    _constants.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    _constants.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_Test = Callable[[str], bool]


class Pattern:
    """A compiled pattern. Raises ValueError where `text` is none, or one that is not supported."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} characters")
        try:
            parsed = _parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None
        if parsed.state.flags & ~re.UNICODE.value:
            raise ValueError("flags are not supported")
        items = list(parsed)
        self.ahead: list[tuple[bool, _Automaton]] = []
        while items and (_is_ahead(items[0]) or _is_start(items[0])):
            operator, value = items.pop(0)
            if operator is not _constants.AT:  # a start is always at the start
                wanted = operator is _constants.ASSERT
                self.ahead.append((wanted, _Automaton(value[1])))
        self.automaton = _Automaton(items)

    def match(self, name: str) -> bool:
        """Whether `name` begins with what the pattern describes, as `re.match` has it."""
        seen = all(automaton.match(name) == wanted for wanted, automaton in self.ahead)
        return seen and self.automaton.match(name)


@lru_cache(4096)
def pattern(text: str) -> Pattern:
    """The compiled pattern, from the second time on without work."""
    return Pattern(text)


def _is_ahead(item: tuple) -> bool:
    operator, value = item
    return operator in (_constants.ASSERT, _constants.ASSERT_NOT) and value[0] == 1


def _is_start(item: tuple) -> bool:
    operator, value = item
    return operator is _constants.AT and _ANCHORS.get(value) == _START


class _Automaton:
    """States with a test of the next character, or an anchor, or neither; each has successors."""

    def __init__(self, items: Iterable) -> None:
        self.tests: list[_Test | str | None] = [None]
        self.next: list[tuple[int, ...]] = [()]
        self.steps = 0
        self.cache: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        try:
            self.first = self._sequence(items, _ACCEPT)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def match(self, name: str) -> bool:
        states = self._reached([self.first], {_START} if name else {_START, _END})
        for character in name:
            if _ACCEPT in states or not states:
                return _ACCEPT in states
            key = (states, character)
            if key not in self.cache:
                if len(self.cache) >= _MAX_CACHED:
                    self.cache.clear()
                self.cache[key] = self._moved(states, character)
            states = self.cache[key]
        return _ACCEPT in self._reached(states, {_END})

    def _moved(self, states: frozenset[int], character: str) -> frozenset[int]:
        found: list[int] = []
        for state in states:
            test = self.tests[state]
            if callable(test) and test(character):
                found.extend(self.next[state])
        return self._reached(found, set())

    def _reached(self, states: Iterable[int], anchors: set[str]) -> frozenset[int]:
        """`states` and all that follow without a character, where these anchors hold."""
        seen: set[int] = set()
        open_states = list(states)
        while open_states:
            state = open_states.pop()
            if state in seen:
                continue
            seen.add(state)
            test = self.tests[state]
            if test is None or (isinstance(test, str) and test in anchors):
                open_states.extend(self.next[state])
        return frozenset(seen)

    # building, from the end of the pattern to its start

    def _sequence(self, items: Iterable, end: int) -> int:
        """The state from which `items` lead to `end`."""
        self.steps += 1
        if self.steps > MAX_STATES:
            raise ValueError("too large")
        for operator, value in reversed(list(items)):
            end = self._item(operator, value, end)
        return end

    def _item(self, operator: Any, value: Any, end: int) -> int:
        if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            least, most, inner = value
            return self._repeat(least, most, inner, end)
        if operator is _constants.SUBPATTERN:
            _, added, removed, inner = value
            if added or removed:
                raise ValueError("flags are not supported")
            return self._sequence(inner, end)
        if operator is _constants.BRANCH:
            return self._add(None, *(self._sequence(branch, end) for branch in value[1]))
        if operator is _constants.AT and value in _ANCHORS:
            return self._add(_ANCHORS[value], end)
        return self._add(_character(operator, value), end)

    def _repeat(self, least: int, most: Any, inner: Any, end: int) -> int:
        tail = end
        if most is _constants.MAXREPEAT:
            tail = self._add(None, end)
            self.next[tail] = (self._sequence(inner, tail), end)
            most = least
        for _ in range(most - least):
            tail = self._add(None, self._sequence(inner, tail), end)
        for _ in range(least):
            tail = self._sequence(inner, tail)
        return tail

    def _add(self, test: _Test | str | None, *following: int) -> int:
        if len(self.next) >= MAX_STATES:
            raise ValueError("too large")
        self.tests.append(test)
        self.next.append(following)
        return len(self.next) - 1


def _character(operator: Any, value: Any) -> _Test:
    """The test of one character."""
    if operator is _constants.LITERAL:
        return chr(value).__eq__
    if operator is _constants.NOT_LITERAL:
        return chr(value).__ne__
    if operator is _constants.ANY:
        return "\n".__ne__
    if operator is _constants.RANGE:
        first, last = map(chr, value)
        return lambda c: first <= c <= last
    if operator is _constants.CATEGORY:
        return _CATEGORIES[value]
    if operator is _constants.IN:
        negated = value[0][0] is _constants.NEGATE
        tests = [_character(*item) for item in value[negated:]]
        return lambda c: any(test(c) for test in tests) != negated
    raise ValueError(f"{str(operator).lower().replace('_', ' ')} is not supported")
