"""JSON objects from outside: of bounded size and depth, no key twice, every error in one line."""

import json
import re
from itertools import accumulate
from pathlib import Path

from grokquant.errors import InputError
from grokquant.files.impostors import impostor
from grokquant.files.regular import read_regular

# Far above any real file. Of 1,000,000 values Python makes objects of a hundred megabytes.
MAX_BYTES = 64_000_000
MAX_VALUES = 1_000_000
MAX_DEPTH = 64
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STEP = {"{": 1, "[": 1, "}": -1, "]": -1}


def read_json_object(path: Path) -> dict:
    """The object in a JSON file. Raises InputError naming the file."""
    return parse_strict_object(read_regular(path, MAX_BYTES), str(path))


def parse_strict_object(raw: bytes, name: str) -> dict:
    """`parse_json_object` whose values can be written again: Python reads 1e999 and half
    characters, JSON has none."""
    content = parse_json_object(raw, name)
    for key, value in content.items():
        try:
            json.dumps([key, value], ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise InputError(f"{name}: {key[:80]}: not valid JSON: {error}") from None
    return content


def parse_json_object(raw: bytes, name: str, most_values: int | None = None) -> dict:
    """Parses `raw` as one JSON object. Raises InputError that begins with `name`."""
    try:
        text = raw.decode("utf-8-sig")
        check_extent(text, MAX_VALUES if most_values is None else most_values)
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if what := impostor(raw):
            raise InputError(f"{name}: {what}") from None
        raise InputError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{name}: expected a JSON object")
    return content


def check_extent(text: str, most_values: int) -> None:
    """Raises ValueError where parsing would take much memory, or more depth than any file has."""
    punctuation = _STRING.sub("", text)
    if max(punctuation.count(","), punctuation.count("{"), punctuation.count("[")) >= most_values:
        raise ValueError(f"it has more than {most_values} values")
    steps = (_STEP[bracket] for bracket in re.findall(r"[][{}]", punctuation))
    if max(accumulate(steps), default=0) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} occurs twice")
            seen.add(key)
    return content


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
