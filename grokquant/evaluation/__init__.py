"""What quantization cost: the same tokens through both models, figures, reports."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.evaluation import report as parts
from grokquant.evaluation.cache import Cache
from grokquant.evaluation.estimates import figures_of, noise_floor, routing
from grokquant.evaluation.items import ItemResults
from grokquant.evaluation.measure import LayerDone, compare_texts
from grokquant.evaluation.report import Report
from grokquant.evaluation.suite import Suite, check_gates, judged, load_suite, suite_of
from grokquant.evaluation.task_requests import opened_tasks
from grokquant.evaluation.windows import read_text
from grokquant.grids import Scheme
from grokquant.job.shards import REPORT_NAME
from grokquant.recipe import EvalSection, parse_size
from grokquant.recipe.of_output import settings_of
from grokquant.version import __version__

# What two models must share, as their configs call it, to be compared token by token.
_SAME = (
    "num_hidden_layers",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "hidden_size",
    "vocab_size",
)
__all__ = [
    "Evaluation",
    "cache_at",
    "check_gates",
    "evaluate",
    "run_suite",
    "suite_for",
]


def cache_at(
    directory: str | Path | None, budget: str, note: Callable[[str], None]
) -> Cache | None:
    """The cache in a directory that may grow to `budget`, such as 20GB; None without a directory.

    Raises InputError.
    """
    if directory is None:
        return None
    try:
        return Cache(Path(directory), parse_size(budget), note)
    except ValueError as error:
        raise InputError(f"the size of the cache: {error}") from None


def suite_for(
    output: str | Path,
    suite: str | None,
    data: str | None = None,
    samples: int | None = None,
    length: int | None = None,
) -> Suite:
    """The suite called `suite`, or the text of `settings_of` with what is given. Raises InputError
    where both are given."""
    if suite is None:
        return suite_of(settings_of(output, data, samples, length))
    given = {"--text": data, "--windows": samples, "--length": length}
    if extra := next((name for name, value in given.items() if value is not None), None):
        raise InputError(f"--suite: {suite} brings its texts, {extra} cannot be given beside it")
    return load_suite(suite)


def evaluate(
    quantized: str | Path,
    reference: str | Path,
    settings: EvalSection | None = None,
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
    forced: bool = True,
    cache: Cache | None = None,
) -> Report:
    """Runs both checkpoints over the same held-out tokens, block by block, on `device`.

    `settings` default to those of the recipe that made `quantized`. With `forced` each layer is
    also measured alone; a `cache` keeps what the reference did for the next evaluation. Raises
    InputError where the two cannot be compared.
    """
    suite = suite_of(settings or settings_of(quantized))
    return run_suite(quantized, reference, suite, "", layer_done, device, forced, cache).report


@dataclass(frozen=True)
class Evaluation:
    """The report, and what the figures of tasks are made of."""

    report: Report
    items: list[ItemResults]


def run_suite(
    quantized: str | Path,
    reference: str | Path,
    suite: Suite,
    name: str,
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
    forced: bool = True,
    cache: Cache | None = None,
) -> Evaluation:
    """Runs both checkpoints over all texts and tasks of a suite, each block read once.

    A `name` goes into the report, with how the thresholds fared. With `forced` each layer is also
    measured alone; a `cache` keeps what the reference did for the next evaluation. Raises
    InputError where the two cannot be compared or a text or task cannot be used.
    """
    candidate, base = open_checkpoint(quantized), open_checkpoint(reference)
    _check_comparable(candidate, base)
    own, theirs = _unit_rows(candidate), _unit_rows(base)
    texts = [read_text(t, base, _key(name, i)) for i, t in enumerate(suite.texts)]
    with opened_tasks(suite, candidate, base, device) as tasks:
        windows = [text.windows for text in texts]
        comparison = compare_texts(
            candidate, base, windows, tasks.batches, layer_done, device, forced, cache
        )
        rows, items = tasks.results(*comparison.answers)
    report = Report(
        grokquant=__version__,
        quantized=_describe(candidate, quantized, own),
        reference=_describe(base, reference, theirs),
        protocol=texts[0].protocol,
        noise_floor=noise_floor(comparison.noise),
        routing=routing(comparison),
        layers=tuple(parts.Layer(**asdict(layer)) for layer in comparison.layers),
        units=own,
        **figures_of(comparison.figures, texts[0].documents),
        further_texts=tuple(
            parts.FurtherText(protocol=text.protocol, **figures_of(figures, text.documents))
            for text, figures in zip(texts[1:], comparison.further, strict=True)
        ),
        tasks=rows,
    )
    if name:
        report = report.model_copy(update={"suite": judged(report, name, suite.thresholds)})
    return Evaluation(report, items)


def _key(suite: str, text: int) -> str:
    """What an error calls a text."""
    return f"suite {suite}: texts[{text}].data" if suite else "eval.data"


def _check_comparable(candidate: Checkpoint, base: Checkpoint) -> None:
    for field in _SAME:
        found, expected = (getattr(c.config, field, None) for c in (candidate, base))
        if found != expected:
            raise InputError(
                f"{candidate.source.path}: {field} is {found}, the reference has {expected}"
            )


def _describe(
    checkpoint: Checkpoint, path: str | Path, rows: tuple[parts.UnitRow, ...]
) -> parts.Checkpoint:
    """What is stored; the methods are those of the quantization report's `rows`."""
    methods = {row.name: f" ({row.method})" for row in rows}
    grids = Counter(ref.stored_as + methods.get(name, "") for name, ref in checkpoint.units())
    return parts.Checkpoint(
        path=str(path),
        family=checkpoint.family.name,
        layers=checkpoint.config.num_hidden_layers,
        experts=max(checkpoint.num_experts, 1),
        parameters=checkpoint.parameters,
        bytes=checkpoint.stored_bytes,
        bits_per_weight=checkpoint.bits_per_weight,
        schemes=grids,
    )


def _unit_rows(checkpoint: Checkpoint) -> tuple[parts.UnitRow, ...]:
    """The rows of the quantization report beside a checkpoint, none where there is no report."""
    path = checkpoint.source.path / REPORT_NAME
    if not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["units"]
        return tuple(_unit_row(row) for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is not a quantization report of this version") from None


def _unit_row(row: dict) -> parts.UnitRow:
    known = {key: value for key, value in row.items() if key in parts.UnitRow.model_fields}
    return parts.UnitRow(**known | {"scheme": str(Scheme(**row["scheme"]))})
