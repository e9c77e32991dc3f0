"""The sections of the page about what a suite adds: thresholds, further texts, tasks."""

from collections.abc import Iterator
from html import escape

from grokquant.evaluation.report import Report, Task, TaskMetric
from grokquant.reporting.html.markup import better, datum, estimate_of, section, wide_table
from grokquant.reporting.rows import HIGHER, LOWER, NBSP, NEAR_ONE, number
from grokquant.reporting.suite_tables import (
    ARROWS,
    limit_words,
    metric_words,
    protocol_words,
    suite_words,
    task_value,
    threshold_limit,
    threshold_value,
    threshold_words,
)


def gate_line(report: Report) -> str:
    """For the head of the page: whether all thresholds are met."""
    if not report.suite or not report.suite.gates:
        return ""
    met = all(gate.met for gate in report.suite.gates)
    kind, mark = ("ok", "✓") if met else ("bad", "✗")
    return f'<p class="gate {kind}"><b>{mark}</b> {escape(suite_words(report.suite))}</p>'


def suite_section(report: Report) -> str:
    """The thresholds, those that were missed first."""
    if not report.suite or not report.suite.gates:
        return ""
    gates = sorted(enumerate(report.suite.gates), key=lambda pair: pair[1].met)
    rows = []
    for i, gate in gates:
        path = f"/suite/gates/{i}"
        found = threshold_value(gate.threshold, gate.value)
        limit = threshold_limit(gate.threshold, gate.limit)
        unit = "%" if limit.endswith("%") else ""
        found = datum(f"{path}/value", gate.value, found, unit)
        limit = datum(f"{path}/limit", gate.limit, limit, unit)
        outcome = "✓ met" if gate.met else "<b>✗ missed</b>"
        name = escape(threshold_words(gate.threshold))
        asked = f"{limit_words(gate.threshold)} {limit}"
        rows.append([name, found, asked, f'<span class="{_kind(gate.met)}">{outcome}</span>, '
                     + escape(gate.where)])  # fmt: skip
    return section(
        "Is it good enough?",
        f"Thresholds of the suite {report.suite.name}, each where it is hardest to meet.",
        wide_table(["Threshold", "Found", "Asked for", "Outcome"], rows, last_in_words=True),
    )


def _kind(met: bool) -> str:
    return "ok" if met else "bad"


def texts_section(report: Report) -> str:
    """The texts of a suite beside the first one, with what matters most of each."""
    if not report.further_texts:
        return ""
    rows = [
        [
            escape(protocol_words(text.protocol)),
            estimate_of(f"/further_texts/{i}/perplexity/ratio", text.perplexity.ratio),
            estimate_of(f"/further_texts/{i}/kld/mean", text.kld.mean),
            estimate_of(f"/further_texts/{i}/same_top_p", text.same_top_p, "%"),
        ]
        for i, text in enumerate(report.further_texts)
    ]
    heads = (("Perplexity ratio", NEAR_ONE), ("Mean KLD, nats", LOWER), ("Same top token", HIGHER))
    names = ["Text", *(f"{name}<br>{better(way)}" for name, way in heads)]
    return section(
        "Other texts",
        f"Below the figures: 95{NBSP}% intervals. Figures of one text cannot be compared with "
        "those of another.",
        wide_table(names, rows, last_in_words=False),
    )


def tasks_section(report: Report) -> str:
    """Both models on the items of lm-eval’s tasks."""
    if not report.tasks or not report.tasks.tasks:
        return ""
    names = ["Task and metric", "Items", "Reference", "Quantized", "Difference", "Lost",
             "Gained", "McNemar’s p", "Better"]  # fmt: skip
    return section(
        "Tasks",
        f"Of lm-eval {report.tasks.lm_eval}, the same items for both models. Lost are items that "
        "only the reference gets right, gained those that only the quantized model does; p says "
        "how likely flips so one-sided are by chance. Below a difference: its "
        f"95{NBSP}% interval, in percentage points.",
        wide_table(names, _task_rows(report), last_in_words=True),
    )


def _task_rows(report: Report) -> Iterator[list[str]]:
    for t, task in enumerate(report.tasks.tasks if report.tasks else ()):
        for m, metric in enumerate(task.metrics):
            yield _task_row(task, metric, f"/tasks/tasks/{t}/metrics/{m}")


def _task_row(task: Task, metric: TaskMetric, path: str) -> list[str]:
    unit = "%" if metric.paired else ""
    values = (
        datum(f"{path}/{key}/value", value.value, task_value(metric, value), unit)
        for key, value in (("reference", metric.reference), ("quantized", metric.quantized))
    )
    paired = metric.paired
    if paired is None:
        change = [number(metric.quantized.value - metric.reference.value), "–", "–", "–"]
    else:
        change = [
            estimate_of(f"{path}/paired/difference", paired.difference, "%"),
            datum(f"{path}/paired/lost", paired.lost, f"{paired.lost:,}"),
            datum(f"{path}/paired/gained", paired.gained, f"{paired.gained:,}"),
            datum(f"{path}/paired/p_value", paired.p_value, number(paired.p_value, paired.p_value)),
        ]
    name = f'{escape(task.name)}<br><span class="ends">{escape(metric_words(metric))}</span>'
    return [
        name,
        datum(f"{path}/items", metric.items, f"{metric.items:,}"),
        *values,
        *change,
        better(ARROWS[metric.higher_is_better]),
    ]
