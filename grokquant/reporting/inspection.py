"""What a checkpoint holds, from its headers alone."""

from collections import Counter
from pathlib import Path

from grokquant.checkpoint import open_checkpoint


def describe(path: str | Path) -> dict:
    """Family, layers, experts, parameters, bytes, bits per weight and every tensor."""
    checkpoint = open_checkpoint(path)
    source = checkpoint.source
    config = checkpoint.config
    grids = Counter(ref.stored_as for _, ref in checkpoint.units())
    return {
        "path": str(source.path),
        "layout": source.kind,
        "family": checkpoint.family.name,
        "notice": checkpoint.family.notice,
        "notes": list(source.notes),
        "layers": config.num_hidden_layers,
        "experts": checkpoint.num_experts,
        "experts_per_token": getattr(config, "num_experts_per_tok", None),
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.file_bytes,
        "bits_per_weight": checkpoint.bits_per_weight,
        "matrices": dict(grids),
        "tokenizer": [file.name for file in source.tokenizer_files],
        "tensors": [
            {
                "name": name,
                "shape": list(ref.shape),
                "stored_as": ref.stored_as,
                "bytes": ref.stored_bytes,
            }
            for name, ref in source.tensors.items()
        ],
    }
