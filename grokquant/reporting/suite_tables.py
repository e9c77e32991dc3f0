"""What a suite adds to a report, in words and as plain tables: thresholds, tasks, further texts."""

from collections.abc import Iterator

from rich.table import Table

from grokquant.escaping import markdown_text
from grokquant.evaluation.report import (
    Estimate,
    Protocol,
    Report,
    SuiteResult,
    TaskMetric,
    Tasks,
)
from grokquant.humanize import NBSP, number, percent, with_unit
from grokquant.reporting.rows import HIGHER, LOWER, markdown_row

# By lm-eval's `higher_is_better`.
DIRECTIONS = {True: HIGHER, False: LOWER, None: ""}
_TASK_HEADS = (
    "Task", "Metric", "Reference", "Quantized", "Difference", "95 % interval",
    "Lost, gained", "p", "Items",
)  # fmt: skip
_TEXT_HEADS = 2  # the first of them stand over words, the others over numbers
_THRESHOLDS = {
    "max_mean_kld": "Mean KL divergence, nats",
    "max_ppl_ratio": "Perplexity ratio",
    "min_same_top_p": "Same top token",
    "min_router_top2": "Same top-2 experts",
    "max_accuracy_drop": "Accuracy drop",
}
_SHARES = {"min_same_top_p", "min_router_top2", "max_accuracy_drop"}


def threshold_words(threshold: str) -> str:
    return _THRESHOLDS.get(threshold, threshold[4:].replace("_", " "))


def threshold_value(threshold: str, value: float) -> str:
    """The measured value of a threshold, in percent if it is a share."""
    return percent(value, 4) if threshold in _SHARES else number(value)


def threshold_limit(threshold: str, limit: float) -> str:
    """A limit with the digits that the suite gives it."""
    return f"{limit * 100:g}{NBSP}%" if threshold in _SHARES else f"{limit:g}"


def threshold_unit(threshold: str) -> str:
    return "%" if threshold in _SHARES else ""


def limit_words(threshold: str) -> str:
    return "at most" if threshold.startswith("max") else "at least"


def suite_words(suite: SuiteResult) -> str:
    """Whether the thresholds are met, in a sentence."""
    total = len(suite.gates)
    missed = sum(not gate.met for gate in suite.gates)
    if not missed:
        return f"All {total} thresholds of the suite {suite.name} are met."
    verb = "is" if missed == 1 else "are"
    return f"{missed} of {total} thresholds of the suite {suite.name} {verb} missed."


def protocol_words(protocol: Protocol) -> str:
    """A text and how it was cut and scored, in a line."""
    return f"{protocol.text}, {protocol.sequences}: {protocol.scored}"


def metric_words(metric: TaskMetric) -> str:
    return metric.metric if metric.filter == "none" else f"{metric.metric}, {metric.filter}"


def with_error(estimate: Estimate) -> str:
    error = number(estimate.error, estimate.error)
    return f"{number(estimate.value, estimate.error)} ± {error}"


def suite_tables(report: Report) -> Iterator[Table]:
    """Other texts, tasks and thresholds of a suite for a rich console, where there are any."""
    if report.further_texts:
        yield _texts_table(report)
    if report.tasks and report.tasks.tasks:
        yield _tasks_table(report.tasks)
    if report.suite and report.suite.gates:
        yield _thresholds_table(report.suite)


def tasks_markdown(report: Report) -> list[str]:
    """Lines of the table of tasks for a model card; none where there are no tasks."""
    if not report.tasks or not report.tasks.tasks:
        return []
    numbers = len(_TASK_HEADS) - _TEXT_HEADS
    rows = [_TASK_HEADS, (*[":--"] * _TEXT_HEADS, *["--:"] * numbers), *_task_cells(report.tasks)]
    words = (
        f"Tasks of lm-eval {markdown_text(report.tasks.lm_eval)}, the same items for both models. "
        "Lost: items that only the reference gets right; p: McNemar’s test."
    )
    return [*map(markdown_row, rows), "", words, ""]


def task_value(metric: TaskMetric, value: float, error: float | None = None) -> str:
    """A metric of one model, in percent if it is a share of items."""
    scale = 100 if metric.paired else 1
    shown = number(value * scale, (error or 0) * scale)
    return with_unit(shown, task_unit(metric))


def task_unit(metric: TaskMetric) -> str:
    return "%" if metric.paired else ""


def _texts_table(report: Report) -> Table:
    table = Table("Text", "PPL(Q)/PPL(base)", "Mean KLD", "Same top p")
    for text in report.further_texts:
        estimates = (text.perplexity.ratio, text.kld.mean, text.same_top_p)
        table.add_row(protocol_words(text.protocol), *map(with_error, estimates))
    return table


def _tasks_table(tasks: Tasks) -> Table:
    table = Table(title=f"lm-eval {tasks.lm_eval}", title_justify="left")
    for i, head in enumerate(_TASK_HEADS):
        in_words = i < _TEXT_HEADS
        table.add_column(head, justify="left" if in_words else "right", no_wrap=in_words)
    for cells in _task_cells(tasks):
        table.add_row(*cells)
    return table


def _thresholds_table(suite: SuiteResult) -> Table:
    table = Table("Threshold", "Worst case", "Measured", "Limit", "")
    for gate in suite.gates:
        limit = f"{limit_words(gate.threshold)} {threshold_limit(gate.threshold, gate.limit)}"
        table.add_row(
            threshold_words(gate.threshold),
            gate.where,
            threshold_value(gate.threshold, gate.value),
            limit,
            "met" if gate.met else "missed",
        )
    return table


def _task_cells(tasks: Tasks) -> Iterator[tuple[str, ...]]:
    for task in tasks.tasks:
        for metric in task.metrics:
            arrow = DIRECTIONS[metric.higher_is_better][:1]
            yield (
                task.name,
                f"{metric_words(metric)} {arrow}".strip(),
                task_value(metric, metric.reference.value, metric.reference.error),
                task_value(metric, metric.quantized.value, metric.quantized.error),
                *_paired_cells(metric),
                f"{metric.items:,}",
            )


def _paired_cells(metric: TaskMetric) -> tuple[str, str, str, str]:
    """Difference, interval, flips and p."""
    paired = metric.paired
    if paired is None:
        return number(metric.quantized.value - metric.reference.value), "", "", ""
    difference = paired.difference
    error = difference.error * 100
    low = number(difference.low * 100, error)
    high = number(difference.high * 100, error)
    return (
        number(difference.value * 100, error),
        f"{low} to {high}",
        f"{paired.lost:,}, {paired.gained:,}",
        f"{paired.p_value:.2g}",
    )
