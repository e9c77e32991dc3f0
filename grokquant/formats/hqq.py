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
        name = stem + flag
        if name in source.tensors and _integers(source, name, 1)[0]:
            raise InputError(f"{source.path}: {name}: this variant of HQQ is not supported")
    codes, scale, zero = (packed_tensor(source, stem + name) for name in (_CODES, "scale", "zero"))
    (bits,) = _integers(source, f"{stem}nbits", 1)
    rows, columns = _shape(source, stem)
    dtype, per_word = _WORDS.get(bits, (torch.uint8, 0))
    held = _held_rows(codes, dtype, per_word, rows * columns)
    width = codes.shape[-1] if held else 0
    fits = (
        held > 0
        and scale.dtype in _FLOATS
        and (scale.dtype, scale.shape) == (zero.dtype, zero.shape)
        and scale.shape in ((held, 1), (1, width))
    )
    if not fits:
        raise InputError(
            f"{source.path}: {codes.name} is {codes.dtype} {list(codes.shape)} with scales "
            f"{scale.dtype} {list(scale.shape)} and zero points {zero.dtype} {list(zero.shape)}, "
            f"which is no matrix [{rows}, {columns}] of {bits} bits"
        )

    def load() -> Tensor:
        found = _in_rows(codes.read(), bits, per_word)[:held]
        values = (found.to(scale.dtype) - zero.read()) * scale.read()
        return values.reshape(rows, columns)

    stored = sum(ref.stored_bytes for ref in (codes, scale, zero))
    group = width if scale.shape[1] == 1 else held
    name = f"hqq int{bits} g{group}"
    return TensorRef(f"{stem}weight", (rows, columns), scale.dtype, stored, load, grid_name=name)


def _held_rows(codes: TensorRef, dtype: torch.dtype, per_word: int, weights: int) -> int:
    """The rows of codes that a matrix of so many weights has in these words; 0 if it has none."""
    if codes.dtype != dtype or len(codes.shape) != 2:
        return 0
    words, width = codes.shape
    rows = weights // width
    filled = 0 <= words * per_word - rows < max(per_word, 1)
    return rows if filled and rows * width == weights else 0


def _shape(source: Source, stem: str) -> tuple[int, int]:
    name = f"{stem}shape"
    rows, columns = _integers(source, name, 2)
    if min(rows, columns) < 1 or max(rows, columns) > 2**24:
        raise InputError(f"{source.path}: {name} is no shape of a matrix")
    return rows, columns


def _integers(source: Source, name: str, count: int) -> list[int]:
    """The integers that a tensor holds. Raises InputError unless it holds so many."""
    ref = packed_tensor(source, name)
    is_integer = not (ref.dtype.is_floating_point or ref.dtype.is_complex)
    if not is_integer or prod(ref.shape) != count:
        found = f"{ref.dtype} {list(ref.shape)}"
        raise InputError(f"{source.path}: {name} is {found}, expected integers, {count} of them")
    return list(map(int, ref.read().flatten().tolist()))


def _in_rows(words: Tensor, bits: int, per_word: int) -> Tensor:
    """The codes [rows, width] of words [rows / per_word, width]."""
    mask = (1 << bits) - 1
    shifts = range(bits * (per_word - 1), -1, -bits)
    return torch.cat([(words >> shift) & mask for shift in shifts])


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked)
