"""Both models' results in a task, item by item, and their figures in the report."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, isclose, isfinite, log, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grokquant.evaluation.paired import compare_items
from grokquant.evaluation.report import PairedAccuracy, Task, TaskMetric, TaskValue

Metric = tuple[str, str]  # its name, and the filter that answers passed through
# Relative difference up to which a metric computed here is taken for lm-eval's own.
_SAME_VALUE = 1e-9
# How a metric follows from the weighted mean m of its items: m, exp(-m), or -m / ln 2.
Kind = Literal["mean", "perplexity", "bits"]


@dataclass(frozen=True)
class Scores:
    """One model's results in a task: lm-eval's figures, and the values of each item they are made
    of, by document number."""

    version: str
    fewshot: int
    sha256: str
    values: dict[Metric, float]
    items: dict[Metric, dict[int, Any]]
    higher_is_better: dict[str, bool | None]


@dataclass(frozen=True)
class ItemResults:
    """The items of a metric: the same ones for both models, in the same order.

    `quantized` and `reference` [items] are 0 or 1 for accuracies, log-likelihoods in nats for
    perplexities; `weights` [items] are the words or bytes of each text, 1 elsewhere. The metric
    follows from sum(items) / sum(weights) by its `kind`.
    """

    task: str
    metric: str
    filter: str
    kind: Kind
    documents: NDArray[np.int64]
    quantized: NDArray[np.float64]
    reference: NDArray[np.float64]
    weights: NDArray[np.float64]

    def value(self, items: NDArray[np.float64]) -> float:
        """The metric of `quantized` or `reference`."""
        return _OF_KIND[self.kind](float(items.sum() / self.weights.sum()))

    def error(self, items: NDArray[np.float64]) -> float:
        """Its standard error over items, to first order; the same as lm-eval's for means."""
        n = len(items)
        if n < 2:
            return 0.0
        total = self.weights.sum()
        mean = items.sum() / total
        squares = np.square(items - mean * self.weights).sum()
        error = float(sqrt(n / (n - 1) * squares) / total)
        # Derivatives of each kind by the mean, up to their signs.
        slopes = {"mean": 1.0, "perplexity": self.value(items), "bits": 1 / log(2)}
        return error * slopes[self.kind]


_OF_KIND = {"mean": lambda x: x, "perplexity": lambda x: exp(-x), "bits": lambda x: -x / log(2)}


def paired_items(
    quantized: dict[str, Scores], reference: dict[str, Scores]
) -> Iterator[ItemResults]:
    """All metrics that follow from one number per item: where they give lm-eval's own value."""
    for task, own in quantized.items():
        for (metric, filter_name), items in own.items.items():
            key = (metric, filter_name)
            values, weights = _arrays(items)
            theirs, _ = _arrays(reference[task].items[key])
            if len(values) == 0 or len(theirs) != len(values):
                continue
            if kind := _kind(values, weights, own.values[key]):
                documents = np.array(list(items), dtype=np.int64)
                yield ItemResults(
                    task, metric, filter_name, kind, documents, values, theirs, weights
                )


def _arrays(items: dict[int, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values and weights of the items; empty unless each item is a number or a pair of numbers."""
    pairs = [item if isinstance(item, tuple | list) else (item, 1.0) for item in items.values()]
    try:
        found = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
    except (TypeError, ValueError):
        found = np.empty((0, 2))
    return found[:, 0].copy(), found[:, 1].copy()


def _kind(values: NDArray[np.float64], weights: NDArray[np.float64], value: object) -> Kind | None:
    """The kind by which the items give lm-eval's `value`, None if no kind does."""
    total = float(weights.sum())
    if not isinstance(value, int | float) or not total:
        return None
    mean = float(values.sum()) / total
    kinds: tuple[Kind, ...] = ("mean", "perplexity", "bits")
    for kind in kinds:
        if kind != "mean" and mean > 0:  # not a log-likelihood
            continue
        if isclose(_OF_KIND[kind](mean), value, rel_tol=_SAME_VALUE):
            return kind
    return None


def task_rows(
    quantized: dict[str, Scores], reference: dict[str, Scores], items: list[ItemResults]
) -> tuple[Task, ...]:
    """The tasks for the report."""
    known = {(i.task, i.metric, i.filter): i for i in items}
    return tuple(
        Task(
            name=task,
            version=own.version,
            fewshot=own.fewshot,
            items=max(map(len, own.items.values())),
            sha256=own.sha256,
            metrics=tuple(
                _metric_row(key, own, reference[task], known.get((task, *key)))
                for key, value in own.values.items()
                if _is_number(value) and _is_number(reference[task].values[key])
            ),
        )
        for task, own in quantized.items()
    )


def _metric_row(key: Metric, own: Scores, base: Scores, items: ItemResults | None) -> TaskMetric:
    metric, filter_name = key
    own_error = items.error(items.quantized) if items else None
    base_error = items.error(items.reference) if items else None
    return TaskMetric(
        metric=metric,
        filter=filter_name,
        higher_is_better=own.higher_is_better.get(metric),
        items=len(own.items[key]),
        quantized=TaskValue(value=own.values[key], error=own_error),
        reference=TaskValue(value=base.values[key], error=base_error),
        paired=_paired(items) if items else None,
    )


def _paired(items: ItemResults) -> PairedAccuracy | None:
    """Item against item, if each is right or wrong."""
    values = np.concatenate((items.quantized, items.reference))
    if items.kind != "mean" or not np.isin(values, (0, 1)).all():
        return None
    return compare_items(items.reference == 1, items.quantized == 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)
