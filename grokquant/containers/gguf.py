"""GGUF files for llama.cpp: its names, its metadata, the experts of a layer stacked to one tensor.

Several files are a split as llama.cpp makes them; it loads the first and finds the others.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from grokquant.containers.container import (
    Container,
    Group,
    OutputLayout,
    PlannedFile,
    PlannedTensor,
    Slot,
    split,
)
from grokquant.containers.gguf_names import (
    LAYER,
    OUTSIDE,
    Architecture,
    architecture_of,
    setting,
)
from grokquant.containers.gguf_vocabulary import vocabulary
from grokquant.errors import InputError
from grokquant.files.gguf_header import DENSE, TYPES, GgufTensor, Short, Signed, Value, gguf_layout
from grokquant.grids import Scheme, block_grid
from grokquant.types import Source, TensorRef

_BLOCKS = "_blocks"  # ends the names of packed matrices, see formats/gguf.py
_TYPE_OF = {dtype: name for name, dtype in DENSE.items()}


@dataclass(frozen=True)
class _Stored:
    """Where llama.cpp has a tensor: `expert` of `experts` in `name`; None where it is alone."""

    name: str
    expert: int | None = None
    experts: int = 1
    heads: int | None = None


def lay_out(
    source: Source, groups: list[Group], schemes: Mapping[str, Scheme], shard: int
) -> OutputLayout:
    """One file, or a split of several where `shard` is less.

    Raises InputError where llama.cpp does not know the family, or the experts of a layer differ in
    their grid.
    """
    known_tensors = _stored_tensors(architecture_of(source), source.config)
    slots: dict[str, Slot] = {}
    tensors: dict[str, GgufTensor] = {}
    stacks: list[Group] = []
    for layer, parts in groups:
        for part in parts:
            where, tensor = _placed(part, known_tensors, schemes)
            known = tensors.setdefault(tensor.name, tensor)
            if known.type != tensor.type:
                raise InputError(
                    f"{part.name}: gguf stores all experts of {tensor.name} as one type, "
                    f"the recipe makes them {known.type} and {tensor.type}"
                )
            stored = _planned(tensor)
            if known is tensor:
                stacks.append((layer, [stored]))
            dtype = None if part.name.endswith(_BLOCKS) else stored.dtype
            first = (where.expert or 0) * (stored.shape[0] // where.experts)
            slots[part.name] = Slot(tensor.name, first, dtype, where.heads)
    return OutputLayout(_files(source, split(stacks, shard, over_layers=True), tensors), slots)


def opened(source: Source) -> Source:
    """`source` with llama.cpp's names and stacks turned back into the usual names and matrices."""
    refs = {}
    for name, where in _stored_tensors(architecture_of(source), source.config).items():
        if where.name in source.tensors:
            ref = _ref(name, where, source.tensors[where.name])
            refs[ref.name] = ref
    return replace(source, tensors=refs)


def _stored_tensors(architecture: Architecture, config: dict) -> dict[str, _Stored]:
    """llama.cpp's place of every tensor that a model with this config may have."""
    found = {name: _Stored(stored) for name, stored in OUTSIDE.items()}
    experts = _experts(architecture, config)
    for layer in range(config["num_hidden_layers"]):
        for end, stored in architecture.within.items():
            name, stored = LAYER.format(layer=layer) + end, f"blk.{layer}.{stored}"
            if "{expert}" in end:
                for expert in range(experts):
                    found[name.format(expert=expert)] = _Stored(stored, expert, experts)
            else:
                heads = architecture.rotated.get(end)
                count = setting(config, heads) if heads else None
                found[name] = _Stored(stored, heads=None if count is None else int(count))
    return found


def _experts(architecture: Architecture, config: dict) -> int:
    field = architecture.settings.get("expert_count")
    return int(setting(config, field) or 0) if field else 0


def _placed(
    part: PlannedTensor, stored: Mapping[str, _Stored], schemes: Mapping[str, Scheme]
) -> tuple[_Stored, GgufTensor]:
    """Where a part goes and the whole tensor there, stacked if it is an expert's."""
    name = part.name.removesuffix(_BLOCKS)
    if name not in stored:
        raise InputError(f"{name}: llama.cpp has no such tensor, gguf cannot hold it")
    where = stored[name]
    shape = part.shape
    if part.name.endswith(_BLOCKS):
        kind = _type_of(schemes[name])
        _, values, size = TYPES[kind]
        shape = (shape[0], shape[1] // size * values)
    else:
        single = len(shape) == 1 or "ffn_gate_inp" in where.name
        kind = "F32" if single else _TYPE_OF[part.dtype]
    stacked = shape if where.expert is None else (where.experts, *shape)
    return where, GgufTensor(where.name, kind, stacked)


def _type_of(scheme: Scheme) -> str:
    grid = block_grid(scheme)
    assert grid is not None, f"llama.cpp has no type for {scheme}"
    return grid.name.upper()


def _planned(tensor: GgufTensor) -> PlannedTensor:
    """As it lies in the file: stacks are rows below each other."""
    if tensor.type in DENSE:
        dtype, columns = DENSE[tensor.type], tensor.shape[-1]
    else:
        dtype, columns = torch.uint8, tensor.row_bytes
    if len(tensor.shape) == 1:
        return PlannedTensor(tensor.name, dtype, (columns,))
    return PlannedTensor(tensor.name, dtype, (tensor.bytes // tensor.row_bytes, columns))


def _files(
    source: Source, parts: list[Group], tensors: Mapping[str, GgufTensor]
) -> tuple[PlannedFile, ...]:
    files = []
    for number, (layer, planned) in enumerate(parts):
        metadata: dict[str, Value] = dict(_metadata(source)) if number == 0 else {}
        if len(parts) > 1:
            counts = {"split.no": Short(number), "split.count": Short(len(parts))}
            metadata |= counts | {"split.tensors.count": Signed(len(tensors))}
        layout = gguf_layout(metadata, [tensors[tensor.name] for tensor in planned])
        name = (
            f"model-{number + 1:05d}-of-{len(parts):05d}.gguf" if len(parts) > 1 else "model.gguf"
        )
        files.append(PlannedFile(name, layer, tuple(planned), layout))
    return tuple(files)


def _metadata(source: Source) -> Iterator[tuple[str, Value]]:
    architecture = architecture_of(source)
    yield "general.architecture", architecture.name
    yield "general.name", source.path.name
    yield "general.quantization_version", 2
    for key, name in architecture.settings.items():
        value = setting(source.config, name)
        if value is not None:
            yield f"{architecture.name}.{key}", value
    yield from vocabulary(source).items()


def _ref(name: str, where: _Stored, stored: TensorRef) -> TensorRef:
    """The tensor `name` as a part of what is stored."""
    dense, shape = stored.dtype != torch.uint8, stored.shape
    name = name if dense else name + _BLOCKS
    slot = Slot(where.name, heads=where.heads)
    if where.expert is None:
        load = partial(_restored, slot, stored.load, stored.dtype)
        return replace(stored, name=name, load=load, load_rows=None)
    rows = shape[0] // where.experts
    assert stored.load_rows is not None
    load = partial(stored.load_rows, where.expert * rows, (where.expert + 1) * rows)
    size = stored.stored_bytes // where.experts
    return TensorRef(name, (rows, shape[1]), stored.dtype, size, load)


def _restored(slot: Slot, load: Callable, dtype: torch.dtype) -> Tensor:
    return slot.restored(load(), dtype)


CONTAINER = Container(lay_out=lay_out, opened=opened)
