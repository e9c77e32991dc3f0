"""AWQ as AutoAWQ writes it for GEMM kernels, which is only read.

A matrix `X.weight` is stored as `X.qweight` int32 [in, out / 8], `X.scales` float16 [groups, out]
and `X.qzeros` int32 [groups, out / 8]; a weight is (code - zero) * scale. Each word holds eight
4-bit codes of a row, the even ones in its low half, the odd ones in its high half:

    bits  31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    code    7      5      3      1      6      4      2      0

Layout: github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from torch import Tensor

from grokquant.formats.format import PackedLayout, ReadableFormat
from grokquant.formats.reading import check_group_size, check_packed, packed_tensor, validated
from grokquant.grids import Scheme
from grokquant.types import QTensor, Source, TensorRef

NAME = "awq"

_ENDINGS = ("qweight", "qzeros", "scales")
# The nibble of code 0, 1, ... 7 in its word, counted from the lowest bits.
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


class _Config(BaseModel):
    """What reading takes from a `quantization_config` or a quant_config.json."""

    bits: Literal[4] = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: Annotated[int, Field(ge=-1)] = Field(
        validation_alias=AliasChoices("group_size", "q_group_size")
    )
    zero_point: Literal[True] = True
    version: Annotated[Literal["gemm"], BeforeValidator(lambda v: str(v).lower())] = Field(
        "gemm", validation_alias=AliasChoices("version", "format", "checkpoint_format")
    )


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight` that reads as a QTensor."""
    return unpacked_by(source, validated(source, _Config).group_size)


def unpacked_by(source: Source, group_size: int) -> Source:
    """The same, whatever the config calls `group_size`; -1 is one as long as a row."""
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        stem, _, ending = name.rpartition(".")
        if ending == "qweight":
            tensors[f"{stem}.weight"] = _unpacked_ref(source, stem, group_size)
        elif ending not in _ENDINGS or f"{stem}.qweight" not in source.tensors:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, stem: str, group_size: int) -> TensorRef:
    words = packed_tensor(source, f"{stem}.qweight")
    columns, rows = (words.shape[0], words.shape[1] * 8) if len(words.shape) == 2 else (0, 0)
    whole_row = group_size in (-1, 0)
    scheme = Scheme(4, None if whole_row else group_size, False, "float16")
    check_group_size(source, stem, scheme, columns)
    groups = scheme.groups(columns)
    layout: PackedLayout = {
        f"{stem}.qweight": (torch.int32, (columns, rows // 8)),
        f"{stem}.qzeros": (torch.int32, (groups, rows // 8)),
        f"{stem}.scales": (torch.float16, (groups, rows)),
    }
    packed = check_packed(source, layout, scheme)

    def load() -> QTensor:
        qweight, qzeros, scales = (ref.read() for ref in packed)
        return QTensor(_codes(qweight), scales.T.contiguous(), scheme, _codes(qzeros))

    stored = sum(ref.stored_bytes for ref in packed)
    return TensorRef(f"{stem}.weight", (rows, columns), torch.float16, stored, load, scheme)


def _codes(words: Tensor) -> Tensor:
    """int32 [in or groups, out / 8] to signed int8 codes [out, in or groups]."""
    codes = torch.stack([(words >> 4 * nibble) & 15 for nibble in _NIBBLES], dim=-1)
    return (codes.flatten(1) - 8).T.to(torch.int8).contiguous()


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked)
