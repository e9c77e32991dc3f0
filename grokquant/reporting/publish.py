"""Writes a report where people and programs look for it."""

from pathlib import Path

from grokquant.errors import InputError
from grokquant.evaluation.report import Report
from grokquant.job.card import fill_evaluation
from grokquant.job.seal import seal_evaluation
from grokquant.job.shards import CARD_NAME, REPORT_NAME
from grokquant.reporting.html.page import write_report
from grokquant.reporting.rows import markdown_table
from grokquant.reporting.suite_tables import tasks_markdown


def publish(report: Report, output: Path, directory: Path | None = None) -> tuple[Path, Path]:
    """Writes report.json and report.html and, if `output` is one of ours, fills its model card.

    `directory` defaults to `output`/evaluation, where both are sealed. Returns both paths. Raises
    InputError where something cannot be written.
    """
    usual = output / "evaluation"
    paths = write_report(report, directory or usual)
    if (output / REPORT_NAME).is_file():
        tables = [markdown_table(report), *tasks_markdown(report)]
        try:
            fill_evaluation(output, "\n".join(tables))
            if paths[0].parent == usual:
                seal_evaluation(*paths)
        except (OSError, UnicodeError) as error:
            card = output / CARD_NAME
            raise InputError(f"{card}: the results cannot be added: {error}") from None
    return paths
