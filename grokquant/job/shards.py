"""The weight files of an output, written part by part until each is complete."""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import TracebackType

import torch
from torch import Tensor

from grokquant.containers.container import PlannedFile
from grokquant.errors import GrokquantError
from grokquant.files import atomic
from grokquant.files.atomic import temporary_name
from grokquant.files.direct_io import PlacedFile
from grokquant.files.safetensors_header import file_layout
from grokquant.job.plan import Plan
from grokquant.types import UnitReport

CARD_NAME = "README.md"
REPORT_NAME = "quantization-report.json"
SUMS_NAME = "SHA256SUMS"
# Tensors that may wait for the disk: enough to keep it busy, few enough to bound memory.
_WAITING = 2

# (planned file, its complete temporary file, that file's sha256 if known, the reports of its units)
Commit = Callable[[PlannedFile, Path, str | None, list[UnitReport]], None]


@dataclass
class _Growing:
    """A file in progress that still lacks `missing` bytes of its tensors."""

    stored: PlacedFile
    missing: int
    reports: list[UnitReport] = field(default_factory=list)


class ShardWriter:
    """Writes packed tensors to their slots in any order and commits each file once complete.

    A thread writes and commits in the order of the calls; its errors are raised by a later call.
    `seconds` is how long that thread was busy, `incomplete` names the files in progress.
    """

    def __init__(self, directory: Path, plan: Plan, commit: Commit) -> None:
        self.directory = directory
        self.plan = plan
        self.commit = commit
        self.stored = {t.name: t for file in plan.files for t in file.tensors}
        self.unwritten = {f.name: sum(t.bytes for t in f.tensors) for f in plan.files}
        self.incomplete: set[str] = set()
        self.seconds = 0.0
        self._growing: dict[str, _Growing] = {}
        self._waiting: deque[Future] = deque()
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "writer")

    def write(self, tensors: Mapping[str, Tensor], report: UnitReport | None = None) -> None:
        """Writes whole parts by name. `report` is that of the unit they belong to."""
        for name, tensor in tensors.items():
            planned = self.plan.parts[name]
            if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
                raise GrokquantError(f"{name}: dtype or shape differs from the plan; this is a bug")
            self.write_rows(name, 0, tensor, report)
            report = None  # noted once for all tensors of the unit

    def write_rows(
        self, name: str, first: int, rows: Tensor, report: UnitReport | None = None
    ) -> None:
        """Writes rows of the part `name`, starting at row `first`."""
        file = self.plan.file_of[name]
        slot = self.plan.slots[name]
        stored = self.stored[slot.tensor]
        rows = slot.stored(rows)
        first += slot.first_row  # in a tensor that stacks several experts
        count = stored.shape[0] if stored.shape else 1
        offset = file.layout.offsets[slot.tensor] + first * stored.bytes // count
        self.unwritten[file.name] -= rows.nbytes
        change = self.incomplete.add if self.unwritten[file.name] else self.incomplete.discard
        change(file.name)
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._write, file, offset, rows, report))

    def drain(self) -> None:
        """Waits until everything is written and all complete files are committed."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes incomplete files. If there are none, pending writes complete the last file."""
        self._thread.shutdown(cancel_futures=bool(self.incomplete))
        for growing in self._growing.values():
            growing.stored.close()
            growing.stored.path.unlink(missing_ok=True)

    def _write(
        self, file: PlannedFile, offset: int, rows: Tensor, report: UnitReport | None
    ) -> None:
        if self._failed:
            return  # the error ends the run; a file with a hole must not become complete
        start = perf_counter()
        self._failed = True  # until this write has succeeded
        growing = self._growing.get(file.name) or self._begin(file)
        growing.stored.write(offset, _bytes_of(rows))
        growing.missing -= rows.nbytes
        if report:
            growing.reports.append(report)
        if growing.missing == 0:
            del self._growing[file.name]
            growing.stored.close()
            self._finish(file, growing)
        self._failed = False
        self.seconds += perf_counter() - start

    def _begin(self, file: PlannedFile) -> _Growing:
        stored = PlacedFile(temporary_name(self.directory / file.name))
        growing = _Growing(stored, sum(t.bytes for t in file.tensors))
        self._growing[file.name] = growing
        stored.write(0, memoryview(file.layout.header))
        return growing

    def _finish(self, file: PlannedFile, growing: _Growing) -> None:
        stored = growing.stored
        try:
            self.commit(file, stored.path, stored.checksum(), growing.reports)
        finally:
            stored.path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """Writes a safetensors file tensor by tensor, without a copy in memory; does not sync it.

    Returns its sha256 if known.
    """
    layout = file_layout({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    stored = PlacedFile(path)
    try:
        stored.write(0, memoryview(layout.header))
        for name, tensor in tensors.items():
            stored.write(layout.offsets[name], _bytes_of(tensor))
    finally:
        stored.close()
    return stored.checksum()


def commit_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """As `write_tensors`, but `path` is there only once it is whole and on the disk."""
    with atomic.temporary(path) as name:
        checksum = write_tensors(name, tensors) or atomic.sha256(name)
        atomic.commit(name, path)
    return checksum


def is_result(directory: Path) -> bool:
    """Whether `directory` is a finished result of grokquant, by the report in it."""
    return (directory / REPORT_NAME).is_file()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data
