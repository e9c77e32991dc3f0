"""Writes a report where people and programs look for it."""

from collections.abc import Callable
from pathlib import Path
from warnings import warn

from grokquant.errors import InputError
from grokquant.evaluation.report import Report
from grokquant.files.unfinished import RECIPE_SUFFIXES, check_directory
from grokquant.job.card import fill_evaluation
from grokquant.job.seal import seal_evaluation
from grokquant.job.shards import CARD_NAME, is_result
from grokquant.reporting.html.page import write_report
from grokquant.reporting.rows import markdown_table
from grokquant.reporting.suite_tables import tasks_markdown


def place_of_reports(output: Path, reference: Path) -> Path:
    """`output`/evaluation, where the reports of a result belong.

    Raises InputError where `output` is not a result of grokquant, but perhaps the model that the
    arguments should have named second: then another directory must be named.
    """
    if output.is_file() and output.suffix.lower() in RECIPE_SUFFIXES:  # no place would help
        check_directory(output)
    if is_result(output):
        if not reference.is_dir() or not output.samefile(reference):
            return output / "evaluation"
        raise InputError(
            f"needed to compare {output} with itself; a result is compared with the model that it "
            "was made from",
            "directory",
        )
    if is_result(reference):
        raise InputError(
            f"{output}: is not a result of grokquant, but {reference} is; the result comes first: "
            f"grokquant eval {reference} --reference {output}"
        )
    raise InputError(
        f"needed for the reports, since {output} is not a result of grokquant: nothing is written "
        "into other models",
        "directory",
    )


def publish(
    report: Report,
    output: Path,
    directory: Path | None = None,
    note: Callable[[str], None] = warn,
) -> tuple[Path, Path]:
    """Writes report.json and report.html and, if `output` is one of ours, fills its model card.

    `directory` defaults to `output`/evaluation, where both are sealed. Returns both paths. Raises
    InputError where they cannot be written; `note` is called with a line about a card that cannot.
    """
    usual = output / "evaluation"
    paths = write_report(report, directory or usual)
    if is_result(output):
        tables = [markdown_table(report), *tasks_markdown(report)]
        try:
            if paths[0].parent == usual:
                seal_evaluation(*paths)
            fill_evaluation(output, "\n".join(tables))
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            note(f"{output / CARD_NAME}: the results cannot be added: {why}")
    return paths
