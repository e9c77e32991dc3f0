"""Checks that formats share when they read quantized matrices made by others."""

from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError

from grokquant.errors import InputError
from grokquant.formats.format import PackedLayout
from grokquant.grids import Scheme
from grokquant.types import ALL_ROWS, QTensor, QuantizedRows, Source, TensorRef

Config = TypeVar("Config", bound=BaseModel)

# What helps where a layout is not read.
WAY_OUT = "take the checkpoint that this one was made from"


def validated(source: Source, model: type[Config], *keys: str) -> Config:
    """The `quantization_config` of a source, or the part of it at `keys`.

    Raises InputError naming the key that is wrong.
    """
    path = ("quantization_config", *keys)
    try:
        return model.model_validate(reduce(getitem, path, source.config))
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic also names the member of a union: literal['a', 'b'].
        keys_in_it = (part for part in first["loc"] if not str(part).startswith("literal["))
        key = ".".join(map(str, (*path, *keys_in_it)))
        text = first["msg"].removeprefix("Value error, ")
        found = "" if isinstance(first["input"], dict) else f", not {first['input']!r:.40}"
        raise InputError(
            f"{source.path / 'config.json'}: {key}: {text}{found}; other variants are not "
            f"supported, {WAY_OUT}"
        ) from None


def packed_tensor(source: Source, name: str) -> TensorRef:
    """The tensor `name` of a source. Raises InputError where it is missing."""
    if name not in source.tensors:
        raise InputError(f"{source.path}: {name} is missing")
    return source.tensors[name]


def check_packed(source: Source, layout: PackedLayout, scheme: Scheme) -> list[TensorRef]:
    """The tensors of `layout`, in its order.

    Raises InputError where one is missing or has not the dtype and shape that `scheme` needs.
    """
    packed = [packed_tensor(source, name) for name in layout]
    for ref in packed:
        dtype, shape = layout[ref.name]
        if (ref.dtype, ref.shape) != (dtype, shape):
            raise InputError(
                f"{source.path}: {ref.name} is {ref.dtype} {list(ref.shape)}, "
                f"{scheme} needs {dtype} {list(shape)}"
            )
    return packed


def packed_matrix(
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    stored_bytes: int,
    open_rows: Callable[[], QuantizedRows],
    scheme: Scheme,
) -> TensorRef:
    """A matrix [out, in] that `open_rows` reads, as a whole or some rows at a time."""

    def load() -> QTensor:
        return open_rows()(ALL_ROWS)

    return TensorRef(name, shape, dtype, stored_bytes, load, scheme, open_rows=open_rows)


def check_group_size(source: Source, name: str, scheme: Scheme, columns: int) -> None:
    """Raises InputError where the groups of `scheme` do not divide the columns of a matrix."""
    if columns == 0 or columns % (scheme.group_size or columns):
        raise InputError(
            f"{source.path}: {name}: {columns} input features are not divisible by group "
            f"{scheme.group_size}"
        )
