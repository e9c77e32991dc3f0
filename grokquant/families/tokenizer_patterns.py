"""Regular expressions in a tokenizer.json, judged before the tokenizers library runs them.

Its engine (Oniguruma) goes back and tries again where a match fails, so that `(a|aa)+$` takes twice
the time for every `a` more. A pattern does so if it can read one text along two ways that part and
meet again: here `aa` as one round of the group or as two. So a pattern becomes an automaton, whose
states are the characters of the pattern, and two walkers look for such ways in its loops.

    (a|bc)+     a <-> a,   a -> b -> c -> a       each text is read in one way
    (a|aa)+     a -> a -> a  and  a -> a' -> a''  both read `aa`: refused

Theory: Weideman, van der Merwe, Berglund, Watson, "Analyzing Matching Time Behavior of Backtracking
Regular Expression Matchers by Using Ambiguity of NFA" (2016). What stands in doubt here, such as
looking ahead, is taken to match.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

MAX_LENGTH = 20_000
_MAX_STATES = 2000
_MAX_DEPTH = 50
# Loops in a row that share a character: each multiplies the time by the length of the text. The
# patterns in use have two.
_MAX_LOOPS = 3
# Copies that a bounded repetition of a character is written out to; more are taken for any number.
_MAX_COPIES = 8
_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")
_PROPERTY = re.compile(r"[pP]\{(\^?)(\w+)\}")
_NUMBER = re.compile(r"x\{([0-9A-Fa-f]{1,6})\}|x([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4})")
_LOOK = re.compile(r"\?(?:=|!|<=|<!)")
_OPENING = re.compile(r"\?(?:[:>]|<\w+>|([a-z]*)(?:-[a-z]+)?([:)]))")
_ZERO_WIDTH = set("bBAzZG")
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b"}
_Test = Callable[[str], bool]
_TESTS: dict[str, _Test] = {
    "s": str.isspace,
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "h": lambda c: c in "0123456789abcdefABCDEF",
}


def check_pattern(text: str) -> None:
    """Raises ValueError where a match might take a time that no text is worth."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    automata = [_Parser(text).automaton()]
    for automaton in automata:
        automata.extend(automaton.looked_at)
        if automaton.is_ambiguous():
            raise ValueError("its repetitions can read the same text in many ways")
        if automaton.loops_in_a_row() > _MAX_LOOPS:
            raise ValueError(f"more than {_MAX_LOOPS} repetitions in a row share a character")


def _character(found: re.Match) -> str:
    """The character that a `_NUMBER` stands for."""
    return chr(min(int(found[1] or found[2] or found[3], 16), 0x10FFFF))


@cache
def _characters() -> str:
    """Some characters of every kind: two tests that both accept one are taken to overlap."""
    of_kind: dict[str, list[str]] = {}
    for code in range(0x30000):
        found = of_kind.setdefault(unicodedata.category(chr(code)), [])
        if code < 0x100 or len(found) < 4:
            found.append(chr(code))
    return "".join(character for found in of_kind.values() for character in found)


@dataclass
class _Part:
    """A part of a pattern: whether it matches nothing, and the states it begins and ends with."""

    empty: bool
    first: list[int]
    last: list[int]
    one_character: bool = False


