"""The checkpoint layout of AutoGPTQ (version 1), which gptqmodel, vLLM and SGLang read.

A matrix `X.weight` becomes `X.qweight` int32 [in * bits / 32, out], `X.scales` float16 [groups,
out], `X.qzeros` int32 [groups, out * bits / 32] and `X.g_idx` int32 [in], the group of each column.
Codes are offset to unsigned. 32 of them fill `bits` words as a stream of bits that begins in the
lowest; for qweight they run down a column, for qzeros along a row:

    4 bits   word 0   |  7 |  6 |  5 |  4 |  3 |  2 |  1 |  0 |
             word 1   | 15 | 14 | 13 | 12 | 11 | 10 |  9 |  8 |    ..
    3 bits   word 0   |10'|  9 | .. |  1 |  0 |       10' is the low part of code 10,
             word 1   |21'| 20 | .. | 11 |10''|       10'' its high part
             word 2   | 31 | 30 | .. | 22 |21''|

Zero points are stored minus one, so that 0 cannot be stored: symmetric grids are written,
asymmetric ones are only read.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AliasChoices, BaseModel, Field, field_validator
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.format import Format, PackedLayout
from grokquant.formats.patterns import pattern
from grokquant.formats.reading import check_packed, packed_matrix, packed_tensor, validated
from grokquant.formats.targets import check_target, engine_targets
from grokquant.grids import Scheme
from grokquant.types import ALL_ROWS, QTensor, QuantizedRows, Source, TensorRef, Unit

NAME = "gptq"
Version = Literal["gptq", "gptq_v2"]
Grid = tuple[Scheme, bool]

_CONFIG_NAME = "quantize_config.json"
_SCALE_DTYPE = "float16"
_ENDINGS = ("qweight", "qzeros", "scales", "g_idx")


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    if NAME not in scheme.row.formats:
        return f"it holds integers, not {scheme.grid}"
    if not scheme.symmetric:
        return "it cannot store a zero point of 0, which symmetric: false may need"
    if scheme.scale_dtype != _SCALE_DTYPE:
        return f"its scales are {_SCALE_DTYPE}, not {scheme.scale_dtype}"
    if shape[0] % 32 or shape[1] % 32:
        return f"{shape[0]} output and {shape[1]} input features must be multiples of 32"
    return None


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> PackedLayout:
    """Names, dtypes and shapes of the packed tensors of a matrix."""
    stem = _stem(tensor)
    rows, columns = shape
    groups = scheme.groups(columns)
    return {
        f"{stem}.qweight": (torch.int32, (columns * scheme.bits // 32, rows)),
        f"{stem}.qzeros": (torch.int32, (groups, rows * scheme.bits // 32)),
        f"{stem}.scales": (torch.float16, (groups, rows)),
        f"{stem}.g_idx": (torch.int32, (columns,)),
    }


def pack_into(packed: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix, from a multiple of 32 to another, into its packed tensors."""
    stem = _stem(tensor)
    scheme = quantized.scheme
    qweight, qzeros, scales, g_idx = (packed[f"{stem}.{ending}"] for ending in _ENDINGS)
    device = qweight.device
    unsigned = quantized.codes.T.to(torch.int64) - scheme.qmin  # (in, rows)
    qweight[:, rows] = _to_words(unsigned, scheme.bits).to(device)
    scales[:, rows] = quantized.scales.T.to(device)
    if quantized.zero_points is None:
        zeros = torch.zeros_like(quantized.scales, dtype=torch.int64)  # (rows, groups)
    else:
        zeros = quantized.zero_points.to(torch.int64)
    stored = (zeros - scheme.qmin - 1) % (1 << scheme.bits)
    words = slice(rows.start * scheme.bits // 32, rows.stop * scheme.bits // 32)
    qzeros[:, words] = _to_words(stored, scheme.bits).T.to(device)
    g_idx.copy_(natural_order(len(g_idx), len(scales)))


def constants(tensor: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, Tensor]:
    """The packed tensors that depend on no weight, since symmetric grids are written."""
    stem = _stem(tensor)
    rows, columns = shape
    groups = scheme.groups(columns)
    zeros = torch.full((rows, groups), -scheme.qmin - 1)  # stored minus one
    return {
        f"{stem}.qzeros": _to_words(zeros, scheme.bits).T,
        f"{stem}.g_idx": natural_order(columns, groups),
    }


def natural_order(columns: int, groups: int) -> Tensor:
    """int32 [in]: the group of each column, without act-order."""
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


def unpack(
    tensor: str, packed: Mapping[str, Tensor], scheme: Scheme, rows: slice = ALL_ROWS
) -> QTensor:
    """The inverse of `pack`, bit by bit, for some rows and columns in their natural order."""
    stem = _stem(tensor)
    unsigned = _from_words(packed[f"{stem}.qweight"][:, rows], scheme.bits)  # (in, rows)
    codes = (unsigned + scheme.qmin).T.to(torch.int8).contiguous()
    scales = packed[f"{stem}.scales"][:, rows].T.contiguous()
    if scheme.symmetric:
        return QTensor(codes, scales, scheme)
    return QTensor(codes, scales, scheme, _zero_points(packed[f"{stem}.qzeros"], scheme, 1)[rows])


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The most frequent grid for all modules; `dynamic` rules for those with another or none."""
    by_scheme: dict[Scheme, list[str]] = {}
    for unit in units:
        by_scheme.setdefault(unit.scheme, []).append(_stem(unit.tensor))
    targets, kept = engine_targets(by_scheme.values(), unquantized, fused_experts=True)
    counts = Counter({scheme: len(stems) for scheme, stems in by_scheme.items()})
    common = counts.most_common(1)[0][0]
    # The first rule that matches counts: a pattern of a grid may also match a module that is kept.
    rules: dict[str, dict] = {"-:" + _pattern(target): {} for target in kept}
    for scheme, patterns in zip(by_scheme, targets, strict=True):
        if scheme != common:
            rules |= {"+:" + _pattern(target): _grid(scheme) for target in patterns}
    return {
        "quant_method": NAME,
        "checkpoint_format": NAME,
        **_grid(common),
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": rules,
    }


def sidecar_files(config: dict) -> dict[str, dict]:
    """The file in which older readers look for the `quantization_config`."""
    return {_CONFIG_NAME: config.get("quantization_config", {})}


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight`.

    It reads as a QTensor, or as a dense matrix where act-order has reordered its columns.
    """
    config = validated(source, _Config)
    return unpacked_by(source, config.grid_of, config.checkpoint_format)


def unpacked_by(source: Source, grid_of: Callable[[str], Grid], version: Version) -> Source:
    """The same, where `grid_of` a module's name is its grid and whether its columns are reordered.
    Zero points are stored minus one in version `gptq`."""
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        stem, _, ending = name.rpartition(".")
        if ending == "qweight":
            tensors[f"{stem}.weight"] = _unpacked_ref(source, stem, grid_of(stem), version)
        elif ending not in _ENDINGS or f"{stem}.qweight" not in source.tensors:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, stem: str, grid: Grid, version: Version) -> TensorRef:
    refs = {ending: packed_tensor(source, f"{stem}.{ending}") for ending in _ENDINGS}
    scheme, desc_act = grid
    groups, shape = _groups_and_shape(refs)
    if groups == 0 or scheme.groups(shape[1]) != groups:
        raise InputError(
            f"{source.path}: {stem}.scales has {groups} groups, which does not match {scheme}"
        )
    check_packed(source, packed_layout(f"{stem}.weight", shape, scheme), scheme)
    minus = 1 if version == "gptq" else 0

    def open_rows() -> QuantizedRows:
        packed = {ref.name: ref.read() for ref in refs.values()}
        _check_groups(source, f"{stem}.g_idx", packed[f"{stem}.g_idx"], groups, desc_act)
        zeros = _zero_points(packed[f"{stem}.qzeros"], scheme, minus)
        if scheme.symmetric and zeros.any():
            wanted = f"sym is true, but not all zero points are {-scheme.qmin - minus}"
            raise InputError(f"{source.path}: {stem}.qzeros: {wanted}")

        def unpacked_rows(rows: slice) -> QTensor:
            quantized = unpack(f"{stem}.weight", packed, scheme, rows)
            return quantized if scheme.symmetric else replace(quantized, zero_points=zeros[rows])

        return unpacked_rows

    def load_reordered() -> Tensor:
        quantized = open_rows()(ALL_ROWS)
        group = refs["g_idx"].read().long()  # (in,)
        by_column = replace(scheme, group_size=1)  # every column with the scale of its group
        zeros = None if quantized.zero_points is None else quantized.zero_points[:, group]
        return QTensor(quantized.codes, quantized.scales[:, group], by_column, zeros).dequantize()

    stored = sum(ref.stored_bytes for ref in refs.values())
    if desc_act:
        return TensorRef(f"{stem}.weight", shape, torch.float16, stored, load_reordered)
    return packed_matrix(f"{stem}.weight", shape, torch.float16, stored, open_rows, scheme)


