"""Whatever happens to a run, what it has committed stays, and the same command goes on from there.

`make test-kill` (test_kill.py) does at every step and hundreds of times what is done here a few
times.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import ENVIRONMENT, KILLED, Job, can_mount, fill_up, tree
from safetensors.torch import load_file

from grokquant.sources.pickles import read_array, read_headers
from grokquant.toy.release_writer import write_leaf

FILES = "out.partial/files/model-000"
JOURNAL = "out.partial/journal/"


# --- kills


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("gptq", f"inside pwrite {FILES}05-of-00012.safetensors.tmp #7"),
        ("gptq", f"replace {JOURNAL}model-00007-of-00012.safetensors.json #1"),
        ("gptq", f"replace {JOURNAL}hidden.json #1"),
        ("gptq", "replace out #1"),
        ("rtn", f"replace {FILES}04-of-00012.safetensors #1"),
        ("rtn", "fsync out.partial/files/SHA256SUMS.tmp #1"),
    ],
)
def test_killed_at_a_step(jobs, kind, step):
    job = jobs(kind)
    assert step in job.steps
    assert job.run(step=step) == KILLED
    job.finish()


@pytest.mark.parametrize("kind", ["gptq", "rtn"])
def test_killed_at_random_moments_again_and_again(jobs, kind):
    job, draw = jobs(kind), random.Random(0)
    for _ in range(3):
        job.run(seconds=draw.uniform(0.1, 0.5))
    job.finish()


def test_an_earlier_result_stays_until_the_new_one_is_whole(jobs):
    job = jobs("gptq")
    assert job.run("quantize[0].method=rtn") == 0
    earlier = tree(job.out)
    replace = ("--overwrite",)
    assert job.run(flags=replace, step=f"replace {FILES}08-of-00012.safetensors #1") == KILLED
    assert tree(job.out) == earlier
    assert job.run(flags=replace, step="replace out #1") == KILLED
    assert not job.out.exists() and tree(job.partial / "replaced") == earlier
    assert job.run("quantize[0].bits=8") == 2  # refused, but the earlier result is back
    assert tree(job.out) == earlier
    job.finish(flags=replace)


def test_a_repair_that_is_killed_goes_on(jobs):
    job, repair = jobs("gptq"), ("--repair",)
    assert job.run() == 0
    first, second = (f"model-{number:05d}-of-00012.safetensors" for number in (4, 9))
    flip_bit(job.out / first)
    (job.out / second).unlink()
    damaged = tree(job.out)
    assert job.run(flags=repair, step=f"open out.partial/files/{second}.tmp #1") == KILLED
    assert tree(job.out) == damaged  # until all is whole
    made = job.stamps_in(job.partial / "files")[first]
    assert job.run(flags=repair, step=f"replace out/{second} #1") == KILLED
    assert not (job.out / second).exists()
    assert job.run(flags=repair) == 0, job.stderr
    assert job.stamps()[first] == made
    job.check_whole()


# --- damage between a kill and the next run


def flip_bit(path: Path, position: int | None = None) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if position is None else position] ^= 1
    path.write_bytes(raw)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


MODEL = "model-00004-of-00012.safetensors"
MADE_AGAIN = ": changed since it was written; rebuilding it"


@pytest.mark.parametrize(
    ("damage", "path", "named"),
    [
        (flip_bit, f"files/{MODEL}", MODEL),
        (flip_bit, "hidden-1", "hidden-1"),
        (shorten, f"files/{MODEL}", MODEL),
        (shorten, "journal/hidden.json", "hidden"),
        (Path.unlink, f"files/{MODEL}", MODEL),
        (Path.unlink, f"journal/{MODEL}.json", None),  # as if it had never been written
        (fill_with_garbage, f"journal/{MODEL}.json", MODEL),
    ],
)
def test_damage_is_found_named_and_mended(jobs, damage, path, named):
    job = jobs("gptq")
    job.stop_at_file(10)
    before = job.committed()
    damage(job.partial / path)
    assert job.run() == 0, job.stderr
    job.check_whole()
    lines = [line for line in job.stderr.splitlines() if line.endswith(MADE_AGAIN)]
    assert lines == ([named + MADE_AGAIN] if named else [])
    changed = {name for name, stamp in before.items() if job.stamps()[name] != stamp}
    assert changed == ({MODEL} if MODEL in path else set())


@pytest.mark.kill
def test_every_damaged_file_is_found_named_and_mended(jobs):
    job = jobs("gptq")
    job.stop_at_file(10)
    kept = shutil.copytree(job.partial, job.home / "kept")
    inner = [*kept.glob("files/model-*"), *kept.glob("journal/*"), *kept.glob("hidden-*")]
    assert len(inner) == 9 + 10 + 1
    for path in inner:
        for damage in (flip_bit, shorten, fill_with_garbage, Path.unlink):
            job.clear()
            shutil.copytree(kept, job.partial)
            damage(job.partial / path.relative_to(kept))
            assert job.run() == 0, job.stderr
            job.check_whole()
            named = [f"{path.name.removesuffix('.json')}{MADE_AGAIN}"]
            lost = damage is Path.unlink and path.suffix == ".json"
            lines = [line for line in job.stderr.splitlines() if line.endswith(MADE_AGAIN)]
            assert lines == ([] if lost else named)


def test_every_bit_of_a_record_counts(jobs):
    """A digit of an error in a report would otherwise change unseen."""
    job = jobs("gptq")
    job.stop_at_file(10)
    record = job.partial / "journal" / f"{MODEL}.json"
    text = record.read_text()
    digit = re.search(r'"relative_error": 0\.(\d)', text)
    assert digit
    flip_bit(record, digit.start(1))
    assert json.loads(record.read_text()) != json.loads(text)
    assert job.run() == 0
    assert MODEL + MADE_AGAIN in job.stderr
    job.check_whole()


def test_a_damaged_identity_is_refused(jobs):
    job = jobs("gptq")
    job.stop_at_file(5)
    flip_bit(job.partial / "run.json")
    assert job.run() == 2
    path = job.partial / "run.json"
    assert job.last_line == f"{path}: is damaged; remove {job.partial} to start over"
    assert len(job.committed()) == 4


# --- what may not change before a run is continued


def append_unknown_field(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\xfa\x07\x00")  # of a protocol buffer, and empty


def other_words(path: Path) -> None:
    words = path.read_text().split()
    path.write_text(" ".join(words[::-1]))


def other_multiplier(source: Path) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attn_output_multiplier": 0.5}))


def test_a_run_of_something_else_is_refused_and_loses_nothing(own_job):
    job = own_job
    job.learn()
    job.clear()
    job.stop_at_file(10)
    before = job.committed()

    def refused(complaint: str, *settings: str, changes: tuple[str, ...] = ()) -> None:
        assert job.run(*settings, changes=changes) == 2
        start = f"{job.partial}: holds an interrupted run with other settings ("
        end = "); restore them to resume it, or remove that directory to start over"
        found = job.last_line.removeprefix(start).removesuffix(end)
        assert re.fullmatch(complaint, found), job.last_line
        assert job.committed() == before and not job.out.exists()

    refused(r"recipe\.quantize\[0\]\.bits was 4, now 8", "quantize[0].bits=8")
    refused(r"recipe\.calibration\.seed was 0, now 1", "calibration.seed=1")
    refused(r"recipe\.output\.shard was 20KB, now 30KB", "output.shard=30KB")
    refused(r"version\.torch was \S+, now 9\.9\.9", changes=("other torch",))

    def with_changed(path: Path, change: Callable[[Path], None], complaint: str) -> None:
        kept = shutil.copytree(path.parent, job.home / "kept")  # times and all
        change(path)
        refused(complaint)
        shutil.rmtree(path.parent)
        kept.rename(path.parent)

    source, home = job.home.parent / "source", job.home.parent
    shard = "tensor00002_000"
    with_changed(source / "ckpt-0" / shard, flip_bit, rf"source\.{shard} was \d+ bytes of .*")
    with_changed(
        source / "tokenizer.model", append_unknown_field, r"tokenizer\.tokenizer\.model was .*"
    )
    other = r"config\.attn_output_multiplier was 0\.\d+, now 0\.5"
    with_changed(source / "config.json", lambda path: other_multiplier(path.parent), other)
    text = (home / "text.txt").read_bytes()
    other_words(home / "text.txt")
    refused(r"calibration text was [0-9a-f]{64}, now [0-9a-f]{64}")
    (home / "text.txt").write_bytes(text)

    # What changes no weight is free.
    assert job.run("max_fallbacks=0.5", "eval.samples=7") == 0, job.stderr
    differing = {name for name, checksum in tree(job.out).items() if job.whole[name] != checksum}
    papers = {"quantization-report.json", "SHA256SUMS", "README.md"}  # with its checksum
    assert differing == {"recipe.yaml"} | papers


def test_where_nothing_is_committed_another_recipe_just_starts(jobs):
    job = jobs("gptq")
    assert job.run("quantize[0].bits=8", step=f"replace {FILES}01-of-00012.safetensors #1") < 0
    assert job.partial.is_dir() and not job.committed()
    job.finish()


def test_what_is_not_a_work_directory_is_left_alone(jobs):
    job = jobs("gptq")
    job.partial.mkdir()
    (job.partial / "thesis.txt").write_text("years of work")
    assert job.run() == 2
    complaint = f"{job.partial}: is not empty and was not made by grokquant; move it"
    assert job.last_line == complaint
    assert (job.partial / "thesis.txt").read_text() == "years of work"


# --- two runs into one directory


def test_the_second_of_two_runs_is_refused(jobs):
    job = jobs("gptq")
    first = job.start(step=f"open {FILES}04-of-00012.safetensors.tmp #1", how="pause", streams="1")
    assert job.run() == 2
    holder = rf"another run is writing there \(process {first} on \S+ since 20\S+ \S+\)"
    assert re.fullmatch(rf"{job.partial}: {holder}", job.last_line)
    job.launcher.ask(**{"continue": first})
    assert job.wait(first) == 0
    job.check_whole()


@pytest.mark.parametrize(
    "step",
    [
        f"open {FILES}05-of-00012.safetensors.tmp #1",
        "fsync out.partial/files/SHA256SUMS.tmp #1",
    ],
)
def test_two_runs_whose_lock_lies_damage_nothing(jobs, step):
    job = jobs("rtn")
    first = job.start(step=step, how="pause", changes=("lying lock",), streams="1")
    second = job.run(changes=("lying lock",))
    assert second == 0, job.stderr
    assert tree(job.out) == job.whole
    job.launcher.ask(**{"continue": first})
    assert job.wait(first) in (0, 2)
    assert "Traceback" not in (job.home / "stderr1").read_text()
    assert tree(job.out) == job.whole


# --- signals


@pytest.mark.parametrize(
    ("how", "changes"), [("interrupt", ()), ("terminate", ()), ("interrupt", ("background",))]
)
def test_a_signal_lets_the_file_in_progress_be_finished(jobs, how, changes):
    job = jobs("gptq")
    step = f"inside pwrite {FILES}05-of-00012.safetensors.tmp #3"
    assert job.run(step=step, how=how, changes=changes) == 130
    assert "stopping after the current file; interrupt again to stop immediately" in job.stderr
    done = len(job.committed())
    assert done >= 5 and not list(job.root.rglob("*.tmp"))
    assert job.last_line == (
        f"stopped, {done} of 12 files are done; run the same command to resume"
    )
    job.finish()


def test_a_second_signal_stops_at_once(jobs):
    job = jobs("gptq")
    step = f"inside pwrite {FILES}03-of-00012.safetensors.tmp #3"
    assert job.run(step=step, how="interrupt twice") == 130
    assert len(job.committed()) == 2 and not list(job.root.rglob("*.tmp"))
    assert job.last_line == ("stopped, 2 of 12 files are done; run the same command to resume")
    job.finish()


def test_a_signal_before_anything_is_committed_leaves_nothing(jobs):
    job = jobs("gptq")
    for step in ("open out.partial/lock #1", "replace out.partial/files/tokenizer.model #1"):
        assert job.run(step=step, how="terminate") == 130
        assert job.last_line == "interrupted; no output was written"
        assert list(job.root.iterdir()) == []


# --- a full disk


@pytest.mark.skipif(not can_mount(), reason="only root can mount a small disk")
@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_a_full_disk(jobs, share):
    job = jobs("gptq")
    assert fill_up(job, 8192 + int(share * job.size)) == 2


# --- what reaches the disk when

CALLS = "fsync,fdatasync,rename,renameat,renameat2,write,writev,pwrite64,sendfile,mkdir,ftruncate"
FINISHED = re.compile(r"(\w+)\((.*)\) += \d+")


def can_trace() -> bool:
    if not shutil.which("strace"):
        return False
    return subprocess.run(["strace", "-f", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_trace(), reason="strace is missing or not allowed")
def test_nothing_gets_its_name_before_it_is_on_the_disk(jobs, tmp_path):
    job, log = jobs("gptq"), tmp_path / "trace"
    trace = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={CALLS}"]
    command = [sys.executable, "-m", "grokquant", "quantize", str(job.recipe)]
    subprocess.run([*trace, *command], env=ENVIRONMENT, check=True, capture_output=True)
    job.check_whole()
    events = read_trace(log, job.root)
    check_order(events, job.root)
    syncs = [index for index, (kind, _) in enumerate(events) if kind == "sync"]
    assert len(syncs) > 4 * 12
    for index in syncs:  # none is there for nothing
        with pytest.raises(AssertionError):
            check_order(events[:index] + events[index + 1 :], job.root)


Event = tuple[str, list[str]]


def read_trace(log: Path, root: Path) -> list[Event]:
    """("write" | "sync" | "mkdir", [path]) and ("rename", [from, to]) in the order of their ends,
    of what lies in `root`."""
    events: list[Event] = []
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        process, call = line.split(maxsplit=1)
        if call.endswith("<unfinished ...>"):
            begun[process] = call.removesuffix("<unfinished ...>")
            continue
        if call.startswith("<... "):
            call = begun.pop(process) + call.partition("resumed>")[2]
        if not (finished := FINISHED.match(call)):
            continue
        name, arguments = finished.groups()
        kind = "sync" if "sync" in name else "write"
        paths = re.findall(r"^\d+<([^>]*)>", arguments)
        if name.startswith(("rename", "mkdir")):
            kind, paths = name.rstrip("at2"), re.findall(r'"([^"]*)"', arguments)
        if paths and paths[0].startswith(str(root)):
            events.append((kind, paths))
    return events


def check_order(events: list[Event], root: Path) -> None:
    """Before a rename the file is synced, with all renames before it; before a file is recorded, it
    and all directories have their names for good; the output gets its name last of all."""
    partial, out = root / "out.partial", root / "out"
    unwritten: set[str] = set()  # files whose last write is not on the disk
    renamed: set[str] = set()  # directories in which a new name is not on the disk
    made: set[str] = set()  # the same of new directories
    names: list[str] = []  # what has its name, in order
    for kind, paths in events:
        path = Path(paths[-1])
        if kind == "mkdir":
            assert not renamed
            made.add(str(path.parent))
        elif kind == "sync":
            for waiting in (unwritten, renamed, made):
                waiting.discard(str(path))
        elif kind == "write":
            assert path.is_relative_to(partial) and str(out) not in names
            if path.name != "lock":
                unwritten.add(str(path))
        else:
            assert not renamed and paths[0] not in unwritten
            renamed.add(str(path.parent))
            names.append(str(path))
        if kind == "rename" and (path.parent == partial / "journal" or path == out):
            assert not unwritten and not made
            assert path in (out, partial / "journal/hidden.json") or (
                str(partial / "files" / path.stem) in names
            )
    assert not unwritten and not renamed and not made
    files = [name for name in names if Path(name).parent == partial / "files"]
    models = [Path(name).name.startswith("model-") for name in files]
    last = len(models) - models[::-1].index(True)
    assert models.count(True) == 12 and names[-1] == str(out)
    rest = [Path(name).name for name in files[last:]]
    assert rest[0] == "model.safetensors.index.json"
    assert rest[-4:] == ["config.json", "quantization-report.json", "SHA256SUMS", "README.md"]


# --- numbers that are none


def leaf_of(job: Job, index: int) -> tuple[Path, list[torch.Tensor]]:
    """A file of the source and its arrays, [expert, in, out] int8 and their scales."""
    path = job.home.parent / "source" / "ckpt-0" / f"tensor{index:05d}_000"
    return path, [read_array(path, header).clone() for header in read_headers(path)]


def check_finite(directory: Path) -> None:
    for file in directory.glob("model-*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), name


def rows_of(job: Job) -> dict[str, dict]:
    report = json.loads((job.out / "quantization-report.json").read_text())
    return {row["name"]: row for row in report["units"]}


@pytest.mark.parametrize(
    ("method", "value"), [("gptq", torch.nan), ("rtn", -torch.inf), ("copy", torch.nan)]
)
def test_scales_that_are_no_numbers_are_never_written(own_job, value, method):
    job = own_job
    path, (codes, scales) = leaf_of(job, 14)  # of layer 1, experts
    scales[2, 0, 5] = value
    write_leaf(path, (codes, scales))
    bits = "null" if method == "copy" else "8"
    assert job.run(f"quantize[0].method={method}", f"quantize[0].bits={bits}") == 2
    assert job.last_line == (
        f"{path}: transformer/decoder_layer_1/moe/linear scales of expert 2: "
        "1 values are NaN or infinite, first at (0, 5)"
    )
    assert len(job.committed()) >= 7 and not job.out.exists()
    check_finite(job.partial / "files")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_rows_of_zeros_are_named(own_job, method):
    job = own_job
    path, (codes, scales) = leaf_of(job, 2)  # of layer 0, experts
    codes[1, :, :3] = 0
    write_leaf(path, (codes, scales))
    assert job.run(f"quantize[0].method={method}") == 0, job.stderr
    noted = {name: row["note"] for name, row in rows_of(job).items() if "zeros" in str(row["note"])}
    assert len(noted) == 1
    ((name, note),) = noted.items()
    assert name.startswith("layers.0.experts.1.") and "3 rows of nothing but zeros" in note
    check_finite(job.out)


def test_hessians_that_cannot_be_used_are_named(own_job):
    job = own_job
    path, (codes, scales) = leaf_of(job, 2)
    zeros = torch.zeros_like(codes)  # what the layer's gates let through is 0
    write_leaf(path, (zeros, torch.ones_like(scales)))
    assert job.run("max_fallbacks=1", "experts.blend_tokens=0") == 0, job.stderr
    rows = rows_of(job)
    fallen = {name: row["fallback"] for name, row in rows.items() if row["fallback"]}
    assert fallen == {f"layers.0.experts.{e}.down": "the Hessian is zero" for e in range(4)}
    job.clear()
    (job.home.parent / "text.txt").write_text("so " * 4000)  # of rank one
    settings = ("max_fallbacks=1", "experts.blend_tokens=0", "quantize[0].damping=1e-30")
    assert job.run(*settings) == 0, job.stderr
    fallen = {name: row["fallback"] for name, row in rows_of(job).items() if row["fallback"]}
    assert any("not positive definite" in reason for reason in fallen.values())
    check_finite(job.out)


def enlarge(job: Job, factor: float, *leaves: int) -> None:
    for index in leaves:
        path, (codes, scales) = leaf_of(job, index)
        write_leaf(path, (codes, scales * factor))


def test_activations_that_are_no_numbers_are_named(own_job):
    """Weights may be finite and their products not."""
    job = own_job
    enlarge(job, 1e14, 2, 3, 4)  # the experts of layer 0
    assert job.run() == 1 and "down: the Hessian is not finite" in job.last_line
    assert job.run("max_fallbacks=1") == 2
    assert job.last_line == "layer 0: its outputs on the calibration text are not finite"
    assert not job.out.exists()
    check_finite(job.partial / "files")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_no_scale_can_hold_are_named(own_job, method):
    job = own_job
    enlarge(job, 1e12, 14)
    settings = (f"quantize[0].method={method}", "quantize[0].scale_dtype=float16")
    assert job.run(*settings, "max_fallbacks=1") == 2
    tensor = r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w.\.weight"
    held = r"float16 cannot hold weights as large as \d\.\S+e\+11"
    assert re.fullmatch(f"{tensor}: {held}", job.last_line), job.last_line
    check_finite(job.partial / "files")
