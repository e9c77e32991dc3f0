"""Errors by document, items in pairs, logits in pieces: against plain loops and against scipy."""

import weakref
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from grokquant.evaluation import bootstrap, statistics
from grokquant.evaluation.bootstrap import Resampler
from grokquant.evaluation.paired import compare_items
from grokquant.text.documents import rows_of, token_rows


def clusters(count: int, seed: int, spread: float = 0.5) -> np.ndarray:
    """(tokens, sum) of documents whose tokens are alike; the true mean of a token is 1."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 400, count).astype(float)
    means = draw.lognormal(-(spread**2) / 2, spread, count)
    return np.stack((tokens, draw.gamma(tokens / 2, 2 * means)), axis=-1)


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 1] / sums[..., 0]


# Documents drawn again


def test_resamples_are_those_of_a_plain_loop():
    sums = clusters(30, seed=0)
    draw, figures = np.random.default_rng(1), []
    for _ in range(4000):
        chosen = [sums[draw.integers(len(sums))] for _ in sums]
        figures.append(sum(s for _, s in chosen) / sum(n for n, _ in chosen))
    found = Resampler(sums, resamples=4000).estimate(mean)
    assert found.value == pytest.approx(sums[:, 1].sum() / sums[:, 0].sum(), rel=1e-14)
    assert found.error == pytest.approx(np.std(figures), rel=0.05)
    low, high = np.quantile(figures, (0.025, 0.975))
    assert found.low < low and high < found.high  # widened for 30 documents, by a few percent
    assert high - low == pytest.approx(found.high - found.low, rel=0.12)


def test_with_many_documents_intervals_are_those_of_scipy():
    sums = clusters(800, seed=2)
    found = Resampler(sums).estimate(mean)
    expected = stats.bootstrap(
        (sums[:, 0], sums[:, 1]), lambda n, s, axis=-1: s.sum(axis) / n.sum(axis),
        paired=True, n_resamples=2000, method="percentile", rng=3, batch=100,
    )  # fmt: skip
    assert found.error == pytest.approx(expected.standard_error, rel=0.06)
    low, high = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.2 * found.error)


@pytest.mark.parametrize(("count", "least"), [(12, 0.87), (60, 0.91), (200, 0.92)])
def test_intervals_hold_the_truth_nineteen_times_in_twenty(count, least):
    found = [Resampler(clusters(count, seed), 500, seed).estimate(mean) for seed in range(400)]
    held = np.mean([interval.low <= 1 <= interval.high for interval in found])
    assert least <= held <= 0.985


def test_tokens_taken_as_independent_would_promise_too_much():
    """Where the tokens of a document are alike, llama.cpp's error is far too small."""
    draw = np.random.default_rng(0)
    documents = torch.arange(40).repeat_interleave(50)
    x = torch.from_numpy(draw.normal(size=40).repeat(50) + draw.normal(size=2000))
    sums = bootstrap.cluster_sums([torch.ones(2000), x], documents)
    honest, naive = Resampler(sums).estimate(mean).error, statistics.mean_and_error(x)[1]
    assert honest == pytest.approx(np.sqrt((1 + 1 / 50) / 40), rel=0.25)
    assert naive < honest / 4


def test_ratios_are_paired():
    """What both models share does not count: a constant difference has no error."""
    draw = np.random.default_rng(0)
    nll = draw.gamma(2, 50, 40)
    sums = np.stack((np.full(40, 50.0), nll + 5, nll), axis=-1)
    found = Resampler(sums).estimate(lambda s: np.exp((s[..., 1] - s[..., 2]) / s[..., 0]))
    assert found.value == pytest.approx(np.exp(0.1)) and found.error < 1e-12
    alone = Resampler(sums).estimate(lambda s: np.exp(s[..., 1] / s[..., 0]))
    assert alone.error > 0.1


def test_the_same_seed_gives_the_same_draws_in_any_number_of_parts(monkeypatch):
    sums = clusters(40, seed=0)
    whole = Resampler(sums).resampled
    monkeypatch.setattr(bootstrap, "_COUNTS_AT_ONCE", 1000)
    assert np.allclose(Resampler(sums).resampled, whole, rtol=1e-13)
    assert not np.allclose(Resampler(sums, seed=1).resampled, whole)


@pytest.mark.parametrize("sums", [[[50.0, 7.0]], [[50.0, 7.0]] * 20, [[9.0, 0.0]] * 20])
def test_nothing_to_draw_leaves_nothing_open(sums):
    found = Resampler(np.array(sums)).estimate(mean)
    assert found.error == pytest.approx(0, abs=1e-15)
    assert found.low == pytest.approx(found.value) == pytest.approx(found.high)


def test_documents_sequences_or_blocks_are_drawn():
    many = torch.arange(12 * 30).view(12, 30) // 25 + 3  # 15 documents
    unit, numbers = bootstrap.clusters_of(many)
    assert unit == "document" and torch.equal(numbers, many.flatten() - 3)
    unit, numbers = bootstrap.clusters_of(torch.zeros(12, 30, dtype=torch.long))
    assert unit == "sequence" and numbers.bincount().tolist() == [30] * 12
    unit, numbers = bootstrap.clusters_of(torch.zeros(2, 70, dtype=torch.long))
    assert unit == "block" and numbers.bincount().tolist() == [32, 32, 6] * 2


