"""Names of matrices in most families: suffix of the unit's name -> suffix of the tensor's."""

ATTENTION = {f"attention.{part}": f"self_attn.{part}_proj.weight" for part in "qkvo"}
MLP = {f"mlp.{part}": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
EXPERTS = {part: f"mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down")}


def shared(module: str) -> dict[str, str]:
    """The matrices of a shared expert, which all tokens pass: the module `module` of a layer."""
    return {f"shared.{part}": f"{module}.{part}_proj.weight" for part in ("gate", "up", "down")}
