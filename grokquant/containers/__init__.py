"""How the parts of an output lie in files, and where a reader finds them again.

A new container is one module with the functions of `container.Container` and a line in
`CONTAINERS`, by the format that needs it; all other formats lie in safetensors files.
"""

from types import ModuleType

from grokquant.containers import gguf, safetensors
from grokquant.sources import gguf_directory
from grokquant.types import Source

CONTAINERS: dict[str, ModuleType] = {"gguf": gguf}


def container_of(output_format: str) -> ModuleType:
    """The container of a format."""
    return CONTAINERS.get(output_format, safetensors)


def opened(source: Source) -> Source:
    """`source` under the usual names, whatever its files call the tensors."""
    return gguf.opened(source) if source.layout == gguf_directory.LAYOUT else source
