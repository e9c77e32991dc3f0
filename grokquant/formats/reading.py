"""What modules share that read quantized matrices of others."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError

from grokquant.errors import InputError
from grokquant.types import Source, TensorRef

Config = TypeVar("Config", bound=BaseModel)


def validated(source: Source, model: type[Config]) -> Config:
    """The `quantization_config` of a source. Raises InputError naming the key that is wrong."""
    try:
        return model.model_validate(source.config["quantization_config"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("quantization_config", *first["loc"])))
        text = first["msg"].removeprefix("Value error, ")
        found = "" if isinstance(first["input"], dict) else f", not {first['input']!r:.40}"
        raise InputError(
            f"{source.path / 'config.json'}: {key}: {text}{found}; nothing else is read, take the "
            "checkpoint that this one was made from"
        ) from None


def part_of(source: Source, name: str) -> TensorRef:
    """The tensor `name` of a source. Raises InputError where it is missing."""
    if name not in source.tensors:
        raise InputError(f"{source.path}: {name} is missing")
    return source.tensors[name]


def check_parts(
    source: Source,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    what: object,
) -> list[TensorRef]:
    """The tensors of `layout`. Raises InputError where one is missing or not as it says."""
    parts = [part_of(source, name) for name in layout]
    for ref in parts:
        dtype, shape = layout[ref.name]
        if (ref.dtype, ref.shape) != (dtype, shape):
            raise InputError(
                f"{source.path}: {ref.name} is {ref.dtype} {list(ref.shape)}, "
                f"{what} needs {dtype} {list(shape)}"
            )
    return parts
