"""torchao's plain tensors as transformers saves them, which are only read.

A matrix `X.weight` [out, in] has a scale, and integers a zero point, for each block of it:

    tensor                    X._weight_qdata          X._weight_scale     X._weight_zero_point
    Int8Tensor                int8 [out, in]           [out, groups]       int8 [out, groups]
    IntxUnpackedToInt8Tensor  int8 [out, in]           [out, groups]       int8 [out, groups]
    Float8Tensor              float8_e4m3fn [out, in]  of rows or blocks   none

Other tensors of torchao have the order of one kernel. Source: quantization/quantize_/workflows of
the torchao package.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from grokquant.errors import InputError
from grokquant.formats.format import ReadableFormat
from grokquant.formats.fp8 import dense_ref
from grokquant.formats.reading import WAY_OUT, check_group_size, packed_tensor
from grokquant.grids import SCALE_DTYPE_NAMES, Scheme
from grokquant.types import QTensor, Source, TensorRef

NAME = "torchao"

_CODES = "._weight_qdata"
_SCALE = "._weight_scale"
_ZERO_POINT = "._weight_zero_point"
# Configurations whose tensors are plain, and whether they have activations rounded too.
_KNOWN = {
    "Float8DynamicActivationFloat8WeightConfig": True,
    "Float8WeightOnlyConfig": False,
    "Int8DynamicActivationInt8WeightConfig": True,
    "Int8DynamicActivationIntxWeightConfig": True,
    "Int8WeightOnlyConfig": False,
    "IntxWeightOnlyConfig": False,
}
_OF_MODULES = ("FqnToConfig", "ModuleFqnToConfig")  # one configuration for each of some modules


def unpacked(source: Source) -> Source:
    """`source` with each packed matrix presented as one `X.weight`: a QTensor, or floats."""
    kinds = list(_types(source.config["quantization_config"].get("quant_type")))
    for kind in kinds or ["no quant_type"]:
        if kind not in (*_KNOWN, *_OF_MODULES):
            raise InputError(
                f"{source.path / 'config.json'}: quantization_config.quant_type: {kind:.60} is not "
                f"supported ({', '.join(_KNOWN)} are); {WAY_OUT}"
            )
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        stem, _, _ = name.rpartition("._weight_")
        if name == stem + _CODES:
            tensors[f"{stem}.weight"] = _unpacked_ref(source, stem, ref)
        elif f"{stem}{_CODES}" not in source.tensors:
            tensors[name] = ref
    return replace(source, tensors=tensors)


def activations(config: dict) -> Iterable[str]:
    """The configurations that have inputs of matrices rounded too."""
    for kind in _types(config.get("quant_type")):
        if _KNOWN.get(kind):
            yield f"inputs of matrices ({kind})"


def _types(value: object) -> Iterator[str]:
    """The names of configurations in a quant_type, however deep."""
    found = value if isinstance(value, dict) else {}
    kind = found.get("_type")
    if isinstance(kind, str) and kind.endswith("Config"):
        yield kind
    for inner in found.values():
        yield from _types(inner)


def _unpacked_ref(source: Source, stem: str, codes: TensorRef) -> TensorRef:
    scale = packed_tensor(source, stem + _SCALE)
    name = f"{stem}.weight"
    if len(codes.shape) != 2 or len(scale.shape) != 2:
        raise InputError(f"{source.path}: {codes.name} is no matrix with scales of its blocks")
    if codes.dtype == torch.float8_e4m3fn:
        rows, columns = (-(-n // max(m, 1)) for n, m in zip(codes.shape, scale.shape, strict=True))
        return replace(dense_ref(source, codes, scale, (rows, columns)), name=name)
    return _integers(source, stem, codes, scale)


def _integers(source: Source, stem: str, codes: TensorRef, scale: TensorRef) -> TensorRef:
    rows, columns = codes.shape
    groups = scale.shape[1]
    zero_point = source.tensors.get(stem + _ZERO_POINT)
    fits = (
        codes.dtype == torch.int8
        and scale.dtype in SCALE_DTYPE_NAMES
        and scale.shape == (rows, groups)
        and groups > 0
        and columns % groups == 0
        and (
            zero_point is None or (zero_point.dtype, zero_point.shape) == (torch.int8, scale.shape)
        )
    )
    if not fits:
        raise InputError(
            f"{source.path}: {codes.name} {codes.dtype} {list(codes.shape)} and its scales "
            f"{scale.dtype} {list(scale.shape)} do not fit together"
        )
    # Where all are zero they say nothing; a column of them is small.
    stored = [ref for ref in (codes, scale, zero_point) if ref is not None]
    if zero_point is not None and not zero_point.read().any():
        zero_point = None
    group_size = None if groups == 1 else columns // groups
    scheme = Scheme(8, group_size, zero_point is None, SCALE_DTYPE_NAMES[scale.dtype])
    check_group_size(source, stem, scheme, columns)

    def load() -> QTensor:
        zeros = [zero_point.read()] if zero_point is not None else []
        return QTensor(codes.read(), scale.read(), scheme, *zeros)

    size = sum(ref.stored_bytes for ref in stored)
    return TensorRef(f"{stem}.weight", (rows, columns), scale.dtype, size, load, scheme)


FORMAT = ReadableFormat(name=NAME, unpacked=unpacked, activations=activations)
