"""Quantized matrices that stay packed in memory and are dequantized on every use."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.families.family import Family, parameter_parent
from grokquant.formats import Format, format_of
from grokquant.formats.format import PackedLayout
from grokquant.grids import SCALE_DTYPES
from grokquant.types import QTensor, TensorRef


class PackedMatrix(nn.Module):
    """A matrix as `format` stores it; as codes and scales if the format cannot hold it; dense in
    `dtype` if the checkpoint has no codes for it.

    Its parts are buffers without memory until `read`, so that size estimates include them.
    """

    _is_hf_initialized = True  # keeps transformers from initializing it

    def __init__(self, ref: TensorRef, format: Format | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.ref = ref
        self.format = format
        self.dtype = dtype
        self.shape: tuple[int, int] = (ref.shape[0], ref.shape[1])
        if format and (ref.scheme is None or format.refusal(ref.scheme, self.shape)):
            self.format = None
        for number, (kind, size) in enumerate(self._layout().values()):
            part = torch.empty(size, dtype=kind, device="meta")
            self.register_buffer(f"part{number}", part, persistent=False)

    def read(self, device: torch.device) -> None:
        """Fills the parts from the file; those without memory are allocated on `device`."""
        for number, part in enumerate(self._parts(self.ref.load()).values()):
            buffer = self.get_buffer(f"part{number}")
            if buffer.is_meta:
                setattr(self, f"part{number}", part.to(device, buffer.dtype))
            else:
                buffer.copy_(part)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix [out, in]."""
        scheme = self.ref.scheme
        parts = list(self.buffers())
        if scheme is None:
            return parts[0].to(dtype)
        if self.format is None:
            return QTensor(parts[0], parts[1], scheme, *parts[2:]).dequantize().to(dtype)
        found = dict(zip(self._layout(), parts, strict=True))
        return self.format.unpack(self.ref.name, found, scheme).dequantize().to(dtype)

    def _layout(self) -> PackedLayout:
        """The parts, their dtypes and shapes."""
        scheme = self.ref.scheme
        if scheme is None:
            return {"weight": (self.dtype, self.shape)}
        if self.format is not None:
            return self.format.packed_layout(self.ref.name, self.shape, scheme)
        rows, columns = self.shape
        spans = (rows, scheme.groups(columns))
        scales = (SCALE_DTYPES[scheme.scale_dtype], spans)
        parts: PackedLayout = {"codes": (torch.int8, self.shape), "scales": scales}
        return parts if scheme.symmetric else parts | {"zero_points": (torch.int8, spans)}

    def _parts(self, stored: Tensor | QTensor) -> dict[str, Tensor]:
        if isinstance(stored, Tensor):
            return {"weight": stored}
        if self.format is not None:
            return self.format.pack(self.ref.name, stored)
        parts = {"codes": stored.codes, "scales": stored.scales}
        return parts if stored.zero_points is None else parts | {"zero_points": stored.zero_points}


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, packed: PackedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.dense(x.dtype), self.bias)


class PackedStack(nn.Module):
    """Replaces a fused parameter of experts; the model takes one expert's matrix at a time."""

    _is_hf_initialized = True

    def __init__(self, experts: list[list[PackedMatrix]], join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)
        self.join = join

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        parts: Any = self.experts[int(expert)]
        return self.join(*(part.dense(part.dtype) for part in parts))


def pack_model(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Replaces all matrices that the checkpoint stores quantized by packed modules, and all experts
    of a layer if one of them is quantized. They have no memory before `read`.

    Such a model refuses `save_pretrained`, which would omit them.
    """
    stored_in = format_of(checkpoint.source)
    format = stored_in if isinstance(stored_in, Format) else None
    model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    _pack_linears(model, checkpoint, format, dtype)
    for index, layer in enumerate(checkpoint.family.layers(model)):  # type: ignore[arg-type]
        _pack_experts(layer, index, checkpoint, format, dtype)


def _refuse_to_save(*arguments: object, **options: object) -> None:
    raise InputError("a model with packed weights cannot be saved; copy its directory instead")


def _pack_linears(
    model: nn.Module, checkpoint: Checkpoint, format: Format | None, dtype: torch.dtype
) -> None:
    for name in [name for name, _ in model.named_parameters()]:
        ref = checkpoint.source.tensors.get(checkpoint.family.tensor_name(name))
        if ref is not None and ref.scheme is not None:
            path, _, last = name.removesuffix(".weight").rpartition(".")
            linear: Any = parameter_parent(model, name)[0]
            packed = PackedLinear(PackedMatrix(ref, format, dtype), linear.bias)
            setattr(model.get_submodule(path), last, packed)


def _pack_experts(
    layer: nn.Module,
    index: int,
    checkpoint: Checkpoint,
    format: Format | None,
    dtype: torch.dtype,
) -> None:
    family = checkpoint.family
    tensors = checkpoint.source.tensors
    count = family.num_experts(checkpoint.config, index)
    names = [family.expert_tensors(index, expert) for expert in range(count)]
    refs = [{part: tensors[name] for part, name in of_one.items()} for of_one in names]
    if all(ref.scheme is None for of_one in refs for ref in of_one.values()):
        return
    experts = family.experts_of(layer)
    for fused, parts, join in _fused(family):
        matrices = [
            [PackedMatrix(of_one[part], format, dtype) for part in parts] for of_one in refs
        ]
        delattr(experts, fused)
        setattr(experts, fused, PackedStack(matrices, join))


def _fused(family: Family) -> Iterator[tuple[str, tuple[str, ...], Callable[..., Tensor]]]:
    """(fused parameter, its parts, how their matrices make it) of an expert."""
    turn = (lambda W: W.T) if family.transposed else (lambda W: W)
    yield "gate_up_proj", ("gate", "up"), lambda gate, up: turn(family.join(gate.T, up.T).T)
    yield "down_proj", ("down",), turn
