"""No quantization: every matrix as 16-bit floats, the release in a form that anything loads."""

from collections.abc import Iterable
from typing import NoReturn

from grokquant.formats.format import Format
from grokquant.grids import Scheme
from grokquant.types import Source, Unit
from grokquant.version import OWN

NAME = "bf16"


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """The same reason for every scheme."""
    return "it holds no quantized matrices, every rule must be method: unquantized"


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of an output whose names transformers does not know."""
    return {"quant_method": OWN, "format": NAME}


def unpacked(source: Source) -> Source:
    """`source` as it is."""
    return source


def _refused(*arguments: object) -> NoReturn:
    raise AssertionError(f"{NAME} refuses every quantized matrix, so none is ever packed")


FORMAT = Format(
    name=NAME,
    scale_dtype="bfloat16",
    refusal=refusal,
    packed_layout=_refused,
    pack_into=_refused,
    unpack=_refused,
    unpacked=unpacked,
    quantization_config=quantization_config,
    holds_quantized=False,
    holds_dense=True,
)
