"""llama.cpp's blocks: a matrix `X.weight` becomes `X.weight_blocks` uint8 [out, bytes of a row].

`gguf_blocks.py` has the bytes of a block of each grid, `containers/gguf.py` puts matrices of blocks
into files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import Format, PackedLayout
from grokquant.formats.gguf_blocks import pack_blocks, unpack_blocks
from grokquant.formats.reading import packed_matrix
from grokquant.formats.targets import own_config
from grokquant.grids import GRIDS, OTHER_BLOCKS, Grid, Scheme, block_grid
from grokquant.types import ALL_ROWS, QTensor, QuantizedRows, Source, TensorRef, Unit

NAME = "gguf"

_BLOCKS = "_blocks"
_NAMES = tuple(name for name, grid in GRIDS.items() if grid.ggml_type is not None)


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    grid = block_grid(scheme)
    if grid is None:
        return f"it has blocks of {', '.join(_NAMES)}, none of {scheme} with {scheme.scale_dtype}"
    if shape[1] % grid.block_columns:
        return f"{shape[1]} input features are not a multiple of its blocks of {grid.block_columns}"
    return None


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> PackedLayout:
    """Names, dtypes and shapes of what `pack` will return, known before anything is read."""
    grid = _grid_of(scheme)
    row_bytes = shape[1] // grid.block_columns * grid.block_bytes
    return {tensor + _BLOCKS: (torch.uint8, (shape[0], row_bytes))}


def pack_into(parts: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix to their place; tiles may be written concurrently."""
    packed = parts[tensor + _BLOCKS]
    grid = _grid_of(quantized.scheme)
    blocks = pack_blocks(grid.name, quantized, grid.block_columns)
    packed[rows] = blocks.flatten(1).to(packed.device)


def unpack(
    tensor: str, packed: Mapping[str, Tensor], scheme: Scheme, rows: slice = ALL_ROWS
) -> QTensor:
    """The inverse of `pack`, bit by bit, for some rows."""
    grid = _grid_of(scheme)
    blocks = packed[tensor + _BLOCKS][rows].unflatten(1, (-1, grid.block_bytes))
    return unpack_blocks(grid.name, blocks, scheme)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of config.json: the block type of groups of matrices.

    llama.cpp reads types from the files; this is for whoever reads the directory.
    """
    by_type: dict[str, list[str]] = {}
    for unit in units:
        name = _grid_of(unit.scheme).name
        by_type.setdefault(name, []).append(unit.tensor.removesuffix(".weight"))
    return own_config(NAME, by_type, unquantized)


def grid_name(scheme: Scheme) -> str:
    """llama.cpp's name of a grid: Q8_0, Q4_K."""
    return _grid_of(scheme).name.upper()


def unpacked(source: Source) -> Source:
    """`source` with each matrix of blocks presented as one `X.weight`.

    It reads as a QTensor if its type is a grid, else as what the gguf package makes of it; both are
    multiplied out in float32, as llama.cpp does.
    """
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        if name.endswith(_BLOCKS):
            ref = _unpacked_ref(source, name.removesuffix(_BLOCKS), ref)
        tensors[ref.name] = ref
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, tensor: str, ref: TensorRef) -> TensorRef:
    assert ref.grid_name is not None
    kind = ref.grid_name
    grid = GRIDS.get(kind.lower())
    if grid is None:
        _, columns, size = OTHER_BLOCKS[kind]
        shape = (ref.shape[0], ref.shape[1] // size * columns)
        load = partial(_multiplied_out, source.path, ref, kind)
        return TensorRef(tensor, shape, torch.float32, ref.stored_bytes, load, grid_name=kind)
    scheme = grid.scheme
    shape = (ref.shape[0], ref.shape[1] // grid.block_bytes * grid.block_columns)

    def open_rows() -> QuantizedRows:
        return partial(unpack, tensor, {tensor + _BLOCKS: ref.read()}, scheme)

    matrix = packed_matrix(tensor, shape, torch.float32, ref.stored_bytes, open_rows, scheme)
    return replace(matrix, grid_name=kind)


def _multiplied_out(path: Path, ref: TensorRef, kind: str) -> Tensor:
    """The float32 values of blocks of a type that is no grid [rows, columns]."""
    # Imported here: it takes as long as many commands.
    from gguf import GGMLQuantizationType, dequantize

    blocks = ref.read().numpy()
    values = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind]))
    if not values.isfinite().all():
        raise InputError(
            f"{path}: tensor {ref.name.removesuffix(_BLOCKS)!r} holds non-finite scales"
        )
    return values


def _grid_of(scheme: Scheme) -> Grid:
    """The grid of a scheme that this format holds."""
    grid = block_grid(scheme)
    assert grid is not None, f"gguf has no blocks of {scheme}"
    return grid


FORMAT = Format(
    name=NAME,
    scale_dtype="float16",
    refusal=refusal,
    packed_layout=packed_layout,
    pack_into=pack_into,
    unpack=unpack,
    unpacked=unpacked,
    quantization_config=quantization_config,
    grid_name=grid_name,
    holds_dense=True,
    needs_own_loader=True,
    budget_units=("projection", "layer"),  # a part of all experts of a layer is one tensor
)
