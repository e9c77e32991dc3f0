"""What a suite adds, in words and as plain tables: thresholds, tasks, further texts."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from grokquant.evaluation.report import Protocol, Report, SuiteResult, TaskMetric, TaskValue
from grokquant.reporting.rows import NBSP, markdown_cell, number, percent

ARROWS = {True: "↑ higher", False: "↓ lower", None: ""}
_COLUMNS = ("Task", "Metric", "Reference", "Quantized", "Difference", "95 % interval",
            "Lost, gained", "p", "Items")  # fmt: skip
_THRESHOLDS = {
    "max_mean_kld": "Mean KL divergence, nats",
    "max_ppl_ratio": "Perplexity ratio",
    "min_same_top_p": "Same top token",
    "min_router_top2": "Same two experts",
    "max_accuracy_drop": "Loss of accuracy",
}
_SHARES = {"min_same_top_p", "min_router_top2", "max_accuracy_drop"}


def threshold_words(threshold: str) -> str:
    return _THRESHOLDS.get(threshold, threshold[4:].replace("_", " "))


def threshold_value(threshold: str, value: float) -> str:
    """A value or limit of a threshold: percent where it is about shares."""
    return percent(value, 4) if threshold in _SHARES else number(value)


def threshold_limit(threshold: str, limit: float) -> str:
    """As it was asked for, without digits that say nothing."""
    return f"{limit * 100:g}{NBSP}%" if threshold in _SHARES else f"{limit:g}"


def limit_words(threshold: str) -> str:
    return "at most" if threshold.startswith("max") else "at least"


def suite_words(suite: SuiteResult) -> str:
    """How the thresholds fared, in a sentence."""
    missed, total = sum(not gate.met for gate in suite.gates), len(suite.gates)
    if not missed:
        return f"All {total} thresholds of the suite {suite.name} are met."
    verb = "is" if missed == 1 else "are"
    return f"{missed} of {total} thresholds of the suite {suite.name} {verb} missed."


def protocol_words(protocol: Protocol) -> str:
    """A text and how it was cut and scored, in a line."""
    windows = f"{protocol.windows:,} windows of {protocol.length:,}"
    return f"{protocol.text}, {windows}: {protocol.scored}"


def metric_words(metric: TaskMetric) -> str:
    return metric.metric if metric.filter == "none" else f"{metric.metric}, {metric.filter}"


def suite_tables(report: Report) -> Iterator[Table]:
    """Other texts, tasks and thresholds of a suite for a rich console, where there are any."""
    if report.further_texts:
        table = Table("Text", "PPL(Q)/PPL(base)", "Mean KLD", "Same top p")
        for text in report.further_texts:
            estimates = (text.perplexity.ratio, text.kld.mean, text.same_top_p)
            shown = (f"{number(e.value, e.error)} ± {number(e.error, e.error)}" for e in estimates)
            table.add_row(escape(protocol_words(text.protocol)), *shown)
        yield table
    if report.tasks and report.tasks.tasks:
        table = Table(title=f"lm-eval {escape(report.tasks.lm_eval)}", title_justify="left")
        for i, name in enumerate(_COLUMNS):
            table.add_column(name, justify="right" if i > 1 else "left", no_wrap=i < 2)
        for cells in _task_cells(report):
            table.add_row(*map(escape, cells))
        yield table
    if report.suite and report.suite.gates:
        table = Table("Threshold", "Worst in", "Found", "Asked for", "")
        for gate in report.suite.gates:
            limit = f"{limit_words(gate.threshold)} {threshold_limit(gate.threshold, gate.limit)}"
            found, met = threshold_value(gate.threshold, gate.value), gate.met
            name = threshold_words(gate.threshold)
            table.add_row(name, escape(gate.where), found, limit, "met" if met else "missed")
        yield table


def tasks_markdown(report: Report) -> list[str]:
    """Lines of the table of tasks for a model card; none where there are no tasks."""
    if not report.tasks or not report.tasks.tasks:
        return []
    rows = [_COLUMNS, (":--", ":--", *["--:"] * (len(_COLUMNS) - 2)), *_task_cells(report)]
    lines = [f"| {' | '.join(map(markdown_cell, row))} |" for row in rows]
    words = "Lost are items that only the reference gets right; p is McNemar’s."
    return [
        *lines,
        "",
        f"Tasks of lm-eval {markdown_cell(report.tasks.lm_eval)}, the same items. {words}",
        "",
    ]


def task_value(metric: TaskMetric, value: TaskValue) -> str:
    """A metric of one model: percent where it is a share of items."""
    scale, unit = (100, f"{NBSP}%") if metric.paired else (1, "")
    return number(value.value * scale, (value.error or 0) * scale) + unit


def _task_cells(report: Report) -> Iterator[tuple[str, ...]]:
    for task in report.tasks.tasks if report.tasks else ():
        for metric in task.metrics:
            name = f"{metric_words(metric)} {ARROWS[metric.higher_is_better][:1]}".strip()
            values = (task_value(metric, v) for v in (metric.reference, metric.quantized))
            yield task.name, name, *values, *_paired_cells(metric), f"{metric.items:,}"


def _paired_cells(metric: TaskMetric) -> tuple[str, str, str, str]:
    """Difference, interval, flips and p."""
    paired = metric.paired
    if paired is None:
        return number(metric.quantized.value - metric.reference.value), "", "", ""
    d = paired.difference
    value, low, high = (number(x * 100, d.error * 100) for x in (d.value, d.low, d.high))
    flips = f"{paired.lost:,}, {paired.gained:,}"
    return value, f"{low} to {high}", flips, f"{paired.p_value:.2g}"
