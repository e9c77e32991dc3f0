"""On-disk forms of quantized matrices. Each module packs and unpacks; both are pure.

A new format is one module with the functions of `compressed_tensors` and one line in `FORMATS`; one
that is only read, a module with `NAME` and `unpacked` and one line in `READ_ONLY`.
"""

from types import ModuleType

from grokquant.errors import InputError
from grokquant.formats import (
    awq,
    bitsandbytes,
    block_fp8,
    compressed_tensors,
    dense,
    gguf,
    gptq,
    int_quantized,
    mxfp4,
)
from grokquant.types import Source
from grokquant.version import OWN

__all__ = ["FORMATS", "packing_of", "unpacked"]
FORMATS: dict[str, ModuleType] = {
    compressed_tensors.NAME: compressed_tensors,
    int_quantized.NAME: int_quantized,
    gptq.NAME: gptq,
    bitsandbytes.NAME: bitsandbytes,
    gguf.NAME: gguf,
    dense.NAME: dense,
}

READ_ONLY: dict[str, ModuleType] = {
    awq.NAME: awq,
    block_fp8.NAME: block_fp8,
    mxfp4.NAME: mxfp4,
}


def packing_of(source: Source) -> ModuleType | None:
    """The format that the quantized matrices of `source` have, None if there is none.

    Raises InputError for one that is not known.
    """
    config = source.config.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    name = config.get("format") if method == OWN else method
    known = FORMATS | READ_ONLY
    if (packing := known.get(str(name))) is not None:
        return packing
    raise InputError(
        f"{source.path / 'config.json'}: quantization_config.quant_method: {name!r} cannot be read "
        f"({', '.join(known)} can); take the checkpoint that this one was made from"
    )


def unpacked(source: Source) -> Source:
    """`source` as it is, or with its packed matrices presented as QTensors. Raises InputError."""
    packing = packing_of(source)
    return source if packing is None else packing.unpacked(source)
