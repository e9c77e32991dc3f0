"""Quantized matrices that stay packed in memory and are multiplied with as they are.

A matrix is read when it is first used and kept in the model's `MatrixCache`, in one of two forms:

    kernel   what a kernel of `products` multiplies with. If that is not worth it for many tokens,
             the matrix is read again for them and dequantized block by block of rows
    stored   as its format stores it; dequantized on every use
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grokquant.checkpoint import Checkpoint
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.families.family import LINEAR, Family, parameter_parent
from grokquant.formats import Format, format_of
from grokquant.formats.format import PackedLayout
from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.runtime.dequantize import Rows, dequantize, product_with_rows
from grokquant.runtime.matrix_cache import MatrixCache, Parts
from grokquant.runtime.products import Kernel, kernel_for
from grokquant.types import ALL_ROWS, QTensor, QuantizedRows, TensorRef

# (outputs of gate, outputs of up) -> those of the fused matrix
Join = Callable[..., Tensor]


class PackedMatrix(nn.Module):
    """A matrix [out, in] that is read when it is used.

    It is held in `cache`: as its kernel wants it if there is one; otherwise as `format` stores it,
    as codes and scales if the format cannot hold it, or dense in `dtype` if the checkpoint has no
    codes for it. Until `open` it has buffers without memory, so that size estimates include it.
    """

    _is_hf_initialized = True  # keeps transformers from initializing it

    def __init__(
        self, ref: TensorRef, format: Format | None, dtype: torch.dtype, cache: MatrixCache
    ) -> None:
        super().__init__()
        self.ref = ref
        self.format = format
        self.dtype = dtype
        self.cache = cache
        self.device = CPU
        self.shape: tuple[int, int] = (ref.shape[0], ref.shape[1])
        if format and (ref.scheme is None or format.refusal(ref.scheme, self.shape)):
            self.format = None
        for number, (kind, size) in enumerate(self._layout().values()):
            part = torch.empty(size, dtype=kind, device="meta")
            self.register_buffer(f"part{number}", part, persistent=False)

    def open(self, device: torch.device) -> None:
        """From now on the matrix is read to `device` when it is used."""
        self._buffers.clear()
        self.device = device

    def product(self, x: Tensor) -> Tensor:
        """x [.., in] times the transposed matrix: [.., out]. Without tokens nothing is read."""
        rows = x.reshape(-1, self.shape[1])  # (tokens, in)
        out = self._product(rows) if len(rows) else x.new_empty(0, self.shape[0])
        return out.unflatten(0, x.shape[:-1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix [out, in]."""
        return self._rows(dtype)(ALL_ROWS, None)

    def _product(self, x: Tensor) -> Tensor:
        kernel = self._kernel(x.dtype)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad  # which kernels do not have
        if kernel and kernel.is_quicker(len(x)) and not wants_gradient:
            return kernel.product(x, self._for_kernel(kernel, x.dtype))
        return product_with_rows(x, self.shape, self._rows(x.dtype))

    def _kernel(self, dtype: torch.dtype) -> Kernel | None:
        """What multiplies with it, and how it is held therefore."""
        scheme = self.ref.scheme
        if scheme is None:
            return None
        return kernel_for(scheme, self.shape, self.ref.stored_bytes, self.device.type, dtype)

    def _for_kernel(self, kernel: Kernel, dtype: torch.dtype) -> Parts:
        scheme = self.ref.scheme
        assert scheme is not None
        expected = kernel.held_bytes(scheme, self.shape, dtype)

        def read() -> Parts:
            return kernel.prepare(self.ref.read_quantized().to(self.device), dtype)

        return self._held(f"{self.ref.name} {dtype}", expected, read)

    def _rows(self, dtype: torch.dtype) -> Rows:
        """Makes some rows of the matrix, dense in `dtype`."""
        if self._kernel(dtype):
            rows = self.ref.quantized_rows()
        else:
            parts = self._held(self.ref.name, self._stored_bytes(), self._read)
            if self.ref.scheme is None:
                return lambda part, memory: parts["weight"][part].to(dtype)
            rows = self._unpacked(parts, self.ref.scheme)
        stored = self.ref.dtype
        return lambda part, memory: dequantize(rows(part).to(self.device), stored, dtype, memory)

    def _held(self, name: str, expected: int, read: Callable[[], Parts]) -> Parts:
        return self.cache.get(name, self.ref.stored_bytes, expected, read)

    def _stored_bytes(self) -> int:
        return sum(prod(size) * kind.itemsize for kind, size in self._layout().values())

    def _read(self) -> Parts:
        """The parts of the stored form."""
        stored = self.ref.load()
        if isinstance(stored, Tensor):
            return {"weight": stored.to(self.device, self.dtype)}
        if self.format is not None:
            parts = self.format.pack(self.ref.name, stored)
        else:
            parts = {"codes": stored.codes, "scales": stored.scales}
            if stored.zero_points is not None:
                parts["zero_points"] = stored.zero_points
        return {name: part.to(self.device) for name, part in parts.items()}

    def _unpacked(self, parts: Parts, scheme: Scheme) -> QuantizedRows:
        if self.format is not None:
            return partial(self.format.unpack, self.ref.name, parts, scheme)
        return QTensor(parts["codes"], parts["scales"], scheme, parts.get("zero_points")).rows

    def _layout(self) -> PackedLayout:
        """The parts of the stored form, their dtypes and shapes."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """Follows `model.to(..)`: what is held is read again where and as it is wanted then."""
        if self._buffers:
            return super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (probe.device, probe.dtype) != (self.device, self.dtype):
            self.device = probe.device
            self.dtype = probe.dtype
            self.cache.clear()
        return self


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, packed: PackedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.out_features, self.in_features = packed.shape

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix, for models that do not call their layers."""
        return self.packed.dense(self.packed.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = self.packed.product(x)
        return out if self.bias is None else out + self.bias


class PackedStack(nn.Module):
    """Replaces a fused parameter of experts; the model takes one expert's weight at a time."""

    _is_hf_initialized = True

    def __init__(self, experts: list[list[PackedMatrix]], join: Join, transposed: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)
        self.join = join
        self.transposed = transposed

    def __getitem__(self, expert: int | Tensor) -> "ExpertWeight":
        parts: Any = self.experts[int(expert)]
        return ExpertWeight(list(parts), self.join, self.transposed)


class ExpertWeight:
    """The weight of one expert in a model's own code, which multiplies with it and nothing else:

    F.linear(x, weight), or x @ weight where the family's are transposed. Those calls come here
    (`__torch_function__`) and become products with packed matrices; any other sees a dense tensor.
    """

    def __init__(self, parts: list[PackedMatrix], join: Join, transposed: bool) -> None:
        self.parts = parts
        self.join = join
        self.transposed = transposed

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = kwargs or {}
        if len(args) > 1 and isinstance(weight := args[1], cls) and weight._multiplies(function):
            out = weight._product(args[0])
            bias = given.get("bias", args[2] if len(args) > 2 else None)
            return out if bias is None else out + bias
        dense = [value._dense() if isinstance(value, cls) else value for value in args]
        return function(*dense, **given)

    def _multiplies(self, function: Any) -> bool:
        products = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
        return function in products if self.transposed else function is F.linear

    def _product(self, x: Tensor) -> Tensor:
        return self.join(*(part.product(x) for part in self.parts))

    def _dense(self) -> Tensor:
        turned = [part.dense(part.dtype).T for part in self.parts]  # (in, out) each
        joined = self.join(*turned)
        return joined if self.transposed else joined.T


@dataclass(frozen=True)
class Packing:
    """Makes the packed matrices of a model, all in one cache."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    cache: MatrixCache

    def matrix(self, ref: TensorRef) -> PackedMatrix:
        stored_in = format_of(self.checkpoint.source)
        format = stored_in if isinstance(stored_in, Format) else None
        return PackedMatrix(ref, format, self.dtype, self.cache)


def pack_model(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, limit: int | None = None
) -> None:
    """Replaces all matrices that the checkpoint stores quantized by packed modules, and all experts
    of a layer if one of them is quantized. They are read when they are used; at most `limit` bytes
    of them are held.

    Such a model refuses `save_pretrained`, which would omit them, and `matrix_cache` is its cache.
    """
    packing = Packing(checkpoint, dtype, MatrixCache(limit))
    model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    model.num_parameters = MethodType(_num_parameters, model)  # type: ignore[assignment]
    model.matrix_cache = packing.cache  # type: ignore[assignment]
    _pack_linears(model, packing)
    for index, layer in enumerate(checkpoint.family.layers(model)):  # type: ignore[arg-type]
        _pack_experts(layer, index, packing)


def _num_parameters(
    model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As in transformers, packed weights included; they cannot be trained."""
    dense = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    packed = (prod(m.shape) for m in model.modules() if isinstance(m, PackedMatrix))
    return dense if only_trainable else dense + sum(packed)


def _refuse_to_save(*arguments: object, **options: object) -> None:
    raise InputError(
        "a model with packed weights cannot be saved; load it with packed=False, or copy its "
        "directory instead"
    )


def _pack_linears(model: nn.Module, packing: Packing) -> None:
    checkpoint = packing.checkpoint
    for name in [name for name, _ in model.named_parameters()]:
        ref = checkpoint.source.tensors.get(checkpoint.family.tensor_name(name))
        linear: Any = parameter_parent(model, name)[0]
        # llama.cpp stores embeddings in blocks, too; their rows are looked up, not multiplied.
        if ref is not None and ref.scheme is not None and isinstance(linear, LINEAR):
            path, _, last = name.removesuffix(".weight").rpartition(".")
            packed = PackedLinear(packing.matrix(ref), linear.bias)
            setattr(model.get_submodule(path), last, packed)


def _pack_experts(layer: nn.Module, index: int, packing: Packing) -> None:
    checkpoint = packing.checkpoint
    family = checkpoint.family
    tensors = checkpoint.source.tensors
    count = family.num_experts(checkpoint.config, index)
    names = [family.expert_tensors(index, expert) for expert in range(count)]
    refs = [{part: tensors[name] for part, name in of_one.items()} for of_one in names]
    if all(ref.scheme is None for of_one in refs for ref in of_one.values()):
        return
    experts = family.experts_of(layer)
    if experts is None:
        return  # of code that multiplies with all experts at once
    for fused, parts, join in _fused(family):
        matrices = [[packing.matrix(of_one[part]) for part in parts] for of_one in refs]
        delattr(experts, fused)
        setattr(experts, fused, PackedStack(matrices, join, family.transposed))


def _fused(family: Family) -> Iterator[tuple[str, tuple[str, ...], Join]]:
    """(fused parameter, its parts, how their outputs make its outputs) of an expert."""
    if "gate" in family.experts:
        yield "gate_up_proj", ("gate", "up"), family.join
    else:
        yield "up_proj", ("up",), lambda up: up
    yield "down_proj", ("down",), lambda down: down
