"""What both models got in a task, item by item, and the figures of that."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import exp, isclose, isfinite, log, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grokquant.evaluation import report as parts
from grokquant.evaluation.paired import compare_items

Metric = tuple[str, str]  # its name and that of the filter that answers went through
# A mean of the items; exp of minus it; that in bits, minus it over ln 2.
Kind = Literal["mean", "perplexity", "bits"]


@dataclass(frozen=True)
class Scores:
    """One model's results in a task: lm-eval's figures, and by document what they are made of."""

    version: str
    fewshot: int
    sha256: str
    values: dict[Metric, float]
    items: dict[Metric, dict[int, Any]]
    higher_is_better: dict[str, bool | None]


@dataclass(frozen=True)
class ItemResults:
    """The items of a metric, the same ones for both models, in one order.

    `quantized` and `reference` [items] are 0 or 1 for accuracies, log-likelihoods in nats for
    perplexities; `weights` [items] are the words or bytes of each text, 1 elsewhere. The metric is
    their sum over that of the weights, made into its `kind`.
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
        """The metric of `quantized` or `reference`, or of a resampled part with its weights."""
        return _OF_KIND[self.kind](float(items.sum() / self.weights.sum()))

    def error(self, items: NDArray[np.float64]) -> float:
        """Its standard error over items, to first order; lm-eval's own for means."""
        n, total = len(items), self.weights.sum()
        if n < 2:
            return 0.0
        mean = items.sum() / total
        error = float(sqrt(n / (n - 1) * np.square(items - mean * self.weights).sum()) / total)
        slopes = {"mean": 1.0, "perplexity": self.value(items), "bits": 1 / log(2)}
        return error * slopes[self.kind]


_OF_KIND = {"mean": lambda x: x, "perplexity": lambda x: exp(-x), "bits": lambda x: -x / log(2)}


def paired_items(
    quantized: dict[str, Scores], reference: dict[str, Scores]
) -> Iterator[ItemResults]:
    """All metrics that are made of one figure an item, which lm-eval's own value proves."""
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
    """Figures and weights of the items, nothing where these are not one number or two each."""
    pairs = [item if isinstance(item, tuple | list) else (item, 1.0) for item in items.values()]
    try:
        found = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
    except (TypeError, ValueError):
        found = np.empty((0, 2))
    return found[:, 0].copy(), found[:, 1].copy()


def _kind(values: NDArray[np.float64], weights: NDArray[np.float64], value: object) -> Kind | None:
    total = float(weights.sum())
    if not isinstance(value, int | float) or not total:
        return None
    mean = float(values.sum()) / total
    kinds: tuple[Kind, ...] = ("mean", "perplexity", "bits")
    fitting = (k for k in kinds if k == "mean" or mean <= 0)
    return next((k for k in fitting if isclose(_OF_KIND[k](mean), value, rel_tol=1e-9)), None)


def task_rows(
    quantized: dict[str, Scores], reference: dict[str, Scores], items: list[ItemResults]
) -> tuple[parts.Task, ...]:
    """The tasks as the report has them."""
    known = {(i.task, i.metric, i.filter): i for i in items}
    return tuple(
        parts.Task(
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


def _metric_row(
    key: Metric, own: Scores, base: Scores, items: ItemResults | None
) -> parts.TaskMetric:
    return parts.TaskMetric(
        metric=key[0],
        filter=key[1],
        higher_is_better=own.higher_is_better.get(key[0]),
        items=len(own.items[key]),
        quantized=parts.TaskValue(
            value=own.values[key], error=items.error(items.quantized) if items else None
        ),
        reference=parts.TaskValue(
            value=base.values[key], error=items.error(items.reference) if items else None
        ),
        paired=_paired(items) if items else None,
    )


def _paired(items: ItemResults) -> parts.PairedAccuracy | None:
    """Item against item, where each is right or wrong."""
    figures = np.concatenate((items.quantized, items.reference))
    if items.kind != "mean" or not np.isin(figures, (0, 1)).all():
        return None
    flips = compare_items(items.reference == 1, items.quantized == 1)
    return parts.PairedAccuracy(**asdict(flips))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)