@dataclass
class _Automaton:
    """`accepts` holds a bit for each known character; `next` has a state twice if two ways lead to
    it."""

    accepts: list[int] = field(default_factory=list)
    next: list[list[int]] = field(default_factory=list)
    looked_at: "list[_Automaton]" = field(default_factory=list)
    repeats_nothing: bool = False

    def add(self, accepts: int) -> _Part:
        if len(self.accepts) >= _MAX_STATES:
            raise ValueError("too large")
        self.accepts.append(accepts)
        self.next.append([])
        state = len(self.accepts) - 1
        return _Part(False, [state], [state], one_character=True)

    def link(self, lasts: list[int], firsts: list[int]) -> None:
        for last in lasts:
            self.next[last].extend(firsts)

    def is_ambiguous(self) -> bool:
        return self.repeats_nothing or any(
            self._parts_and_meets(state, loop) for loop in self._loops() for state in loop
        )

    def _parts_and_meets(self, start: int, loop: frozenset[int]) -> bool:
        """Whether two walkers from `start`, over the same characters, part and meet there again."""
        seen = set()
        open_pairs = [(start, start, False)]
        while open_pairs:
            one, other, parted = open_pairs.pop()
            for way, a in enumerate(self.next[one]):
                for other_way, b in enumerate(self.next[other]):
                    if a not in loop or b not in loop or not self.accepts[a] & self.accepts[b]:
                        continue
                    apart = parted or one != other or way != other_way
                    if a == b == start and apart:
                        return True
                    if (pair := (a, b, apart)) not in seen:
                        seen.add(pair)
                        open_pairs.append(pair)
        return False

    def loops_in_a_row(self) -> int:
        """The largest number of loops that follow each other and share a character."""
        loops = self._loops()
        reach = [self._reached(loop) for loop in loops]
        masks = [self._mask(loop) for loop in loops]

        def longest(index: int, shared: int) -> int:
            following = (
                longest(other, shared & masks[other])
                for other, loop in enumerate(loops)
                if other != index and loop & reach[index] and shared & masks[other]
            )
            return 1 + max(following, default=0)

        if len(loops) > 200:
            raise ValueError("too large")
        return max((longest(index, mask) for index, mask in enumerate(masks)), default=0)

    def _mask(self, loop: frozenset[int]) -> int:
        mask = 0
        for state in loop:
            mask |= self.accepts[state]
        return mask

    def _reached(self, states: frozenset[int]) -> set[int]:
        seen: set[int] = set()
        open_states = list(states)
        while open_states:
            for state in self.next[open_states.pop()]:
                if state not in seen:
                    seen.add(state)
                    open_states.append(state)
        return seen

    def _loops(self) -> list[frozenset[int]]:
        """The sets of states that all lead to each other."""
        reach = [self._reached(frozenset([state])) for state in range(len(self.accepts))]
        found = {
            frozenset(other for other in reach[state] if state in reach[other])
            for state in range(len(reach))
            if state in reach[state]
        }
        return list(found)


