"""On-disk forms of quantized matrices. Each module packs and unpacks; both are pure.

A new format is one module with the functions of `compressed_tensors` and one line in `FORMATS`.
"""

from types import ModuleType

from grokquant.errors import InputError
from grokquant.formats import compressed_tensors, dense
from grokquant.types import Source

FORMATS: dict[str, ModuleType] = {
    compressed_tensors.NAME: compressed_tensors,
    dense.NAME: dense,
}


def unpacked(source: Source) -> Source:
    """`source` as it is, or with its packed matrices presented as QTensors. Raises InputError."""
    config = source.config.get("quantization_config")
    if config is None:
        return source
    method = config.get("quant_method") if isinstance(config, dict) else None
    packing = FORMATS.get(str(method))
    if packing is None:
        raise InputError(
            f"{source.path / 'config.json'}: quantization method {method!r} cannot be read "
            f"(known: {', '.join(FORMATS)})"
        )
    return packing.unpacked(source)
