"""The directory of a run that is not finished, `OUT.partial`: what is committed there stays.

    run.json         what the run is made of; nothing else may continue it
    lock             who is writing
    journal/         a record of each committed file: checksum and reports; of the hidden states
    hidden-N         the calibration tokens' hidden states before layer N
    files/           what becomes OUT, by rename, when everything is there

A file is committed by rename after its bytes are on disk, then its record is in the same way. So at
any instant a file without a record is to be made again, and one with a record is whole.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from grokquant import durable
from grokquant.errors import InputError
from grokquant.output import CARD_NAME, INDEX_NAME, REPORT_NAME, SUMS_NAME, write_tensors
from grokquant.plan import Plan, PlannedFile
from grokquant.types import Scheme, UnitReport

RUN, LOCK, HIDDEN, REPLACED = "run.json", "lock", "hidden", "replaced"


class WorkDirectory:
    """An open work directory. `reports` are those of all committed units, `damaged` names what was
    no longer as it had been committed and is made again, `tokens_per_expert` is what calibration
    brought to the experts of the layers so far."""

    def __init__(self, path: Path, output: Path) -> None:
        self.path, self.output = path, output
        self.files, self.journal = path / "files", path / "journal"
        self.sums: dict[str, str] = {}
        self.reports: dict[str, UnitReport] = {}
        self.damaged: list[str] = []
        self.tokens_per_expert: list[list[int]] = []
        self._hidden: tuple[int, Path] | None = None

    @property
    def published(self) -> bool:
        """Whether the output has its name already, so that only this directory is left to go."""
        run, sums = _read_record(self.path / RUN) or {}, self.output / SUMS_NAME
        if self.files.exists() or not sums.is_file():
            return False
        return run.get("complete") == durable.sha256(sums)

    @property
    def started(self) -> bool:
        """Whether anything is committed."""
        return self.journal.exists() and any(self.journal.glob("*.json"))

    def commit(self, file: PlannedFile, temporary: Path, reports: list[UnitReport]) -> None:
        checksum = durable.sha256(temporary)
        durable.commit(temporary, self.files / file.name)
        record = {"sha256": checksum, "units": [asdict(report) for report in reports]}
        _write_record(self.journal / f"{file.name}.json", record)
        self._remember(file, record)

    def committed(self, file: PlannedFile) -> bool:
        return file.name in self.sums

    def read(self, file: PlannedFile, names: list[str]) -> dict[str, Tensor]:
        """Tensors of a committed file."""
        with safe_open(self.files / file.name, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in names}

    def recover(self, plan: Plan) -> None:
        """Takes up what is committed and intact; what is not will be made again."""
        for directory in (self.path, self.files, self.journal):
            durable.remove_abandoned(directory)
        for file in plan.files:
            place = self.journal / f"{file.name}.json"
            record = _read_record(place)
            if record and _holds(self.files / file.name, record["sha256"]):
                self._remember(file, record)
            elif place.exists():
                self.damaged.append(file.name)
        self._recover_hidden()

    def _recover_hidden(self) -> None:
        place = self.journal / f"{HIDDEN}.json"
        record = _read_record(place)
        if record is None:
            self.damaged += [HIDDEN] if place.exists() else []
            return
        self.tokens_per_expert = record["tokens_per_expert"]
        path = self.path / f"{HIDDEN}-{record['layer']}"
        if record["sha256"] and _holds(path, record["sha256"]):
            self._hidden = record["layer"], path
        elif record["sha256"]:
            self.damaged.append(path.name)

    def save_hidden(self, layer: int, hidden: Tensor | None) -> None:
        """The hidden states before `layer`, None after the last; tokens per expert with them."""
        path, checksum = self.path / f"{HIDDEN}-{layer}", None
        if hidden is not None:
            with durable.temporary(path) as name:
                write_tensors(name, {"hidden": hidden})
                checksum = durable.sha256(name)
                durable.commit(name, path)
        record = {"layer": layer, "sha256": checksum, "tokens_per_expert": self.tokens_per_expert}
        _write_record(self.journal / f"{HIDDEN}.json", record)
        for old in self.path.glob(f"{HIDDEN}-*"):
            if old != path:
                old.unlink(missing_ok=True)

    def load_hidden(self, at_most: int) -> tuple[int, Tensor] | None:
        """What `save_hidden` saved last, if that is whole and of layer `at_most` or before."""
        if self._hidden is None or self._hidden[0] > at_most:
            return None
        layer, path = self._hidden
        return layer, load_file(path)["hidden"].clone()

    def write_index(self, plan: Plan) -> None:
        weight_map = {name: file.name for name, file in sorted(plan.file_of.items())}
        metadata = {"total_size": plan.tensor_bytes}
        index = {"metadata": metadata, "weight_map": weight_map}
        durable.write_json(self.files / INDEX_NAME, index)

    def write_sums(self) -> None:
        """SHA256SUMS of everything but the card, which people edit. `sha256sum -c` reads it."""
        free = {SUMS_NAME, CARD_NAME, *(path.name for path in self._temporaries())}
        files = sorted(p for p in self.files.iterdir() if p.name not in free)
        sums = ((self.sums.get(p.name) or durable.sha256(p), p.name) for p in files)
        text = "".join(f"{checksum}  {name}\n" for checksum, name in sums)
        durable.write_text(self.files / SUMS_NAME, text)

    def publish(self) -> None:
        """Gives the output its name; an earlier result makes way only then."""
        run = _read_record(self.path / RUN) or {}
        complete = durable.sha256(self.files / SUMS_NAME)
        _write_record(self.path / RUN, run | {"complete": complete})
        try:
            if self.output.exists() and self.files.exists():
                self.output.replace(self.path / REPLACED)
                durable.sync(self.path)
            for path in self._temporaries():
                path.unlink(missing_ok=True)
            self.files.replace(self.output)
        except BaseException:  # a signal too
            self.give_back()
            raise
        durable.sync(self.output.parent)

    def give_back(self) -> None:
        """Puts an earlier result back in its place if it made way for one that did not come."""
        replaced = self.path / REPLACED
        if replaced.exists() and not self.output.exists():
            replaced.replace(self.output)

    def clear(self) -> None:
        """Removes everything but what says whose the directory is."""
        for path in self.path.iterdir():
            if path.name not in (RUN, LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove(self) -> None:
        """Removes the directory, last of all what says whose it is, should this be cut short."""
        self.clear()
        for name in (RUN, LOCK):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # another run may have come
            self.path.rmdir()

    def _temporaries(self) -> Iterator[Path]:
        """Of another run, where a lock does not keep it out."""
        return self.files.glob(".*.tmp")

    def _remember(self, file: PlannedFile, record: dict) -> None:
        self.sums[file.name] = record["sha256"]
        for row in record["units"]:
            self.reports[row["name"]] = UnitReport(**row | {"scheme": Scheme(**row["scheme"])})


@contextmanager
def work_directory(output: Path, source: Path, identity: dict) -> Iterator[WorkDirectory]:
    """The work directory of `output`, ours alone; new, or that of an interrupted run.

    Removed at the end if nothing is committed in it. Raises InputError if `output` holds what is
    not ours or the checkpoint `source`, if another process writes there, or if the run that was
    interrupted is not described by `identity`.
    """
    _refuse_foreign(output, source)
    output = output.absolute()  # "." has no name that could be extended
    path = output.with_name(output.name + ".partial")
    _refuse_strange(path)
    work = WorkDirectory(path, output)
    try:
        with _locked(path):
            try:
                _begin(work, identity)
                yield work
            finally:
                if not work.started or work.published:
                    work.remove()
    except (OSError, SafetensorError) as error:
        hint = "; run the same command to continue" if work.sums else ""
        raise InputError(f"{output}: cannot be written: {_plain(error)}{hint}") from error


def _begin(work: WorkDirectory, identity: dict) -> None:
    """Makes what a work directory holds, or checks that what is there belongs to this run."""
    work.give_back()
    before = _read_record(work.path / RUN)
    same = before is not None and {k: before.get(k) for k in identity} == identity
    if same and work.published:
        return
    if work.started and not work.published:
        _refuse_other(work.path, before, identity)
    else:
        work.clear()
        _write_record(work.path / RUN, identity)
    work.files.mkdir(exist_ok=True)
    work.journal.mkdir(exist_ok=True)
    durable.sync(work.path)
    durable.sync(work.path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Makes and locks a work directory. Where locks do not work, two runs do the same twice."""
    descriptor = _open_lock(path)
    try:
        holder = f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%F %T')}"
        with suppress(OSError):  # a full disk; others are told less then
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """The descriptor of the lock that is ours; raises InputError naming who has it."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise InputError(f"{path}: another run is writing there: {holder}") from None
        except OSError:
            return descriptor  # this filesystem knows no locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
                return descriptor
        os.close(descriptor)  # of a run that has just removed it


def _refuse_other(path: Path, before: dict | None, now: dict) -> None:
    if before is None:
        raise InputError(f"{path / RUN}: is damaged; remove {path} to start over")
    for field in now:
        if before.get(field) != now[field]:
            changed = _difference(field, before.get(field), now[field])
            raise InputError(
                f"{path}: an interrupted run of something else: {changed}; "
                "undo that to continue it, or remove that directory to start over"
            )


def _difference(name: str, before: object, now: object) -> str:
    """The first place at which two values differ: recipe.quantize[0].bits was 4, is 8."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        index = next(i for i in range(len(now)) if before[i] != now[i])
        return _difference(f"{name}[{index}]", before[index], now[index])
    return f"{name} was {before}, is {now}"


