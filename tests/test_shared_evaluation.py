"""Several processes evaluate together and get the figures of one, to the last bit."""

import pytest
import torch
from members import together

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.evaluation import likelihoods, measure
from grokquant.evaluation.cache import Cache
from grokquant.evaluation.measure import Comparison, Windows, compare_texts
from grokquant.evaluation.models import opened_models
from grokquant.evaluation.run import run_suite
from grokquant.evaluation.suite import Suite, TextSection
from grokquant.parallel import ALONE, Team
from grokquant.streaming import blocks
from grokquant.streaming.blocks import BlockwiseModel


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """One to three rows in a forward pass, so that several processes have some."""
    monkeypatch.setattr(blocks, "TOKENS_AT_ONCE", 128)
    monkeypatch.setattr(measure, "_FORCED", 100)  # two windows


def numbers(found: Comparison) -> list[torch.Tensor]:
    figures = [found.figures, found.noise, *found.further]
    columns = [column for each in figures for column in vars(each).values()]
    return [*columns, found.first_change]


@pytest.mark.parametrize(
    ("forced", "sizes", "products"),
    [(True, (2, 7), torch.float32), (False, (3,), torch.bfloat16)],
)
def test_all_figures_are_those_of_one_process(int4, tiny_release, forced, sizes, products):
    generator = torch.Generator().manual_seed(0)
    texts = [
        Windows(torch.randint(4, 500, shape, generator=generator)) for shape in ((9, 50), (4, 70))
    ]
    ids = torch.randint(4, 500, (40, 8), generator=generator).tolist()
    pairs = [((*row[:4],), (*row[4 : 5 + number % 4],)) for number, row in enumerate(ids)]
    pairs += [(context, (rest[0], 7, 9)) for context, rest in pairs[::2]]  # rows with branches
    requests = likelihoods.pack(pairs, 64)

    def compare(team: Team) -> Comparison:
        both = open_checkpoint(int4), open_checkpoint(tiny_release)
        return compare_texts(*both, texts, requests, forced=forced, team=team, products=products)

    alone = compare(ALONE)
    assert all((layer.forced is not None) == forced for layer in alone.layers)
    assert len(alone.answers[0]) == len(pairs)
    for size in sizes:
        for found in together(size, compare):
            assert all(map(torch.equal, numbers(found), numbers(alone)))
            assert found.layers == alone.layers
            assert found.answers == alone.answers


def test_rows_are_divided_and_each_expert_is_read_once(int4, tiny_release, monkeypatch):
    read: list[tuple[str, str]] = []
    passed: list[tuple[str, int]] = []
    expert_weight, run_batches = BlockwiseModel.expert_weight, BlockwiseModel.run_batches

    def noted_weight(model, tensor, dtype):
        read.append((model.source.path.name, tensor))
        return expert_weight(model, tensor, dtype)

    def noted_batches(model, index, batches, hidden, *others):
        passed.append((model.source.path.name, sum(map(len, hidden))))
        return run_batches(model, index, batches, hidden, *others)

    monkeypatch.setattr(BlockwiseModel, "expert_weight", noted_weight)
    monkeypatch.setattr(BlockwiseModel, "run_batches", noted_batches)
    texts = [Windows(torch.arange(4, 604).view(12, 50))]
    both = open_checkpoint(int4), open_checkpoint(tiny_release)
    together(3, lambda team: compare_texts(*both, texts, team=team))
    assert len(read) == len(set(read)) == 2 * 2 * 4 * 3  # models, layers, experts, matrices
    rows = sorted(count for name, count in passed if name == int4.name)
    assert rows == [4, 4, 4, 4, 6, 6]  # of two layers; the first process forces two rows more


def test_the_report_is_the_same_on_all_members(int4, tiny_release, text_file):
    suite = Suite(texts=(TextSection(text=str(text_file), samples=5, length=50),))

    def report(team: Team) -> str:
        return str(run_suite(opened_models(int4, tiny_release), suite, team=team).report.to_json())

    alone = report(ALONE)
    assert together(2, report) == [alone] * 2


def test_a_cache_is_refused(int4, tiny_release, text_file, tmp_path):
    suite = Suite(texts=(TextSection(text=str(text_file), samples=5, length=50),))
    cache = Cache(tmp_path, 10**9, print)
    with pytest.raises(InputError, match="^cache: several processes"):
        together(
            2,
            lambda team: run_suite(
                opened_models(int4, tiny_release), suite, cache=cache, team=team
            ),
        )
