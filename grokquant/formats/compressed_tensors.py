"""compressed-tensors `pack-quantized`: int4 and int8 codes packed into int32 words.

A matrix `X.weight` becomes `X.weight_packed` int32 [out, in * bits / 32], `X.weight_scale`
[out, groups], `X.weight_shape` int64 [2] and, if asymmetric, `X.weight_zero_point` int32
[out * bits / 32, groups]. Codes are offset to unsigned, the first one in the lowest bits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from torch import Tensor

from grokquant.errors import InputError
from grokquant.formats.targets import check_target, first_match, targets_of
from grokquant.formats.words import pack_words, unpack_words
from grokquant.types import SCALE_DTYPES, QTensor, Scheme, Source, TensorRef, Unit

NAME = "compressed-tensors"
# How a scale is stored if the recipe does not say; whether an output of no quantized matrix is one.
SCALE_DTYPE, HOLDS_DENSE = "bfloat16", False

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a matrix of `shape` under `scheme`, or None if it can."""
    per_word = 32 // scheme.bits
    if shape[1] % per_word:
        return f"{shape[1]} input features do not fill int32 words of {per_word} codes"
    if not scheme.symmetric and shape[0] % per_word:
        return f"{shape[0]} output features do not fill int32 words of {per_word} zero points"
    return None


