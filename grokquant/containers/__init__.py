"""How the parts of an output lie in files, and where a reader finds them again.

A new container is one module with the functions of `container.Container` and a line in
`CONTAINERS`, by the format that needs it; all other formats lie in safetensors files.
"""

from types import ModuleType

from grokquant.containers import safetensors

CONTAINERS: dict[str, ModuleType] = {}


def container_of(output_format: str) -> ModuleType:
    """The container of a format."""
    return CONTAINERS.get(output_format, safetensors)
