"""Runs grokquant and lets it die, or pause, at a named step of what it does to files.

    python tests/kill_driver.py DIR list -- quantize RECIPE ...      names the steps, on stderr
    python tests/kill_driver.py DIR STEP -- quantize RECIPE ...      dies at that step
    python tests/kill_driver.py --serve                              forks a run for each request

Steps are counted for files below DIR. Nothing in grokquant knows of them: the calls of the
operating system are wrapped. Every step is the moment before a call, "inside pwrite" is that where
half of the bytes are written. Serving saves the imports: a run is forked off for each line of JSON.
"""

import builtins
import io
import json
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

TEMPORARY = re.compile(r"\.(.+)\.[^.]+\.\d+\.[0-9a-f]{32}\.tmp$")
# What happens at a step.
POWER = ("power cut", "power cut, names kept")
SIGNALS = {
    "die": [signal.SIGKILL],
    **{how: [signal.SIGKILL] for how in POWER},
    "pause": [signal.SIGSTOP],
    "interrupt": [signal.SIGINT],
    "interrupt twice": [signal.SIGINT] * 2,
    "terminate": [signal.SIGTERM],
}


class Steps:
    """Wraps the calls that change files and tells `reached` the name of each step."""

    def __init__(self, root: Path, reached: Callable[[str], None]) -> None:
        self.root, self.reached = os.path.abspath(root), reached
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def install(self) -> None:
        for operation in ("fsync", "ftruncate"):
            self._wrap(os, operation, lambda fd, *_: _path_of(fd))
        for operation in ("replace", "rename"):
            self._wrap(os, operation, lambda source, target, **_: target)
        for operation in ("unlink", "rmdir", "mkdir"):
            self._wrap(os, operation, _in_directory)
        self._wrap(os, "open", lambda path, flags, *_, **__: path if flags & os.O_CREAT else None)
        for module in (io, builtins):
            self._wrap(module, "open", _opened_to_write)
        self._wrap_pwrite()

    def _wrap(self, module: object, operation: str, path_of: Callable) -> None:
        call = getattr(module, operation)

        def wrapped(*arguments: object, **options: object) -> object:
            self._step(operation, path_of(*arguments, **options))
            return call(*arguments, **options)

        setattr(module, operation, wrapped)

    def _wrap_pwrite(self) -> None:
        call = os.pwrite

        def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            half = call(descriptor, data[: len(data) // 2], offset)
            self._step("inside pwrite", _path_of(descriptor))
            return half + call(descriptor, data[half:], offset + half)

        os.pwrite = pwrite

    def _step(self, operation: str, path: object) -> None:
        if isinstance(path, str | os.PathLike) and (name := self._name(os.path.abspath(path))):
            with self.lock:
                step = f"{operation} {name}"
                self.counts[step] += 1
                step = f"{step} #{self.counts[step]}"
            self.reached(step)

    def _name(self, path: str) -> str | None:
        if not path.startswith(self.root + os.sep):
            return None
        parent, name = os.path.split(os.path.relpath(path, self.root))
        return os.path.join(parent, TEMPORARY.sub(r"\1.tmp", name))


class Disk:
    """What is on the disk for certain of all that lies in `root`: what was synced, and no more."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.contents: dict[int, bytes] = {}
        self.listings: dict[int, dict[str, tuple[int, bool]]] = {}
        self.held: list[int] = []  # no inode number may come round again
        for directory, _, files in os.walk(root):
            for name in ("", *files):
                descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
                self.sync(descriptor)
                os.close(descriptor)

    def sync(self, descriptor: int) -> None:
        status, path = os.fstat(descriptor), Path(_path_of(descriptor))
        self.held.append(os.dup(descriptor))
        if not stat.S_ISDIR(status.st_mode):
            self.contents[status.st_ino] = path.read_bytes()
            return
        listing = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        for other in self.listings.values():  # a directory is in one place
            for name in [n for n, (inode, _) in other.items() if (inode, True) in listing.values()]:
                del other[name]
        self.listings[status.st_ino] = listing

    def cut_power(self, with_names: bool) -> None:
        """Leaves in `root` what is certain; `with_names` also all names, but not what they hold."""
        rest = self.root.with_name("rest")
        self._restore(self.root.stat().st_ino, self.root, rest, with_names)
        shutil.rmtree(self.root)
        rest.rename(self.root)

    def _restore(self, inode: int, now: Path, place: Path, with_names: bool) -> None:
        place.mkdir()
        listing = self.listings.get(inode, {})
        if with_names and now.is_dir():
            listing = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(now)}
        for name, (child, is_directory) in listing.items():
            if is_directory:
                self._restore(child, now / name, place / name, with_names)
            else:
                (place / name).write_bytes(self.contents.get(child, b"\0" * 1000))


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _in_directory(path: object, *_: object, dir_fd: int | None = None) -> str:
    path = os.fspath(path)
    return path if dir_fd is None else os.path.join(_path_of(dir_fd), path)


def _opened_to_write(path: object, mode: str = "r", *_: object, **__: object) -> object:
    return path if set(mode) & set("wax+") else None


# --- what a test may change in the world of a run


def _lying_lock() -> None:
    import fcntl

    fcntl.flock = lambda *_: None


def _endless_disk() -> None:
    import shutil

    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _: usage._replace(free=10**15)


def _other_torch() -> None:
    from grokquant.job import fingerprint

    known = fingerprint.version
    fingerprint.version = lambda name: "9.9.9" if name == "torch" else known(name)


def _background() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells do for what ends with &


def _impatient() -> None:
    from grokquant import parallel

    parallel._BEAT = 0.1
    parallel._SILENCE = 2.0
    parallel._START = timedelta(seconds=10)


def _own_network() -> None:
    """Enters the network namespace $NETNS."""
    import ctypes

    new_network = 0x40000000  # CLONE_NEWNET
    with open(f"/run/netns/{os.environ['NETNS']}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), new_network) == 0


CHANGES = {
    "own network": _own_network,
    "impatient": _impatient,
    "lying lock": _lying_lock,
    "endless disk": _endless_disk,
    "other torch": _other_torch,
    "background": _background,
}


# --- running


def _follow(root: Path) -> Disk:
    """The disk of `root`, told of every sync."""
    disk, sync = Disk(root), os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        disk.sync(descriptor)

    os.fsync = fsync
    return disk


def run(root: Path, arguments: list[str], step: str | None, how: str, log: Path | None) -> int:
    """The command line in this process, up to `step`; the names of all steps go to `log`."""
    from grokquant.cli import main

    seen = log.open("a", buffering=1) if log else None
    disk = _follow(root) if how in POWER else None
    dying: list[threading.Thread] = []

    def reached(name: str) -> None:
        if seen:
            seen.write(name + "\n")
        if dying and dying[0] is not threading.current_thread():
            time.sleep(60)
        if name != step:
            return
        if disk:
            dying.append(threading.current_thread())
            disk.cut_power(with_names=how == "power cut, names kept")
        for number in SIGNALS[how]:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    Steps(root, reached).install()
    try:
        main(arguments, prog_name="grokquant")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _fork(request: dict) -> int:
    if child := os.fork():
        return child
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            where = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(where, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= request["environment"]
        for change in request["changes"]:
            CHANGES[change]()
        log = Path(request["log"]) if request["log"] else None
        place = request["root"], request["arguments"]
        code = run(*place, request["step"], request["how"], log)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer(request: dict) -> dict:
    """{"wait": process}, {"continue": process}, {"warm": arguments} or what `_fork` needs."""
    if "wait" in request:
        return {"status": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
    if "continue" in request:
        os.kill(request["continue"], signal.SIGCONT)
        return {}
    if "warm" in request:
        from grokquant.job import pipeline
        from grokquant.recipe import load_recipe

        pipeline.quantize(load_recipe(request["warm"]))
        return {}
    child = _fork(request)
    if request["how"] == "pause":
        os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if request["seconds"] is not None:
        time.sleep(request["seconds"])
        os.kill(child, signal.SIGKILL)
    return {"process": child}


def serve() -> None:
    import torch

    import grokquant.job.pipeline
    import grokquant.reporting.terminal  # noqa: F401

    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    replies.write("{}\n")
    for line in sys.stdin:
        replies.write(json.dumps(_answer(json.loads(line))) + "\n")


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    root, step, _, *arguments = sys.argv[1:]
    log = Path("/dev/stderr") if step == "list" else None
    sys.exit(run(Path(root), arguments, step, "die", log))


if __name__ == "__main__":
    main()
