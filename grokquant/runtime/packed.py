"""Quantized matrices that stay packed in memory and are multiplied out whenever they are used."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grokquant.checkpoint import Checkpoint
from grokquant.families.family import Family, parameter_parent
from grokquant.formats import packing_of
from grokquant.types import QTensor, TensorRef


class PackedMatrix(nn.Module):
    """A matrix as `packing` stores it, or as codes and scales where that is None."""

    def __init__(self, ref: TensorRef, packing: ModuleType | None) -> None:
        super().__init__()
        self.ref, self.packing = ref, packing
        self.names: tuple[str, ...] = ()

    def read(self, device: torch.device) -> None:
        """Reads the matrix from its file; until then it has no memory."""
        quantized = self.ref.read_quantized()
        parts = {"codes": quantized.codes, "scales": quantized.scales}
        if self.packing is not None:
            parts = self.packing.pack(self.ref.name, quantized)
        self.names = tuple(parts)
        for number, part in enumerate(parts.values()):
            self.register_buffer(f"part{number}", part.to(device), persistent=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix multiplied out [out, in]."""
        scheme = self.ref.scheme
        assert scheme is not None
        found = {name: self.get_buffer(f"part{n}") for n, name in enumerate(self.names)}
        if self.packing is None:
            return QTensor(found["codes"], found["scales"], scheme).dequantize().to(dtype)
        return self.packing.unpack(self.ref.name, found, scheme).dequantize().to(dtype)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, packed: PackedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.dense(x.dtype), self.bias)


class PackedStack(nn.Module):
    """Stands for a fused parameter of experts: a model takes one expert's matrix at a time."""

    def __init__(
        self, experts: list[list[PackedMatrix]], join: Callable[..., Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)
        self.join, self.dtype = join, dtype

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        parts: Any = self.experts[int(expert)]
        return self.join(*(part.dense(self.dtype) for part in parts))


def pack_model(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Puts packed modules in the place of everything that the checkpoint has quantized.

    They have no memory before `read_packed`. Layers whose experts are only in part quantized keep
    them dense.
    """
    packing = packing_of(checkpoint.source)
    _pack_linears(model, checkpoint, packing)
    for index, layer in enumerate(checkpoint.family.layers(model)):  # type: ignore[arg-type]
        _pack_experts(layer, index, checkpoint, packing, dtype)


def read_packed(model: nn.Module, device: torch.device) -> None:
    """Fills all packed modules of a model from their files."""
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.read(device)


def _pack_linears(model: nn.Module, checkpoint: Checkpoint, packing: ModuleType | None) -> None:
    for name in [name for name, _ in model.named_parameters()]:
        ref = checkpoint.source.tensors.get(checkpoint.family.tensor_name(name))
        if ref is not None and ref.scheme is not None:
            path, _, last = name.removesuffix(".weight").rpartition(".")
            linear: Any = parameter_parent(model, name)[0]
            packed = PackedLinear(PackedMatrix(ref, packing), linear.bias)
            setattr(model.get_submodule(path), last, packed)


def _pack_experts(
    layer: nn.Module,
    index: int,
    checkpoint: Checkpoint,
    packing: ModuleType | None,
    dtype: torch.dtype,
) -> None:
    family, tensors = checkpoint.family, checkpoint.source.tensors
    count = family.num_experts(checkpoint.config, index)
    names = [family.expert_tensors(index, expert) for expert in range(count)]
    refs = [{part: tensors[name] for part, name in of_one.items()} for of_one in names]
    if not refs or any(ref.scheme is None for of_one in refs for ref in of_one.values()):
        return
    experts = family.experts_of(layer)
    for fused, parts, join in _fused(family):
        matrices = [[PackedMatrix(of_one[part], packing) for part in parts] for of_one in refs]
        delattr(experts, fused)
        setattr(experts, fused, PackedStack(matrices, join, dtype))


def _fused(family: Family) -> Iterator[tuple[str, tuple[str, ...], Callable[..., Tensor]]]:
    """(fused parameter, its parts, how their matrices make it) of an expert."""
    turn = (lambda W: W.T) if family.transposed else (lambda W: W)
    yield "gate_up_proj", ("gate", "up"), lambda gate, up: turn(family.join(gate.T, up.T).T)
    yield "down_proj", ("down",), turn
