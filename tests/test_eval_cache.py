"""States of the reference on disk: the same report without reading it, and nothing trusted."""

import json
import os
import shutil
from collections import Counter
from os.path import relpath
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_moe_view import counted

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.evaluation import models, run
from grokquant.evaluation.cache import Cache
from grokquant.evaluation.suite import suite_of
from grokquant.recipe import EvalSection

BUDGET = 50_000_000


@pytest.fixture(scope="module")
def settings(text_file) -> EvalSection:
    return EvalSection(text=relpath(text_file), samples=3, length=40)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny_release) -> dict[int, Path]:
    """The tiny release with 4 and with 8 bits."""
    return {
        bits: grokquant.quantize(
            {
                "model": {"path": str(tiny_release)},
                "quantize": [{"match": "layers.*", "method": "rtn", "bits": bits, "group": 64}],
                "output": {"path": str(tmp_path_factory.mktemp("out") / f"int{bits}")},
            }
        )
        for bits in (4, 8)
    }


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, notes) -> Cache:
    return Cache(tmp_path / "cache", BUDGET, notes.append)


@pytest.fixture
def evaluate(outputs, tiny_release, settings, monkeypatch):
    """bytes of the report of an output, and which tensors of the reference were read."""
    opened = open_checkpoint

    def counted_run(
        bits: int, cache: Cache | None = None, reference: Path = tiny_release, **changes: object
    ) -> tuple[str, set[str]]:
        reads: Counter[str] = Counter()

        def open_counted(path, config):
            side = "reference" if Path(path) == reference else "quantized"
            return counted(opened(path), reads, side)

        # Reads small models whole, whatever the cache holds.
        monkeypatch.setattr(run, "continuations", lambda *_: "not asked for")
        forced = bool(changes.pop("forced", True))
        suite = suite_of(settings.model_copy(update=changes))
        report = run.run_suite(
            models.opened_models(outputs[bits], reference, opened=open_counted),
            suite,
            forced=forced,
            cache=cache,
        ).report
        of_reference = {name.split()[1] for name in reads if name.startswith("reference ")}
        return json.dumps(report.to_json()), of_reference

    return counted_run


def files(cache: Cache) -> list[Path]:
    return sorted(cache.directory.rglob("layer-*.safetensors"))


def layers_of(names: set[str]) -> set[int]:
    return {int(name.split(".")[2]) for name in names if ".layers." in name}


def test_a_warm_cache_gives_the_same_bytes_without_reading_a_layer(evaluate, cache, notes):
    plain = {bits: evaluate(bits) for bits in (4, 8)}
    assert all(layers_of(reads) == {0, 1} for _, reads in plain.values())
    cold, reads = evaluate(4, cache)
    assert cold == plain[4][0] and layers_of(reads) == {0, 1}
    assert len(files(cache)) == 2
    for bits in (8, 4):
        warm, reads = evaluate(bits, cache)
        assert warm == plain[bits][0]
        assert layers_of(reads) == set() and reads  # embedding, last norm and head
    assert notes == []


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("how", ["a bit", "cut", "record", "foreign", "not tensors"])
def test_a_damaged_or_foreign_file_is_made_again_with_a_note(evaluate, cache, notes, layer, how):
    plain, _ = evaluate(4, cache)
    path = files(cache)[layer]
    whole = path.read_bytes()
    if how == "a bit":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif how == "cut":
        path.write_bytes(whole[:-100])
    elif how == "record":
        path.with_suffix(".json").write_text("{}")
    elif how == "foreign":  # another layer's, whole and with its record
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(files(cache)[1 - layer].with_suffix(suffix), path.with_suffix(suffix))
    else:
        path.write_bytes(b"what is this")
    again, reads = evaluate(4, cache)
    assert again == plain and layers_of(reads) == {layer}
    assert notes == [f"{path}: is damaged or not ours, its layer is computed again"]
    assert path.read_bytes() == whole
    assert evaluate(4, cache) == (plain, reads - {n for n in reads if ".layers." in n})


