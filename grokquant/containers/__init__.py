"""Where the parts of an output are stored in files, and how a reader finds them.

A new container is one module with a `Container` and a line in `CONTAINERS`, under the name of the
format that needs it; all other formats use safetensors files.
"""

from grokquant.containers import gguf, safetensors
from grokquant.containers.container import Container
from grokquant.types import Source

CONTAINERS: dict[str, Container] = {"gguf": gguf.CONTAINER}


def container_of(name: str) -> Container:
    """The container of a format, or of a kind of source."""
    return CONTAINERS.get(name, safetensors.CONTAINER)


def opened(source: Source) -> Source:
    """`source` with the usual tensor names, whatever names its files use."""
    return container_of(source.kind).opened(source)