def packed_layout(
    tensor: str, shape: tuple[int, int], scheme: Scheme
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what `pack` will return, known before anything is read."""
    stem, (rows, columns) = _stem(tensor), shape
    groups, per_word = scheme.groups(columns), 32 // scheme.bits
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{stem}.weight_packed": (torch.int32, (rows, columns // per_word)),
        f"{stem}.weight_scale": (SCALE_DTYPES[scheme.scale_dtype], (rows, groups)),
        f"{stem}.weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        layout[f"{stem}.weight_zero_point"] = (torch.int32, (rows // per_word, groups))
    return layout


def pack(tensor: str, quantized: QTensor) -> dict[str, Tensor]:
    """The named tensors that stand for `tensor` in a checkpoint."""
    rows, columns = quantized.codes.shape
    layout = packed_layout(tensor, (rows, columns), quantized.scheme)
    device = quantized.codes.device
    parts = {
        name: torch.empty(s, dtype=dtype, device=device) for name, (dtype, s) in layout.items()
    }
    pack_into(parts, tensor, slice(0, rows), quantized)
    return parts


def pack_into(parts: Mapping[str, Tensor], tensor: str, rows: slice, quantized: QTensor) -> None:
    """Writes some rows of a matrix to where `packed_layout` puts them in the whole one's parts.

    Begins and, but for the last rows, ends at a multiple of 8. Tiles may be written concurrently.
    """
    stem, bits = _stem(tensor), quantized.scheme.bits
    words = parts[f"{stem}.weight_packed"]
    shape = torch.tensor([len(words), quantized.codes.shape[1]])
    parts[f"{stem}.weight_shape"].copy_(shape)
    parts[f"{stem}.weight_scale"][rows] = quantized.scales.to(words.device)
    pack_words(quantized.codes, bits, words[rows])
    if quantized.zero_points is not None:
        per_word, (count, groups) = 32 // bits, quantized.zero_points.shape
        packed = words.new_empty(groups, count // per_word)
        pack_words(quantized.zero_points.T, bits, packed)
        first = rows.start // per_word
        parts[f"{stem}.weight_zero_point"][first : first + count // per_word] = packed.T


def unpack(tensor: str, packed: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The inverse of `pack`, bit by bit."""
    stem = _stem(tensor)
    rows, columns = packed[f"{stem}.weight_shape"].tolist()
    scales = packed[f"{stem}.weight_scale"]
    codes = unpack_words(packed[f"{stem}.weight_packed"], scheme.bits)[:, :columns].contiguous()
    zero_points = None
    if not scheme.symmetric:
        words = packed[f"{stem}.weight_zero_point"].T.contiguous()
        zero_points = unpack_words(words, scheme.bits)[:, :rows].T.contiguous()
    return QTensor(codes, scales, scheme, zero_points)


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of config.json: a group of targets per scheme.

    `unquantized` names the modules that hold a matrix but stay as they are.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for unit in units:
        by_scheme.setdefault(unit.scheme, []).append(_stem(unit.tensor))
    everything = [stem for stems in by_scheme.values() for stem in stems]
    largest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]), default=None)
    groups = {
        f"group_{index}": {
            # Linear comes after all names; SGLang looks up fused experts by it and nothing else.
            "targets": targets_of(stems, set(everything) - set(stems))
            + ["Linear"] * (scheme == largest),
            "weights": _weight_arguments(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for index, (scheme, stems) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": targets_of(sorted(unquantized), set(everything)),
        "kv_cache_scheme": None,
    }


def papers(config: dict) -> dict[str, dict]:
    """JSON files that readers of this format want beside config.json, by name: none."""
    return {}


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight` that reads as a QTensor."""
    schemes = _schemes_of(source)
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        stem, _, part = name.rpartition(".")
        if part == "weight_packed":
            scheme = first_match(stem, schemes)
            if scheme is None:
                raise InputError(f"{source.path / 'config.json'}: no config group targets {stem}")
            tensors[f"{stem}.weight"] = _unpacked_ref(source, stem, scheme)
        elif part not in _PARTS:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def _unpacked_ref(source: Source, stem: str, scheme: Scheme) -> TensorRef:
    names = [f"{stem}.{part}" for part in (_PARTS[:3] if scheme.symmetric else _PARTS)]
    for name in names:
        if name not in source.tensors:
            raise InputError(f"{source.path}: {name} is missing")
    parts = [source.tensors[name] for name in names]
    packed, scale = parts[:2]
    if scale.dtype not in _DTYPE_NAMES:
        raise InputError(f"{source.path}: {scale.name} has the unknown scale dtype {scale.dtype}")
    scheme = replace(scheme, scale_dtype=_DTYPE_NAMES[scale.dtype])
    rows, words = packed.shape if len(packed.shape) == 2 else (0, 0)
    shape = (rows, words * 32 // scheme.bits)
    _check_layout(source, parts, packed_layout(f"{stem}.weight", shape, scheme), scheme)
    if shape[1] % (scheme.group_size or 1):
        raise InputError(f"{source.path}: {stem}: {scheme} does not divide {shape[1]} columns")

    def load() -> QTensor:
        tensors = {ref.name: ref.read() for ref in parts}
        if tensors[f"{stem}.weight_shape"].tolist() != list(shape):
            raise InputError(f"{source.path}: {stem}.weight_shape disagrees with weight_packed")
        return unpack(f"{stem}.weight", tensors, scheme)

    stored = sum(ref.stored_bytes for ref in parts)
    return TensorRef(f"{stem}.weight", shape, scale.dtype, stored, load, scheme)


def _check_layout(
    source: Source,
    parts: Iterable[TensorRef],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    scheme: Scheme,
) -> None:
    for ref in parts:
        dtype, shape = layout[ref.name]
        if (ref.dtype, ref.shape) != (dtype, shape):
            raise InputError(
                f"{source.path}: {ref.name} is {ref.dtype} {list(ref.shape)}, "
                f"{scheme} needs {dtype} {list(shape)}"
            )


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _weight_arguments(scheme: Scheme) -> dict:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": None,
    }


class _Weights(BaseModel):
    """The grids that can be read."""

    num_bits: Literal[4, 8]
    type: Literal["int"] = "int"
    strategy: Literal["group", "channel"]
    group_size: Annotated[int, Field(ge=-1)] | None = None
    symmetric: bool = True
    actorder: Literal["static", "weight", False] | None = None  # group: columns in another order

    @property
    def scheme(self) -> Scheme:
        whole_row = self.strategy == "channel" or self.group_size in (0, -1)
        return Scheme(self.num_bits, None if whole_row else self.group_size, self.symmetric)


class _Group(BaseModel):
    targets: list[Annotated[str, AfterValidator(check_target)]]
    weights: _Weights
    input_activations: None = None


class _Config(BaseModel):
    """What reading takes from a `quantization_config`."""

    config_groups: dict[str, _Group]


def _schemes_of(source: Source) -> list[tuple[str, Scheme]]:
    """Targets and their schemes in the order of the config; the first that matches counts."""
    try:
        config = _Config.model_validate(source.config["quantization_config"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("quantization_config", *first["loc"])))
        text = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{source.path / 'config.json'}: {key}: {text}") from None
    return [
        (target, group.weights.scheme)
        for group in config.config_groups.values()
        for target in group.targets
    ]
