"""No packing at all: every matrix as 16-bit floats, the release in a form that anything loads."""

from collections.abc import Iterable

from grokquant.grids import Scheme
from grokquant.types import Source, Unit
from grokquant.version import OWN

NAME = "bf16"
SCALE_DTYPE, HOLDS_DENSE = "bfloat16", True


def refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot hold a quantized matrix: it holds none."""
    return "it holds nothing quantized, every rule must be method: keep"


def quantization_config(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config` of an output whose names transformers does not know."""
    return {"quant_method": OWN, "format": NAME}


def unpacked(source: Source) -> Source:
    """`source` as it is."""
    return source


def papers(config: dict) -> dict[str, dict]:
    """JSON files that readers of this format want beside config.json, by name: none."""
    return {}
