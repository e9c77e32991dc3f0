"""GGUF files for llama.cpp: its names and metadata, the experts of a layer in one tensor.

Several files are a split as llama.cpp makes them; it loads the first and finds the others.
"""

from collections.abc import Collection, Mapping
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
from grokquant.containers.gguf_config import described
from grokquant.containers.gguf_general import file_name, general
from grokquant.containers.gguf_names import (
    EXPERT,
    LAYER,
    OUTSIDE,
    VECTORS,
    Architecture,
    architecture_of,
    known_architecture,
    setting,
)
from grokquant.containers.gguf_vocabulary import vocabulary
from grokquant.errors import InputError
from grokquant.files.gguf_header import (
    DENSE,
    TYPES,
    GgufTensor,
    Short,
    Signed,
    Value,
    gguf_layout,
    read_listing,
)
from grokquant.grids import Scheme, block_grid
from grokquant.types import Source, TensorRef

_BLOCKS = "_blocks"  # the ending of packed matrices, see formats/gguf.py
_TYPE_OF = {dtype: name for name, dtype in DENSE.items()}


@dataclass(frozen=True)
class _Location:
    """Where llama.cpp stores a tensor: in `name`, alone or as number `expert` of `experts`.

    `heads` and `shift` are as in `Slot`. With `vector`, a matrix of one row has no rows there.
    """

    name: str
    expert: int | None = None
    experts: int = 1
    heads: int | None = None
    shift: int = 0
    vector: bool = False


def lay_out(
    source: Source, groups: list[Group], schemes: Mapping[str, Scheme], shard: int
) -> OutputLayout:
    """One file, or a split of several if they exceed `shard` bytes.

    Raises InputError if llama.cpp does not know the family, or if the experts of a layer have
    different grids.
    """
    locations = _locations(architecture_of(source), source.config)
    slots: dict[str, Slot] = {}
    tensors: dict[str, GgufTensor] = {}
    stacks: list[Group] = []
    for layer, parts in groups:
        for part in parts:
            location = _location_of(part, locations)
            tensor = _stacked(part, location, schemes)
            known = tensors.setdefault(tensor.name, tensor)
            if known.type != tensor.type:
                raise InputError(
                    f"{part.name}: gguf stores all experts of {tensor.name} as one type, "
                    f"but the recipe makes them {known.type} and {tensor.type}"
                )
            stored = _planned(tensor)
            if known is tensor:
                stacks.append((layer, [stored]))
            slots[part.name] = _slot(part, location, stored)
    return OutputLayout(_files(source, split(stacks, shard, over_layers=True), tensors), slots)


def opened(source: Source) -> Source:
    """`source` with the usual names and matrices instead of llama.cpp's names and stacks.

    Metadata give the config and the tokenizer where nothing beside the files does.
    """
    if source.metadata:
        source = described(source)
    refs = {}
    for name, location in _locations(known_architecture(source), source.config).items():
        if location.name in source.tensors:
            ref = _ref(name, location, source.tensors[location.name])
            refs[ref.name] = ref
    return replace(source, tensors=refs)


def _locations(architecture: Architecture, config: dict) -> dict[str, _Location]:
    """Where llama.cpp stores each tensor of a model with this config, by usual name."""
    outside = OUTSIDE.items()
    locations = {name: _location(architecture, config, name, file) for name, file in outside}
    experts = _experts(architecture, config)
    for layer in range(config["num_hidden_layers"]):
        for ending, stored_ending in architecture.within.items():
            name = LAYER.format(layer=layer) + ending
            stored = f"blk.{layer}.{stored_ending}"
            if EXPERT in ending:
                for expert in range(experts):
                    locations[name.format(expert=expert)] = _Location(stored, expert, experts)
            else:
                locations[name] = _location(architecture, config, ending, stored)
    return locations


def _location(architecture: Architecture, config: dict, ending: str, stored: str) -> _Location:
    """Where a tensor lies whose name has this ending in its layer, or outside the layers."""
    heads = architecture.heads_field(ending)
    count = setting(config, heads) if heads else None
    return _Location(
        stored,
        heads=None if count is None else int(count),
        shift=int(ending in architecture.shifted),
        vector=ending in VECTORS,
    )


def _experts(architecture: Architecture, config: dict) -> int:
    field = architecture.settings.get("expert_count")
    return int(setting(config, field) or 0) if field else 0


def _location_of(part: PlannedTensor, locations: Mapping[str, _Location]) -> _Location:
    name = part.name.removesuffix(_BLOCKS)
    if name not in locations:
        raise InputError(f"{name}: llama.cpp has no such tensor, so gguf cannot hold it")
    return locations[name]


