"""Measuring a command from outside: seconds, memory, disk traffic, and on what machine."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile

GROKQUANT = [sys.executable, "-m", "grokquant"]
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """`peak_rss` counts pages of mapped files too, `peak_anonymous` does not.

    Both are sampled: wait4's figure would count what the measuring program held when it forked.
    `disk_read` are bytes that came from the disk and not from the page cache. `cpu_seconds` are
    those of all threads and of its own children, which other programs hardly change.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anonymous: int
    disk_read: int
    disk_written: int
    stdout: str


def run(command: list[str]) -> Measured:
    """Runs `command` to its end; its errors go to stderr. Raises CalledProcessError if it fails."""
    with TemporaryFile("w+") as stdout:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=stdout)
        peak_rss, peak_anonymous = _watch(child.pid)
        seconds = time.perf_counter() - start
        # Of a process that has ended but is still there.
        counters = _numbers(child.pid, "io")
        cpu_seconds = _cpu_seconds(child.pid)
        child.wait()
        stdout.seek(0)
        text = stdout.read()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, text)
    read, written = counters["read_bytes"], counters["write_bytes"]
    return Measured(seconds, cpu_seconds, peak_rss, peak_anonymous, read, written, text)


def _watch(pid: int) -> tuple[int, int]:
    """Waits for the end of a process without reaping it; its peak memory, all and anonymous."""
    peak = anonymous = 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        status = _numbers(pid, "status")  # in KiB
        peak = max(peak, status.get("VmHWM", 0) * 1024)
        anonymous = max(anonymous, status.get("RssAnon", 0) * 1024)
        time.sleep(SAMPLE_SECONDS)
    return peak, anonymous


def _numbers(pid: int, name: str) -> dict[str, int]:
    """The fields of /proc/PID/`name` that are numbers."""
    words = (line.split() for line in Path(f"/proc/{pid}/{name}").read_text().splitlines())
    return {word[0].rstrip(":"): int(word[1]) for word in words if word[1:] and word[1].isdigit()}


def _cpu_seconds(pid: int) -> float:
    """In user code and in the system, of a process and of its children that have ended: fields 14
    to 17 of proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3 on
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def drop_from_cache(files: Iterable[Path]) -> None:
    """Makes the next reader of `files` go to the disk. Needs no privileges."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not yet on disk would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_of(directory: Path) -> list[Path]:
    """All files below `directory`."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def total_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def conditions() -> dict:
    """The machine and the versions that a figure was measured with."""
    names = ("torch", "transformers", "numpy", "safetensors", "grokquant")
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "machine": {
            "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }
