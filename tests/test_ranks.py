"""Processes that torchrun would start: killed, hung, different, interrupted."""

import os
import signal

import pytest
from click.testing import CliRunner
from jobs import KILLED

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
        ({"changes": ("other torch",)}, "version.torch"),
        ({"settings": ("quantize[0].bits=8",)}, "recipe.quantize[0].bits"),
        ({"settings": ("calibration.samples=4",)}, "recipe.calibration.samples"),
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
    ran = CliRunner().invoke(main, ["eval", "a", "--reference", "b"])
    assert ran.exit_code == 2
    assert ran.stderr == "grokquant: eval: does not run under torchrun; run it as one process\n"
    monkeypatch.setenv("RANK", "1")
    ran = CliRunner().invoke(main, ["eval", "a", "--reference", "b"])
    assert (ran.exit_code, ran.output) == (2, "")
