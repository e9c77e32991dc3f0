"""AWQ as AutoAWQ writes it for GEMM kernels, which is only read.

A matrix `X.weight` is there as `X.qweight` int32 [in, out / 8], `X.scales` float16 [groups, out]
and `X.qzeros` int32 [groups, out / 8]. Eight 4-bit codes of a row share a word, the even ones in
its low half, the odd ones in its high half; a weight is (code - zero) * scale.
Layout: github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import ReadableFormat
from grokquant.formats.reading import check_parts, part_of, validated
from grokquant.grids import Scheme
from grokquant.types import QTensor, Source, TensorRef

NAME = "awq"

_PARTS = ("qweight", "qzeros", "scales")
# The place of code 0, 1, ... 7 in its word, counted from the lowest bits.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class _Config(BaseModel):
    """What reading takes from a `quantization_config` or a quant_config.json."""

    bits: Literal[4] = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: Annotated[int, Field(ge=-1)] = Field(
        validation_alias=AliasChoices("group_size", "q_group_size")
    )
    zero_point: Literal[True] = True
    version: Annotated[Literal["gemm"], BeforeValidator(lambda v: str(v).lower())] = "gemm"


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight` that reads as a QTensor."""
    group_size = validated(source, _Config).group_size
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        stem, _, part = name.rpartition(".")
        if part == "qweight":
            tensors[f"{stem}.weight"] = _unpacked_ref(source, stem, group_size)
        elif part not in _PARTS or f"{stem}.qweight" not in source.tensors:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, stem: str, group_size: int) -> TensorRef:
    words = part_of(source, f"{stem}.qweight")
    columns, rows = (words.shape[0], words.shape[1] * 8) if len(words.shape) == 2 else (0, 0)
    scheme = Scheme(4, None if group_size in (-1, 0) else group_size, False, "float16")
    if columns == 0 or columns % (scheme.group_size or 1):
        raise InputError(f"{source.path}: {stem}: {scheme} does not divide {columns} columns")
    groups = scheme.groups(columns)
    layout = {
        f"{stem}.qweight": (torch.int32, (columns, rows // 8)),
        f"{stem}.qzeros": (torch.int32, (groups, rows // 8)),
        f"{stem}.scales": (torch.float16, (groups, rows)),
    }
    parts = check_parts(source, layout, scheme)

    def load() -> QTensor:
        qweight, qzeros, scales = (ref.read() for ref in parts)
        return QTensor(_codes(qweight), scales.T.contiguous(), scheme, _codes(qzeros))

    stored = sum(ref.stored_bytes for ref in parts)
    return TensorRef(f"{stem}.weight", (rows, columns), torch.float16, stored, load, scheme)


def _codes(words: Tensor) -> Tensor:
    """int32 [in or groups, out / 8] to signed int8 codes [out, in or groups]."""
    codes = torch.stack([(words >> 4 * place) & 15 for place in _PLACES], dim=-1)
    return (codes.flatten(1) - 8).T.to(torch.int8).contiguous()


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked)
