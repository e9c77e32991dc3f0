"""The checkpoint layout of AutoGPTQ (version 1), which gptqmodel, vLLM and SGLang read.

A matrix `X.weight` becomes `X.qweight` int32 [in * bits / 32, out], `X.scales` float16 [groups,
out], `X.qzeros` int32 [groups, out * bits / 32] and `X.g_idx` int32 [in], the group of each column.
Codes are offset to unsigned; 32 of them fill `bits` words, the first in the lowest bits. Zero
points are stored less one, so that none can be 0: symmetric grids are written, asymmetric ones are
only read.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.parts import Layout, pack_all
from grokquant.formats.reading import check_parts, part_of, validated
from grokquant.formats.targets import check_target, targets_of
from grokquant.grids import Scheme
from grokquant.types import QTensor, Source, TensorRef, Unit

NAME = "gptq"
# How a scale is stored if the recipe does not say; whether an output of no quantized matrix is one.
SCALE_DTYPE, HOLDS_DENSE = "float16", False
CONFIG_NAME = "quantize_config.json"

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    if NAME not in scheme.row.formats:
        return f"it holds integers, not {scheme.grid}"
    if not scheme.symmetric:
        return "it holds no zero point of 0, which symmetric: false may give"
    if scheme.scale_dtype != SCALE_DTYPE:
        return f"its scales are {SCALE_DTYPE}, not {scheme.scale_dtype}"
    if shape[0] % 32 or shape[1] % 32:
        return f"{shape[0]} x {shape[1]} features do not fill words of 32 codes"
    return None


def packed_layout(tensor: str, shape: tuple[int, int], scheme: Scheme) -> Layout:
    """Names, dtypes and shapes of what `pack` will return, known before anything is read."""
    stem, (rows, columns) = _stem(tensor), shape
    groups, words = scheme.groups(columns), scheme.bits
    return {
        f"{stem}.qweight": (torch.int32, (columns * words // 32, rows)),
        f"{stem}.qzeros": (torch.int32, (groups, rows * words // 32)),
        f"{stem}.scales": (torch.float16, (groups, rows)),
        f"{stem}.g_idx": (torch.int32, (columns,)),
    }


def pack(tensor: str, quantized: QTensor) -> dict[str, Tensor]:
    """The named tensors that stand for `tensor` in a checkpoint."""
    return pack_all(tensor, quantized, packed_layout, pack_into)


def pack_into(parts: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix to where `packed_layout` puts them in the whole one's parts.

    Begins and ends at a multiple of 32. Tiles may be written concurrently: what does not depend on
    rows is the same in each.
    """
    stem, scheme = _stem(tensor), quantized.scheme
    qweight, qzeros, scales, g_idx = (parts[f"{stem}.{part}"] for part in _PARTS)
    device = qweight.device
    unsigned = quantized.codes.T.to(torch.int64) - scheme.qmin  # (in, rows)
    qweight[:, rows] = _to_words(unsigned, scheme.bits).to(device)
    scales[:, rows] = quantized.scales.T.to(device)
    zeros = torch.zeros_like(quantized.scales, dtype=torch.int64)  # (rows, groups)
    zeros = zeros if quantized.zero_points is None else quantized.zero_points.to(torch.int64)
    stored = (zeros - scheme.qmin - 1) % (1 << scheme.bits)
    words = slice(rows.start * scheme.bits // 32, rows.stop * scheme.bits // 32)
    qzeros[:, words] = _to_words(stored, scheme.bits).T.to(device)
    g_idx.copy_(torch.arange(len(g_idx)) // (len(g_idx) // len(scales)))


def unpack(tensor: str, packed: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The inverse of `pack`, bit by bit, for columns in their natural order."""
    stem = _stem(tensor)
    unsigned = _from_words(packed[f"{stem}.qweight"], scheme.bits)  # (in, out)
    codes = (unsigned + scheme.qmin).T.to(torch.int8).contiguous()
    scales = packed[f"{stem}.scales"].T.contiguous()
    if scheme.symmetric:
        return QTensor(codes, scales, scheme)
    return QTensor(codes, scales, scheme, _zero_points(packed[f"{stem}.qzeros"], scheme, 1))


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of config.json: the commonest grid, and `dynamic` rules for others.

    `unquantized` names the modules that hold a matrix but stay as they are.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for unit in units:
        by_scheme.setdefault(unit.scheme, []).append(_stem(unit.tensor))
    everything = {stem for stems in by_scheme.values() for stem in stems}
    common = Counter({scheme: len(stems) for scheme, stems in by_scheme.items()}).most_common(1)
    rules: dict[str, dict] = {}
    for scheme, stems in by_scheme.items():
        if scheme != common[0][0]:
            for target in targets_of(stems, everything - set(stems)):
                rules["+:" + _pattern(target)] = _grid(scheme)
    for target in targets_of(sorted(unquantized), everything):
        rules["-:" + _pattern(target)] = {}
    return {
        "quant_method": NAME,
        "checkpoint_format": NAME,
        **_grid(common[0][0]),
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": rules,
    }


def papers(config: dict) -> dict[str, dict]:
    """JSON files that readers of this format want beside config.json, by name."""
    return {CONFIG_NAME: config.get("quantization_config", {})}


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight`.

    It reads as a QTensor, or as a dense matrix where act-order has spread its groups over columns.
    """
    config = validated(source, _Config)
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        stem, _, part = name.rpartition(".")
        if part == "qweight":
            tensors[f"{stem}.weight"] = _unpacked_ref(source, stem, config)
        elif part not in _PARTS or f"{stem}.qweight" not in source.tensors:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, stem: str, config: "_Config") -> TensorRef:
    parts = [part_of(source, f"{stem}.{part}") for part in _PARTS]
    scheme, desc_act = config.grid_of(stem)
    qweight, _, scales, g_idx = (ref.shape for ref in parts)
    well_formed = (len(qweight), len(scales), len(g_idx)) == (2, 2, 1)
    groups, shape = (scales[0], (qweight[1], g_idx[0])) if well_formed else (0, (0, 0))
    if groups == 0 or scheme.groups(shape[1]) != groups:
        raise InputError(f"{source.path}: {stem}.scales has {groups} groups, not those of {scheme}")
    check_parts(source, packed_layout(f"{stem}.weight", shape, scheme), scheme)
    less = 1 if config.checkpoint_format == "gptq" else 0

    def load() -> QTensor:
        tensors = {ref.name: ref.read() for ref in parts}
        _check_groups(source, parts[3].name, tensors[parts[3].name], groups, desc_act)
        quantized = unpack(f"{stem}.weight", tensors, scheme)
        zeros = _zero_points(tensors[f"{stem}.qzeros"], scheme, less)
        if not scheme.symmetric:
            return replace(quantized, zero_points=zeros)
        if zeros.any():
            wanted = f"sym is true, but not all are {-scheme.qmin - less}"
            raise InputError(f"{source.path}: {stem}.qzeros: {wanted}")
        return quantized

    def load_spread() -> Tensor:
        quantized, group = load(), parts[3].read().long()
        spread = replace(scheme, group_size=1)  # every column has the scale of its group
        zeros = None if quantized.zero_points is None else quantized.zero_points[:, group]
        return QTensor(quantized.codes, quantized.scales[:, group], spread, zeros).dequantize()

    stored = sum(ref.stored_bytes for ref in parts)
    if desc_act:
        return TensorRef(f"{stem}.weight", shape, torch.float16, stored, load_spread)
    return TensorRef(f"{stem}.weight", shape, torch.float16, stored, load, scheme)


def _zero_points(qzeros: Tensor, scheme: Scheme, less: int) -> Tensor:
    """int8 [out, groups], stored `less` so much; what wraps around is 0."""
    stored = _from_words(qzeros.T, scheme.bits) + less
    return (stored % (1 << scheme.bits) + scheme.qmin).to(torch.int8)


def _check_groups(source: Source, name: str, g_idx: Tensor, groups: int, desc_act: bool) -> None:
    """Raises InputError where columns have no group, or another than in their natural order."""
    if ((g_idx < 0) | (g_idx >= groups)).any():
        raise InputError(f"{source.path}: {name} names groups that are not there")
    natural = torch.arange(len(g_idx)) // (len(g_idx) // groups)
    if not desc_act and not torch.equal(g_idx.long(), natural):
        raise InputError(f"{source.path}: {name} reorders columns, but desc_act is false")


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """int64 codes below 2^bits [n, columns] as a stream of bits: int32 [n * bits / 32, columns]."""
    blocks = codes.unflatten(0, (-1, 32))
    words = torch.zeros(len(blocks), bits, codes.shape[1], dtype=torch.int64, device=codes.device)
    for number in range(32):
        word, shift = divmod(number * bits, 32)
        words[:, word] |= (blocks[:, number] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
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
    """What a `dynamic` rule changes."""

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
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    dynamic: dict[str, _Grid | bool] | None = None
    # Another order of the codes, that of the Marlin kernels, under the names of this one.
    is_marlin_format: Literal[False] = False

    @field_validator("dynamic")
    @classmethod
    def _patterns(cls, rules: dict | None) -> dict | None:
        for rule in rules or ():
            check_target("re:" + rule[2:] if rule[:2] in ("+:", "-:") else "re:" + rule)
        return rules

    def grid_of(self, stem: str) -> tuple[Scheme, bool]:
        """The grid of a module and whether its columns are reordered; the first `dynamic` rule that
        matches it changes the common ones."""
        found = {key: getattr(self, key) for key in _Grid.model_fields}
        for rule, changes in (self.dynamic or {}).items():
            if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), stem):
                given = changes.model_dump() if isinstance(changes, _Grid) else {}
                found |= {key: value for key, value in given.items() if value is not None}
                break
        group = None if found["group_size"] in (-1, 0) else found["group_size"]
        return Scheme(found["bits"], group, found["sym"], SCALE_DTYPE), found["desc_act"]
