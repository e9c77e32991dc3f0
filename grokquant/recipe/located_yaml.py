"""YAML 1.2 read into plain values, with the line and column of each.

Only what a recipe needs: mappings with text keys, lists and scalars. Anchors, aliases, tags, merge
keys and duplicate keys are refused, so that every value stands in the file exactly once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Loc = tuple[str | int, ...]  # the path to a value: ("quantize", 1, "bits")
Mark = tuple[int, int]  # line and column, both from 1

_TAG = "tag:yaml.org,2002:"
_MOST_DIGITS = 100
_MAX_DEPTH = 64
_STEP = {"{": 1, "[": 1, "}": -1, "]": -1}
_BOOLS = {"true": True, "false": False}


class YamlProblem(Exception):
    """YAML that cannot be read: `text` says why and `mark` where, if that is known."""

    def __init__(self, text: str, mark: Mark | None = None):
        super().__init__(text)
        self.text = text
        self.mark = mark


@dataclass(frozen=True)
class Document:
    """A YAML document as dicts, lists and scalars, with the marks of its keys and values."""

    value: Any
    keys: dict[Loc, Mark]
    values: dict[Loc, Mark]

    def mark(self, loc: Loc, at_key: bool = False) -> Mark | None:
        """The mark of `loc`, or of the innermost mapping or list that should have held it."""
        if at_key and loc in self.keys:
            return self.keys[loc]
        while loc and loc not in self.values:
            loc = loc[:-1]
        return self.values.get(loc)


def read_yaml(text: str) -> Document:
    """Parses one YAML document. Raises YamlProblem."""
    reader = _Reader()
    steps = (_STEP[bracket] for bracket in re.findall(r"[][{}]", text))
    if max(accumulate(steps), default=0) > _MAX_DEPTH:  # before the parser goes that deep
        raise YamlProblem("nested too deeply")
    try:
        root = YAML().compose(text)
        value = None if root is None else reader.value(root, ())
    except RecursionError:
        raise YamlProblem("nested too deeply") from None
    except YAMLError as error:
        raise _explained(error) from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" is no character
        raise YamlProblem(f"not valid YAML: {error}") from None
    return Document(value, reader.keys, reader.values)


@dataclass
class _Reader:
    keys: dict[Loc, Mark] = field(default_factory=dict)
    values: dict[Loc, Mark] = field(default_factory=dict)

    def value(self, node: Node, loc: Loc) -> Any:
        mark = _mark(node)
        self.values[loc] = mark
        if node.anchor:
            raise YamlProblem("anchors and aliases are not supported", mark)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*loc, index)) for index, item in enumerate(node.value)]
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, loc)
        return _scalar(node, mark)

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = _mark(key_node)
            key = _scalar(key_node, mark)
            if not isinstance(key, str):
                raise YamlProblem(f"a key should be text, not {key_node.value}", mark)
            if key in mapping:
                raise YamlProblem(f"duplicate key {key}", mark)
            self.keys[(*loc, key)] = mark
            mapping[key] = self.value(value_node, (*loc, key))
            if value_node.tag == _TAG + "null" and not value_node.value:
                # YAML puts an empty value where the next key begins; we put it at its own key.
                self.values[(*loc, key)] = mark
        return mapping


def _scalar(node: Node, mark: Mark) -> Any:
    construct = _SCALARS.get(str(node.tag))
    if construct is None or not isinstance(node, ScalarNode):
        tag = str(node.tag).removeprefix(_TAG)
        raise YamlProblem(f"a YAML {tag} is not supported here", mark)
    try:
        return construct(node.value)
    except ValueError:
        raise YamlProblem(f"not a usable number: {node.value[:40]}", mark) from None


def _integer(text: str) -> int:
    """1_000, 0x10, 0o17 or 0b1; with a leading 0 alone, digits stay decimal in YAML 1.2."""
    digits = text.replace("_", "")
    if len(digits) > _MOST_DIGITS:
        raise ValueError("no key takes such a number")
    return int(digits, 0 if re.match(r"[-+]?0[box]", digits) else 10)


def _real(text: str) -> float:
    """As Python writes it: YAML's .inf and .nan have a dot."""
    return float(re.sub(r"\.(inf|nan)", r"\1", text.replace("_", "").lower()))


# Dates stay text: no key of a recipe takes one, but a directory may be named by one.
_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "str": str,
    _TAG + "timestamp": str,
    _TAG + "value": str,
    _TAG + "int": _integer,
    _TAG + "float": _real,
    _TAG + "bool": lambda text: _BOOLS.get(text.lower(), text),
    _TAG + "null": lambda text: None,
}


def _mark(node: Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _explained(error: YAMLError) -> YamlProblem:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return YamlProblem(str(getattr(error, "reason", error)))
    mark = error.problem_mark.line + 1, error.problem_mark.column + 1
    if "'\\t'" in str(error.problem):
        return YamlProblem("a tab where YAML wants spaces", mark)
    return YamlProblem(str(error.problem), mark)