def _groups_and_shape(refs: Mapping[str, TensorRef]) -> tuple[int, tuple[int, int]]:
    """The number of groups and [out, in] of a matrix; zeros where its packed tensors lack axes."""
    qweight, scales, g_idx = (refs[name].shape for name in ("qweight", "scales", "g_idx"))
    if (len(qweight), len(scales), len(g_idx)) != (2, 2, 1):
        return 0, (0, 0)
    return scales[0], (qweight[1], g_idx[0])


def _zero_points(qzeros: Tensor, scheme: Scheme, minus: int) -> Tensor:
    """int8 [out, groups] of zero points that are stored minus `minus`; an overflow is 0."""
    stored = _from_words(qzeros.T, scheme.bits) + minus
    return (stored % (1 << scheme.bits) + scheme.qmin).to(torch.int8)


def _check_groups(source: Source, name: str, g_idx: Tensor, groups: int, desc_act: bool) -> None:
    """Raises InputError where columns have no group, or are reordered without `desc_act`."""
    if ((g_idx < 0) | (g_idx >= groups)).any():
        raise InputError(f"{source.path}: {name} refers to groups that do not exist")
    if not desc_act and not torch.equal(g_idx, natural_order(len(g_idx), groups)):
        raise InputError(f"{source.path}: {name} reorders columns, but desc_act is false")


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """int64 codes below 2^bits [n, columns] as a stream of bits: int32 [n * bits / 32, columns]."""
    blocks = codes.unflatten(0, (-1, 32))
    words = torch.zeros(len(blocks), bits, codes.shape[1], dtype=torch.int64, device=codes.device)
    for number in range(32):
        word, shift = divmod(number * bits, 32)
        words[:, word] |= (blocks[:, number] << shift) & 0xFFFFFFFF
        if shift + bits > 32:  # the code goes on in the next word
            words[:, word + 1] |= blocks[:, number] >> (32 - shift)
    return words.flatten(0, 1).to(torch.int32)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse: int32 [words, columns] to int64 codes [words * 32 / bits, columns]."""
    blocks = (words.to(torch.int64) & 0xFFFFFFFF).unflatten(0, (-1, bits))
    codes = []
    for number in range(32):
        word, shift = divmod(number * bits, 32)
        code = blocks[:, word] >> shift
        if shift + bits > 32:
            code = code | (blocks[:, word + 1] << (32 - shift))
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, dim=1).flatten(0, 1)


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _pattern(target: str) -> str:
    return target[3:] if target.startswith("re:") else f"^{re.escape(target)}$"


def _grid(scheme: Scheme) -> dict[str, int]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1}


class _Grid(BaseModel):
    """The settings that a `dynamic` rule may change."""

    bits: Literal[2, 3, 4, 8] | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None
    desc_act: bool | None = None
    sym: bool | None = None


class _Config(BaseModel):
    """What reading takes from a `quantization_config` or a quantize_config.json."""

    bits: Literal[2, 3, 4, 8]
    group_size: Annotated[int, Field(ge=-1)]
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: Version = Field(
        "gptq", validation_alias=AliasChoices("checkpoint_format", "format")
    )
    dynamic: dict[str, _Grid | bool] | None = None
    # True: the codes are in the order of the Marlin kernels, under the same names.
    is_marlin_format: Literal[False] = False

    @field_validator("dynamic")
    @classmethod
    def _patterns(cls, rules: dict | None) -> dict | None:
        for rule in rules or ():
            check_target("re:" + rule[2:] if rule[:2] in ("+:", "-:") else "re:" + rule)
        return rules

    def grid_of(self, stem: str) -> Grid:
        """The grid of a module and whether its columns are reordered: the common settings as
        changed by the first `dynamic` rule that matches."""
        found = {key: getattr(self, key) for key in _Grid.model_fields}
        for rule, changes in (self.dynamic or {}).items():
            if not rule.startswith("-:") and pattern(rule.removeprefix("+:")).match(stem):
                given = changes.model_dump() if isinstance(changes, _Grid) else {}
                found |= {key: value for key, value in given.items() if value is not None}
                break
        return scheme_of(found["bits"], found["group_size"], found["sym"]), found["desc_act"]


def scheme_of(bits: int, group_size: int, sym: bool) -> Scheme:
    """A grid in the words of the format, where -1 is a group as long as a row."""
    return Scheme(bits, None if group_size in (-1, 0) else group_size, sym, _SCALE_DTYPE)


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
    sidecar_files=sidecar_files,
)
