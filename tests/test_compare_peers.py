"""The comparison with peers gives all of them the same tokens, and counts bits from files."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ATTENTION, EXPERTS

from grokquant.checkpoint import open_checkpoint
from grokquant.job import pipeline
from grokquant.job.plan import build_plan
from grokquant.recipe import CalibrationSection
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer

COMPARE = Path(__file__).parents[1] / "eval" / "compare"
ROW = {
    "seed": 0,
    "text": "prose.txt",
    "line": "int4-g128",
    "entrant": "gptqmodel",
    "version": "7.6.0",
    "bits_per_weight": 4.28125,
    "kld": 0.00125,
    "kld_error": 0.00003,
    "kld_99": 0.0125,
    "same_top": 0.9751,
    "router_set": [0.99, None, 0.985],
    "cpu_seconds": 15.25,
    "peak_rss": 885_657_600,
}


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    sys.path.insert(0, str(COMPARE))
    spec = importlib.util.spec_from_file_location("compare_peers", COMPARE / "compare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_peer_has_a_program_and_pinned_requirements(compare):
    entrants = {entrant for line in compare.LINES.values() for entrant in line.entrants}
    assert all(entrant.startswith("grokquant") for entrant in compare.OWN)
    peers = {entrant.removesuffix("-imatrix") for entrant in entrants - compare.OWN.keys()}
    assert peers == compare.PEERS.keys()
    for peer, distribution in compare.PEERS.items():
        assert (COMPARE / "peers" / f"run_{peer.replace('-', '_')}.py").is_file()
        text = (COMPARE / "peers" / f"requirements-{peer}.txt").read_text()
        packages = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", package) for package in packages)
        assert any(package.startswith(f"{distribution}==") for package in packages)


def test_a_run_of_ours_gets_the_tokens_that_the_peers_get(
    compare, tiny_release, text_file, tmp_path
):
    job = compare.Job(str(tiny_release), tmp_path, str(text_file), tmp_path, 8, 32, 1)
    job.write_tokens()
    checkpoint = open_checkpoint(tiny_release)
    tokenizer = load_tokenizer(checkpoint)
    section = CalibrationSection(text=str(job.tokens), samples=8, length=32)
    ours = calibration_rows(section, tokenizer, checkpoint).tolist()
    asked = CalibrationSection(text=str(text_file), samples=8, length=32, seed=1)
    assert sorted(ours) == sorted(calibration_rows(asked, tokenizer, checkpoint).tolist())


def test_a_peer_that_is_not_installed_is_named(compare, tmp_path, capsys):
    job = compare.Job("model", tmp_path, "", tmp_path / "peers", 8, 32, 0)
    assert compare.made(job, "int4-g128", "auto-round") is None
    assert capsys.readouterr().err == "int4-g128: auto-round is not installed\n"


def test_bits_are_those_in_the_files(compare, tiny_recipe):
    recipe = tiny_recipe(EXPERTS | {"method": "rtn"}, ATTENTION)
    plan = build_plan(recipe)
    experts = [unit for unit in plan.units.values() if unit.expert is not None]
    weights = sum(torch.Size(unit.shape).numel() for unit in experts)
    stored = 8 * sum(map(plan.packed_bytes, experts)) / weights
    # Beside codes and scales the files hold the shape of each matrix.
    assert compare.expert_bits(pipeline.quantize(recipe)) == pytest.approx(stored, rel=0.01)


def test_rows_of_the_table_are_means_beside_the_best_peer(compare):
    other = ROW | {"text": "code.txt", "kld": 0.00075}
    ours = {"entrant": "grokquant-gptq", "version": "0.1.0"}
    own = [ROW | ours | {"kld": 0.0005}, other | ours | {"kld": 0.00045}]
    worse = [row | {"entrant": "hqq", "kld": 0.005} for row in (ROW, other)]
    head, _, *lines = compare.table([*own, ROW, other, *worse]).splitlines()
    assert {line.count("|") for line in (head, *lines)} == {11}
    assert "| grokquant-gptq 0.1.0 | 4.281 | 0.000475 | 0.50 ± 0.10 | 0.01250 |" in lines[0]
    assert "| 4.281 | 0.001000 | 1 | 0.01250 | 97.51 | 99.00, 98.50 | 15 | 0.89 |" in lines[1]
    assert "| 0.005000 | 5.33 ± 1.33 |" in lines[2]


def test_a_line_without_peers_has_no_shares(compare):
    (line,) = compare.table([ROW | {"entrant": "grokquant-gptq"}]).splitlines()[2:]
    assert "| 0.001250 | – |" in line