def _refuse_strange(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path}: is in the way; move it or choose another output")
    begun = path.exists() and not (path / RUN).is_file()
    if begun and not all(map(_of_a_beginning, path.iterdir())):
        raise InputError(f"{path}: is not empty and not a run of grokquant; move it")


def _of_a_beginning(path: Path) -> bool:
    """Whether `path` may be there before run.json is."""
    if path.is_dir():
        return path.name in ("files", "journal") and not any(path.iterdir())
    return path.name == LOCK or (path.name.startswith(f".{RUN}.") and path.suffix == ".tmp")


def _refuse_foreign(output: Path, source: Path) -> None:
    if source.resolve().is_relative_to(output.resolve()):
        raise InputError(f"{output}: holds the model itself; choose another")
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"{output}: is a file, the output needs a directory")
    if any(output.iterdir()) and not (output / REPORT_NAME).is_file():
        raise InputError(f"{output}: is not empty and not a result of grokquant; choose another")


def _write_record(path: Path, record: dict) -> None:
    durable.write_json(path, {"sha256": _digest(record), "record": record})


def _read_record(path: Path) -> dict | None:
    """What `_write_record` wrote; None if it is not there or no longer that."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        record, digest = value["record"], value["sha256"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return record if digest == _digest(record) else None


def _digest(record: object) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _holds(path: Path, checksum: str) -> bool:
    return path.is_file() and durable.sha256(path) == checksum


def _plain(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
