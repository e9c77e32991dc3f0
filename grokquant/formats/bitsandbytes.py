"""bitsandbytes: nf4 and fp4 codes in blocks, or int8 codes with an absmax per row (LLM.int8).

Names and layouts are those of the state of its Linear4bit and Linear8bitLt.

nf4 and fp4: `X.weight` uint8 [out * in / 2, 1] holds the codes of the flattened matrix;
`X.weight.absmax` float32 [out * in / block] the scales; `X.weight.quant_map` float32 [16] the value
of each code; `X.weight.quant_state.bitsandbytes__nf4` uint8 a JSON text. Blocks that divide the
rows, as this module requires, are groups.

    byte       0         1     ..        absmax of codes 0 .. block - 1, of the next block, ..
    code  |0   1|   |2   3|    ..        first code in the high bits

Double quantization, which is only read, has `X.weight.absmax` uint8: places in the table
`X.weight.nested_quant_map` float32 [256]. The values there, times `X.weight.nested_absmax` float32
of their block of 256, plus the `nested_offset` of the JSON text, are the scales.

int8: `X.weight` int8 [out, in], `X.SCB` float32 [out] the absmax of each row, `X.weight_format`
uint8 [], which is 0: row by row.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from math import prod
from typing import Annotated, Literal

import numpy as np
import torch
from numba import njit
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import Format, PackedLayout
from grokquant.formats.reading import check_packed, packed_matrix
from grokquant.formats.targets import own_config
from grokquant.grids import GRIDS, Scheme
from grokquant.types import ALL_ROWS, QTensor, QuantizedRows, Source, TensorRef, Unit

NAME = "bitsandbytes"

_INT8 = GRIDS["llm_int8"].scheme
_STATE = "quant_state.bitsandbytes__"
_SCALE_DTYPE = "float32"
_MAX_STATE_BYTES = 10_000  # of a few hundred


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    if scheme == _INT8:
        return None
    if NAME not in scheme.row.formats:
        return f"it holds the grids nf4, fp4 and llm_int8, not {scheme}"
    size = scheme.group_size
    if size is None or size not in scheme.row.groups:
        return f"its blocks hold {scheme.row.group_names} weights, unlike {scheme}"
    if shape[1] % size:
        return f"blocks of {size} weights do not divide rows of {shape[1]}"
    return None


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> PackedLayout:
    """Names, dtypes and shapes of the packed tensors of a matrix."""
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


def pack_into(packed: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix into its packed tensors."""
    if quantized.scheme == _INT8:
        _pack_int8(packed, tensor, rows, quantized)
    else:
        _pack_four_bits(packed, tensor, rows, quantized)


