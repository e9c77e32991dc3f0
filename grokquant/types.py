"""The nouns of grokquant: few, frozen, free of files, models and ranks.

Matrices are always [out, in] here, whatever a checkpoint stores.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from grokquant.grids import Scheme

# What has one grid where matrices share a budget of bits: each matrix; each kind of matrix in a
# layer, all experts alike; all experts of a layer, or all of its attention.
BudgetUnit = Literal["expert", "projection", "layer"]
# Of a tensor that is carried over as it is, at once.
ROW_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class QTensor:
    """Integer codes with their scales: a quantized [out, in] matrix.

    `codes` int8 [out, in], places in the table of a grid that has one; `scales` [out, groups] in
    the scheme's scale dtype; `zero_points` int8 [out, groups] for asymmetric integers; `offsets`
    [out, groups] in the scale dtype, the value of code 0 where a grid has offsets; `headers` uint8
    [out, in / 256, bytes], from which llama.cpp's blocks of 256 columns take scales and offsets.
    """

    codes: Tensor
    scales: Tensor
    scheme: Scheme
    zero_points: Tensor | None = None
    offsets: Tensor | None = None
    headers: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(codes - zero_points) * scales + offsets, computed in `dtype`, by default the scale dtype
        as in most engines. [out, in]"""
        dtype = dtype or self.scales.dtype
        groups = (self.scales.shape[1], -1)
        table = self.scheme.row.table
        unit = self.scheme.row.unit
        if table:
            values = torch.tensor(table, dtype=dtype, device=self.codes.device)
            values = values[self.codes.long()].unflatten(1, groups)
        else:
            values = self.codes.unflatten(1, groups).to(dtype)
        if self.zero_points is not None:
            values = values - self.zero_points.to(dtype).unsqueeze(-1)
        values = values * self.scales.to(dtype).unsqueeze(-1)
        if unit != 1:
            values = values * unit  # at last, as bitsandbytes does
        if self.offsets is not None:
            values = values + self.offsets.to(dtype).unsqueeze(-1)
        return values.flatten(1)

    @staticmethod
    def cat(tiles: "Sequence[QTensor]") -> "QTensor":
        """Tiles of rows, one below the other."""

        def below(name: str) -> Tensor | None:
            tensors = [tensor for tile in tiles if (tensor := getattr(tile, name)) is not None]
            return torch.cat(tensors) if tensors else None

        return replace(
            tiles[0],
            codes=torch.cat([tile.codes for tile in tiles]),
            scales=torch.cat([tile.scales for tile in tiles]),
            zero_points=below("zero_points"),
            offsets=below("offsets"),
            headers=below("headers"),
        )

    def rows(self, part: slice) -> "QTensor":
        """A view of some rows."""
        return self.each(lambda tensor: tensor[part])

    def to(self, device: torch.device) -> "QTensor":
        return self.each(lambda tensor: tensor.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "QTensor":
        """What `change` makes of each tensor, which all have a row for each output."""
        spans = (self.zero_points, self.offsets, self.headers)
        changed = (None if span is None else change(span) for span in spans)
        return QTensor(change(self.codes), change(self.scales), self.scheme, *changed)


ALL_ROWS = slice(None)
# Some rows of a quantized matrix.
QuantizedRows = Callable[[slice], QTensor]


def rows_of(W: Tensor | QTensor, part: slice) -> Tensor | QTensor:
    """A view of some rows of a matrix, whichever way it is stored."""
    return W.rows(part) if isinstance(W, QTensor) else W[part]


@dataclass(frozen=True)
class Guide:
    """What the tokens of one expert were in the original model, where it is rounded towards that:
    rows `token` of `inputs` [tokens, hidden], those of all experts. Errors of a token count
    `weight` float32 [routed]; it is in row `row` int64 [routed] of the text.
    """

    inputs: Tensor
    weight: Tensor
    row: Tensor


@dataclass(frozen=True)
class Routed:
    """The tokens of one expert: rows `token` int64 [routed] of `x` [tokens, hidden], the inputs of
    all experts. `gate` float32 [routed, 1] multiplies its outputs; `combined` float32 [tokens,
    hidden] is the sum of the gated outputs of the experts before it. Both are empty where the
    tokens come from other processes, which know their gates and add up their outputs. Products of
    `exact` tokens are in the dtype of x, whatever that of others.
    """

    x: Tensor
    token: Tensor
    gate: Tensor
    combined: Tensor
    exact: bool = False
    guide: Guide | None = None


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a checkpoint that has not been read yet.

    `shape` and `dtype` are those that `read()` returns: an expert of a stacked, transposed or
    packed source tensor appears as one [out, in] matrix. `scheme` is set if the source itself
    stores integers and scales, `grid_name` if its format has a name of its own for what it stores.
    `stored_bytes` is the size of the tensor at the source. Where the source supports them,
    `load_rows` reads the rows from a first to before a second index, `load_into` reads into a uint8
    buffer of at least `stored_bytes`, and `load_part` reads the part selected by a slice, with both
    ends, for each axis. `open_rows` reads a packed matrix and returns what unpacks some rows of it,
    from a multiple of 32 to another or the end.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_bytes: int
    load: Callable[[], "Tensor | QTensor"] = field(repr=False, compare=False)
    scheme: Scheme | None = None
    load_rows: Callable[[int, int], Tensor] | None = field(default=None, repr=False, compare=False)
    load_into: Callable[[Tensor], QTensor] | None = field(default=None, repr=False, compare=False)
    load_part: Callable[[tuple[slice, ...]], Tensor] | None = field(
        default=None, repr=False, compare=False
    )
    open_rows: Callable[[], QuantizedRows] | None = field(default=None, repr=False, compare=False)
    grid_name: str | None = None

    @property
    def stored_as(self) -> str:
        """The grid or dtype at the source, as people read it: int8 g32 sym, Q4_K, bfloat16."""
        return self.grid_name or str(self.scheme or self.dtype).removeprefix("torch.")

    def read(self) -> Tensor:
        """The dense tensor; integers are dequantized in the dtype that this has."""
        tensor = self.load()
        return tensor.dequantize(self.dtype) if isinstance(tensor, QTensor) else tensor

    def load_on(self, device: torch.device) -> Tensor:
        """As `read`, but dequantized on `device`, to which only the integers are copied."""
        tensor = self.load().to(device)
        return tensor.dequantize(self.dtype) if isinstance(tensor, QTensor) else tensor

    def row_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The dense tensor from first row to last, in blocks that fit the memory of any machine."""
        if self.load_rows is None:
            yield 0, self.read()
            return
        at_once = max(1, ROW_BLOCK_BYTES * self.shape[0] // max(self.stored_bytes, 1))
        for first in range(0, self.shape[0], at_once):
            yield first, self.load_rows(first, min(first + at_once, self.shape[0]))

    def read_quantized(self) -> QTensor:
        """Integers and scales exactly as stored. Only where `scheme` is set."""
        tensor = self.load()
        assert isinstance(tensor, QTensor), f"{self.name} is not stored quantized"
        return tensor

    def quantized_rows(self) -> QuantizedRows:
        """The same, unpacked some rows at a time: from a multiple of 32 to another or the end."""
        return self.open_rows() if self.open_rows else self.read_quantized().rows

    def loaded_by(
        self,
        load: Callable[[], "Tensor | QTensor"],
        load_rows: Callable[[int, int], Tensor] | None = None,
    ) -> "TensorRef":
        """This tensor, which these functions read and no others."""
        return replace(
            self, load=load, load_rows=load_rows, load_into=None, load_part=None, open_rows=None
        )


@dataclass(frozen=True)
class Origin:
    """What is known of a model beside its weights, for the model card of an output.

    `base_model` is its repository on the Hugging Face hub, or that of the model from which it was
    quantized. `licence` is an identifier of the hub; `other` has a name and a link.
    """

    name: str = "model"
    base_model: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: what is in it and how to read each tensor, nothing loaded yet.

    `kind` is the form on disk ("release", "safetensors", "gguf"), `config` is a transformers-style
    config dict, `tensors` maps Hugging Face tensor names (experts one by one) to references.
    `path` is a directory, or the file that holds all of the model.
    """

    path: Path
    kind: str
    config: dict = field(repr=False)
    tensors: dict[str, TensorRef] = field(repr=False)
    tokenizer_files: tuple[Path, ...] = ()
    weight_files: tuple[Path, ...] = field(default=(), repr=False)
    origin: Origin = field(default_factory=Origin)
    # Files that an output takes over as they are, by their names relative to `path`.
    beside: Mapping[str, Path] = field(default_factory=dict)
    # Lines for people: weights in `path` that are not read.
    notes: tuple[str, ...] = ()
    # What files of weights that describe their model say of it, where no config.json does.
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    # A directory of files made for this source, which is deleted with its last copy.
    held: object = field(default=None, repr=False, compare=False)

    @property
    def licence(self) -> str | None:
        return self.origin.licence


@dataclass(frozen=True)
class Matrix:
    """A matrix of a model that may be quantized, and where it is.

    `name` is what rules match (`layers.3.experts.5.down`), `tensor` its name in the checkpoint.
    `part` is `gate`, `up` or `down` in expert number `expert`, `attention.q` and the like outside
    the experts. Matrices of a layer and expert that have the same `reads` read the same input.
    """

    name: str
    tensor: str
    layer: int
    part: str
    reads: str
    expert: int | None = None

    @property
    def kind(self) -> str:
        """What it is in every layer and expert: `experts.down`, `attention.q`."""
        return self.part if self.expert is None else f"experts.{self.part}"


@dataclass(frozen=True, kw_only=True)
class Unit(Matrix):
    """A matrix to quantize: its grid, the name of its method and the settings of that method.

    `shape` is [out, in]; `rule` is the index of the recipe's rule that decided all this.
    """

    shape: tuple[int, int]
    scheme: Scheme
    method: str
    settings: Any
    rule: int


@dataclass(frozen=True)
class UnitReport:
    """What happened to one unit.

    `relative_error` is ||W - Q||_F / ||W||_F of the weights, `output_error` the same of the outputs
    on the calibration inputs, `held_out_error` on some of them that were kept out. `lost_rows` are
    rows that became zero. `tokens` reached the matrix. `fallback` is the reason why rtn took the
    place of the planned method, `note` what else a reader should know.
    """

    name: str
    method: str
    scheme: Scheme
    bits_per_weight: float
    relative_error: float
    seconds: float
    output_error: float | None = None
    tokens: int | None = None
    fallback: str | None = None
    note: str | None = None
    lost_rows: int = 0
    held_out_error: float | None = None
