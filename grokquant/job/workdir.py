"""The work directory of an unfinished run, `OUT.partial`. Committed files stay there.

    run.json         the fingerprint of the run; only an equal run may resume it
    lock             names the process that is writing
    journal/         a record of each committed file, with checksum and reports, and of the states
    hidden-N         the calibration tokens' hidden states before layer N; hidden-N-R has those from
                     row R on, where several processes saved them
    gradients/       what a backward pass of the original gave, see `gradients.py`
    files/           becomes OUT, by rename, when it is complete

A file is committed by rename after its bytes are on disk, then its record in the same way. So at
any time, a file with a record is complete, and one without a record must be rebuilt.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from grokquant.containers.container import PlannedFile
from grokquant.errors import InputError
from grokquant.files import atomic
from grokquant.files.unfinished import JOURNAL, RUN
from grokquant.grids import Scheme
from grokquant.job.plan import Plan
from grokquant.job.shards import SUMS_NAME, commit_tensors
from grokquant.parallel import ALONE, Team
from grokquant.types import UnitReport

LOCK = "lock"
HIDDEN = "hidden"
REPLACED = "replaced"  # an earlier output while the new one takes its name


@dataclass(frozen=True)
class States:
    """Hidden states [rows, time, hidden] of the calibration tokens between two layers: those of the
    quantized model, and those of the original if a method needs them."""

    hidden: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class _Span:
    """A file with the states of rows `first` to before `end`."""

    file: str
    first: int
    end: int
    sha256: str


class WorkDirectory:
    """An open work directory. `reports` has a report for each committed unit, `damaged` the
    names of files that changed since they were committed and will be rebuilt, `tokens_per_expert`
    the calibration tokens of each expert, layer by layer."""

    def __init__(self, path: Path, output: Path) -> None:
        self.path = path
        self.output = output
        self.files = path / "files"
        self.journal = path / JOURNAL
        self.sums: dict[str, str] = {}
        self.reports: dict[str, UnitReport] = {}
        self.damaged: list[str] = []
        self.tokens_per_expert: list[list[int]] = []
        self._saved: tuple[int, list[_Span]] | None = None

    @property
    def published(self) -> bool:
        """Whether the output has its final name; only this directory is left to be removed then."""
        run = atomic.read_record(self.path / RUN) or {}
        sums = self.output / SUMS_NAME
        if self.files.exists() or not sums.is_file():
            return False
        return run.get("complete") == atomic.sha256(sums)

    @property
    def started(self) -> bool:
        """Whether anything is committed."""
        return self.journal.exists() and any(self.journal.glob("*.json"))

    def commit(
        self, file: PlannedFile, temporary: Path, checksum: str | None, reports: list[UnitReport]
    ) -> None:
        """Moves a complete file to its final place, then writes its record."""
        checksum = checksum or atomic.sha256(temporary)
        atomic.commit(temporary, self.files / file.name)
        record = {"sha256": checksum, "units": [asdict(report) for report in reports]}
        atomic.write_record(self.journal / f"{file.name}.json", record)
        self._remember(file.name, record)

    def committed(self, file: PlannedFile) -> bool:
        return file.name in self.sums

    def read(self, plan: Plan, names: list[str]) -> dict[str, Tensor]:
        """Reads committed parts."""
        return {name: self._read(plan, name) for name in names}

    def _read(self, plan: Plan, name: str) -> Tensor:
        file = plan.file_of[name]
        slot = plan.slots[name]
        part = plan.parts[name]
        path = self.files / file.name
        dtype = slot.dtype or part.dtype
        row = prod(part.shape[1:]) * dtype.itemsize
        whole = prod(part.shape) * dtype.itemsize
        offset = file.layout.offsets[slot.tensor] + slot.first_row * row
        raw = np.fromfile(path, np.uint8, whole, offset=offset)
        if len(raw) < whole:
            raise InputError(f"{path}: was truncated during the run")
        return slot.restored(torch.from_numpy(raw).view(dtype).view(part.shape), part.dtype)

    def recover(self, plan: Plan, team: Team = ALONE) -> None:
        """Finds the committed files that are intact; damaged ones will be rebuilt.

        Each member reads some of the files, and all know what was found.
        """
        for directory in (self.path, self.files, self.journal):
            atomic.remove_abandoned(directory)
        own = plan.files[team.rows(len(plan.files), 1)]
        records = team.merge({file.name: self._intact_record(file.name) for file in own})
        for name, record in records.items():
            if record:
                self._remember(name, record)
            elif (self.journal / f"{name}.json").exists():
                self.damaged.append(name)
        self._recover_states(team)

    def _intact_record(self, name: str) -> dict | None:
        """The record of a committed file that is as it was committed."""
        record = atomic.read_record(self.journal / f"{name}.json")
        return record if record and atomic.holds(self.files / name, record["sha256"]) else None

    def share(self, team: Team) -> None:
        """Tells all members what each has committed."""
        self.sums = team.merge(self.sums)
        rows = team.merge({name: asdict(report) for name, report in self.reports.items()})
        self.reports = {name: report_from(row) for name, row in rows.items()}

    def _recover_states(self, team: Team) -> None:
        record_path = self.journal / f"{HIDDEN}.json"
        record = team.once(partial(atomic.read_record, record_path))
        if record is None:
            self.damaged += [HIDDEN] if record_path.exists() else []
            return
        self.tokens_per_expert = record["tokens_per_expert"]
        spans = [_Span(**span) for span in record["spans"]]  # none after the last layer
        own = spans[team.rows(len(spans), 1)]
        intact = team.merge({s.file: atomic.holds(self.path / s.file, s.sha256) for s in own})
        damaged = [name for name, is_intact in intact.items() if not is_intact]
        if damaged:
            self.damaged += damaged
        elif spans:
            self._saved = record["layer"], spans

    def save_states(
        self, layer: int, states: States | None, first: int = 0, team: Team = ALONE
    ) -> None:
        """Saves the states before `layer` (None after the last) and the tokens per expert.

        Each member saves those of its rows, which begin with row `first` of all.
        """
        saved: dict[str, dict] = {}
        if states is not None and len(states.hidden):
            name = f"{HIDDEN}-{layer}-{first}" if first else f"{HIDDEN}-{layer}"
            checksum = self._save(self.path / name, states)
            saved[name] = asdict(_Span(name, first, first + len(states.hidden), checksum))
        everyones = team.merge(saved)
        team.once(partial(self._record_states, layer, everyones))

    def _save(self, path: Path, states: States) -> str:
        tensors = {name: tensor for name, tensor in vars(states).items() if tensor is not None}
        return commit_tensors(path, tensors)

    def _record_states(self, layer: int, spans: dict[str, dict]) -> None:
        record = {
            "layer": layer,
            "spans": list(spans.values()),
            "tokens_per_expert": self.tokens_per_expert,
        }
        atomic.write_record(self.journal / f"{HIDDEN}.json", record)
        for old in self.path.glob(f"{HIDDEN}-*"):
            if old.name not in spans:
                old.unlink(missing_ok=True)

    def load_states(self, at_most: int, rows: slice) -> tuple[int, States] | None:
        """The states of some rows that were saved last, if they are intact and of layer `at_most`
        or an earlier one."""
        if self._saved is None or self._saved[0] > at_most:
            return None
        layer, spans = self._saved
        parts: dict[str, list[Tensor]] = {}
        for span in sorted(spans, key=lambda span: span.first):
            own = slice(max(rows.start - span.first, 0), max(rows.stop - span.first, 0))
            for name, tensor in load_file(self.path / span.file).items():
                parts.setdefault(name, []).append(tensor[own])
        # Copies, since tensors are mapped from files that the next layer removes.
        return layer, States(**{name: torch.cat(tensors) for name, tensors in parts.items()})

    def publish(self, overwrite: bool) -> None:
        """Gives the output its final name and only then, with `overwrite`, replaces an earlier
        result. Raises InputError if one has appeared that may not be replaced."""
        if not overwrite and self.output.exists() and any(self.output.iterdir()):
            raise InputError(
                f"{self.output}: has been filled during the run; move it away and run the same "
                "command again, or overwrite=True replaces it"
            )
        run = atomic.read_record(self.path / RUN) or {}
        complete = atomic.sha256(self.files / SUMS_NAME)
        atomic.write_record(self.path / RUN, run | {"complete": complete})
        try:
            if self.output.exists() and self.files.exists():
                self.output.replace(self.path / REPLACED)
                atomic.sync(self.path)
            for path in self._temporaries():
                path.unlink(missing_ok=True)
            self.files.replace(self.output)
        except BaseException:  # signals included
            self.give_back()
            raise
        atomic.sync(self.output.parent)

    def give_back(self) -> None:
        """Restores an earlier result that was moved away for a new one that never came."""
        replaced = self.path / REPLACED
        if replaced.exists() and not self.output.exists():
            replaced.replace(self.output)

    def clear(self) -> None:
        """Removes everything but the fingerprint and the lock."""
        for path in self.path.iterdir():
            if path.name not in (RUN, LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove(self) -> None:
        """Removes the directory, fingerprint and lock last, in case this is interrupted."""
        self.clear()
        for name in (RUN, LOCK):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # another run may have begun there
            self.path.rmdir()

    def _temporaries(self) -> Iterator[Path]:
        """Temporary files of another run, on filesystems without locks."""
        return self.files.glob(".*.tmp")

    def _remember(self, file: str, record: dict) -> None:
        self.sums[file] = record["sha256"]
        for row in record["units"]:
            self.reports[row["name"]] = report_from(row)


def report_from(row: dict) -> UnitReport:
    """The report whose `asdict` is `row`."""
    return UnitReport(**row | {"scheme": Scheme(**row["scheme"])})