class _Parser:
    """Reads Oniguruma's syntax, as far as it concerns what a pattern repeats."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.any_case = False
        self.made = _Automaton()
        named = {_character(found) for found in _NUMBER.finditer(text)}
        self.characters = _characters() + "".join(sorted(named.union(text)))
        self.all = (1 << len(self.characters)) - 1

    def automaton(self) -> _Automaton:
        self._alternatives()
        if self.at < len(self.text):
            raise ValueError(f"unbalanced at character {self.at}")
        return self.made

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, pattern: re.Pattern) -> re.Match | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def _alternatives(self) -> _Part:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        whole = self._sequence()
        while self._peek() == "|":
            self.at += 1
            other = self._sequence()
            one = whole.one_character and other.one_character
            whole = _Part(
                whole.empty or other.empty, whole.first + other.first, whole.last + other.last, one
            )
        self.depth -= 1
        return whole

    def _sequence(self) -> _Part:
        whole = _Part(True, [], [])
        while (character := self._peek()) and character not in "|)":
            item = self._repeated(self._atom())
            self.made.link(whole.last, item.first)
            whole = _Part(
                whole.empty and item.empty,
                whole.first + (item.first if whole.empty else []),
                item.last + (whole.last if item.empty else []),
            )
        return whole

    def _repeated(self, item: _Part) -> _Part:
        while (bounds := self._quantifier()) is not None:
            least, most = bounds
            if most is not None and most <= _MAX_COPIES and item.one_character:
                item = self._copies(item, least, most)
            elif most is None or most > 1:
                self.made.repeats_nothing |= item.empty and bool(item.first)
                self.made.link(item.last, item.first)
                item = _Part(item.empty or least == 0, item.first, item.last)
            else:
                item = _Part(item.empty or least == 0, item.first, item.last)
        return item

    def _copies(self, item: _Part, least: int, most: int) -> _Part:
        """`item`, of one character, from `least` to `most` times."""
        mask = self.made._mask(frozenset(item.first))
        whole = item
        firsts = list(item.first)
        lasts = list(item.last) if least <= 1 else []
        for number in range(2, most + 1):
            further = self.made.add(mask)
            self.made.link(whole.last, further.first)
            lasts += further.last if number >= least else []
            whole = further
        return _Part(least == 0, firsts, lasts or whole.last)

    def _quantifier(self) -> tuple[int, int | None] | None:
        """(least, most) of a quantifier that follows; None as `most` sets no limit."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if (bounds := simple.get(self._peek())) is not None:
            self.at += 1
        elif (found := self._take(_COUNTED)) and (found[1] or found[3]):
            least = int(found[1] or 0)
            most = (int(found[3]) if found[3] else None) if found[2] else least
            bounds = (least, most)
        else:
            if found:
                self.at = found.start()
            return None
        if self._peek() == "?" or (self._peek() == "+" and self._is_possessive()):
            self.at += 1
        return bounds

    def _is_possessive(self) -> bool:
        """Whether a + after a quantifier repeats nothing. After {n,m} it does repeat, which nobody
        means, and is harmless where nothing follows that could fail."""
        return self.text[self.at - 1] != "}" or self.text[self.at + 1 : self.at + 2] in (
            "|",
            ")",
            "",
        )

    def _atom(self) -> _Part:
        character = self._peek()
        self.at += 1
        if character == "(":
            return self._group()
        if character in "^$":
            return _Part(True, [], [])
        if character == "[":
            return self.made.add(self._class())
        if character == ".":
            return self.made.add(self.all)
        if character == "\\":
            if self._peek() in _ZERO_WIDTH:
                self.at += 1
                return _Part(True, [], [])
            return self.made.add(self._escape())
        return self.made.add(self._mask_of(character))

    def _group(self) -> _Part:
        if self.text.startswith("?#", self.at):
            self.at = self.text.find(")", self.at) % (len(self.text) + 1)
            inner = _Part(True, [], [])
        elif self._take(_LOOK):
            inner = self._looked_at()
        else:
            if (found := self._take(_OPENING)) and found[1] is not None:
                if "x" in found[1]:
                    raise ValueError("the flag x is not supported")
                self.any_case |= "i" in found[1]
                if found[2] == ")":
                    return _Part(True, [], [])
            elif self._peek() == "?":
                raise ValueError(f"{self.text[self.at - 1 : self.at + 3]!r} is not supported")
            inner = self._alternatives()
        if self._peek() != ")":
            raise ValueError("unbalanced")
        self.at += 1
        return inner

    def _looked_at(self) -> _Part:
        """What is looked at is matched on its own, and reads nothing."""
        outer, self.made = self.made, _Automaton()
        self._alternatives()
        outer.looked_at += [self.made, *self.made.looked_at]
        self.made.looked_at = []
        self.made = outer
        return _Part(True, [], [])

    def _class(self) -> int:
        """The characters of a class, its bracket being open."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        negated = self._peek() == "^"
        self.at += negated
        mask = 0
        unsure = False
        start = self.at
        while (character := self._peek()) != "]" or self.at == start:
            if not character:
                raise ValueError("unbalanced")
            self.at += 1
            if character == "[":
                unsure |= self._peek() == ":"  # a class by its name
                mask |= self._class()
            elif character == "&" and self._peek() == "&":
                unsure = True
            else:
                mask |= self._member(character)
        self.at += 1
        self.depth -= 1
        if unsure:
            return self.all
        return self.all & ~mask if negated else mask

    def _member(self, character: str) -> int:
        """One character of a class, or a range."""
        mask = self._escape() if character == "\\" else self._mask_of(character)
        if self._peek() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", "["):
            return mask
        first = self._last_of(mask) if character == "\\" else character
        self.at += 1
        end = self._peek()
        self.at += 1
        end_mask = self._escape() if end == "\\" else self._mask_of(end)
        last = self._last_of(end_mask) if end == "\\" else end
        if first is None or last is None:  # a dash beside a class, as in \w-.
            return mask | end_mask | self._mask_of("-")
        return self._where(lambda c: first <= c <= last)

    def _last_of(self, mask: int) -> str | None:
        """The character of a mask that has just one."""
        if mask and not mask & (mask - 1):
            return self.characters[mask.bit_length() - 1]
        return None

    def _escape(self) -> int:
        """The characters that an escape stands for, its backslash being read."""
        if found := self._take(_PROPERTY):
            return self._property(found[2], (found[0][0] == "P") != bool(found[1]))
        if found := self._take(_NUMBER):
            return self._mask_of(_character(found))
        character = self._peek()
        self.at += 1
        if not character or character in "123456789kg":
            raise ValueError("a reference to a group is not supported")
        if (test := _TESTS.get(character.lower())) is not None:
            mask = self._where(test)
            return self.all & ~mask if character.isupper() else mask
        if character in "RXNO":
            return self.all
        return self._mask_of(_CONTROLS.get(character, character))

    def _property(self, name: str, negated: bool) -> int:
        if not re.fullmatch("[A-Z][a-z]?", name):
            return self.all  # a script, a block, a name in full
        mask = self._where(lambda c: unicodedata.category(c).startswith(name))
        return self.all & ~mask if negated else mask

    def _mask_of(self, character: str) -> int:
        if character not in self.characters:
            return self.all
        if self.any_case:
            return self._where(lambda c: c.lower() == character.lower())
        return 1 << self.characters.index(character)

    def _where(self, test: _Test) -> int:
        return sum(1 << index for index, c in enumerate(self.characters) if test(c))


def patterns_in(content: object) -> Iterator[str]:
    """The regular expressions in a part of a tokenizer.json."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "Regex" and isinstance(value, str):
                yield value
            else:
                yield from patterns_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from patterns_in(value)