def _pack_int8(packed: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    stem = _stem(tensor)
    weight = packed[tensor]
    weight[rows] = quantized.codes.to(weight.device)
    packed[f"{stem}.SCB"][rows] = quantized.scales.squeeze(1).to(weight.device)
    _copy(constants(tensor, (len(weight), weight.shape[1]), quantized.scheme), packed)


def _pack_four_bits(
    packed: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor
) -> None:
    weight = packed[tensor]
    scheme = quantized.scheme
    columns = quantized.codes.shape[1]
    codes = quantized.codes.view(torch.uint8)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]  # (rows, in / 2)
    weight.view(-1, columns // 2)[rows] = pairs.to(weight.device)
    absmax = packed[f"{tensor}.absmax"].view(-1, scheme.groups(columns))
    absmax[rows] = quantized.scales.to(weight.device)
    _copy(constants(tensor, (len(absmax), columns), scheme), packed)


def _copy(values: Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        packed[name].copy_(value)


def constants(tensor: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, Tensor]:
    """The packed tensors that depend on no weight."""
    if scheme == _INT8:
        row_by_row = torch.tensor(0, dtype=torch.uint8)
        return {f"{_stem(tensor)}.weight_format": row_by_row}
    state = torch.tensor(list(_state(shape, scheme)), dtype=torch.uint8)
    return {
        f"{tensor}.quant_map": torch.tensor(scheme.row.table),
        f"{tensor}.{_STATE}{scheme.grid}": state,
    }


def unpack(
    tensor: str, packed: Mapping[str, Tensor], scheme: Scheme, rows: slice = ALL_ROWS
) -> QTensor:
    """The inverse of `pack`, bit by bit, for some rows."""
    weight = packed[tensor]
    if scheme == _INT8:
        absmax = packed[f"{_stem(tensor)}.SCB"].unsqueeze(1)
        return QTensor(weight[rows], absmax[rows], scheme)
    state = bytes(packed[f"{tensor}.{_STATE}{scheme.grid}"].tolist())
    count = json.loads(state)["shape"][0]
    pairs = weight.view(count, -1)[rows]  # (rows, in / 2)
    absmax = packed[f"{tensor}.absmax"].view(count, -1)
    return QTensor(_unpack_pairs(pairs), absmax[rows], scheme)


def _unpack_pairs(pairs: Tensor) -> Tensor:
    """uint8 [rows, n] to int8 codes [rows, 2 n], the upper half first."""
    if pairs.device.type != "cpu":
        return torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(1).view(torch.int8)
    codes = torch.empty(len(pairs), 2 * pairs.shape[1], dtype=torch.int8)
    words = codes.view(-1).view(torch.int16).numpy().view(np.uint16)
    _split_pairs(pairs.reshape(-1).numpy(), words)
    return codes


@njit(nogil=True, cache=True)
def _split_pairs(pairs, words):
    """0xab -> 0x0b0a, whose lower byte comes first."""
    for i in range(len(pairs)):
        words[i] = np.uint16(pairs[i] >> 4) | np.uint16((pairs[i] & 15) << 8)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The config of bitsandbytes itself where the loader of transformers reads everything: a single
    grid, and no experts, which that loader would leave unquantized. Otherwise our own config."""
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


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight` that reads as a QTensor."""
    tensors = dict(source.tensors)
    for name in source.tensors:
        tensor, _, kind = name.partition(f".{_STATE}")
        if kind:
            ref, names = _four_bit_ref(source, tensor, name)
        elif name.endswith(".SCB"):
            tensor = name.removesuffix("SCB") + "weight"
            ref, names = _int8_ref(source, tensor)
        else:
            continue
        for packed in names:
            tensors.pop(packed, None)
        tensors[tensor] = ref
    return replace(source, tensors=tensors)


def _four_bit_ref(source: Source, tensor: str, name: str) -> tuple[TensorRef, Iterable[str]]:
    """The matrix whose state is called `name`, and the names of its packed tensors."""
    state = _read_state(source, name)
    scheme = Scheme(4, state.blocksize, True, _SCALE_DTYPE, state.quant_type)
    if reason := refusal(scheme, state.shape):
        raise InputError(f"{source.path}: {name}: {reason}")
    layout = packed_layout(tensor, state.shape, scheme)
    # The JSON of other writers may have other spaces, and so another length.
    layout[name] = (torch.uint8, source.tensors[name].shape)
    if state.nested_blocksize is not None:
        layout |= _nested_layout(
            f"{tensor}.", prod(state.shape) // state.blocksize, state.nested_blocksize
        )
    return _unpacked_ref(source, tensor, layout, scheme, state.shape, state), layout.keys()


def _nested_layout(prefix: str, scales: int, blocksize: int) -> PackedLayout:
    """The tensors of `double quantization`, in which the scales are codes of 8 bits themselves."""
    return {
        f"{prefix}absmax": (torch.uint8, (scales,)),
        f"{prefix}nested_absmax": (torch.float32, (-(-scales // blocksize),)),
        f"{prefix}nested_quant_map": (torch.float32, (256,)),
    }


def _unnested(prefix: str, packed: Mapping[str, Tensor], state: "_State") -> Tensor:
    """The scales of double quantization: value(code) * nested scale + offset, in float32."""
    assert state.nested_blocksize is not None
    codes = packed[f"{prefix}absmax"].int()
    scales = packed[f"{prefix}nested_absmax"]
    scales = scales.repeat_interleave(min(state.nested_blocksize, len(codes)))[: len(codes)]
    return packed[f"{prefix}nested_quant_map"][codes] * scales + state.nested_offset


def _int8_ref(source: Source, tensor: str) -> tuple[TensorRef, Iterable[str]]:
    weight = source.tensors.get(tensor)
    shape = weight.shape if weight and len(weight.shape) == 2 else (0, 0)
    layout = packed_layout(tensor, shape, _INT8)
    return _unpacked_ref(source, tensor, layout, _INT8, shape), layout.keys()


def _unpacked_ref(
    source: Source,
    tensor: str,
    layout: PackedLayout,
    scheme: Scheme,
    shape: tuple[int, int],
    state: "_State | None" = None,
) -> TensorRef:
    refs = check_packed(source, layout, scheme)

    def open_rows() -> QuantizedRows:
        packed = {ref.name: ref.read() for ref in refs}
        values = packed.get(f"{tensor}.quant_map")
        if values is not None and not values.equal(torch.tensor(scheme.row.table)):
            raise InputError(
                f"{source.path}: {tensor}.quant_map does not hold the values of {scheme.grid}"
            )
        if state is not None and state.nested_blocksize is not None:
            packed[f"{tensor}.absmax"] = _unnested(f"{tensor}.", packed, state)
        return partial(unpack, tensor, packed, scheme)

    stored = sum(ref.stored_bytes for ref in refs)
    return packed_matrix(tensor, shape, torch.float32, stored, open_rows, scheme)


Size = Annotated[int, Field(ge=1, le=2**31)]


class _State(BaseModel):
    """What reading takes from the JSON of a 4-bit matrix."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Annotated[int, Field(ge=1, le=2**20)]
    shape: tuple[Size, Size]
    # Of the scales, where they are quantized as well.
    nested_blocksize: Annotated[int, Field(ge=1)] | None = None
    nested_dtype: Literal["float32"] = "float32"
    nested_offset: FiniteFloat = 0.0


def _state(shape: tuple[int, int], scheme: Scheme) -> bytes:
    """The JSON of a 4-bit matrix; `dtype` is that of the matrix as bitsandbytes dequantizes it."""
    state = {"quant_type": scheme.grid, "blocksize": scheme.group_size, "dtype": "bfloat16"}
    return json.dumps(state | {"shape": list(shape)}).encode()


def _read_state(source: Source, name: str) -> _State:
    where = f"{source.path}: {name}"
    ref = source.tensors[name]
    if ref.stored_bytes > _MAX_STATE_BYTES:
        raise InputError(f"{where}: larger than {_MAX_STATE_BYTES} bytes, not the JSON of a matrix")
    content = bytes(ref.read().flatten().to(torch.uint8).tolist())
    try:
        found = json.loads(content)
        return _State.model_validate(found)
    except (ValueError, TypeError, ValidationError, RecursionError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())[:200]}") from None


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")


FORMAT = Format(
    name=NAME,
    scale_dtype=_SCALE_DTYPE,
    refusal=refusal,
    packed_layout=packed_layout,
    pack_into=pack_into,
    constants=constants,
    unpack=unpack,
    unpacked=unpacked,
    quantization_config=quantization_config,
)
