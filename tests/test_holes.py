"""Parts of a release that were never written are found, zeros of a model are left alone."""

import os
import re

import numpy as np
import pytest
import torch
from make_release import write_random_release

from grokquant.errors import InputError
from grokquant.job import pipeline
from grokquant.sources import open_source
from grokquant.sources.holes import contradiction, find_hole
from grokquant.sources.pickles import read_headers

ROW = 6144
SHORTEST = 1 << 16


def values(rows: int, seed: int = 0) -> np.ndarray:
    """Codes as int8 weights have them: 3 % zeros."""
    draw = np.random.default_rng(seed).normal(0, 12, (rows, ROW))
    return draw.round().clip(-128, 127).astype(np.int8).view(np.uint8)


def test_every_hole_of_pages_is_found():
    draw = np.random.default_rng(1)
    missed = 0
    for _ in range(300):
        raw = values(64).reshape(-1)
        header = 323  # bytes before the array, as in Grok-1's files
        pages = int(draw.integers(SHORTEST // 4096, 50))
        start = int(draw.integers(1, len(raw) // 4096 - pages)) * 4096 - header
        raw[start : start + pages * 4096] = 0
        found = find_hole(raw, ROW, SHORTEST)
        missed += found is None
        if found is not None:
            assert found.start <= start and found.stop >= start + pages * 4096
    assert missed == 0


@pytest.mark.parametrize(("first", "stop"), [(0, 64), (0, 20), (5, 40), (40, 64)])
def test_whole_rows_of_zeros_are_no_hole(first, stop):
    """Tokens without use, pruned neurons, whole experts; the values around may end in zeros."""
    for seed in range(20):
        raw = values(64, seed)
        raw[first:stop] = 0
        assert find_hole(raw.reshape(-1), ROW, SHORTEST) is None


def test_short_runs_and_sparse_values_are_no_hole():
    raw = values(64).reshape(-1)
    raw[1000 : 1000 + SHORTEST // 2] = 0
    assert find_hole(raw, ROW, SHORTEST) is None
    raw = values(64).reshape(-1)
    raw[np.random.default_rng(2).random(len(raw)) < 0.95] = 0
    assert find_hole(raw, ROW, SHORTEST) is None
    assert find_hole(np.zeros(0, np.uint8), ROW, SHORTEST) is None


def test_codes_and_scales_that_contradict_each_other():
    codes = torch.randint(-127, 128, (64, 200), dtype=torch.int8)
    scales = torch.rand(2, 200).add(0.1).bfloat16()
    assert contradiction(codes, scales) is None
    assert "all codes are zero" in str(contradiction(torch.zeros_like(codes), scales))
    torn = scales.clone()
    torn[1, 50:150] = 0
    assert contradiction(codes, torn) == "100 scales are zero, but their codes are not"
    dead = codes.clone()
    dead[32:, 50:150] = 0
    assert contradiction(dead, torn) is None


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-8])
def test_an_expert_of_zeros_is_a_model_s_own(scale):
    codes = torch.zeros(64, 200, dtype=torch.int8)
    assert contradiction(codes, torch.full((2, 200), scale).bfloat16()) is None


@pytest.fixture
def release(tmp_path):
    """A release with experts of 1.5 MiB."""
    write_random_release(tmp_path / "r", layers=1, hidden=768, ffn=2048, vocab=512)
    return tmp_path / "r"


def punch(path, offset: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))


def test_a_hole_in_a_release_is_named(release):
    path = release / "ckpt-0" / "tensor00002_000"
    assert read_headers(path)[0].shape == (4, 768, 2048)
    start = 2 << 20
    punch(path, start, 1 << 20)
    source = open_source(release)
    refused = []
    for name, ref in source.tensors.items():
        try:
            ref.load()
        except InputError as error:
            refused.append(name)
            found = re.search(r"bytes (\d+) to (\d+) are all zero", str(error))
            assert str(error).startswith(f"{path}: ") and found
            assert abs(int(found[1]) - start) < 64
            assert "download it again" in str(error)
    assert refused == ["model.layers.0.block_sparse_moe.experts.1.w1.weight"]


def test_a_hole_that_swallows_an_expert_is_named(release):
    path = release / "ckpt-0" / "tensor00002_000"
    weight = read_headers(path)[0]
    punch(path, weight.offset + weight.nbytes // 4, weight.nbytes // 4)
    ref = open_source(release).tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    with pytest.raises(InputError, match="of expert 1: all codes are zero, but their scales"):
        ref.load()


def test_a_source_that_changes_during_the_run_is_refused(tiny_recipe, tmp_path, monkeypatch):
    rule = {"match": "*", "method": "rtn", "bits": 4, "group": 32}
    recipe = tiny_recipe(rule)
    path = pipeline.build_plan(recipe).checkpoint.source.weight_files[3]
    before = path.stat()
    verify = pipeline.verify_against_plan

    def meanwhile(directory, plan):
        verify(directory, plan)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    monkeypatch.setattr(pipeline, "verify_against_plan", meanwhile)
    try:
        with pytest.raises(InputError, match=f"{path.name}: has changed during the run"):
            pipeline.quantize(recipe)
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not os.path.exists(recipe.output.path)