def _stacked(part: PlannedTensor, location: _Location, schemes: Mapping[str, Scheme]) -> GgufTensor:
    """The whole tensor that holds a part: itself, or the stack of all experts."""
    shape = part.shape
    if part.name.endswith(_BLOCKS):
        kind = _type_of(schemes[part.name.removesuffix(_BLOCKS)])
        _, values, size = TYPES[kind]
        shape = (shape[0], shape[1] // size * values)
    else:
        # Like llama.cpp's converter: vectors and routers in single precision.
        single = len(shape) == 1 or "ffn_gate_inp" in location.name
        kind = "F32" if single else _TYPE_OF[part.dtype]
    shape = shape[-1:] if location.vector else shape
    stacked = shape if location.expert is None else (location.experts, *shape)
    return GgufTensor(location.name, kind, stacked)


def _slot(part: PlannedTensor, location: _Location, stored: PlannedTensor) -> Slot:
    dtype = None if part.name.endswith(_BLOCKS) else stored.dtype
    first_row = (location.expert or 0) * (stored.shape[0] // location.experts)
    return Slot(location.name, first_row, dtype, location.heads, location.shift)


def _type_of(scheme: Scheme) -> str:
    grid = block_grid(scheme)
    assert grid is not None, f"llama.cpp has no type for {scheme}"
    return grid.name.upper()


def _planned(tensor: GgufTensor) -> PlannedTensor:
    """A tensor as stored in the file; the matrices of a stack follow each other as rows."""
    dtype = DENSE.get(tensor.type, torch.uint8)
    columns = tensor.shape[-1] if tensor.type in DENSE else tensor.row_bytes
    if len(tensor.shape) == 1:
        return PlannedTensor(tensor.name, dtype, (columns,))
    return PlannedTensor(tensor.name, dtype, (tensor.bytes // tensor.row_bytes, columns))


def _files(
    source: Source, parts: list[Group], tensors: Mapping[str, GgufTensor]
) -> tuple[PlannedFile, ...]:
    count = len(parts)
    files = []
    for number, (layer, planned) in enumerate(parts):
        name = file_name(source, tensors.values(), number, count)
        metadata = _metadata(source, tensors.values()) if number == 0 else {}
        if count > 1:
            metadata["split.no"] = Short(number)
            metadata["split.count"] = Short(count)
            metadata["split.tensors.count"] = Signed(len(tensors))
        layout = gguf_layout(metadata, [tensors[tensor.name] for tensor in planned])
        files.append(PlannedFile(name, layer, tuple(planned), layout))
    return tuple(files)


def _metadata(source: Source, tensors: Collection[GgufTensor]) -> dict[str, Value]:
    architecture = architecture_of(source)
    found: dict[str, Value] = {"general.architecture": architecture.name}
    found |= general(source, tensors)
    for key, name in architecture.settings.items():
        value = setting(source.config, name)
        if value is not None:
            found[f"{architecture.name}.{key}"] = value
    return found | vocabulary(source)


def _ref(name: str, location: _Location, stored: TensorRef) -> TensorRef:
    """The tensor `name`: a whole stored tensor, or one expert of it."""
    dense = stored.dtype != torch.uint8
    name = name if dense else name + _BLOCKS
    slot = Slot(location.name, heads=location.heads, shift=location.shift)
    if location.expert is None:
        shape = (1, *stored.shape) if location.vector else stored.shape
        load = partial(_restored, slot, stored, shape)
        return replace(stored.loaded_by(load), name=name, shape=shape)
    assert stored.load_rows is not None
    rows = stored.shape[0] // location.experts
    # The biases of all experts are one matrix.
    shape = stored.shape[1:] if name.endswith(".bias") else (rows, *stored.shape[1:])
    load = partial(_expert, stored, location.expert * rows, rows, shape)
    size = stored.stored_bytes // location.experts
    expert = stored.loaded_by(load)
    return replace(expert, name=name, shape=shape, stored_bytes=size)


def _restored(slot: Slot, stored: TensorRef, shape: tuple[int, ...]) -> Tensor:
    return slot.restored(stored.read(), stored.dtype).view(shape)


def _expert(stored: TensorRef, first: int, rows: int, shape: tuple[int, ...]) -> Tensor:
    assert stored.load_rows is not None
    return stored.load_rows(first, first + rows).view(shape)


CONTAINER = Container(lay_out=lay_out, listed=read_listing, opened=opened, holds_tokenizer=True)
