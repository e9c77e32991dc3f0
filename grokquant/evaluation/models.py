"""The two models of an evaluation: whether they can be compared, and their rows in the report."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grokquant.checkpoint import Checkpoint, Opener, open_checkpoint
from grokquant.devices import CPU, multiplies_bfloat16
from grokquant.errors import InputError
from grokquant.evaluation.report import ComparedModel, UnitRow
from grokquant.evaluation.same_model import check_same_model
from grokquant.files.json_objects import read_json_object
from grokquant.files.published import published_path
from grokquant.formats import format_of
from grokquant.job.shards import REPORT_NAME
from grokquant.types import Matrix

# Weights from which products take most of the time of an evaluation; float32 is quick for fewer.
_LARGE = 10**9
# Keys of config.json that must be equal for a comparison token by token and layer by layer.
_SAME = (
    "num_hidden_layers",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "hidden_size",
    "vocab_size",
)


@dataclass(frozen=True)
class Models:
    """Two models that can be compared; `paths` are theirs, as they were given.

    `products` is the dtype of the products of experts. `note` says that the reference is, or may
    be, another model than the source of `quantized`.
    """

    quantized: Checkpoint
    reference: Checkpoint
    paths: tuple[str, str]
    products: torch.dtype
    note: str | None


def opened_models(
    quantized: str | Path,
    reference: str | Path,
    device: torch.device = CPU,
    dtype: str = "auto",
    any_reference: bool = False,
    opened: Opener = open_checkpoint,
) -> Models:
    """Opens two models that are to be compared; nothing is loaded yet.

    `dtype` is that of the products of experts, as `dtype_of_products` takes it. With
    `any_reference`, the reference may be another model than the source.
    Raises InputError where the two cannot be compared.
    """
    own = opened(quantized, None)
    base = opened(reference, None)
    products = dtype_of_products(base, dtype, device)
    check_comparable(own, base, any_reference)
    note = check_same_model(own, base, any_reference)
    return Models(own, base, (str(quantized), str(reference)), products, note)


def dtype_of_products(reference: Checkpoint, dtype: str, device: torch.device) -> torch.dtype:
    """The dtype in which products of experts are computed.

    `auto` is bfloat16 where those of a large model are faster in it, else float32. Raises
    InputError for bfloat16 where no experts run one by one.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"expected auto, float32 or bfloat16, not {dtype!r}", "dtype")
    family = reference.family
    has_experts = bool(reference.num_experts) and family.streams and family.runs_experts
    if dtype == "bfloat16" and not has_experts:
        raise InputError("only experts that run one by one can multiply in bfloat16", "dtype")
    pays = has_experts and reference.parameters >= _LARGE and multiplies_bfloat16(device)
    return torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and pays) else torch.float32


def check_comparable(
    quantized: Checkpoint, reference: Checkpoint, any_reference: bool = False
) -> None:
    """Raises InputError that names the first size in which the models differ, or the architecture
    unless `any_reference`."""
    own, theirs = quantized.family.name, reference.family.name
    if own != theirs and not any_reference:
        raise InputError(
            f"needed to compare {quantized.source.path} with {reference.source.path}: "
            f"family is {own}, the reference has {theirs}",
            "any_reference",
        )
    for field in _SAME:
        found, expected = (getattr(c.config, field, None) for c in (quantized, reference))
        if found != expected:
            raise InputError(
                f"{quantized.source.path}: {field} is {found}, the reference has {expected}"
            )


def described(checkpoint: Checkpoint, path: str | Path, rows: tuple[UnitRow, ...]) -> ComparedModel:
    """A model as the report has it; methods are those of `rows`, its quantization report."""
    methods = {row.name: f" ({row.method})" for row in rows}
    stored_in = format_of(checkpoint.source)
    grids = Counter(ref.stored_as + methods.get(name, "") for name, ref in checkpoint.units())
    return ComparedModel(
        path=published_path(str(path)),
        family=checkpoint.family.name,
        layers=checkpoint.num_layers,
        experts=max(checkpoint.num_experts, 1),
        parameters=checkpoint.parameters,
        bytes=checkpoint.file_bytes,
        bits_per_weight=checkpoint.bits_per_weight,
        schemes=grids,
        format=stored_in.name if stored_in else None,
    )


def unit_rows(checkpoint: Checkpoint) -> tuple[UnitRow, ...]:
    """The rows of the quantization report beside a checkpoint; none without such a report.

    Raises InputError where the report cannot be read.
    """
    path = checkpoint.source.path / REPORT_NAME
    if not path.is_file():
        return ()
    try:
        rows = read_json_object(path)["units"]
        matrices = {matrix.name: matrix for matrix in checkpoint.matrices()}
        grids = {name: ref.stored_as for name, ref in checkpoint.units()}
        return tuple(_unit_row(row, matrices[row["name"]], grids[row["name"]]) for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a quantization report of this version") from None


def _unit_row(row: dict[str, Any], matrix: Matrix, grid: str) -> UnitRow:
    known = {key: value for key, value in row.items() if key in UnitRow.model_fields}
    place = {"layer": matrix.layer, "expert": matrix.expert}
    return UnitRow.model_validate(known | place | {"scheme": grid})
