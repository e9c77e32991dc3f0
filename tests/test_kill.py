"""A run that is killed, paused, signalled or starved at every step and at random moments.

Minutes long and left out of `make test`; `make test-kill` runs it.
"""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import ENVIRONMENT, KILLED, can_mount, fill_up, tree

pytestmark = pytest.mark.kill
KINDS = ["gptq", "rtn"]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step(jobs, kind):
    job = jobs(kind)
    assert len(job.steps) == len(set(job.steps)) >= 240
    for step in job.steps:
        job.clear()
        assert job.run(step=step) == KILLED, step
        made = {path.name for path in (job.partial / "files").glob("model-*.safetensors")}
        assert len(made - set(job.committed())) <= 1, step  # one file to be made again
        job.finish()


@pytest.mark.parametrize("how", ["power cut", "power cut, names kept"])
def test_power_cut_at_every_step(jobs, how):
    """All that was not synced is gone, or its name is there and zeros are in it."""
    job = jobs("gptq")
    for step in (step for step in job.steps if not step.startswith("inside")):
        job.clear()
        assert job.run(step=step, how=how) == KILLED, (step, job.stderr)
        job.finish()
        assert "no longer what was committed" not in job.stderr, step


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(jobs, kind):
    """110 times; every third run that goes on is killed as well, and so forth."""
    job, draw = jobs(kind), random.Random(kind)
    kills = 0
    while kills < 110:
        job.clear()
        while True:
            kills += job.run(seconds=draw.uniform(0, 1.0)) == KILLED
            if draw.random() < 2 / 3:
                break
        if job.partial.exists():
            job.finish()
        elif job.out.exists():
            job.check_whole()


@pytest.mark.parametrize("kind", KINDS)
def test_an_earlier_result_survives_until_it_is_replaced_whole(jobs, kind, tmp_path):
    earlier = jobs("rtn" if kind == "gptq" else "gptq")
    assert earlier.run() == 0
    earlier_files = tree(shutil.copytree(earlier.out, tmp_path / "earlier"))
    job = jobs(kind)
    log = tmp_path / "steps"
    shutil.copytree(tmp_path / "earlier", job.out)
    assert job.run(log=log) == 0
    job.check_whole()
    steps = log.read_text().splitlines()
    first = next(i for i, step in enumerate(steps) if step.startswith("replace out.partial/repl"))
    for step in [*steps[: first - 6 : 29], *steps[first - 6 :]]:
        for other_recipe in (False, True):
            job.clear()
            shutil.copytree(tmp_path / "earlier", job.out)
            assert job.run(step=step) == KILLED, step
            found = [tree(p) for p in (job.out, job.partial / "replaced") if p.exists()]
            assert earlier_files in found or job.whole in found, step
            if other_recipe and job.partial.exists() and job.run("experts.min_tokens=2") == 2:
                assert tree(job.out) in (earlier_files, job.whole), step
            elif other_recipe:
                continue  # it had something to say about an output that was complete
            job.finish()


@pytest.mark.parametrize("flag", ["--overwrite", "--repair"])
def test_replacing_and_repairing_killed_at_random_moments(jobs, flag, tmp_path):
    """Whenever they are killed, the files that were intact are there, and a repetition ends it."""
    job, draw = jobs("gptq"), random.Random(flag)
    assert job.run() == 0
    intact = dict(job.whole)
    if flag == "--repair":
        for name in draw.sample(sorted(job.stamps()), 3):
            (job.out / name).write_bytes(draw.randbytes(100))
            del intact[name]
    kept = shutil.copytree(job.out, tmp_path / "kept")
    for _ in range(30):
        job.clear()
        shutil.copytree(kept, job.out)
        for _ in range(3):
            job.run(flags=(flag,), seconds=draw.uniform(0, 1.0))
            found = [tree(p) for p in (job.out, job.partial / "replaced") if p.exists()]
            assert any(intact.items() <= files.items() for files in found)
        assert job.run(flags=(flag,)) == 0, job.stderr
        job.check_whole()


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_every_step(jobs, kind):
    """SIGINT lets the file in progress be finished; what is committed is never made again."""
    job = jobs(kind)
    for step in job.steps[::3]:
        job.clear()
        status = job.run(step=step, how="interrupt")
        assert "Traceback" not in job.stderr, (step, job.stderr)
        if status == 0:
            job.check_whole()
            continue
        assert status == 130, (step, job.stderr)
        if job.partial.exists():
            assert job.last_line == (
                f"stopped, {len(job.committed())} of 12 files are done; "
                "run the same command to resume"
            ), step
            assert not list(job.root.rglob("*.tmp")), step
        else:
            assert job.last_line == "interrupted; no output was written", step
            assert list(job.root.iterdir()) == [], step
        job.finish()


