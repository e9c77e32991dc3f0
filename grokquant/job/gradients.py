"""Gradients of the original model, made before the first layer is quantized and kept on disk.

    OUT.partial/gradients/
        layer-N-XX    what the backward pass needs of layer N, until it has come there, for the rows
                      of one process, which calls itself XX
        metric-N      E[g g^T] of layer N: by the sum of its experts and by sites
        record.json   their checksums, once all of them are there

A run that was interrupted before that begins anew; the same rows and seed give the same bytes.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from secrets import token_hex

from safetensors.torch import load_file
from torch import Tensor

from grokquant.files import atomic
from grokquant.job.division import Division
from grokquant.job.shards import write_tensors
from grokquant.job.workdir import WorkDirectory
from grokquant.streaming.gradients import (
    DTYPE,
    DifferentiableModel,
    Draws,
    Kept,
    Metrics,
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
        self._own = token_hex(4)

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

    def put_metrics(self, index: int, metrics: Metrics) -> tuple[str, str]:
        """The name and the checksum of their file."""
        path = self.path / f"{_METRIC}-{index}"
        of_sum = {} if metrics.of_sum is None else {_METRIC: metrics.of_sum}
        checksum = write_tensors(path, of_sum | dict(metrics.of_sites))
        atomic.sync(path)
        return path.name, checksum or atomic.sha256(path)

    def metrics(self, index: int) -> Metrics:
        """Those of a layer."""
        path = self.path / f"{_METRIC}-{index}"
        found = {k: t.clone() for k, t in load_file(path).items()} if path.is_file() else {}
        return Metrics(found.pop(_METRIC, None), found)

    def _layer(self, index: int) -> Path:
        return self.path / f"layer-{index}-{self._own}"


def make_gradients(division: Division, files: GradientFiles, rows: Tensor) -> None:
    """Makes the gradients of a run with calibration `rows` [rows, time], unless they are there."""
    plan, team = division.plan, division.team
    if team.once(lambda: files.complete):
        return
    team.once(files.begin)
    model = DifferentiableModel(plan.checkpoint, DTYPE, pieces=True)
    for index in plan.lone_experts:
        model.take_as_expert(index)
    some = differentiated_rows(rows)
    own = team.rows(len(some), model.rows_at_once(some.shape[1]))
    draws = Draws(plan.recipe.calibration.seed, (len(some), some.shape[1]), own)
    asked = {
        index: {
            reads: [unit.tensor for unit in site]
            for reads, site in plan.differentiated(index).items()
        }
        for index in range(plan.checkpoint.num_layers)
    }
    found = output_gradients(model, some[own], draws, files, asked, team, division.owners)
    sums = team.merge(dict(files.put_metrics(index, metrics) for index, metrics in found))
    team.once(partial(files.finish, sums))
