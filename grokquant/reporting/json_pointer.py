"""Numbers of a report by JSON pointer (RFC 6901): a value and its place in the file, read together.

Pages print the pointer beside every number. A number that is looked up by its pointer cannot be
printed beside another one's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

JsonDocument = BaseModel | Mapping[str, Any]


@dataclass(frozen=True)
class Datum:
    """A number of a report and the JSON pointer that leads to it."""

    value: float
    pointer: str


def value_at(document: JsonDocument, pointer: str) -> Any:
    """What `document` holds at `pointer`; None where a part on the way is None (null).

    Pointers use the names of the JSON file: "/kld/99.9%", "/layers/3/forced/block_error". Raises
    KeyError, IndexError or ValueError where the document has no such key.
    """
    node: Any = document
    for key in pointer.split("/")[1:]:
        if node is None:
            return None
        node = _child(node, key)
    return node


def datum_at(document: JsonDocument, pointer: str) -> Datum:
    """The number at `pointer`. Raises ValueError where there is none."""
    found = find_datum(document, pointer)
    if found is None:
        raise ValueError(f"{pointer} is null")
    return found


def find_datum(document: JsonDocument, pointer: str) -> Datum | None:
    """The number at `pointer`, or None where it was not measured."""
    value = value_at(document, pointer)
    return None if value is None else Datum(value, pointer)


def _child(node: Any, key: str) -> Any:
    if isinstance(node, BaseModel):
        return getattr(node, _attributes(type(node))[key])
    return node[key] if isinstance(node, Mapping) else node[int(key)]


@cache
def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """Python's name of each field by its name in JSON."""
    return {field.alias or name: name for name, field in model.model_fields.items()}