def test_a_lock_that_lies(jobs):
    """One run pauses at a step, another comes and does all, then the first goes on."""
    job = jobs("rtn")
    for step in job.steps[::2]:
        job.clear()
        first = job.start(step=step, how="pause", changes=("lying lock",), streams="1")
        second = job.run(changes=("lying lock",))
        assert second == 0 or "Traceback" not in job.stderr, (step, job.stderr)
        if second == 0:
            assert tree(job.out) == job.whole, step
        job.launcher.ask(**{"continue": first})
        status, stderr = job.wait(first), (job.home / "stderr1").read_text()
        assert status in (0, 2) and "Traceback" not in stderr, (step, stderr)
        assert status == 0 or second == 0 or job.partial.exists()
        if job.out.exists():
            assert tree(job.out) == job.whole, step
        if job.partial.exists():
            job.run()
            job.check_whole()


def test_two_runs_at_random_with_a_lock_that_lies(jobs):
    job, draw = jobs("rtn"), random.Random(0)
    for _ in range(30):
        job.clear()
        lies = ("lying lock",)
        running = [job.start(changes=lies, streams="1")]
        time.sleep(draw.uniform(0, 0.7))
        running.append(job.start(changes=lies, streams="2"))
        statuses = [job.wait(process) for process in running]
        stderrs = [(job.home / f"stderr{i}").read_text() for i in (1, 2)]
        assert set(statuses) <= {0, 2} and "Traceback" not in "".join(stderrs), stderrs
        if job.out.exists():
            assert tree(job.out) == job.whole
        assert job.out.exists() or 0 not in statuses
        job.run()
        job.check_whole()


def test_processes_with_all_their_threads_killed_on_the_toy(text_file, tmp_path):
    """Nothing is forked, wrapped or held to one thread here."""
    draw = random.Random(0)
    recipe = Path(__file__).parents[1] / "recipes" / "toy-int4.yaml"
    wanted = ["calibration.samples=32", "output.shard=100KB", f"calibration.text={text_file}"]
    command = [sys.executable, "-m", "grokquant", "quantize", str(recipe)]
    command += [part for setting in wanted for part in ("--set", setting)]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "OMP_NUM_THREADS"}

    def start(out: str) -> subprocess.Popen:
        setting = ["--set", f"output.path={out}"]  # the same words, as recipe.yaml holds them
        return subprocess.Popen(
            command + setting, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )

    whole = start("out")
    layers = sum(line.startswith("layer ") for line in whole.stderr)
    assert (whole.wait(), layers) == (0, 4)
    (tmp_path / "out").rename(tmp_path / "whole")
    for _ in range(4):
        killed = start("out")
        next(line for line in killed.stderr if line.startswith("calibration: "))
        time.sleep(draw.uniform(0, 3))
        killed.kill()
        killed.communicate()
    assert (tmp_path / "out.partial" / "journal").is_dir()
    last = start("out")
    assert "resuming: " in last.communicate()[1] and last.returncode == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.skipif(not can_mount(), reason="only root can mount a small disk")
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_anywhere(jobs, kind):
    job = jobs(kind)
    needed = job.size
    sizes = range(8192, needed + 200_000, 12_288)
    statuses = [fill_up(job, size) for size in sizes]
    assert statuses[0] == 2 and statuses[-1] == 0
