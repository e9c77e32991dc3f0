"""auto-round, which is only read: tensors of GPTQ or AWQ under a config of its own.

`packing_format` says whose tensors they are:

    auto_round:auto_gptq                  GPTQ, zero points stored minus one
    auto_round, auto_round:gptqmodel      GPTQ, zero points stored as they are (version 2)
    auto_round:auto_awq                   AWQ

Columns are in their natural order, and `g_idx` may be missing. `extra_config` has the grids of
modules that differ from the others, by name or by regular expression. Source: auto-round,
`inference/backend.py` and `export/export_to_autoround/export.py`.
"""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from grokquant.formats import awq, gptq
from grokquant.formats.format import ReadableFormat
from grokquant.formats.patterns import pattern
from grokquant.formats.reading import validated
from grokquant.formats.targets import check_target
from grokquant.types import Source, TensorRef

NAME = "auto-round"

_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_VERSION_2 = ("auto_round", "auto_round:gptqmodel")


class _Grid(BaseModel):
    """What an entry of `extra_config` may change; with 16 bits or more, a module is not packed."""

    bits: Literal[2, 3, 4, 8, 16, 32] | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None
    sym: bool | None = None


class _Config(BaseModel):
    """What reading takes from a `quantization_config`."""

    packing_format: Literal[
        "auto",
        "auto_round:auto_gptq",
        "auto_round:gptq",
        "auto_round",
        "auto_round:gptqmodel",
        "auto_round:auto_awq",
        "auto_round:awq",
    ] = "auto_round:auto_gptq"
    bits: Literal[2, 3, 4, 8]
    group_size: Annotated[int, Field(ge=-1)]
    sym: bool = True
    data_type: Literal["int"] = "int"
    act_bits: Annotated[int, Field(ge=16)] | None = None  # fewer: of activations, too
    rotation_config: None = None  # of activations at run time
    spinquant_config: None = None  # likewise
    extra_config: dict[str, _Grid] | None = None

    @field_validator("rotation_config", "spinquant_config", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return value or None

    @field_validator("extra_config")
    @classmethod
    def _expressions(cls, extra: dict | None) -> dict | None:
        for key in extra or ():
            check_target(f"re:{_searched(key)}")
        return extra

    def grid_of(self, stem: str) -> gptq.Grid:
        """The grid of a module: that of all as changed by its name's entry, else by the first
        expression found in its name."""
        extra = self.extra_config or {}
        keys = [stem] if stem in extra else [k for k in extra if pattern(_searched(k)).match(stem)]
        own = extra[keys[0]] if keys else _Grid()
        bits = own.bits or self.bits
        group_size = self.group_size if own.group_size is None else own.group_size
        sym = self.sym if own.sym is None else own.sym
        return gptq.scheme_of(bits, group_size, sym), False


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight` that reads as a QTensor."""
    config = validated(source, _Config)
    if config.packing_format in _AWQ:
        return awq.unpacked_by(source, config.group_size)
    version: gptq.Version = "gptq_v2" if config.packing_format in _VERSION_2 else "gptq"
    return gptq.unpacked_by(_with_order(source, config), config.grid_of, version)


def _searched(expression: str) -> str:
    """A pattern that matches a name from its start where the expression is anywhere in it."""
    return f".*(?:{expression})"


def _with_order(source: Source, config: _Config) -> Source:
    """`source` with the natural order of columns where `g_idx` is missing."""
    tensors = dict(source.tensors)
    for name, words in source.tensors.items():
        stem, _, ending = name.rpartition(".")
        scales = source.tensors.get(f"{stem}.scales")
        if ending == "qweight" and f"{stem}.g_idx" not in tensors and scales and words.shape:
            scheme, _ = config.grid_of(stem)
            columns = words.shape[0] * 32 // scheme.bits
            tensors[f"{stem}.g_idx"] = _order(f"{stem}.g_idx", columns, scheme.groups(columns))
    return replace(source, tensors=tensors)


def _order(name: str, columns: int, groups: int) -> TensorRef:
    def load() -> Tensor:
        return gptq.natural_order(columns, groups)

    return TensorRef(name, (columns,), torch.int32, 0, load)


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked)
