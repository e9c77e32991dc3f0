"""bitsandbytes: nf4 and fp4 codes in blocks, or int8 codes with an absmax per row (LLM.int8).

Names and layouts are those of the state of its Linear4bit and Linear8bitLt.
nf4, fp4: `X.weight` uint8 [out * in / 2, 1], the first of two codes in the high bits;
`X.weight.absmax` float32 [out * in / block]; `X.weight.quant_map` float32 [16], what the codes
stand for; `X.weight.quant_state.bitsandbytes__nf4`, JSON as uint8. Blocks run over the flattened
matrix; where they divide its rows, as here they must, they are groups.
int8: `X.weight` int8 [out, in], `X.SCB` float32 [out], `X.weight_format` uint8 [], which is 0.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.parts import Layout, pack_all
from grokquant.formats.targets import own_config
from grokquant.grids import GRIDS, Scheme
from grokquant.types import QTensor, Source, TensorRef, Unit

NAME = "bitsandbytes"
# How a scale is stored if the recipe does not say; whether an output of no quantized matrix is one.
SCALE_DTYPE, HOLDS_DENSE = "float32", False

_INT8 = GRIDS["llm_int8"].scheme
_STATE = "quant_state.bitsandbytes__"


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    if scheme == _INT8:
        return None
    if NAME not in scheme.row.formats:
        return f"it holds the grids nf4, fp4 and llm_int8, not {scheme}"
    size = scheme.group_size
    if size is None or size not in scheme.row.groups:
        return f"its blocks have {scheme.row.group_names} weights, not those of {scheme}"
    if shape[1] % size:
        return f"blocks of {size} weights would go over rows of {shape[1]}"
    return None


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> Layout:
    """Names, dtypes and shapes of what `pack` will return, known before anything is read."""
    if scheme == _INT8:
        stem = _stem(tensor)
        return {
            tensor: (torch.int8, shape),
            f"{stem}.SCB": (torch.float32, (shape[0],)),
            f"{stem}.weight_format": (torch.uint8, ()),
        }
    return {
        tensor: (torch.uint8, (prod(shape) // 2, 1)),
        f"{tensor}.absmax": (torch.float32, (shape[0] * scheme.groups(shape[1]),)),
        f"{tensor}.quant_map": (torch.float32, (16,)),
        f"{tensor}.{_STATE}{scheme.grid}": (torch.uint8, (len(_state(shape, scheme)),)),
    }


def pack(tensor: str, quantized: QTensor) -> dict[str, Tensor]:
    """The named tensors that stand for `tensor` in a checkpoint."""
    return pack_all(tensor, quantized, packed_layout, pack_into)


def pack_into(parts: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix to where `packed_layout` puts them in the whole one's parts.

    Tiles may be written concurrently: what does not depend on rows is the same in each.
    """
    weight, scheme, columns = parts[tensor], quantized.scheme, quantized.codes.shape[1]
    if scheme == _INT8:
        stem = _stem(tensor)
        weight[rows] = quantized.codes.to(weight.device)
        parts[f"{stem}.SCB"][rows] = quantized.scales.squeeze(1).to(weight.device)
        parts[f"{stem}.weight_format"].zero_()
        return
    codes = quantized.codes.view(torch.uint8)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    weight.view(-1, columns // 2)[rows] = pairs.to(weight.device)
    absmax = parts[f"{tensor}.absmax"].view(-1, scheme.groups(columns))
    absmax[rows] = quantized.scales.to(weight.device)
    parts[f"{tensor}.quant_map"].copy_(torch.tensor(scheme.row.table))
    state = _state((len(absmax), columns), scheme)
    parts[f"{tensor}.{_STATE}{scheme.grid}"].copy_(torch.tensor(list(state), dtype=torch.uint8))


def unpack(tensor: str, packed: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The inverse of `pack`, bit by bit."""
    weight = packed[tensor]
    if scheme == _INT8:
        return QTensor(weight, packed[f"{_stem(tensor)}.SCB"].unsqueeze(1), scheme)
    state = bytes(packed[f"{tensor}.{_STATE}{scheme.grid}"].tolist())
    rows, columns = json.loads(state)["shape"]
    codes = torch.cat((weight >> 4, weight & 15), dim=1).view(rows, columns)
    return QTensor(codes.view(torch.int8), packed[f"{tensor}.absmax"].view(rows, -1), scheme)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of config.json.

    That of bitsandbytes itself where the loader of transformers reads all: one kind of layer in a
    model without experts, which it would leave as they are. Else one that only we read.
    """
    by_grid: dict[str, list[str]] = {}
    for unit in units:
        by_grid.setdefault(str(unit.scheme), []).append(_stem(unit.tensor))
    kept = sorted(unquantized)
    kind, *others = {grid.partition(" ")[0] for grid in by_grid}
    if others or any(".experts." in stem for stem in chain(kept, *by_grid.values())):
        return own_config(NAME, by_grid, kept)
    common = {"quant_method": NAME, "llm_int8_skip_modules": kept}
    if kind == _INT8.grid:
        return common | {"load_in_8bit": True, "load_in_4bit": False}
    return common | {
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
    }


def papers(config: dict) -> dict[str, dict]:
    """JSON files that readers of this format want beside config.json, by name: none."""
    return {}


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight` that reads as a QTensor."""
    tensors = dict(source.tensors)
    for name in source.tensors:
        tensor, _, kind = name.partition(f".{_STATE}")
        if kind:
            ref, parts = _four_bit_ref(source, tensor, name)
        elif name.endswith(".SCB"):
            tensor = name.removesuffix("SCB") + "weight"
            ref, parts = _int8_ref(source, tensor)
        else:
            continue
        for part in parts:
            tensors.pop(part, None)
        tensors[tensor] = ref
    return replace(source, tensors=tensors)


def _four_bit_ref(source: Source, tensor: str, name: str) -> tuple[TensorRef, Iterable[str]]:
    """The matrix whose state is called `name`, and the names of its parts."""
    state = _read_state(source, name)
    scheme = Scheme(4, state.blocksize, True, SCALE_DTYPE, state.quant_type)
    if reason := refusal(scheme, state.shape):
        raise InputError(f"{source.path}: {name}: {reason}")
    layout = packed_layout(tensor, state.shape, scheme)
    layout[name] = torch.uint8, source.tensors[name].shape  # others may write other spaces
    return _unpacked_ref(source, tensor, layout, scheme, state.shape), layout.keys()


def _int8_ref(source: Source, tensor: str) -> tuple[TensorRef, Iterable[str]]:
    weight = source.tensors.get(tensor)
    shape = weight.shape if weight and len(weight.shape) == 2 else (0, 0)
    layout = packed_layout(tensor, shape, _INT8)
    return _unpacked_ref(source, tensor, layout, _INT8, shape), layout.keys()


def _unpacked_ref(
    source: Source, tensor: str, layout: Layout, scheme: Scheme, shape: tuple[int, int]
) -> TensorRef:
    for name, (dtype, wanted) in layout.items():
        if name not in source.tensors:
            raise InputError(f"{source.path}: {name} is missing")
        ref = source.tensors[name]
        if (ref.dtype, ref.shape) != (dtype, wanted):
            found = f"{ref.dtype} {list(ref.shape)}"
            raise InputError(f"{source.path}: {name} is {found}, not {dtype} {list(wanted)}")
    parts = [source.tensors[name] for name in layout]

    def load() -> QTensor:
        packed = {ref.name: ref.read() for ref in parts}
        values = packed.get(f"{tensor}.quant_map")
        if values is not None and not values.equal(torch.tensor(scheme.row.table)):
            raise InputError(f"{source.path}: {tensor}.quant_map is not that of {scheme.grid}")
        return unpack(tensor, packed, scheme)

    stored = sum(ref.stored_bytes for ref in parts)
    return TensorRef(tensor, shape, torch.float32, stored, load, scheme)


class _State(BaseModel):
    """What the JSON of a 4-bit matrix says."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    shape: tuple[int, int]


def _state(shape: tuple[int, int], scheme: Scheme) -> bytes:
    """The JSON of a 4-bit matrix; `dtype` is what bitsandbytes multiplies it out to."""
    state = {"quant_type": scheme.grid, "blocksize": scheme.group_size, "dtype": "bfloat16"}
    return json.dumps(state | {"shape": list(shape)}).encode()


def _read_state(source: Source, name: str) -> _State:
    content = bytes(source.tensors[name].read().flatten().to(torch.uint8).tolist())
    try:
        found = json.loads(content)
        if "nested_blocksize" in found:
            raise InputError(f"{source.path}: {name}: nested absmax cannot be read")
        return _State.model_validate(found)
    except (ValueError, TypeError, ValidationError, RecursionError) as error:
        raise InputError(f"{source.path}: {name}: {' '.join(str(error).split())[:200]}") from None


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")
