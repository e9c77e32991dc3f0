"""Names of matrices that most families share, unit's end -> checkpoint name's end in a layer."""

ATTENTION = {f"attention.{part}": f"self_attn.{part}_proj.weight" for part in "qkvo"}
MLP = {f"mlp.{part}": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
EXPERTS = {part: f"mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down")}


def shared(module: str) -> dict[str, str]:
    """The matrices of an expert that all tokens pass, which is the module `module` in a layer."""
    return {f"shared.{part}": f"{module}.{part}_proj.weight" for part in ("gate", "up", "down")}
