"""llama.cpp's blocks: a matrix `X.weight` becomes `X.weight_blocks` uint8 [out, bytes of a row].

Layouts: github.com/ggml-org/ggml, src/ggml-common.h. Blocks of 32 columns have a float16 scale, and
a float16 offset (Q4_1); those of 256 (Q4_K, Q5_K, Q6_K) a header of float16 and of small integers
that make the scales and offsets of their groups. `containers/gguf.py` puts them in files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import Format, PackedLayout
from grokquant.formats.targets import first_match, own_config
from grokquant.grids import NAMED_GRIDS, Scheme
from grokquant.types import QTensor, Source, TensorRef, Unit

NAME = "gguf"

# Grids with the columns and bytes of a block.
_BLOCKS = {
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
_NAMES = {NAMED_GRIDS[name]: name for name in _BLOCKS}


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    if scheme not in _NAMES:
        return f"it has blocks of {', '.join(_BLOCKS)}, none of {scheme} with {scheme.scale_dtype}"
    columns = _BLOCKS[_NAMES[scheme]][0]
    if shape[1] % columns:
        return f"{shape[1]} input features are no whole blocks of {columns}"
    return None


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> PackedLayout:
    """Names, dtypes and shapes of what `pack` will return, known before anything is read."""
    columns, size = _BLOCKS[_NAMES[scheme]]
    return {f"{tensor}_blocks": (torch.uint8, (shape[0], shape[1] // columns * size))}


def pack_into(parts: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix to their place; tiles may be written concurrently."""
    packed, name = parts[f"{tensor}_blocks"], _NAMES[quantized.scheme]
    codes = quantized.codes.unflatten(1, (-1, _BLOCKS[name][0]))  # (rows, blocks, columns)
    packed[rows] = torch.cat(_fields(name, codes, quantized), dim=-1).flatten(1).to(packed.device)


