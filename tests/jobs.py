"""Small runs that tests kill, continue and compare."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import grokquant
from grokquant.files.atomic import sha256
from grokquant.job import pipeline
from grokquant.recipe import Recipe

DRIVER = Path(__file__).parent / "kill_driver.py"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(grokquant.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the command line sets it, which forks are too late for
}
KILLED = -signal.SIGKILL
# The file for everything that is committed is small, so that there are many.
SHARD = "20KB"
EXPERTS = {"match": "layers.*.experts.*", "method": "gptq", "bits": 4, "group": 32}
ATTENTION = {"match": "layers.*.attention.*", "method": "copy"}
RULES = {
    "gptq": [EXPERTS, ATTENTION],
    "ranks": [EXPERTS, ATTENTION],
    "two-sided": [EXPERTS | {"method": "two-sided", "metric": "gradients"}],
    "rtn": [{"match": "layers.*", "method": "rtn", "bits": 4, "group": 32, "symmetric": False}],
}

SAMPLES = {"ranks": 32, "two-sided": 32}  # rows for several forward passes, which ranks may share


class Launcher:
    """A process that has imported everything and forks runs off."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, str(DRIVER), "--serve"]
        self.server = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT, bufsize=1
        )
        self._reply()

    def ask(self, **request: object) -> dict:
        assert self.server.stdin
        self.server.stdin.write(json.dumps(request) + "\n")
        return self._reply()

    def _reply(self) -> dict:
        assert self.server.stdout
        line = self.server.stdout.readline()
        assert line, "the launcher died"
        return json.loads(line)

    def close(self) -> None:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()


