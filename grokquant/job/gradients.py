"""Gradients of the original model, made before the first layer is quantized and kept on disk.

    OUT.partial/gradients/
        layer-N       what the backward pass needs of layer N, until it has come there
        metric-N      E[g g^T] of layer N
        record.json   their checksums, once all of them are there

A run that was interrupted before that begins anew; the same rows and seed give the same bytes.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from grokquant.files import atomic
from grokquant.job.plan import Plan
from grokquant.job.shards import write_tensors
from grokquant.job.workdir import WorkDirectory
from grokquant.streaming.gradients import (
    DTYPE,
    DifferentiableModel,
    Kept,
    differentiated_rows,
    output_gradients,
)

_RECORD = "record.json"
_METRIC = "metric"
# Is told what is being done.
Doing = Callable[[str], None]


class GradientFiles:
    """The files of the gradients of one run."""

    def __init__(self, work: WorkDirectory, doing: Doing) -> None:
        self.path = work.path / "gradients"
        self.doing = doing

    @property
    def complete(self) -> bool:
        """Whether all are there and intact."""
        record = atomic.read_record(self.path / _RECORD)
        return record is not None and all(
            atomic.holds(self.path / name, checksum) for name, checksum in record.items()
        )

    def begin(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()

    def finish(self, sums: Mapping[str, str]) -> None:
        atomic.write_record(self.path / _RECORD, dict(sums))

    def put(self, index: int, kept: Kept) -> None:
        self.doing(f"running the original forward: layer {index}")
        write_tensors(self._layer(index), kept.stored())

    def take(self, index: int) -> Kept:
        self.doing(f"running the original backward: layer {index}")
        path = self._layer(index)
        kept = Kept.restored(load_file(path))
        path.unlink()
        return kept

    def put_metric(self, index: int, metric: Tensor) -> tuple[str, str]:
        """The name and the checksum of its file."""
        path = self.path / f"{_METRIC}-{index}"
        checksum = write_tensors(path, {_METRIC: metric})
        atomic.sync(path)
        return path.name, checksum or atomic.sha256(path)

    def metric(self, index: int) -> Tensor | None:
        """E[g g^T] float32 [hidden, hidden] of a layer; None where it has no experts."""
        path = self.path / f"{_METRIC}-{index}"
        return load_file(path)[_METRIC].clone() if path.is_file() else None

    def _layer(self, index: int) -> Path:
        return self.path / f"layer-{index}"


def make_gradients(plan: Plan, files: GradientFiles, rows: Tensor) -> None:
    """Makes the gradients of a run with calibration `rows` [rows, time], unless they are there."""
    if files.complete:
        return
    files.begin()
    model = DifferentiableModel(plan.checkpoint, DTYPE, pieces=True)
    for index in plan.lone_experts:
        model.take_as_expert(index)
    some = differentiated_rows(rows)
    metrics = output_gradients(model, some, plan.recipe.calibration.seed, files)
    files.finish(dict(files.put_metric(index, metric) for index, metric in metrics))