def unpack(tensor: str, packed: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The inverse of `pack`, bit by bit."""
    name = _NAMES[scheme]
    blocks = packed[f"{tensor}_blocks"].unflatten(1, (-1, _BLOCKS[name][1]))
    return _READERS[name](blocks, scheme)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of config.json: the block type of groups of matrices.

    llama.cpp reads types from the files; this is for whoever reads the directory.
    """
    by_type: dict[str, list[str]] = {}
    for unit in units:
        by_type.setdefault(_NAMES[unit.scheme], []).append(unit.tensor.removesuffix(".weight"))
    return own_config(NAME, by_type, unquantized)


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
    columns, size = _BLOCKS[name]
    if ref.dtype != torch.uint8 or len(ref.shape) != 2 or ref.shape[1] % size:
        raise InputError(f"{source.path}: {tensor} does not consist of blocks of {name}")
    scheme, shape = NAMED_GRIDS[name], (ref.shape[0], ref.shape[1] // size * columns)

    def load() -> QTensor:
        return unpack(tensor, {f"{tensor}_blocks": ref.read()}, scheme)

    dtype = torch.float16 if scheme.scale_dtype == "float16" else torch.float32
    return TensorRef(tensor, shape, dtype, ref.stored_bytes, load, scheme)


def _types_of(source: Source) -> list[tuple[str, str]]:
    """Targets and their block types. Raises InputError where the config does not tell them."""
    groups: Any = source.config["quantization_config"].get("config_groups")
    try:
        found = [(str(t), str(name)) for name, group in groups.items() for t in group["targets"]]
    except (AttributeError, KeyError, TypeError):
        found = [("", "nothing")]
    if unknown := [name for _, name in found if name not in _BLOCKS]:
        where = f"{source.path / 'config.json'}: quantization_config.config_groups"
        raise InputError(f"{where}: {unknown[0]!r} is none of {', '.join(_BLOCKS)}")
    return found


def _fields(name: str, codes: Tensor, quantized: QTensor) -> tuple[Tensor, ...]:
    """What stands in each block one after the other, as bytes [rows, blocks, bytes]."""
    if name == "q8_0":
        return _bytes(quantized.scales), codes.view(torch.uint8)
    if name == "q4_0":
        return _bytes(quantized.scales), _halves((codes + 8).view(torch.uint8))
    if name == "q4_1":
        assert quantized.offsets is not None
        unsigned = codes.view(torch.uint8)
        return _bytes(quantized.scales), _bytes(quantized.offsets), _halves(unsigned)
    headers = quantized.headers
    assert headers is not None
    if name == "q6_k":
        return *_six_bits((codes + 32).view(torch.uint8)), headers
    unsigned = codes.view(torch.uint8).unflatten(-1, (4, 64))
    low = _halves(unsigned & 15).flatten(-2)
    return (headers, low) if name == "q4_k" else (headers, _fifth_bits(unsigned), low)


def _halves(codes: Tensor) -> Tensor:
    """4-bit codes [.., n] to bytes [.., n / 2]: the first half in the low bits."""
    first, second = codes.chunk(2, dim=-1)
    return first | (second << 4)


def _unhalved(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _fifth_bits(codes: Tensor) -> Tensor:
    """The upper bits of 5-bit codes [.., 4, 64]: bytes [.., 32] with a bit for each half of 64."""
    bits = (codes >> 4).unflatten(-1, (2, 32)).flatten(-3, -2)  # (.., 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    return (bits << shifts).sum(-2, dtype=torch.uint8)


def _six_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Low four bits [.., 128] and high two bits [.., 64] of 6-bit codes [.., 256]."""
    quarters = codes.unflatten(-1, (2, 4, 32))  # of each half of 128
    low, high = quarters & 15, quarters >> 4
    low = (
        torch.cat((low[..., :2, :], low[..., 2:, :] << 4), dim=-2)
        .unflatten(-2, (2, 2))
        .sum(-3, dtype=torch.uint8)
    )  # (.., 2, 2, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    return low.flatten(-3), (high << shifts).sum(-2, dtype=torch.uint8).flatten(-2)


def _read_q8_0(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
    return QTensor(codes, _floats(blocks, 0), scheme)


def _read_q4_0(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unhalved(blocks[..., 2:]).view(torch.int8) - 8
    return QTensor(codes.flatten(1), _floats(blocks, 0), scheme)


def _read_q4_1(blocks: Tensor, scheme: Scheme) -> QTensor:
    codes = _unhalved(blocks[..., 4:]).view(torch.int8).flatten(1)
    return QTensor(codes, _floats(blocks, 0), scheme, offsets=_floats(blocks, 2))


def _read_with_minima(blocks: Tensor, scheme: Scheme) -> QTensor:
    headers, rest = blocks[..., :16].contiguous(), blocks[..., 16:]
    codes = _unhalved(rest[..., -128:].unflatten(-1, (4, 32)))  # (.., 4, 64)
    if scheme.bits == 5:
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).unsqueeze(-1)
        bits = (rest[..., None, :32] >> shifts) & 1  # (.., 8, 32)
        codes = codes | (bits.unflatten(-2, (4, 2)).flatten(-2) << 4)
    d, dmin = (_floats(headers, at).float().unsqueeze(-1) for at in (0, 2))
    scales, minima = _whole_parts(headers[..., 4:])
    spans = (d * scales).flatten(1), -(dmin * minima).flatten(1)
    codes = codes.flatten(1).contiguous().view(torch.int8)
    return QTensor(codes, spans[0], scheme, offsets=spans[1], headers=headers)


def _whole_parts(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima [.., 8] of 12 bytes."""
    first, second, last = packed.split(4, dim=-1)
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), dim=-1)
    minima = torch.cat((second & 63, (last >> 4) | ((second >> 6) << 4)), dim=-1)
    return scales.float(), minima.float()


def _read_q6_k(blocks: Tensor, scheme: Scheme) -> QTensor:
    low, high = blocks[..., :128].unflatten(-1, (2, 2, 32)), blocks[..., 128:192]
    low = torch.cat((low & 15, low >> 4), dim=-2)  # (.., 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).unsqueeze(-1)
    upper = (high.unflatten(-1, (2, 1, 32)) >> shifts) & 3
    codes = ((low | (upper << 4)).view(torch.int8) - 32).flatten(1)
    headers = blocks[..., 192:].contiguous()
    parts = headers[..., :16].contiguous().view(torch.int8).float()
    scales = (_floats(headers, 16).float().unsqueeze(-1) * parts).flatten(1)
    return QTensor(codes, scales, scheme, headers=headers)


_READERS = {
    "q8_0": _read_q8_0,
    "q4_0": _read_q4_0,
    "q4_1": _read_q4_1,
    "q4_k": _read_with_minima,
    "q5_k": _read_with_minima,
    "q6_k": _read_q6_k,
}


def _bytes(values: Tensor) -> Tensor:
    """float16 [rows, blocks] as bytes [rows, blocks, 2]."""
    return values.contiguous().unsqueeze(-1).view(torch.uint8)


def _floats(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a place of each block [rows, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


FORMAT = Format(
    name=NAME,
    scale_dtype="float16",
    refusal=refusal,
    packed_layout=packed_layout,
    pack_into=pack_into,
    unpack=unpack,
    unpacked=unpacked,
    quantization_config=quantization_config,
    holds_dense=True,
    needs_own_loader=True,
)
