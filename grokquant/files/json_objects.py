"""JSON objects from outside: no key twice, every error in one line."""

import json
from pathlib import Path

from grokquant.errors import InputError


def read_json_object(path: Path) -> dict:
    """The object in a JSON file. Raises InputError naming the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    content = parse_json_object(raw, str(path))
    for key, value in content.items():
        try:
            json.dumps([key, value], ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # Python reads NaN, 1e999 and half characters, JSON has none
            raise InputError(f"{path}: {key}: not valid JSON: {error}") from None
    return content


def parse_json_object(raw: bytes, name: str) -> dict:
    """Parses `raw` as one JSON object. Raises InputError that begins with `name`."""
    try:
        content = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{name}: expected a JSON object")
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r} occurs twice")
    return content
