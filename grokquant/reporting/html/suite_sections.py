"""The sections of the page about what a suite adds: thresholds, further texts, tasks."""

from collections.abc import Iterator
from functools import partial

from grokquant.escaping import html_text
from grokquant.evaluation.report import Gate, Report, Task, TaskMetric, Tasks
from grokquant.humanize import NBSP, number, rough
from grokquant.reporting.html.markup import better, estimate_at, number_at, section, wide_table
from grokquant.reporting.rows import HIGHER, LOWER, NEAR_ONE
from grokquant.reporting.suite_tables import (
    DIRECTIONS,
    limit_words,
    metric_words,
    protocol_words,
    suite_words,
    task_unit,
    task_value,
    threshold_limit,
    threshold_unit,
    threshold_value,
    threshold_words,
)


def gate_line(report: Report) -> str:
    """For the head of the page: whether all thresholds are met."""
    if not report.suite or not report.suite.gates:
        return ""
    met = all(gate.met for gate in report.suite.gates)
    mark = "✓" if met else "✗"
    return f'<p class="gate {_kind(met)}"><b>{mark}</b> {html_text(suite_words(report.suite))}</p>'


def suite_section(report: Report) -> str:
    """The thresholds, those that were missed first."""
    if not report.suite or not report.suite.gates:
        return ""
    gates = sorted(enumerate(report.suite.gates), key=lambda pair: pair[1].met)
    rows = [_gate_row(report, i, gate) for i, gate in gates]
    return section(
        "Is it good enough?",
        f"Thresholds of the suite {report.suite.name}, each checked where it is hardest to meet.",
        wide_table(["Threshold", "Measured", "Limit", "Outcome"], rows, in_words=1),
    )


def _gate_row(report: Report, i: int, gate: Gate) -> list[str]:
    pointer = f"/suite/gates/{i}"
    unit = threshold_unit(gate.threshold)
    measured = number_at(report, f"{pointer}/value", partial(threshold_value, gate.threshold), unit)
    limit = number_at(report, f"{pointer}/limit", partial(threshold_limit, gate.threshold), unit)
    outcome = "✓ met" if gate.met else "<b>✗ missed</b>"
    return [
        html_text(threshold_words(gate.threshold)),
        measured,
        f"{limit_words(gate.threshold)} {limit}",
        f'<span class="{_kind(gate.met)}">{outcome}</span>, {html_text(gate.where)}',
    ]


def _kind(met: bool) -> str:
    return "ok" if met else "bad"


def texts_section(report: Report) -> str:
    """The texts of a suite after the first one, with the three main metrics of each."""
    if not report.further_texts:
        return ""
    rows = [
        [
            html_text(protocol_words(text.protocol)),
            estimate_at(report, f"/further_texts/{i}/perplexity/ratio"),
            estimate_at(report, f"/further_texts/{i}/kld/mean"),
            estimate_at(report, f"/further_texts/{i}/same_top_p", "%"),
        ]
        for i, text in enumerate(report.further_texts)
    ]
    heads = (("Perplexity ratio", NEAR_ONE), ("Mean KLD, nats", LOWER), ("Same top token", HIGHER))
    names = ["Text", *(f"{name}<br>{better(way)}" for name, way in heads)]
    return section(
        "Other texts",
        f"Below each value: its 95{NBSP}% confidence interval. Values of different texts cannot be "
        "compared.",
        wide_table(names, rows, in_words=0),
    )


def tasks_section(report: Report) -> str:
    """Both models on the items of lm-eval’s tasks."""
    if not report.tasks or not report.tasks.tasks:
        return ""
    names = [
        "Task and metric", "Items", "Reference", "Quantized", "Difference", "Lost", "Gained",
        "McNemar’s p", "Better",
    ]  # fmt: skip
    return section(
        "Tasks",
        f"From lm-eval {report.tasks.lm_eval}, with the same items for both models. Lost: items "
        "that only the reference gets right. Gained: items that only the quantized model gets "
        "right. p: probability of flips at least this one-sided if quantization had no effect. "
        f"Below each difference: its 95{NBSP}% confidence interval, in percentage points.",
        wide_table(names, _task_rows(report, report.tasks), in_words=1),
    )


def _task_rows(report: Report, tasks: Tasks) -> Iterator[list[str]]:
    for t, task in enumerate(tasks.tasks):
        for m, metric in enumerate(task.metrics):
            yield _task_row(report, task, metric, f"/tasks/tasks/{t}/metrics/{m}")


def _task_row(report: Report, task: Task, metric: TaskMetric, pointer: str) -> list[str]:
    metric_name = f'<span class="ends">{html_text(metric_words(metric))}</span>'
    return [
        f"{html_text(task.name)}<br>{metric_name}",
        number_at(report, f"{pointer}/items", _whole),
        _side(report, metric, metric.reference.error, f"{pointer}/reference/value"),
        _side(report, metric, metric.quantized.error, f"{pointer}/quantized/value"),
        *_change(report, metric, pointer),
        better(DIRECTIONS[metric.higher_is_better]),
    ]


def _side(report: Report, metric: TaskMetric, error: float | None, pointer: str) -> str:
    """The metric of one model."""
    return number_at(
        report, pointer, lambda value: task_value(metric, value, error), task_unit(metric)
    )


def _change(report: Report, metric: TaskMetric, pointer: str) -> list[str]:
    """Difference, lost, gained and p."""
    if metric.paired is None:
        return [number(metric.quantized.value - metric.reference.value), "–", "–", "–"]
    return [
        estimate_at(report, f"{pointer}/paired/difference", "%"),
        number_at(report, f"{pointer}/paired/lost", _whole),
        number_at(report, f"{pointer}/paired/gained", _whole),
        number_at(report, f"{pointer}/paired/p_value", rough),
    ]


def _whole(things: float) -> str:
    return f"{things:,}"
