"""safetensors shards with an index: every part is a tensor with its own name."""

from collections.abc import Mapping

from grokquant.containers.container import (
    Container,
    Group,
    OutputLayout,
    PlannedFile,
    Slot,
    split,
)
from grokquant.files.safetensors_header import file_layout, read_listing
from grokquant.grids import Scheme
from grokquant.sources.safetensors_directory import INDEX
from grokquant.types import Source


def lay_out(
    source: Source, groups: list[Group], schemes: Mapping[str, Scheme], shard: int
) -> OutputLayout:
    """Files of at most `shard` bytes with the groups in order; no file spans two layers."""
    parts = split(groups, shard)
    files = tuple(
        PlannedFile(
            f"model-{number:05d}-of-{len(parts):05d}.safetensors",
            layer,
            tuple(tensors),
            file_layout({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}),
        )
        for number, (layer, tensors) in enumerate(parts, 1)
    )
    slots = {tensor.name: Slot(tensor.name) for _, tensors in parts for tensor in tensors}
    return OutputLayout(files, slots)


def sidecar_files(layout: OutputLayout) -> dict[str, dict]:
    """The index: the file of each tensor."""
    files = {tensor.name: file.name for file in layout.files for tensor in file.tensors}
    total = sum(tensor.bytes for file in layout.files for tensor in file.tensors)
    return {INDEX: {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}}


CONTAINER = Container(lay_out=lay_out, listed=read_listing, sidecar_files=sidecar_files)