class Characters:
    """A tokenizer whose tokens are characters."""

    class Found:
        def __init__(self, ids: list[int]) -> None:
            self.input_ids = ids

    def __call__(self, text: str, add_special_tokens: bool) -> "Characters.Found":
        return self.Found([ord(c) for c in text])


@pytest.mark.parametrize("seed", [None, 7])
def test_tokens_carry_the_number_of_their_document(seed):
    texts = ["aaaa", "", "bbbbbbb", "cc", "dddddd"]
    found = rows_of(texts, Characters(), 5, 3, seed)  # type: ignore[arg-type]
    expected = {"a": 0, "b": 2, "c": 3, "d": 4}
    for token, document in zip(found.tokens.flatten(), found.documents.flatten(), strict=True):
        assert expected[chr(token)] == document
    assert torch.equal(found.tokens, token_rows(texts, Characters(), 5, 3, seed))  # type: ignore


# Items in pairs


def test_flips_are_counted_both_ways():
    reference = np.array([1, 1, 1, 1, 0, 0, 1, 0, 1, 1], dtype=bool)
    quantized = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 1], dtype=bool)
    found = compare_items(reference, quantized)
    assert (found.items, found.reference, found.quantized) == (10, 0.7, 0.4)
    assert (found.lost, found.gained) == (4, 1)
    assert found.difference.value == pytest.approx(-0.3)


def exact_mcnemar(lost: int, gained: int) -> float:
    """Every way that the flips could have fallen, each as likely."""
    flips = lost + gained
    ways = [sum(way) for way in product((0, 1), repeat=flips)]
    return np.mean([abs(way - flips / 2) >= abs(lost - flips / 2) for way in ways]).item()


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (5, 5), (10, 2), (0, 8)])
def test_mcnemar_is_exact(lost, gained):
    reference = [True] * lost + [False] * gained + [True] * 5
    quantized = [False] * lost + [True] * gained + [True] * 5
    assert compare_items(reference, quantized).p_value == pytest.approx(exact_mcnemar(lost, gained))


def test_the_error_of_a_paired_difference_is_that_of_the_flips():
    draw = np.random.default_rng(0)
    reference = draw.random(3000) < 0.7
    quantized = np.where(draw.random(3000) < 0.05, ~reference, reference)
    found = compare_items(reference, quantized)
    each = quantized.astype(float) - reference
    assert found.difference.error == pytest.approx(each.std() / np.sqrt(3000), rel=0.06)
    assert found.difference.low < each.mean() < found.difference.high


@pytest.mark.parametrize("pair", [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_items_that_are_no_pairs_are_refused(pair):
    with pytest.raises(ValueError, match="are no pairs"):
        compare_items(*pair)


# Logits in pieces


@pytest.mark.parametrize("scale", [0.1, 5.0, 60.0])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (3, 7), (64, 200), (100, 5000)])
def test_pieces_of_the_vocabulary_give_the_figures_of_all_of_it(
    tokens, vocabulary, scale, monkeypatch
):
    draw = torch.Generator().manual_seed(0)
    shape = (19, 300)
    reference = torch.randn(shape, generator=draw) * scale
    logits = reference + torch.randn(shape, generator=draw) * 0.3 * scale
    targets = torch.randint(0, shape[1], shape[:1], generator=draw)
    log_q, log_p = (x.double().log_softmax(-1) for x in (logits, reference))
    monkeypatch.setattr(statistics, "_TOKENS", tokens)
    monkeypatch.setattr(statistics, "_VOCABULARY", vocabulary)
    found = statistics.compare_logits(logits, reference, targets)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.kld, (log_p.exp() * (log_p - log_q)).sum(-1), **close)
    for nll, log in ((found.nll, log_q), (found.nll_reference, log_p)):
        torch.testing.assert_close(nll, -log.gather(1, targets[:, None])[:, 0], **close)
    assert torch.equal(found.same_top, (log_q.argmax(-1) == log_p.argmax(-1)).double())


def test_logits_that_are_all_the_same_or_far_away():
    logits = torch.full((3, 5000), -1e4)
    logits[:, 4321] = 3e4
    found = statistics.compare_logits(logits, logits, torch.tensor([4321, 0, 4999]))
    assert found.kld.tolist() == [0, 0, 0] and found.nll.tolist() == [0, 4e4, 4e4]
    assert found.same_top.tolist() == [1, 1, 1]


class Allocations(TorchDispatchMode):
    """The most bytes of tensors made here that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in given or place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def test_memory_does_not_grow_with_the_vocabulary():
    logits = torch.randn(96, 131072)  # 50 MB; in float64 one copy would take 100 MB
    with Allocations() as seen:
        statistics.compare_logits(logits, logits + 1, torch.zeros(96, dtype=torch.long))
    copied = logits.nbytes  # logits + 1 is made here as well
    assert copied < seen.most < copied + 8_000_000
