"""Creates and locks the work directory of an output, or says why it cannot be used."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from grokquant.errors import InputError
from grokquant.files import atomic
from grokquant.files.unfinished import RUN, work_path
from grokquant.job.fingerprint import difference
from grokquant.job.shards import is_result
from grokquant.job.workdir import LOCK, WorkDirectory
from grokquant.parallel import ALONE, Team


@contextmanager
def work_directory(output: Path, identity: dict, team: Team = ALONE) -> Iterator[WorkDirectory]:
    """The locked work directory of `output`: a new one, or that of an interrupted run.

    The first member of a team makes and locks it for all. It is removed at the end if nothing is
    committed in it. Raises InputError if another process writes there, if the interrupted run has
    another `identity`, or if the members do not see the same directory.
    """
    path = work_path(output)
    output = output.resolve()
    team.once(partial(_check_path, path))
    work = WorkDirectory(path, output)
    lock: AbstractContextManager[None] = team.only_first(locked(path), nullcontext())
    remove = team.only_first(work.remove, lambda: None)
    try:
        with lock:
            try:
                team.once(partial(_begin, work, identity))
                _check_shared(work, identity)
                yield work
            finally:
                if not work.started or work.published:
                    remove()
    except OSError as error:
        why = error.strerror or str(error)
        names = [str(name) for name in (error.filename, error.filename2) if name]
        if names and not any(_concerns(work, Path(name).absolute()) for name in names):
            raise InputError(f"{names[0]}: {why}") from error
        hint = "; run the same command to resume" if work.sums else ""
        raise InputError(f"{output}: cannot be written: {why}{hint}") from error


def _concerns(work: WorkDirectory, path: Path) -> bool:
    """Whether `path` is inside the work directory or the output, or a directory above them."""
    written = (work.path, work.output)
    return any(path.is_relative_to(place) or place.is_relative_to(path) for place in written)


def _begin(work: WorkDirectory, identity: dict) -> None:
    """Creates the contents of a work directory, or checks that they belong to this run."""
    work.give_back()
    before = atomic.read_record(work.path / RUN)
    same = before is not None and {k: before.get(k) for k in identity} == identity
    if same and work.published:
        return
    if work.started and not work.published:
        _check_same(work.path, before, identity)
    else:
        work.clear()
        atomic.write_record(work.path / RUN, identity)
    work.files.mkdir(exist_ok=True)
    work.journal.mkdir(exist_ok=True)
    atomic.sync(work.path)
    atomic.sync(work.path.parent)


def _check_shared(work: WorkDirectory, identity: dict) -> None:
    """Raises InputError if the directory that was made for this run is none here."""
    found = atomic.read_record(work.path / RUN) or {}
    if {key: found.get(key) for key in identity} != identity:
        raise InputError(
            f"{work.path}: is not there for all processes of the run; "
            "the output must be on a file system that their hosts share"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Creates and locks a work directory. Without file locks, two runs may do the same work."""
    descriptor = _open_lock(path)
    try:
        holder = f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%F %T')}"
        with suppress(OSError):  # a full disk: others see no holder then
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """The descriptor of the acquired lock. Raises InputError naming the process that holds it."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise InputError(f"{path}: another run is writing there ({holder})") from None
        except OSError:
            return descriptor  # this filesystem has no locks
        # A run that ended meanwhile may have removed the file that we locked: then try again.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
                return descriptor
        os.close(descriptor)


def _check_same(path: Path, before: dict | None, now: dict) -> None:
    if before is None:
        raise InputError(f"{path / RUN}: is damaged; remove {path} to start over")
    if changed := difference(before, now):
        raise InputError(
            f"{path}: holds an interrupted run with other settings ({changed}); "
            "restore them to resume it, or remove that directory to start over"
        )


def _check_path(path: Path) -> None:
    """Raises InputError if something other than a work directory is at `path`."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path}: is in the way; move it or choose another output")
    begun = path.exists() and not (path / RUN).is_file()
    if begun and not all(map(_precedes_run, path.iterdir())):
        raise InputError(f"{path}: is not empty and was not made by grokquant; move it")


def _precedes_run(path: Path) -> bool:
    """Whether `path` may exist before run.json does."""
    if path.is_dir():
        return path.name in ("files", "journal") and not any(path.iterdir())
    return path.name == LOCK or (path.name.startswith(f".{RUN}.") and path.suffix == ".tmp")


def check_output(output: Path, source: Path) -> None:
    """Raises InputError unless `output` is free or holds a result, which is not the `source`."""
    check_place(output, source)
    if not output.exists():
        atomic.check_writable(output)
        return
    if any(output.iterdir()) and not is_result(output):
        raise InputError(f"{output}: is not empty and was not made by grokquant; choose another")


def check_place(output: Path, source: Path) -> None:
    """Raises InputError where no result may be, whatever is there now."""
    if source.resolve().is_relative_to(output.resolve()):
        raise InputError(f"{output}: holds the model itself; choose another output")
    if output.exists() and output.resolve().is_mount():
        raise InputError(f"{output}: is a mount point; choose a directory inside it")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file, but the output must be a directory")
