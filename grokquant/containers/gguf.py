"""GGUF files for llama.cpp: its names and metadata, the experts of a layer in one tensor.

Several files are a split as llama.cpp makes them; it loads the first and finds the others.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

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
from grokquant.containers.gguf_fused import with_parts
from grokquant.containers.gguf_general import file_name, general
from grokquant.containers.gguf_names import (
    EXPERT,
    LAYER,
    OUTSIDE,
    ROPE_FREQS,
    VECTORS,
    Architecture,
    known_architecture,
)
from grokquant.containers.gguf_settings import (
    setting,
    settings_of,
    with_rotary_factors,
)
from grokquant.containers.gguf_vocabulary import vocabulary
from grokquant.errors import InputError
from grokquant.families import config_of
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
from grokquant.sources.left_aside import named
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
    settings = settings_of(source)
    locations = dict(_locations(known_architecture(source), config_of(source)))
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
    files = _files(source, settings, split(stacks, shard, over_layers=True), tensors)
    return OutputLayout(files, slots)


def opened(source: Source) -> Source:
    """`source` with the usual names and matrices instead of llama.cpp's names and stacks.

    Metadata give the config and the tokenizer where nothing beside the files does.
    """
    if source.metadata:
        source = described(with_parts(source))
    architecture = known_architecture(source)
    config = config_of(source)
    refs = {}
    used = {ROPE_FREQS}
    for name, location in _locations(architecture, config, source.tensors):
        stored = source.tensors.get(location.name)
        if stored is None:
            continue
        if stored.shape[0] % location.experts:
            raise InputError(
                f"{source.path}: {stored.name} is no stack of {location.experts} experts"
            )
        ref = _ref(name, location, stored)
        refs[ref.name] = ref
        used.add(location.name)
    others = {name: source.tensors[name] for name in source.tensors if name not in used}
    further = [name for name in others if _layer_of(name) >= config.num_hidden_layers]
    notes = source.notes
    if further:
        notes += (f"{source.path}: layers that predict further tokens, not read: {named(further)}",)
    # What is left is no part of the model, and refused as such.
    refs |= {name: ref for name, ref in others.items() if name not in further}
    return replace(source, tensors=refs, notes=notes)


def _layer_of(stored: str) -> int:
    """The layer of a tensor by llama.cpp's name, -1 outside the layers."""
    found = re.match(r"blk\.(\d{1,6})\.", stored)
    return int(found[1]) if found else -1


def _locations(
    architecture: Architecture, config: PreTrainedConfig, stored: Collection[str] | None = None
) -> Iterator[tuple[str, _Location]]:
    """Where llama.cpp stores each tensor of a model with this config, by usual name.

    With the names of tensors that are `stored`, only those, wherever files of others have them.
    """
    outside = {**OUTSIDE, **({ROPE_FREQS: ROPE_FREQS} if stored is None else {})}
    for name, place in outside.items():
        if stored is None or place in stored:
            yield name, _location(architecture, config, name, place)
    endings = [*architecture.within.items()]
    endings += [] if stored is None else architecture.read_too.items()
    for layer in range(config.num_hidden_layers):
        for ending, stored_ending in endings:
            name = LAYER.format(layer=layer) + ending
            place = f"blk.{layer}.{stored_ending}"
            if stored is not None and place.format(expert=0) not in stored:
                continue
            if EXPERT in ending:
                yield from _of_experts(architecture, config, name, place)
            else:
                yield name, _location(architecture, config, ending, place)


def _of_experts(
    architecture: Architecture, config: PreTrainedConfig, name: str, place: str
) -> Iterator[tuple[str, _Location]]:
    """Where the tensors of all experts are: in one stack, or alone if `place` has their numbers."""
    experts = setting(config, architecture.settings["expert_count"])
    for expert in range(experts):
        if EXPERT in place:
            yield name.format(expert=expert), _Location(place.format(expert=expert))
        else:
            yield name.format(expert=expert), _Location(place, expert, experts)


def _location(
    architecture: Architecture, config: PreTrainedConfig, ending: str, stored: str
) -> _Location:
    """Where a tensor lies whose name has this ending in its layer, or outside the layers."""
    heads = architecture.heads_field(ending)
    return _Location(
        stored,
        heads=setting(config, heads) if heads else None,
        shift=int(ending in architecture.shifted),
        vector=ending in VECTORS,
    )


def _location_of(part: PlannedTensor, locations: Mapping[str, _Location]) -> _Location:
    name = part.name.removesuffix(_BLOCKS)
    if name not in locations:
        raise InputError(
            f"{name}: llama.cpp has no such tensor, so gguf cannot hold it; if the model does not "
            "use it, set output.extra_tensors to leave_out"
        )
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
    source: Source,
    settings: Mapping[str, Value],
    parts: list[Group],
    tensors: Mapping[str, GgufTensor],
) -> tuple[PlannedFile, ...]:
    count = len(parts)
    files = []
    for number, (layer, planned) in enumerate(parts):
        name = file_name(source, tensors.values(), number, count)
        metadata = _metadata(source, settings, tensors.values()) if number == 0 else {}
        if count > 1:
            metadata["split.no"] = Short(number)
            metadata["split.count"] = Short(count)
            metadata["split.tensors.count"] = Signed(len(tensors))
        layout = gguf_layout(metadata, [tensors[tensor.name] for tensor in planned])
        files.append(PlannedFile(name, layer, tuple(planned), layout))
    return tuple(files)


def _metadata(
    source: Source, settings: Mapping[str, Value], tensors: Collection[GgufTensor]
) -> dict[str, Value]:
    name: dict[str, Value] = {"general.architecture": known_architecture(source).name}
    return {**name, **general(source, tensors), **settings, **vocabulary(source)}


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


CONTAINER = Container(
    lay_out=lay_out,
    listed=read_listing,
    opened=opened,
    prepared=with_rotary_factors,
    holds_tokenizer=True,
)