def test_an_interrupted_evaluation_leaves_what_it_has(evaluate, cache, notes):
    plain, _ = evaluate(4, cache)
    files(cache)[1].unlink()
    (files(cache)[0].parent / f".x.{os.uname().nodename.replace('.', '-')}.999999.y.tmp").touch()
    again, reads = evaluate(4, cache)
    assert again == plain and layers_of(reads) == {1} and notes == []
    assert not list(cache.directory.rglob("*.tmp"))


@pytest.mark.parametrize("change", [{"samples": 2}, {"length": 39}, {"forced": False}])
def test_other_protocols_have_entries_of_their_own(evaluate, cache, change):
    evaluate(4, cache)
    assert evaluate(4, cache, **change)[0] == evaluate(4, **change)[0]
    assert len({path.parent for path in files(cache)}) == 2


def test_another_reference_has_an_entry_of_its_own(
    evaluate, cache, outputs, tiny_release, tmp_path
):
    """Even with files of the same names, sizes and times."""
    other = Path(shutil.copytree(tiny_release, tmp_path / "other"))
    evaluate(4, cache)
    _, reads = evaluate(4, cache, reference=other)
    assert layers_of(reads) == {0, 1}
    changed = next(other.rglob("tensor00000*"))
    os.utime(changed, ns=(1, 1))
    _, reads = evaluate(4, cache, reference=other)
    assert layers_of(reads) == {0, 1}
    assert len({path.parent for path in files(cache)}) == 3


def test_the_entry_used_least_recently_goes(evaluate, cache, notes):
    evaluate(4, cache, samples=1)
    one = sum(path.stat().st_size for path in cache.directory.rglob("*") if path.is_file())
    (cache.directory / "mine.txt").write_text("not ours")
    (cache.directory / ("a" * 64)).mkdir()
    small = Cache(cache.directory, int(3 * one) + 500_000, notes.append)
    entries = {1: {path.parent for path in files(small)}}
    for length in (38, 39):
        evaluate(4, small, samples=1, length=length)
        entries[length] = {p.parent for p in files(small)} - set().union(*entries.values())
    evaluate(4, small, samples=1)  # used again
    evaluate(4, small, samples=2, length=39)
    left = {path.parent for path in files(small)}
    assert entries[38].isdisjoint(left) and entries[1] <= left
    assert sum(p.stat().st_size for p in small.directory.rglob("*.safetensors")) <= small.budget
    assert (small.directory / "mine.txt").is_file() and (small.directory / ("a" * 64)).is_dir()


def test_what_does_not_fit_is_not_kept_and_said_once(evaluate, tmp_path, notes):
    small = Cache(tmp_path / "cache", 100_000, notes.append)
    assert evaluate(4, small)[0] == evaluate(4)[0]
    assert not files(small) and len(notes) == 1
    assert "nothing more is cached: 2 layers take about" in notes[0] and "100 kB" in notes[0]


def test_a_full_disk_stops_the_cache_and_not_the_evaluation(evaluate, cache, notes, monkeypatch):
    plain, _ = evaluate(4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grokquant.files.atomic.commit", full)
    assert evaluate(4, cache)[0] == plain
    assert len(notes) == 1 and "No space left on device" in notes[0]
    assert not list(cache.directory.rglob("*.tmp"))


def test_a_place_that_cannot_be_a_directory_is_named(tmp_path, notes):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be written"):
        Cache(tmp_path / "file", BUDGET, notes.append)


def test_a_forged_file_with_another_checksum_is_not_loaded(evaluate, cache, notes):
    plain, _ = evaluate(4, cache)
    path = files(cache)[0]
    tensors = load_file(path)
    tensors["hidden.0"] = torch.zeros_like(tensors["hidden.0"])
    save_file(tensors, path)
    assert evaluate(4, cache)[0] == plain and len(notes) == 1
