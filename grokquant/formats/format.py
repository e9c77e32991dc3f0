"""What a format is: a table of pure functions, one row per module of this room.

A row that lacks a function, or a function of another signature, does not pass mypy.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.types import BudgetUnit, QTensor, Source, Unit

# Dtype and shape of each packed tensor by its name in the checkpoint.
PackedLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Unpack(Protocol):
    """Some rows of a matrix, by default all, from its packed tensors."""

    def __call__(
        self,
        tensor: str,
        packed: Mapping[str, Tensor],
        scheme: Scheme,
        rows: slice = ...,
        /,
    ) -> QTensor: ...


def _no_constants(tensor: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, Tensor]:
    """The `constants` of formats whose packed tensors are all computed from weights."""
    return {}


def _no_sidecar_files(config: dict) -> dict[str, dict]:
    """The `sidecar_files` of formats whose readers want config.json alone."""
    return {}


def _no_activations(config: dict) -> Iterable[str]:
    """The `activations` of formats that quantize weights alone."""
    return ()


@dataclass(frozen=True, kw_only=True)
class ReadableFormat:
    """A format that can be read.

    `unpacked(source)` presents each packed matrix of a source as one tensor `X.weight`, which reads
    as a QTensor, or as floats where the format stores floats. It raises InputError for a
    `quantization_config` that it does not support and for packed tensors that contradict it.
    `activations(config)` says how a `quantization_config` that `unpacked` has accepted has
    activations quantized, in words; a note names them, since only weights are read.
    """

    name: str
    unpacked: Callable[[Source], Source]
    activations: Callable[[dict], Iterable[str]] = _no_activations


@dataclass(frozen=True, kw_only=True)
class Format(ReadableFormat):
    """A format that can be read and written.

    `refusal(scheme, shape)` is the reason why it cannot hold a matrix [out, in], None if it can.
    `packed_layout(tensor, shape, scheme)` gives names, dtypes and shapes of the tensors that stand
    for the matrix `tensor`, before anything is read.
    `pack_into(packed, tensor, rows, quantized)` writes some rows into those tensors. Slices begin,
    and but for the last end, at a multiple of 32; they may be written concurrently, since whatever
    does not depend on rows is the same in each.
    `constants(tensor, shape, scheme)` are the packed tensors that depend on no weight, by name.
    `unpack(tensor, packed, scheme)` is the inverse of `pack`, bit by bit; a fourth argument selects
    rows, which begin and end like those of `pack_into`.
    `quantization_config(units, unquantized)` is that of config.json; `unquantized` names the
    modules that hold a matrix but stay as they are.
    `sidecar_files(config)` are the JSON files that readers want beside config.json, by name.

    `grid_name(scheme)` is what the users of the format call a grid that it can hold.

    `budget_units` are the parts of a model that may have grids of their own (see `BudgetUnit`),
    first the smallest that readers of the format take.

    `scale_dtype` is the dtype of scales if the recipe names none. `holds_quantized` is False where
    `refusal` refuses every matrix. `holds_dense` is True where an output may have no quantized
    matrix at all. `needs_own_loader` is True where transformers by itself does not find the files,
    so that config.json must name our loader.
    """

    scale_dtype: str
    refusal: Callable[[Scheme, tuple[int, int]], str | None]
    packed_layout: Callable[[str, tuple[int, int], Scheme], PackedLayout]
    pack_into: Callable[[Mapping[str, Tensor], str, slice, QTensor], None]
    unpack: Unpack
    quantization_config: Callable[[Iterable[Unit], Iterable[str]], dict]
    constants: Callable[[str, tuple[int, int], Scheme], dict[str, Tensor]] = _no_constants
    sidecar_files: Callable[[dict], dict[str, dict]] = _no_sidecar_files
    grid_name: Callable[[Scheme], str] = str
    holds_quantized: bool = True
    holds_dense: bool = False
    needs_own_loader: bool = False
    budget_units: tuple[BudgetUnit, ...] = ("expert", "projection", "layer")

    def packed_bytes(self, unit: Unit) -> int:
        """Bytes of the tensors that stand for a matrix."""
        layout = self.packed_layout(unit.tensor, unit.shape, unit.scheme).values()
        return sum(prod(shape) * dtype.itemsize for dtype, shape in layout)

    def pack(self, tensor: str, quantized: QTensor) -> dict[str, Tensor]:
        """The tensors that stand for a whole matrix, in new memory on the device of its codes."""
        rows, columns = quantized.codes.shape
        layout = self.packed_layout(tensor, (rows, columns), quantized.scheme)
        packed = {
            name: torch.empty(shape, dtype=dtype, device=quantized.codes.device)
            for name, (dtype, shape) in layout.items()
        }
        self.pack_into(packed, tensor, slice(0, rows), quantized)
        return packed
