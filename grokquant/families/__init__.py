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
    match source.config.get("architectures"):
        case [str(name)] if name in FAMILIES:
            return FAMILIES[name]
        case [str(name)]:
            found = f"{name!r} is not known"
        case _:
            found = "is not given as a list of one name"
    raise InputError(
        f"{source.path / 'config.json'}: the architecture {found} (known: {', '.join(FAMILIES)})"
    )
