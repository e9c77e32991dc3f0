"""The interface of a container: planned files, their tensors, and the slots of parts in them.

A part is a tensor as the run computes it or carries it over; its slot is rows of a stored tensor:

    part experts.0.w1  ->  rows   0 .. 255 |
    part experts.1.w1  ->  rows 256 .. 511 |  tensor blk.3.ffn_gate_exps, as gguf stacks experts
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from grokquant.files.safetensors_header import FileLayout
from grokquant.grids import Scheme
from grokquant.types import Source


@dataclass(frozen=True)
class PlannedTensor:
    """A part of the output, or a tensor of one of its files, with its size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output and its layer; None for tensors outside the layers."""

    name: str
    layer: int | None
    tensors: tuple[PlannedTensor, ...]
    layout: FileLayout


@dataclass(frozen=True)
class Slot:
    """Where a part is stored: in rows of `tensor`, from `first_row` on.

    Values are converted to `dtype` unless it is None, and `shift` is added. With `heads`, the rows
    of that number of heads are stored with the two halves of each head interleaved, as ggml rotates
    them.
    """

    tensor: str
    first_row: int = 0
    dtype: torch.dtype | None = None
    heads: int | None = None
    shift: int = 0

    def stored(self, rows: Tensor) -> Tensor:
        """Rows of a part as the file holds them; with `heads`, all rows must be given."""
        rows = rows if self.dtype is None else rows.to(self.dtype)
        rows = rows + self.shift if self.shift else rows
        return rows if self.heads is None else _swap_axes(rows, (self.heads, 2, -1))

    def restored(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `stored`, in `dtype`."""
        rows = rows if self.heads is None else _swap_axes(rows, (self.heads, -1, 2))
        rows = rows - self.shift if self.shift else rows
        return rows.to(dtype)


@dataclass(frozen=True)
class OutputLayout:
    """The files of an output in the order in which they are written, and the slot of each part."""

    files: tuple[PlannedFile, ...]
    slots: dict[str, Slot]


# (layer, parts that must lie in one file)
Group = tuple[int | None, list[PlannedTensor]]


def _no_sidecar_files(layout: OutputLayout) -> dict[str, dict]:
    """The `sidecar_files` of containers whose files need nothing beside them."""
    return {}


def _as_it_is(source: Source) -> Source:
    """The `opened` and `prepared` of containers that call tensors by their usual names and need no
    others."""
    return source


@dataclass(frozen=True, kw_only=True)
class Container:
    """One kind of weight files.

    `lay_out(source, groups, schemes, shard)` plans files of at most `shard` bytes, or of one group,
    none of which spans two layers; `schemes` are the grids of the matrices by tensor name. It
    raises InputError for parts that such files cannot hold.
    `listed(file, name)` is what the header of a file says, to be compared with a planned one: type
    and shape of each tensor by its name, in the order of their bytes, and metadata. It raises
    InputError that begins with `name` for a damaged header.
    `sidecar_files(layout)` are the JSON files beside the weights, by name.
    `prepared(source)` adds tensors to what is written that follow from the config.
    `holds_tokenizer` is True where the weight files hold the tokenizer as well.
    `opened(source)` presents the tensors of such files under their usual names.
    """

    lay_out: Callable[[Source, list[Group], Mapping[str, Scheme], int], OutputLayout]
    listed: Callable[[BinaryIO, str], dict[str, str]]
    sidecar_files: Callable[[OutputLayout], dict[str, dict]] = _no_sidecar_files
    opened: Callable[[Source], Source] = _as_it_is
    prepared: Callable[[Source], Source] = _as_it_is
    holds_tokenizer: bool = False


def split(groups: Iterable[Group], shard: int, over_layers: bool = False) -> list[Group]:
    """Groups in order, joined up to `shard` bytes; those of different layers only if `over_layers`,
    under the layer of the first."""
    files: list[Group] = []
    for layer, tensors in groups:
        size = sum(tensor.bytes for tensor in tensors)
        together = files and (over_layers or files[-1][0] == layer)
        if together and size + sum(tensor.bytes for tensor in files[-1][1]) <= shard:
            files[-1][1].extend(tensors)
        else:
            files.append((layer, list(tensors)))
    return files


def _swap_axes(rows: Tensor, axes: tuple[int, int, int]) -> Tensor:
    return rows.unflatten(0, axes).transpose(1, 2).flatten(0, 2)
