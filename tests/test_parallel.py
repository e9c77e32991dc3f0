"""Several processes make one result, with the same bytes as one."""

import ast
import shutil
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ATTENTION, EXPERTS
from members import together
from torch import Tensor

import grokquant
from grokquant import parallel
from grokquant.calibration.site import Site
from grokquant.errors import Elsewhere, InputError
from grokquant.job import pipeline
from grokquant.job.division import Division
from grokquant.job.layer import LayerQuantizer
from grokquant.job.plan import build_plan
from grokquant.methods import METHODS
from grokquant.parallel import Members
from grokquant.types import Routed

RTN = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
GPTQ_ATTENTION = ATTENTION | {"method": "gptq", "bits": 8, "group": 32}
TWO_SIDED = EXPERTS | {"method": "two-sided", "metric": "gradients"}
Q4_0 = {"match": "layers.*.experts.*", "method": "gptq", "grid": "q4_0"}
# What differs between runs that are divided: rules, and the size of files.
CASES = {
    "without data": ([RTN], {"shard": "100KB"}),
    # A file for each expert.
    "gptq": ([EXPERTS, GPTQ_ATTENTION], {"shard": "60KB"}),
    # Files with several experts, which several members make, and attention of the source.
    "gptq, large files": ([EXPERTS, ATTENTION], {"shard": "1MB"}),
    # Experts that take turns, by gradients; attention is fitted.
    "two-sided": ([TWO_SIDED], {"shard": "60KB"}),
    # The same for attention.
    "two-sided, everything": ([TWO_SIDED | {"match": "layers.*"}], {"shard": "60KB"}),
    # Stacks of experts in one tensor, attention in other files than those of its site.
    "gguf": ([Q4_0, Q4_0 | {"match": "layers.*.attention.*"}], {"format": "gguf", "shard": "60KB"}),
}


@pytest.fixture(params=CASES)
def recipe(request, tiny_recipe, tmp_path):
    rules, output = CASES[request.param]
    return tiny_recipe(*rules, output=output | {"path": str(tmp_path / "out")})


def sums_of(outputs: list[Path]) -> str:
    """SHA256SUMS, the report among them, of a result, which is removed."""
    text = (outputs[0] / "SHA256SUMS").read_text()
    shutil.rmtree(outputs[0])
    return text


def test_any_number_of_members_gives_the_same_bytes(recipe):
    alone = sums_of([pipeline.quantize(recipe)])
    for size in (2, 3, 6):
        assert sums_of(together(size, lambda team: pipeline.quantize(recipe, team=team))) == alone


def test_every_matrix_and_hessian_is_made_once_and_by_its_maker(tiny_recipe, monkeypatch):
    recipe = tiny_recipe(EXPERTS, GPTQ_ATTENTION)
    made: list[tuple[str, int]] = []
    hessians: list[int] = []
    round_unit, hessian = LayerQuantizer._round, Site.hessian

    def noted_round(layer, unit, site):
        assert layer.division.is_made_here(unit)
        made.append((unit.name, threading.get_ident()))
        return round_unit(layer, unit, site)

    def noted_hessian(site, *given):
        hessians.append(threading.get_ident())
        return hessian(site, *given)

    monkeypatch.setattr(LayerQuantizer, "_round", noted_round)
    monkeypatch.setattr(Site, "hessian", noted_hessian)
    together(3, lambda team: pipeline.quantize(recipe, team=team))
    assert sorted(name for name, _ in made) == sorted(build_plan(recipe).units)
    assert len(hessians) == 2 * (2 + 4 * 2)  # of two layers: q k v, o; gate and up, down
    experts = Counter(member for name, member in made if ".experts." in name)
    assert sorted(experts.values()) == [6, 6, 12]  # of four experts


def test_experts_are_dealt_out_by_the_cost_of_their_solves(tiny_recipe):
    cheap = EXPERTS | {"match": "layers.*.experts.[0-1].*", "method": "rtn"}
    plan = build_plan(tiny_recipe(cheap, EXPERTS, ATTENTION))
    (owners, *_) = together(2, lambda team: Division(plan, team).owners(0))
    assert sorted(owners[2:]) == [0, 1]  # one that is solved for each


