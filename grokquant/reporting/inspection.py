"""What a checkpoint holds, from its headers alone."""

from collections import Counter
from pathlib import Path

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.engines import Contents, Stored, verdicts, where_it_runs
from grokquant.families.naming import HEAD
from grokquant.formats import format_of
from grokquant.sources import open_source
from grokquant.version import MARK


def describe(path: str | Path) -> dict:
    """Family, layers, experts, parameters, bytes, bits per weight and every tensor."""
    checkpoint = open_checkpoint(path)
    source = checkpoint.source
    contents = _contents(checkpoint)
    grids = Counter(ref.stored_as for _, ref in checkpoint.units())
    return {
        "path": str(source.path),
        "layout": source.kind,
        "family": checkpoint.family.name,
        "notice": checkpoint.family.notice,
        "notes": list(source.notes),
        "layers": checkpoint.num_layers,
        "experts": checkpoint.num_experts,
        "experts_per_token": getattr(checkpoint.text_config, "num_experts_per_tok", None),
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.file_bytes,
        "bits_per_weight": checkpoint.bits_per_weight,
        "matrices": dict(grids),
        "runs_in": {} if contents is None else verdicts(contents),
        "where_it_runs": [] if contents is None else where_it_runs(contents),
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


def _contents(checkpoint: Checkpoint) -> Contents | None:
    """What programs find in an output of ours, None for other checkpoints."""
    source = checkpoint.source
    described = source.config.get("quantization_config") or {}
    format = format_of(source)
    if format is None or MARK not in described:
        return None
    refs = [(matrix, source.tensors[matrix.tensor]) for matrix in checkpoint.matrices()]
    stored = tuple(Stored(matrix, ref.shape, ref.scheme) for matrix, ref in refs)
    code = checkpoint.family.remote_code
    return Contents(
        format.name,
        checkpoint.family.name,
        stored,
        own_head=HEAD in source.tensors,
        remote_code=code is not None and (source.path / code.file).is_file(),
        names=_names(checkpoint),
        names_experts=checkpoint.family.names_experts,
        joins=checkpoint.family.joins,
    )


def _names(checkpoint: Checkpoint) -> str:
    """`output.names` of an output, by the first tensor that has two names."""
    family = checkpoint.family
    others = ((name, family.gptqmodel_name(name)) for name in family.routers(checkpoint.config))
    other = next((other for name, other in others if other != name), None)
    return "gptqmodel" if other in open_source(checkpoint.source.path).tensors else "published"
