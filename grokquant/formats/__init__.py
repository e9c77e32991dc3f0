"""On-disk forms of quantized matrices. Each module packs and unpacks; both are pure.

A new format is one module with a `Format` and a line in `FORMATS`; one that is only read, a
module with a `ReadableFormat` and a line in `READ_ONLY`.
"""

from collections.abc import Mapping

from grokquant.errors import InputError
from grokquant.formats import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    dense,
    fp8,
    gguf,
    gptq,
    hqq,
    modelopt,
    mxfp4,
    quark,
    torchao,
)
from grokquant.formats.activations import without_activations
from grokquant.formats.format import Format, ReadableFormat
from grokquant.formats.reading import WAY_OUT
from grokquant.types import Source
from grokquant.version import OWN

__all__ = ["FORMATS", "Format", "format_of", "unpacked"]
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        compressed_tensors.FORMAT,
        gptq.FORMAT,
        bitsandbytes.FORMAT,
        gguf.FORMAT,
        dense.FORMAT,
    )
}

READ_ONLY: dict[str, ReadableFormat] = {
    format.name: format
    for format in (
        awq.FORMAT,
        auto_round.FORMAT,
        fp8.FORMAT,
        fp8.FBGEMM,
        hqq.FORMAT,
        modelopt.FORMAT,
        mxfp4.FORMAT,
        quark.FORMAT,
        torchao.FORMAT,
    )
}


# What is known of other values of `quant_method`, for people.
_UNREAD = {
    "aqlm": "AQLM, whose codes are places in codebooks of vectors",
    "bitnet": "BitNet, a model trained with weights of -1, 0 and 1",
    "eetq": "EETQ, int8 in the order of its kernels",
    "exl2": "ExLlamaV2, which mixes bits within a matrix",
    "exl3": "ExLlamaV3, codes of a trellis after rotations",
    "fp_quant": "FP-Quant, 4-bit floats after rotations at run time",
    "higgs": "HIGGS, codebooks of vectors after rotations",
    "quanto": "Quanto, tensors of the optimum-quanto package, which dequantizes it",
    "quip": "QuIP, codebooks of vectors after rotations",
    "sinq": "SINQ, whose rows and columns both have scales",
    "spqr": "SpQR, codes with outliers beside them",
    "vptq": "VPTQ, whose codes are places in codebooks of vectors",
}


def format_of(source: Source) -> ReadableFormat | None:
    """The format that the quantized matrices of `source` have, None if there is none.

    Raises InputError for one that is not known.
    """
    config = source.config.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    name = config.get("format") if method == OWN else method
    known: Mapping[str, ReadableFormat] = {**FORMATS, **READ_ONLY}
    if (found := known.get(str(name))) is not None:
        return found
    raise InputError(
        f"{source.path / 'config.json'}: quantization_config.quant_method: {name!r:.60} cannot be "
        f"read ({', '.join(known)} can){_described(name)}; {WAY_OUT}"
    )


def _described(method: object) -> str:
    what = _UNREAD.get(str(method).lower())
    return f"; it is {what}" if what else ""


def unpacked(source: Source) -> Source:
    """`source` as it is, or with its packed matrices presented as one tensor each and without what
    is no part of the weights. Raises InputError."""
    found = format_of(source)
    if found is None:
        return source
    described = source.config["quantization_config"]
    return without_activations(found.unpacked(source), found.activations(described))
