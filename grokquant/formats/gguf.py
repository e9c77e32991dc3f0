"""llama.cpp's blocks: a matrix `X.weight` becomes `X.weight_blocks` uint8 [out, bytes of a row].

`gguf_blocks.py` has the bytes of a block of each grid, `containers/gguf.py` puts matrices of blocks
into files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import Format, PackedLayout
from grokquant.formats.gguf_blocks import pack_blocks, unpack_blocks
from grokquant.formats.reading import packed_matrix
from grokquant.formats.targets import first_match, own_config
from grokquant.grids import GRIDS, SCALE_DTYPES, Grid, Scheme, block_grid
from grokquant.types import ALL_ROWS, QTensor, QuantizedRows, Source, TensorRef, Unit

NAME = "gguf"

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
    return {f"{tensor}_blocks": (torch.uint8, (shape[0], row_bytes))}


def pack_into(parts: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix to their place; tiles may be written concurrently."""
    packed = parts[f"{tensor}_blocks"]
    grid = _grid_of(quantized.scheme)
    blocks = pack_blocks(grid.name, quantized, grid.block_columns)
    packed[rows] = blocks.flatten(1).to(packed.device)


def unpack(
    tensor: str, packed: Mapping[str, Tensor], scheme: Scheme, rows: slice = ALL_ROWS
) -> QTensor:
    """The inverse of `pack`, bit by bit, for some rows."""
    grid = _grid_of(scheme)
    blocks = packed[f"{tensor}_blocks"][rows].unflatten(1, (-1, grid.block_bytes))
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
    """`source` with each matrix of blocks presented as one `X.weight` that reads as a QTensor."""
    types = _types_of(source)
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        if name.endswith(".weight_blocks"):
            tensor = name.removesuffix("_blocks")
            tensors[tensor] = _unpacked_ref(source, tensor, ref, types)
        else:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _unpacked_ref(
    source: Source, tensor: str, ref: TensorRef, types: list[tuple[str, str]]
) -> TensorRef:
    name = first_match(tensor.removesuffix(".weight"), types)
    if name is None:
        raise InputError(f"{source.path / 'config.json'}: no config group targets {tensor}")
    grid = GRIDS[name]
    if ref.dtype != torch.uint8 or len(ref.shape) != 2 or ref.shape[1] % grid.block_bytes:
        raise InputError(f"{source.path}: {tensor} does not consist of blocks of {name}")
    scheme = grid.scheme
    shape = (ref.shape[0], ref.shape[1] // grid.block_bytes * grid.block_columns)

    def open_rows() -> QuantizedRows:
        return partial(unpack, tensor, {f"{tensor}_blocks": ref.read()}, scheme)

    dtype = SCALE_DTYPES[scheme.scale_dtype]
    matrix = packed_matrix(tensor, shape, dtype, ref.stored_bytes, open_rows, scheme)
    return replace(matrix, grid_name=grid_name(scheme))


def _types_of(source: Source) -> list[tuple[str, str]]:
    """Targets and their block types. Raises InputError where the config does not tell them."""
    groups: Any = source.config["quantization_config"].get("config_groups")
    try:
        found = [(str(t), str(name)) for name, group in groups.items() for t in group["targets"]]
    except (AttributeError, KeyError, TypeError):
        found = [("", "nothing")]
    if unknown := [name for _, name in found if name not in _NAMES]:
        where = f"{source.path / 'config.json'}: quantization_config.config_groups"
        raise InputError(f"{where}: {unknown[0]!r} is none of {', '.join(_NAMES)}")
    return found


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
)
