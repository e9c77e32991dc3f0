"""Model families: how tensors are named and how a block runs. A new one is a line in FAMILIES."""

from grokquant.errors import InputError
from grokquant.families.family import Family
from grokquant.families.grok import GROK_1
from grokquant.types import Source

FAMILIES: dict[str, Family] = {
    "Grok1ForCausalLM": GROK_1,
}


def family_of(source: Source) -> Family:
    """The family of an opened checkpoint, by its `architectures`. Raises InputError."""
    architectures = source.config.get("architectures") or []
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    found = ", ".join(architectures) or "none"
    raise InputError(
        f"{source.path}: architecture {found} is not known (known: {', '.join(FAMILIES)})"
    )
