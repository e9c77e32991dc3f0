"""HQQ as transformers saved it, which is only read: codes with zero points that are no integers.

A matrix `X.weight` of `X.shape` is stored as its groups of neighbours, codes of `X.nbits` in
`X.W_q`, and the floats `X.scale` and `X.zero` of each group:

    axis 1    codes [groups, group_size]    scale, zero [groups, 1]
    axis 0    codes [group_size, groups]    scale, zero [1, groups]

A byte of `X.W_q`, or an int32 where a code has three bits, holds codes of rows far apart, the first
of them in the highest bits; rows are added until they fill the words:

    4 bits, 6 rows    word row 0: | row 0 | row 3 |    row 1: | row 1 | row 4 |    ..

A weight is (code - zero) * scale, in the dtype of the scales. Source: core/quantize.py and
core/bitpack.py of the hqq package.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import ReadableFormat
from grokquant.formats.reading import packed_tensor
from grokquant.types import Source, TensorRef

NAME = "hqq"

_CODES = "W_q"
# What lies beside the codes of a matrix and is read, and what repeats it or is no part of it.
_READ = ("scale", "zero", "nbits", "shape", "view_as_float", "quant_scale", "quant_zero")
_REPEATED = (
    "axis",
    "channel_wise",
    "compute_dtype",
    "encoded_state_dict",
    "group_size",
    "offload_meta",
    "optimize",
    "packing",
    "round_zero",
    "stores_quant_config",
    "unpack_view_dtype",
)
# Flags of variants in which codes, scales or zero points are packed another time.
_REFUSED = ("view_as_float", "quant_scale", "quant_zero")
# Bits of a code -> the dtype of a word and the codes in it.
_WORDS = {
    8: (torch.uint8, 1),
    4: (torch.uint8, 2),
    3: (torch.int32, 10),
    2: (torch.uint8, 4),
    1: (torch.uint8, 8),
}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight`, which reads as floats."""
    stems = {name.removesuffix(_CODES) for name in source.tensors if name.endswith(f".{_CODES}")}
    beside = {stem + ending for stem in stems for ending in (_CODES, *_READ, *_REPEATED)}
    tensors = {name: ref for name, ref in source.tensors.items() if name not in beside}
    tensors |= {f"{stem}weight": _unpacked_ref(source, stem) for stem in sorted(stems)}
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, stem: str) -> TensorRef:
    """The matrix `stem`weight. Raises InputError where its tensors do not fit together."""
    for flag in _REFUSED:
        if (ref := source.tensors.get(stem + flag)) and bool(ref.read()):
            raise InputError(f"{source.path}: {ref.name}: this variant of HQQ is not supported")
    codes, scale, zero = (packed_tensor(source, stem + name) for name in (_CODES, "scale", "zero"))
    bits = int(packed_tensor(source, f"{stem}nbits").read())
    rows, columns = _shape(source, stem)
    dtype, per_word = _WORDS.get(bits, (torch.uint8, 0))
    width = codes.shape[-1]
    held = codes.shape[0] * per_word
    spans = ((rows * columns // width, 1), (1, width))
    fits = (
        len(codes.shape) == 2
        and codes.dtype == dtype
        and rows * columns % width == 0
        and 0 <= held - rows * columns // width < max(per_word, 1)
        and scale.dtype in _FLOATS
        and scale.shape == zero.shape
        and scale.shape in spans
    )
    if not fits:
        raise InputError(
            f"{source.path}: {codes.name} is {codes.dtype} {list(codes.shape)} with scales "
            f"{scale.dtype} {list(scale.shape)}, which is no matrix [{rows}, {columns}] of "
            f"{bits} bits"
        )

    def load() -> Tensor:
        found = _in_rows(codes.read(), bits, per_word)[: rows * columns // width]
        values = (found.to(scale.dtype) - zero.read()) * scale.read()
        return values.reshape(rows, columns)

    stored = sum(ref.stored_bytes for ref in (codes, scale, zero))
    group = width if scale.shape[1] == 1 else rows * columns // width
    name = f"hqq int{bits} g{group}"
    return TensorRef(f"{stem}weight", (rows, columns), scale.dtype, stored, load, grid_name=name)


def _shape(source: Source, stem: str) -> tuple[int, int]:
    ref = packed_tensor(source, f"{stem}shape")
    values = ref.read().tolist() if prod(ref.shape) == 2 else [0]
    if len(values) != 2 or min(values) < 1 or max(values) > 2**24:
        raise InputError(f"{source.path}: {ref.name} is no shape of a matrix")
    return int(values[0]), int(values[1])


def _in_rows(words: Tensor, bits: int, per_word: int) -> Tensor:
    """The codes [rows, width] of words [rows / per_word, width]."""
    mask = (1 << bits) - 1
    shifts = range(bits * (per_word - 1), -1, -bits)
    return torch.cat([(words >> shift) & mask for shift in shifts])


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked)
