"""An evaluation from start to end: a suite through both models, the report made of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.evaluation.cache import Cache
from grokquant.evaluation.continuation import continuations
from grokquant.evaluation.estimates import noise_floor, routing, text_figures
from grokquant.evaluation.items import ItemResults
from grokquant.evaluation.measure import Comparison, LayerDone, compare_texts
from grokquant.evaluation.models import Models, described, unit_rows
from grokquant.evaluation.passage import passage
from grokquant.evaluation.report import Report, TextFigures
from grokquant.evaluation.suite import Suite, judged, load_suite, refuse_task_files, suite_of
from grokquant.evaluation.task_requests import opened_tasks
from grokquant.evaluation.windows import TextWindows, read_text
from grokquant.parallel import ALONE, Team
from grokquant.recipe import parse_size
from grokquant.recipe.of_output import check_text_is_known, settings_of
from grokquant.text.tokenizer import load_tokenizer
from grokquant.version import __version__


@dataclass(frozen=True)
class Evaluation:
    """The report, and the items behind the figures of its tasks."""

    report: Report
    items: list[ItemResults]


def suite_for(
    output: str | Path,
    suite: str | None = None,
    text: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    task_files: bool = False,
    field: str | None = None,
    packed: bool | None = None,
) -> Suite:
    """The suite called `suite`; without one, the text in the recipe of `output`, changed by what is
    given.

    Raises InputError where a suite is given together with its parts, or one of them cannot be used;
    where the recipe names a text that is not a known one; and where the suite names the file of a
    task, which can run any code, unless `task_files`.
    """
    if suite is None:
        settings = settings_of(output, text, samples, length, field, packed)
        if text is None:
            check_text_is_known(output, settings)
        return suite_of(settings)
    given = {"text": text, "samples": samples, "length": length, "field": field, "packed": packed}
    for key, value in given.items():
        if value is not None:
            raise InputError(f"cannot be combined with suite {suite}, which has its own texts", key)
    loaded = load_suite(suite)
    if not task_files:
        refuse_task_files(loaded)
    return loaded


def cache_at(
    directory: str | Path | None, budget: str, note: Callable[[str], None]
) -> Cache | None:
    """The cache in `directory`, of at most `budget` such as 20GB; None without a directory.

    `note` is called with a line about what could not be cached or read. Raises InputError.
    """
    if directory is None:
        return None
    try:
        size = parse_size(budget)
    except ValueError as error:
        raise InputError(str(error), "cache_size") from None
    return Cache(Path(directory), size, note)


def run_suite(
    models: Models,
    suite: Suite,
    name: str = "",
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
    forced: bool = True,
    cache: Cache | None = None,
    team: Team = ALONE,
) -> Evaluation:
    """Runs both models over all texts and tasks of a suite, each block read once.

    With a `name`, the outcome of the thresholds goes into the report. With `forced`, each layer is
    also measured alone, and both write a text if they fit in memory; a `cache` keeps the
    reference's states for the next evaluation. Members of a `team` share the rows; all of them make
    this call and get the same evaluation. Raises InputError where a text or task cannot be used.
    """
    if cache and team.is_divided:
        raise InputError("several processes would keep parts of their own; leave it out", "cache")
    own, base = models.quantized, models.reference
    own_units, base_units = unit_rows(own), unit_rows(base)
    texts = [
        read_text(text, base, _key(name, index), models.products)
        for index, text in enumerate(suite.texts)
    ]
    with opened_tasks(suite, own, base, device, team) as tasks:
        comparison = compare_texts(
            own,
            base,
            [text.windows for text in texts],
            tasks.batches,
            layer_done,
            device,
            forced,
            cache,
            team,
            models.products,
        )
        task_rows, items = tasks.results(*comparison.answers)
    continued: list[list[int]] | str = "it was a quick evaluation"
    if forced:
        said = comparison.choices
        write = partial(continuations, own, base, said.before, len(said.own), device)
        continued = team.once(write)
    figures = _figures(texts, comparison)
    report = Report(
        **dict(figures[0]),
        reference_note=models.note,
        grokquant=__version__,
        quantized=described(own, models.paths[0], own_units),
        reference=described(base, models.paths[1], base_units),
        noise_floor=noise_floor(comparison.noise, figures[0].kld.mean.value, models.products),
        routing=routing(comparison),
        layers=tuple(comparison.layers),
        units=own_units,
        further_texts=tuple(figures[1:]),
        tasks=task_rows,
        passage=passage(comparison.choices, continued, load_tokenizer(base)),
    )
    if name:
        report = report.model_copy(update={"suite": judged(report, name, suite.thresholds)})
    return Evaluation(report, items)


def _figures(texts: list[TextWindows], comparison: Comparison) -> list[TextFigures]:
    """Of each text."""
    measured = [comparison.figures, *comparison.further]
    return [
        text_figures(text.protocol, figures, text.documents)
        for text, figures in zip(texts, measured, strict=True)
    ]


def _key(suite: str, text: int) -> str:
    """The name of a text in errors."""
    return f"suite {suite}: texts[{text}]" if suite else "eval"