def test_methods_that_see_a_whole_layer_are_refused(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(EXPERTS, ATTENTION)
    monkeypatch.setattr(METHODS["gptq"], "revises", True)
    text = r"quantize\[0\].method: gptq .* does not run under torchrun"
    with pytest.raises(InputError, match=text):
        together(2, lambda team: pipeline.quantize(recipe, team=team))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tasks_of_a_round_begin_together_and_end_in_turn(size):
    """Six tasks with a row at each member; each adds the sum of all rows that it is told."""
    owners = [task % size for task in range(6)]
    begun = threading.Barrier(size, timeout=60)

    def work(team: Members) -> tuple[list[int], Tensor]:
        x = torch.full((1, 2), float(team.rank + 1))
        combined = torch.zeros(1, 2)
        token, gate = torch.tensor([0]), torch.ones(1, 1)
        given = [Routed(x, token, gate, combined)] * len(owners)
        added = []

        def add(task: int, part: slice, y: Tensor) -> None:
            added.append(task)
            combined[part] += y

        def answer(task: int, about: Tensor) -> Tensor:
            return combined + about

        for task, routed, take, ask in team.in_turn(given, owners, answer, add):
            begun.wait()  # for one task of each member
            own = routed.x[routed.token]
            assert own[:, 0].tolist() == list(range(1, size + 1))
            take(slice(0, size), ask(own) + task)
        return added, combined

    for rank, (added, combined) in enumerate(together(size, work)):
        assert added == list(range(6))
        total = 0.0
        for task in range(6):
            total += total + (rank + 1) + task
        assert combined.tolist() == [[total, total]]


def test_rows_are_divided_in_whole_pieces():
    spans = together(3, lambda team: [team.rows(n, 4) for n in (0, 3, 16, 41)])
    for count, parts in zip((0, 3, 16, 41), zip(*spans, strict=True), strict=True):
        ends = [0, *(part.stop for part in parts)]
        assert [part.start for part in parts] == ends[:-1] and ends[-1] == count
        assert all(part.start % 4 == 0 for part in parts if part.start < count)


def test_large_tensors_travel_in_parts(monkeypatch):
    monkeypatch.setattr(parallel, "AT_ONCE", 100)

    def exchange(team: parallel.Members) -> tuple[torch.Tensor | None, torch.Tensor]:
        X = torch.arange(500 * team.rank, dtype=torch.float32).view(-1, 5).bfloat16()
        layout = {"W": (torch.int64, (7, 11))}
        W = {"W": torch.arange(77).view(7, 11)} if team.rank == 1 else None
        shared = team.shared(W, lambda value: value, lambda parts: parts, layout, 1)
        handed = team.hand_over(W, layout, 1, 0)
        assert handed.keys() == ({"W"} if team.rank == 0 else set())
        assert all(torch.equal(value, shared["W"]) for value in handed.values())
        return team.gather(X, {2}), shared["W"]

    results = together(3, exchange)
    whole = [torch.arange(500 * n, dtype=torch.float32).view(-1, 5).bfloat16() for n in range(3)]
    assert torch.equal(results[2][0], torch.cat(whole)) and results[0][0] is None
    assert all(torch.equal(shared, torch.arange(77).view(7, 11)) for _, shared in results)


def test_an_error_of_the_first_member_ends_the_others():
    def fail() -> None:
        raise InputError("a full disk")

    def work(team: parallel.Team) -> type[Exception]:
        try:
            team.once(fail)
        except (Elsewhere, InputError) as error:
            return type(error)
        return AssertionError

    assert together(3, work) == [InputError, Elsewhere, Elsewhere]


def test_a_member_that_lives_but_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(parallel, "_PATIENCE", timedelta(seconds=2))
    monkeypatch.setattr(parallel, "_BEAT", 0.05)

    def work(team: parallel.Members) -> str:
        team.merge({})
        time.sleep(4 * (team.rank == 1))
        try:
            team.merge({})
        except Elsewhere as error:
            return str(error)
        return ""

    text = together(2, work, lambda *_: None)[0]
    assert text.startswith("rank 1 (") and text.endswith("to an exchange within 0:00:02")


def test_one_file_knows_ranks():
    root = Path(grokquant.__file__).parent
    rooms = ("job", "streaming", "calibration", "evaluation", "methods", "text", "files")
    paths = [path for room in rooms for path in (root / room).rglob("*.py")]
    paths += [path for path in root.glob("*.py") if path.name != "parallel.py"]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {str(getattr(node, key, "")) for key in ("id", "attr", "arg", "name")}
            assert not {"rank", "ranks", "get_rank", "local_rank", "world_size"} & names, path
    others = [path for path in root.rglob("*.py") if path.name != "parallel.py"]
    assert [p for p in others if "torch.distributed" in p.read_text()] == []


def test_a_member_that_has_left_has_no_threads(monkeypatch):
    """Python would abort a process that ends while one of them asks the store."""
    monkeypatch.setattr(parallel, "_BEAT", 0.001)

    def work(team: parallel.Members) -> list[threading.Thread]:
        team.merge({})
        team.leave()
        assert team._watch._threads
        return [thread for thread in team._watch._threads if thread.is_alive()]

    assert together(2, work, lambda team, what: None) == [[], []]