@dataclass
class Job:
    """A recipe and the directory `root` in which nothing but its output is written.

    `steps` are those of an undisturbed run, `whole` is the tree that it leaves, of `size` bytes.
    """

    launcher: Launcher
    home: Path
    recipe: Path
    steps: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    size: int = 0

    @property
    def root(self) -> Path:
        return self.home / "root"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def partial(self) -> Path:
        return self.root / "out.partial"

    @property
    def stderr(self) -> str:
        return (self.home / "stderr").read_text()

    @property
    def last_line(self) -> str:
        return self.stderr.splitlines()[-1].removeprefix("grokquant: ")

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)

    def start(
        self,
        *settings: str,
        step: str | None = None,
        how: str = "die",
        seconds: float | None = None,
        changes: tuple[str, ...] = (),
        log: Path | None = None,
        streams: str = "",
        flags: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> int:
        """A process with this run in it, which dies (or what else `how` is) at `step`."""
        options = [part for setting in settings for part in ("--set", setting)]
        return self.launcher.ask(
            root=str(self.root),
            arguments=["quantize", str(self.recipe), *options, *flags],
            step=step,
            how=how,
            seconds=seconds,
            changes=changes,
            environment=environment or {},
            log=log and str(log),
            stdout=str(self.home / f"stdout{streams}"),
            stderr=str(self.home / f"stderr{streams}"),
        )["process"]

    def wait(self, process: int) -> int:
        return self.launcher.ask(wait=process)["status"]

    def run(self, *settings: str, **options: object) -> int:
        """The exit status."""
        return self.wait(self.start(*settings, **options))  # type: ignore[arg-type]

    def start_ranks(
        self, size: int, of: dict[int, dict] | None = None, **options: Any
    ) -> list[int]:
        """Processes that make this run together, as torchrun starts them.

        `of` has options of single ranks, which begin last: the launcher waits for them to pause.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        common |= {"GLOO_SOCKET_IFNAME": "lo"}
        of = of or {}
        processes = {}
        for rank in sorted(range(size), key=lambda rank: rank in of):
            own = {"streams": f"-{rank}"} | options | of.get(rank, {})
            own["environment"] = common | {"RANK": str(rank)} | own.get("environment", {})
            processes[rank] = self.start(*own.pop("settings", ()), **own)
        return [processes[rank] for rank in range(size)]

    def run_ranks(self, size: int, of: dict[int, dict] | None = None, **options: Any) -> list[int]:
        """The exit status of each rank."""
        return [self.wait(process) for process in self.start_ranks(size, of, **options)]

    def said_by(self, rank: int) -> str:
        return (self.home / f"stderr-{rank}").read_text()

    def learn(self) -> None:
        """Fills `steps`, `whole` and `size`."""
        self.clear()
        log = self.home / "steps"
        assert self.run(log=log) == 0, self.stderr
        self.steps, self.whole = log.read_text().splitlines(), tree(self.out)
        self.size = sum(path.stat().st_size for path in self.out.iterdir())

    def stop_at_file(self, number: int) -> None:
        """Kills a run when it begins its file `number`; those before are committed."""
        name = f"model-{number:05d}-of-00012.safetensors"
        assert self.run(step=f"open out.partial/files/{name}.tmp #1") == KILLED, self.stderr
        assert len(self.committed()) == number - 1

    def check_whole(self) -> None:
        """The output is that of the undisturbed run, and nothing lies beside it."""
        assert tree(self.out) == self.whole
        assert [path.name for path in self.root.iterdir()] == ["out"]

    def finish(self, *settings: str, flags: tuple[str, ...] = ()) -> None:
        """The same command goes on to the end and makes nothing again that is committed."""
        before = self.committed()
        assert self.run(*settings, flags=flags) == 0, self.stderr
        assert {name: found for name, found in self.stamps().items() if name in before} == before
        self.check_whole()

    def committed(self) -> dict[str, tuple[int, int]]:
        """The files with a record: inode and time of change."""
        records = [path.stem for path in (self.partial / "journal").glob("model-*.json")]
        place = self.partial / "files" if (self.partial / "files").is_dir() else self.out
        return {name: stamp(place / name) for name in records}

    def stamps(self) -> dict[str, tuple[int, int]]:
        return self.stamps_in(self.out)

    def stamps_in(self, directory: Path) -> dict[str, tuple[int, int]]:
        return {path.name: stamp(path) for path in directory.glob("model-*")}


def stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory with its checksum."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256(path) for path in sorted(files)}


def new_job(launcher: Launcher, home: Path, source: Path, text: Path, kind: str) -> Job:
    home.mkdir(exist_ok=True)
    job = Job(launcher, home, home / "recipe.yaml")
    values = {
        "model": {"path": str(source)},
        "calibration": {"text": str(text), "samples": SAMPLES.get(kind, 8), "length": 32},
        "quantize": RULES[kind],
        "experts": {"min_tokens": 1},
        "output": {"path": str(job.out), "shard": SHARD},
    }
    job.recipe.write_text(json.dumps(values))  # YAML holds JSON
    return job


def can_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory() as place:
        if mount("-t", "tmpfs", "none", place):
            return False
        subprocess.run(["umount", place], check=True)
    return True


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode


def fill_up(job: Job, size: int) -> int:
    """Runs on a disk of `size` bytes, then on a larger one; the exit status of the first run."""
    job.clear()
    assert mount("-t", "tmpfs", "-o", f"size={size}", "none", str(job.root)) == 0
    try:
        status = job.run(changes=("endless disk",))
        if status:
            assert status == 2 and "Traceback" not in job.stderr, (size, job.stderr)
            assert "out: cannot be written: No space left on device" in job.last_line, size
            assert not list(job.root.rglob("*.tmp")), size
            assert mount("-o", f"remount,size={size + 50_000_000}", str(job.root)) == 0
            job.finish()
        job.check_whole()
        return status
    finally:
        subprocess.run(["umount", str(job.root)], check=True)


def interrupt_after(matrices: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a recipe here until so many matrices are rounded; full files are committed."""
    emit, left = pipeline.Run.emit, matrices

    def emit_or_fail(run: pipeline.Run, *given: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            run.writer.drain()
            raise KeyboardInterrupt
        emit(run, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Run, "emit", emit_or_fail)
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(recipe)
