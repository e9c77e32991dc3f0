"""The nouns of grokquant: few, frozen, free of files, models and ranks.

Matrices are always [out, in] here, whatever a checkpoint stores.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Scheme:
    """The grid that a matrix is rounded onto.

    `group_size` counts consecutive input columns that share a scale; None is one scale per row.
    Codes are signed: -2^(bits-1) .. 2^(bits-1)-1, asymmetric grids add a zero point of that range.
    """

    bits: int
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "bfloat16"

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Number of scales in a row of `in_features` columns."""
        return 1 if self.group_size is None else in_features // self.group_size

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class QTensor:
    """Integer codes with their scales: a quantized [out, in] matrix.

    `codes` int8 [out, in]; `scales` [out, groups] in the scheme's scale dtype;
    `zero_points` int8 [out, groups] for asymmetric schemes, else None.
    """

    codes: Tensor
    scales: Tensor
    scheme: Scheme
    zero_points: Tensor | None = None

    def dequantize(self) -> Tensor:
        """(codes - zero_points) * scales, multiplied in the scale dtype as engines do. [out, in]"""
        rows, columns = self.codes.shape
        codes = self.codes.view(rows, self.scales.shape[1], -1).to(self.scales.dtype)
        if self.zero_points is not None:
            codes = codes - self.zero_points.to(self.scales.dtype).unsqueeze(-1)
        return (codes * self.scales.unsqueeze(-1)).view(rows, columns)


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a checkpoint that has not been read yet.

    `shape` and `dtype` are those that `read()` returns: an expert of a stacked, transposed or
    packed source tensor appears as one [out, in] matrix. `scheme` is set where the source itself
    stores integers and scales. `stored_bytes` is what the tensor takes up at the source.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_bytes: int
    load: Callable[[], "Tensor | QTensor"] = field(repr=False, compare=False)
    scheme: Scheme | None = None

    @property
    def stored_as(self) -> str:
        """The grid or dtype at the source, as people read it: int8 g32 sym, bfloat16."""
        return str(self.scheme or self.dtype).removeprefix("torch.")

    def read(self) -> Tensor:
        """The dense tensor; integers are multiplied out in their scales' dtype."""
        tensor = self.load()
        return tensor.dequantize() if isinstance(tensor, QTensor) else tensor

    def read_quantized(self) -> QTensor:
        """Integers and scales exactly as stored. Only where `scheme` is set."""
        tensor = self.load()
        assert isinstance(tensor, QTensor), f"{self.name} is not stored quantized"
        return tensor


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: what is in it and how to read each tensor, nothing loaded yet.

    `layout` names the on-disk form ("release", "safetensors"), `config` is a transformers-style
    config dict, `tensors` maps Hugging Face tensor names (experts one by one) to references.
    """

    path: Path
    layout: str
    config: dict
    tensors: dict[str, TensorRef]
    tokenizer_files: tuple[Path, ...] = ()
    weight_files: tuple[Path, ...] = ()
    licence: str | None = None


@dataclass(frozen=True)
class Unit:
    """One matrix that is quantized on its own: `layers.3.experts.5.down`."""

    name: str
    tensor: str
    shape: tuple[int, int]
    method: str
    scheme: Scheme


@dataclass(frozen=True)
class UnitReport:
    """What happened to one unit.

    `relative_error` is ||W - Q||_F / ||W||_F of the weights, `output_error` the same of the outputs
    on the calibration inputs (gptq only). `tokens` reached the matrix. `fallback` is the reason why
    rtn took the place of the planned method, `note` what else a reader should know.
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
