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
    mxfp4,
)
from grokquant.formats.activations import without_activations
from grokquant.formats.format import Format, ReadableFormat
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
    for format in (awq.FORMAT, auto_round.FORMAT, fp8.FORMAT, fp8.FBGEMM, mxfp4.FORMAT)
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
        f"{source.path / 'config.json'}: quantization_config.quant_method: {name!r} cannot be read "
        f"({', '.join(known)} can); take the checkpoint that this one was made from"
    )


def unpacked(source: Source) -> Source:
    """`source` as it is, or with its packed matrices presented as one tensor each and without what
    is no part of the weights. Raises InputError."""
    found = format_of(source)
    if found is None:
        return source
    described = source.config["quantization_config"]
    return without_activations(found.unpacked(source), found.activations(described))
