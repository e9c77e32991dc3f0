"""compressed-tensors `pack-quantized`: int4 and int8 codes packed into int32 words.

A matrix `X.weight` becomes `X.weight_packed` int32 [out, in * bits / 32], `X.weight_scale`
[out, groups], `X.weight_shape` int64 [2] and, if asymmetric, `X.weight_zero_point` int32
[out * bits / 32, groups]. Codes are offset to unsigned and run along a row, zero points down a
column (see `words` for the bits):

    weight_packed    row 0    | codes 0..7 | codes 8..15 | ..         of 4 bits
    zero_point       word 0   of rows 0..7, one column per group
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats import compressed_config, float_quantized, int_quantized
from grokquant.formats.compressed_config import (
    Group,
    Integers,
    Storage,
    config_of,
    groups_of,
)
from grokquant.formats.format import Format, PackedLayout
from grokquant.formats.reading import (
    check_group_size,
    check_packed,
    packed_matrix,
    packed_tensor,
)
from grokquant.formats.targets import first_match
from grokquant.formats.words import pack_words, unpack_words
from grokquant.grids import SCALE_DTYPE_NAMES, SCALE_DTYPES, Scheme
from grokquant.types import ALL_ROWS, QTensor, QuantizedRows, Source, TensorRef, Unit

NAME = compressed_config.NAME

# What follows `X.` in the names of the tensors that stand for a matrix.
_PARTS: dict[Storage, tuple[str, ...]] = {
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "int-quantized": ("weight", "weight_scale", "weight_zero_point"),
    "float-quantized": ("weight", "weight_scale"),
    "mxfp8-quantized": ("weight", "weight_scale"),
    "mxfp4-pack-quantized": ("weight_packed", "weight_scale"),
    "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
}
# Of a `X.weight` that holds codes.
_CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    if NAME not in scheme.row.formats or scheme.bits not in (4, 8):
        return f"it holds integers of 4 or 8 bits, not {scheme}"
    per_word = 32 // scheme.bits
    if shape[1] % per_word:
        return f"{shape[1]} input features do not fill whole int32 words of {per_word} codes"
    if not scheme.symmetric and shape[0] % per_word:
        return f"{shape[0]} output features do not fill whole int32 words of {per_word} zero points"
    return None


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> PackedLayout:
    """Names, dtypes and shapes of the packed tensors of a matrix."""
    stem = _stem(tensor)
    rows, columns = shape
    groups = scheme.groups(columns)
    per_word = 32 // scheme.bits
    layout: PackedLayout = {
        f"{stem}.weight_packed": (torch.int32, (rows, columns // per_word)),
        f"{stem}.weight_scale": (SCALE_DTYPES[scheme.scale_dtype], (rows, groups)),
        f"{stem}.weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        layout[f"{stem}.weight_zero_point"] = (torch.int32, (rows // per_word, groups))
    return layout


def pack_into(packed: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix, from a multiple of 8 to another or the last, into its packed
    tensors."""
    stem = _stem(tensor)
    bits = quantized.scheme.bits
    words = packed[f"{stem}.weight_packed"]
    shape = (len(words), quantized.codes.shape[1])
    for name, value in constants(tensor, shape, quantized.scheme).items():
        packed[name].copy_(value)
    packed[f"{stem}.weight_scale"][rows] = quantized.scales.to(words.device)
    pack_words(quantized.codes, bits, words[rows])
    if quantized.zero_points is not None:
        per_word = 32 // bits
        count, groups = quantized.zero_points.shape
        zeros = words.new_empty(groups, count // per_word)
        pack_words(quantized.zero_points.T, bits, zeros)
        first = rows.start // per_word
        packed[f"{stem}.weight_zero_point"][first : first + count // per_word] = zeros.T


def constants(tensor: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, Tensor]:
    """The packed tensors that depend on no weight."""
    return {f"{_stem(tensor)}.weight_shape": torch.tensor(shape)}


def unpack(
    tensor: str, packed: Mapping[str, Tensor], scheme: Scheme, rows: slice = ALL_ROWS
) -> QTensor:
    """The inverse of `pack`, bit by bit, for some rows from a multiple of 8 to another or the
    last."""
    stem = _stem(tensor)
    count, columns = packed[f"{stem}.weight_shape"].tolist()
    scales = packed[f"{stem}.weight_scale"][rows]
    words = packed[f"{stem}.weight_packed"][rows]
    codes = unpack_words(words, scheme.bits)[:, :columns].contiguous()
    zero_points = None
    if not scheme.symmetric:
        per_word = 32 // scheme.bits
        first, stop, _ = rows.indices(count)
        part = packed[f"{stem}.weight_zero_point"][first // per_word : -(-stop // per_word)]
        columns_of_words = part.T.contiguous()
        unpacked = unpack_words(columns_of_words, scheme.bits)  # (groups, rows)
        zero_points = unpacked[:, : stop - first].T.contiguous()
    return QTensor(codes, scales, scheme, zero_points)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """One group of targets per scheme."""
    return config_of(units, unquantized)


def unpacked(source: Source) -> Source:
    """`source` with each quantized matrix presented as one `X.weight`.

    It reads as a QTensor where it is stored in integers, else as floats.
    """
    groups = groups_of(source)
    tensors = dict(source.tensors)
    for name, ref in source.tensors.items():
        stem, _, ending = name.rpartition(".")
        if ending == "weight_packed" or (ending == "weight" and ref.dtype in _CODE_DTYPES):
            group = first_match(stem, groups)
            if group is None:
                raise InputError(f"{source.path / 'config.json'}: no config group targets {stem}")
            matrix = _unpacked_ref(source, f"{stem}.weight", group)
            for part in _PARTS[group.storage]:
                tensors.pop(f"{stem}.{part}", None)
            if matrix.name in tensors:
                raise InputError(f"{source.path}: {matrix.name} is stored twice, packed and not")
            tensors[matrix.name] = matrix
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, tensor: str, group: Group) -> TensorRef:
    weights = group.weights
    if not isinstance(weights, Integers):
        return float_quantized.dense_ref(source, tensor, group.storage, weights)
    scale = packed_tensor(source, f"{tensor}_scale")
    if scale.dtype not in SCALE_DTYPE_NAMES:
        raise InputError(f"{source.path}: {scale.name} has the unsupported dtype {scale.dtype}")
    scheme = replace(weights.scheme, scale_dtype=SCALE_DTYPE_NAMES[scale.dtype])
    if group.storage == "int-quantized":
        return int_quantized.unpacked_ref(source, tensor, weights, scheme, scale)
    return _words_ref(source, tensor, scheme, scale)


def _words_ref(source: Source, tensor: str, scheme: Scheme, scale: TensorRef) -> TensorRef:
    words = packed_tensor(source, f"{tensor}_packed")
    rows, last = words.shape if len(words.shape) == 2 else (0, 0)
    shape = (rows, last * 32 // scheme.bits)
    refs = check_packed(source, packed_layout(tensor, shape, scheme), scheme)
    check_group_size(source, tensor, scheme, shape[1])

    def open_rows() -> QuantizedRows:
        packed = {ref.name: ref.read() for ref in refs}
        if packed[f"{tensor}_shape"].tolist() != list(shape):
            raise InputError(f"{source.path}: {tensor}_shape contradicts {tensor}_packed")
        return partial(unpack, tensor, packed, scheme)

    stored = sum(ref.stored_bytes for ref in refs)
    return packed_matrix(tensor, shape, scale.dtype, stored, open_rows, scheme)


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")


FORMAT = Format(
    name=NAME,
    scale_dtype="bfloat16",
    refusal=refusal,
    packed_layout=packed_layout,
    pack_into=pack_into,
    constants=constants,
    unpack=unpack,
    unpacked=unpacked,
    activations=compressed_config.activations,
    quantization_config=quantization_config,
    budget_units=("layer", "projection", "expert"),  # vLLM fuses the matrices of a layer
)
