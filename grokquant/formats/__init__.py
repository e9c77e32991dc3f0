"""On-disk forms of quantized matrices. Each module packs and unpacks; both are pure.

A new format is one module with the functions of `compressed_tensors` and one line in `FORMATS`.
"""

from types import ModuleType

from grokquant.errors import InputError
from grokquant.formats import bitsandbytes, compressed_tensors, dense, gguf, gptq, int_quantized
from grokquant.formats.targets import MARK, OWN
from grokquant.types import Source

__all__ = ["FORMATS", "MARK", "OWN", "packing_of", "unpacked"]
FORMATS: dict[str, ModuleType] = {
    compressed_tensors.NAME: compressed_tensors,
    int_quantized.NAME: int_quantized,
    gptq.NAME: gptq,
    bitsandbytes.NAME: bitsandbytes,
    gguf.NAME: gguf,
    dense.NAME: dense,
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
    if (packing := FORMATS.get(str(name))) is not None:
        return packing
    raise InputError(
        f"{source.path / 'config.json'}: quantization method {name!r} cannot be read "
        f"(known: {', '.join(FORMATS)})"
    )


def unpacked(source: Source) -> Source:
    """`source` as it is, or with its packed matrices presented as QTensors. Raises InputError."""
    packing = packing_of(source)
    return source if packing is None else packing.unpacked(source)
