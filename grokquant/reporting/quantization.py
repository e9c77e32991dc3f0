"""The report that a run leaves beside its weights, for people."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.escaping import one_line
from grokquant.evaluation.models import unit_rows
from grokquant.evaluation.report import Count, NotNegative, UnitRow
from grokquant.files.json_objects import read_json_object
from grokquant.job.shards import REPORT_NAME

Key = TypeVar("Key")


class QuantizationReport(BaseModel):
    """How a result was made: a row per matrix, and what was unusual.

    `tokens_per_expert` are calibration tokens, layer by layer. By the name of a matrix, `kinds`
    says what it is, such as experts.down, and `weights` how many weights it has.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    path: str
    source: str
    family: str
    parameters: Count
    output_bytes: Count
    bits_per_weight: NotNegative
    calibration_rows: tuple[Count, ...]
    tokens_per_expert: tuple[tuple[Count, ...], ...]
    findings: tuple[str, ...]
    fallbacks: tuple[str, ...]
    units: tuple[UnitRow, ...]
    kinds: dict[str, str]
    weights: dict[str, Count]

    def __repr__(self) -> str:
        path = one_line(self.path)
        return (
            f"<QuantizationReport {path}: {len(self.units)} matrices, "
            f"{self.bits_per_weight:.3f} bits, {len(self.fallbacks)} fallbacks>"
        )

    __str__ = __repr__

    def by_kind(self) -> dict[tuple[str, str, str], list[UnitRow]]:
        """The matrices by kind, grid and method, in the order of the model."""
        return _grouped(self.units, lambda row: (self.kinds[row.name], row.scheme, row.method))

    def by_layer(self) -> dict[int, list[UnitRow]]:
        return _grouped(self.units, lambda row: row.layer or 0)

    def bits_of(self, rows: Sequence[UnitRow]) -> float:
        """Stored bits per weight of these matrices."""
        bits = sum(row.bits_per_weight * self.weights[row.name] for row in rows)
        return bits / sum(self.weights[row.name] for row in rows)


def read_quantization(path: str | Path) -> QuantizationReport:
    """The report of a result of grokquant. Raises InputError where there is none."""
    checkpoint = open_checkpoint(path)
    place = checkpoint.source.path / REPORT_NAME
    if not place.is_file():
        raise InputError(f"{path}: has no {REPORT_NAME}: it is not a result of grokquant")
    rows = unit_rows(checkpoint)
    kinds = {matrix.name: matrix.kind for matrix in checkpoint.matrices()}
    weights = {name: prod(ref.shape) for name, ref in checkpoint.units()}
    known = {"path": str(path), "units": rows, "kinds": kinds, "weights": weights}
    try:
        return QuantizationReport.model_validate(read_json_object(place) | known)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(f"{place}: {key}: not a report of this version") from None


def mean_error(rows: Iterable[UnitRow], field: str) -> float | None:
    """The mean of `relative_error` or `output_error` over the rows that have it."""
    found = [getattr(row, field) for row in rows]
    known = [error for error in found if error is not None]
    return sum(known) / len(known) if known else None


def _grouped(rows: Iterable[UnitRow], key: Callable[[UnitRow], Key]) -> dict[Key, list[UnitRow]]:
    groups: dict[Key, list[UnitRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)
