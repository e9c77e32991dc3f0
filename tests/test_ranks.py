"""Processes that torchrun would start: killed, hung, different, interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from jobs import ENVIRONMENT, KILLED, Job

from grokquant.cli import main

FILE_5 = "open out.partial/files/model-00005-of-00012.safetensors.tmp #1"
FILE_8 = "open out.partial/files/model-00008-of-00012.safetensors.tmp #1"
# Rank 1 of 2 and rank 2 of 3 save these.
STATES = "open out.partial/hidden-1-16.tmp #1"


@pytest.fixture
def job(jobs):
    return jobs("ranks")


def test_processes_make_what_one_makes_and_only_the_first_speaks(job):
    assert job.run_ranks(3) == [0, 0, 0], job.said_by(0)
    job.check_whole()
    assert "layer 1:" in job.said_by(0)
    assert job.said_by(1) == job.said_by(2) == ""
    assert (job.home / "stdout-1").read_text() == ""


def test_a_killed_rank_ends_all_and_the_run_goes_on_with_any_number(job):
    """Whichever rank writes the file is killed."""
    status = job.run_ranks(3, step=FILE_5)
    assert sorted(status) == [KILLED, 1, 1]
    said = "".join(map(job.said_by, range(3)))
    assert said.count("another process of the run has ended") == 1
    before = job.committed()
    assert before
    assert job.run_ranks(2, step=FILE_8).count(KILLED) == 1
    assert before.items() <= job.committed().items()
    job.finish()  # alone


def test_a_rank_that_hangs_is_named(job):
    of = {2: {"step": STATES, "how": "pause"}}
    processes = job.start_ranks(3, of, changes=("impatient",))
    assert [job.wait(process) for process in processes[:2]] == [1, 1]
    os.kill(processes[2], signal.SIGKILL)
    job.wait(processes[2])
    said = job.said_by(0) + job.said_by(1)
    assert said.count("has given no sign of life for 2 seconds") == 1
    assert f"rank 2 ({os.uname().nodename}, process {processes[2]})" in said
    job.finish()


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"changes": ("other torch",)}, "version.torch is 9.9.9, not"),
        ({"settings": ("quantize[0].bits=8",)}, "recipe.quantize[0].bits is 8, not 4"),
        ({"settings": ("calibration.samples=4",)}, "recipe.calibration.samples is 4, not 32"),
    ],
)
def test_a_rank_that_would_make_something_else_is_refused_by_name(job, other, text):
    assert job.run_ranks(2, {1: other}) == [2, 2]
    said = job.said_by(0)
    assert f"grokquant: rank 1 ({os.uname().nodename}" in said and text in said
    assert job.said_by(1) == ""
    assert not list(job.root.iterdir())


def test_a_rank_with_another_file_system_is_refused_by_name(job):
    of = {1: {"settings": (f"output.path={job.root / 'elsewhere'}",)}}
    assert sorted(job.run_ranks(2, of)) == [1, 2]
    said = job.said_by(0) + job.said_by(1)
    assert "grokquant: rank 1" in said and "on a file system that their hosts share" in said
    assert not list(job.root.iterdir())


def test_a_signal_to_all_ranks_stops_them_and_the_run_goes_on(job):
    processes = job.start_ranks(2, {1: {"step": STATES, "how": "pause"}})
    for process in processes:
        os.kill(process, signal.SIGTERM)
    os.kill(processes[1], signal.SIGCONT)
    assert [job.wait(process) for process in processes] == [130, 130]
    said = job.said_by(0) + job.said_by(1)
    assert said.count("files are done; run the same command to resume") == 1
    assert "Traceback" not in said
    job.finish()


def test_commands_that_one_process_must_carry_out_are_refused(monkeypatch):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    ran = CliRunner().invoke(main, ["verify", "a"])
    assert ran.exit_code == 2
    assert ran.stderr == "grokquant: verify: does not run under torchrun; run it as one process\n"
    monkeypatch.setenv("RANK", "1")
    ran = CliRunner().invoke(main, ["verify", "a"])
    assert (ran.exit_code, ran.output) == (2, "")


# --- `make test-ranks`


def torchrun(job: Job, size: int, *options: str, command: tuple[str, ...] = ()) -> subprocess.Popen:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    command = command or ("quantize", str(job.recipe))
    started = [*run, "--nproc-per-node", str(size), "-m", "grokquant", *command]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(started, env=environment, stderr=(job.home / "stderr").open("w"))


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["ranks", "gptq", "two-sided", "rtn"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_any_number_of_processes_makes_the_same_bytes(jobs, kind, size):
    job = jobs(kind)
    assert job.run_ranks(size) == [0] * size, job.said_by(0)
    job.check_whole()


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 4])
def test_torchrun_makes_the_same_bytes(job, size):
    assert torchrun(job, size).wait(600) == 0, job.stderr
    job.check_whole()


@pytest.mark.ranks
def test_torchrun_makes_the_same_evaluation(job, smallest_release, tmp_path):
    assert job.run() == 0
    reports = []
    for size in (1, 2, 3):
        place = tmp_path / str(size)
        options = ("--reference", str(smallest_release), "--output", str(place), "--samples", "24")
        command = ("eval", str(job.out), *options)
        assert torchrun(job, size, command=command).wait(600) == 0, job.stderr
        assert "Traceback" not in job.stderr
        reports.append((place / "report.json").read_bytes())
    assert torchrun(job, size, command=command).wait(600) == 0, job.stderr
    assert job.stderr.count("already") == 1, job.stderr  # evaluated
    assert reports[1:] == reports[:1] * 2


def children_of(process: int) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


@pytest.mark.ranks
def test_torchrun_restarts_what_was_killed(job):
    run = torchrun(job, 3, "--max-restarts", "3")
    while not job.committed() and run.poll() is None:
        time.sleep(0.01)
    os.kill(random.Random(0).choice(children_of(run.pid)), signal.SIGKILL)
    assert run.wait(600) == 0, job.stderr
    assert "resuming:" in job.stderr
    job.check_whole()


@pytest.mark.ranks
def test_torchrun_passes_signals_on(job):
    run = torchrun(job, 2)
    while not job.committed() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.wait(600) != 0
    assert job.stderr.count("run the same command to resume") == 1, job.stderr
    job.finish()


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["ranks", "two-sided", "rtn"])
def test_ranks_killed_at_random_moments(jobs, kind):
    job, draw = jobs(kind), random.Random(kind)
    kills = 0
    while kills < 30:
        job.clear()
        size = draw.randint(2, 4)
        victim = {draw.randrange(size): {"seconds": draw.uniform(0, 2)}}
        kills += KILLED in job.run_ranks(size, victim, changes=("impatient",))
        if not job.out.exists():
            size = draw.randint(2, 4)
            assert job.run_ranks(size) == [0] * size, job.said_by(0)
        job.check_whole()


@pytest.fixture
def two_networks() -> Iterator[list[str]]:
    """Two network namespaces, each with an end of a cable."""
    names = [f"ranks-{os.getpid()}-{end}" for end in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
    for number, name in enumerate(names, 1):
        commands.append(f"-n {name} addr add 10.77.0.{number}/24 dev cable")
        commands += [f"-n {name} link set {device} up" for device in ("lo", "cable")]
    try:
        for command in commands:
            try:
                done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("there is no ip command")
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.ranks
def test_a_host_that_is_cut_off_is_named(job, two_networks):
    network = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable"}
    of = {
        rank: {"environment": network | {"NETNS": name}} for rank, name in enumerate(two_networks)
    }
    of[1] |= {"step": STATES, "how": "pause"}
    processes = job.start_ranks(2, of, changes=("own network", "impatient"))
    cut = ["ip", "-n", two_networks[0], "link", "set", "cable", "down"]
    subprocess.run(cut, check=True)
    os.kill(processes[1], signal.SIGCONT)
    assert [job.wait(process) for process in processes] == [1, 1]
    assert "grokquant: rank 1" in job.said_by(0) and "no sign of life" in job.said_by(0)
    assert "the store, on the first host, has given no sign of life" in job.said_by(1)
    job.finish()
