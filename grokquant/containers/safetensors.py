"""safetensors shards with an index: every part is a tensor of its own name."""

from collections.abc import Mapping

from grokquant.containers.container import Arrangement, Group, Place, PlannedFile, split
from grokquant.files.safetensors_header import file_layout
from grokquant.grids import Scheme
from grokquant.sources.safetensors_directory import INDEX
from grokquant.types import Source


def arrange(
    source: Source, groups: list[Group], schemes: Mapping[str, Scheme], shard: int
) -> Arrangement:
    """Groups in order, as many to a file as `shard` allows; none goes over two layers."""
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
    return Arrangement(files, {t.name: Place(t.name) for file in files for t in file.tensors})


def papers(arrangement: Arrangement) -> dict[str, dict]:
    """The index: which file holds which tensor."""
    files = {tensor.name: file.name for file in arrangement.files for tensor in file.tensors}
    total = sum(tensor.bytes for file in arrangement.files for tensor in file.tensors)
    return {INDEX: {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}}
