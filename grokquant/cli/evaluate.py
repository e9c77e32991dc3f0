"""eval measures a result, compare ranks several."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from grokquant.cli.group import command, join_team
from grokquant.cli.options import MODEL, PATH, device_option, json_option, overwrite_option
from grokquant.cli.printing import print_json, print_tables, say, say_error
from grokquant.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from grokquant.evaluation.models import Models
    from grokquant.evaluation.report import Report


@command(
    name="eval",
    doing="reading both models and the text",
    shared=True,
    less_memory="; lower --samples or --length",
)
@click.argument("output", type=MODEL)
@click.option(
    "--reference",
    type=MODEL,
    required=True,
    metavar="PATH",
    help="Checkpoint that OUTPUT was made from.",
)
@click.option(
    "--text",
    metavar="TEXT",
    help="python-docs, a txt, json, jsonl or parquet file, or a dataset name.",
)
@click.option("--field", metavar="NAME", help="Field of its records that holds the text.")
@click.option("--samples", type=click.IntRange(1), help="Number of sequences to score.")
@click.option("--length", type=click.IntRange(8), help="Tokens per sequence.")
@click.option(
    "--suite",
    type=PATH,
    metavar="NAME",
    help="Suite to run: smoke, fidelity, tasks, grok-1 or a YAML file.",
)
@click.option(
    "--output",
    "directory",
    type=PATH,
    metavar="DIR",
    help="Directory for the reports  [default: OUTPUT/evaluation]",
)
@click.option(
    "--any-reference",
    is_flag=True,
    help="Also compare with a model that OUTPUT was not made from; the report says so.",
)
@click.option(
    "--task-files",
    is_flag=True,
    help="Let the suite name files of tasks, which can run any code.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Skip the measurement of each layer in isolation and the generated text.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Products of experts; auto is bfloat16 where that is faster for a large model.",
)
@click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    help="Cache the reference's results in DIR for later evaluations.",
)
@click.option(
    "--cache-size",
    default="20GB",
    show_default=True,
    metavar="SIZE",
    help="Maximum size of the cache.",
)
@overwrite_option
@device_option
@json_option
def evaluate(
    output: str,
    reference: str,
    text: str | None,
    field: str | None,
    samples: int | None,
    length: int | None,
    suite: str | None,
    directory: str | None,
    any_reference: bool,
    task_files: bool,
    quick: bool,
    dtype: str,
    cache: str | None,
    cache_size: str,
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    """Compare OUTPUT with the checkpoint it was made from.

    Measures perplexity, KL divergence and routing of both models on the same tokens and writes
    report.html and report.json. Both models are streamed; neither has to fit in memory. Text,
    samples and length default to the eval section of OUTPUT's recipe, but a file or
    data set that it names is read only if --text names it. A suite defines its own
    texts, lm-eval tasks and thresholds; the exit code is 1 if the result misses a threshold. OUTPUT
    may also come from another tool, in any supported format, if --output names a directory for the
    reports. An evaluation that is there already is not repeated, and one of something else refused.
    """
    from grokquant.checkpoint import opener
    from grokquant.evaluation.finished import identity_of
    from grokquant.evaluation.models import opened_models
    from grokquant.evaluation.report import Report
    from grokquant.evaluation.run import cache_at, run_suite, suite_for
    from grokquant.evaluation.suite import check_gates
    from grokquant.job.fingerprint import difference
    from grokquant.recipe.of_output import origin_of_text
    from grokquant.reporting.terminal import LayerProgress

    run_on, team = join_team(device)
    opened = opener()
    for path in (output, reference):  # a model that is not there is named first
        opened(path, None)
    reports = _Reports(output, reference, directory, as_json)
    models = opened_models(output, reference, run_on, dtype, any_reference, opened)
    chosen = suite_for(output, suite, text, samples, length, task_files, field)
    if suite is None:
        reports.about_text = f"text: {chosen.texts[0].text}, {origin_of_text(output, text)}"
    kept = team.once(lambda: reports.begin(models))
    identity = identity_of(models, chosen, not quick)
    team.agree(identity, partial(difference, words="{0} is {2}, not {1}"))
    with LayerProgress(click.get_current_context().obj) as progress:
        states = cache_at(cache, cache_size, progress.note)
        if not overwrite:
            found = team.once(lambda: reports.finished(identity, progress.note))
            if found is not None:
                team.leave()
                check_gates(Report.model_validate(found))
                return
        report = run_suite(
            models,
            chosen,
            suite or "",
            team.only_first(progress.layer_done, None),
            run_on,
            forced=not quick,
            cache=states,
            team=team,
        ).report
    report = report.model_copy(update={"made_from": identity})
    team.once(lambda: reports.publish(report, kept))
    team.leave()
    check_gates(report)


class _Reports:
    """Where the reports of an evaluation go, and what people see of them.

    They go beside the output, or to `directory` if the user names one.
    """

    def __init__(self, output: str, reference: str, directory: str | None, as_json: bool) -> None:
        from pathlib import Path

        from grokquant.reporting.publish import place_of_reports

        self.output = Path(output)
        self.named = directory is not None
        self.place = Path(directory or place_of_reports(self.output, Path(reference)))
        self.as_json = as_json
        self.about_text = ""  # a line on the text, if a suite does not say it

    def begin(self, models: "Models") -> bool:
        """Prints notices on the models; whether reports can be written.

        A result that can only be read is evaluated all the same. Raises InputError where the place
        was named.
        """
        from grokquant.files.atomic import check_writable
        from grokquant.reporting.terminal import print_notices

        print_notices(models.quantized.source.notes)
        print_notices(models.reference.source.notes)
        try:
            check_writable(self.place)
        except InputError as error:
            if self.named:
                raise
            say_error(f"{error}, so no report is kept; --output keeps one")
            return False
        return True

    def finished(self, identity: dict, note: Callable[[str], None]) -> dict | None:
        """Shows the report of this evaluation that is there already; None if there is none.

        Raises InputError where there is one of something else, or papers that do not fit it.
        """
        from grokquant.evaluation.finished import finished_evaluation
        from grokquant.job.verify.papers import evaluation_faults
        from grokquant.reporting.html.page import HTML_NAME

        found = finished_evaluation(self.place, identity)
        if found is None:
            return None
        if not self.named and (fault := next(evaluation_faults(self.output), None)):
            raise InputError(f"{fault}; overwrite=True evaluates again")
        note(f"{self.place}: already evaluated, with the same models, texts and versions")
        self._show(found)
        self._say_page(self.place / HTML_NAME)
        return found.model_dump(mode="json")

    def publish(self, report: "Report", kept: bool) -> None:
        """Shows a report; if it can be `kept`, writes it and fills the card.

        What fails there is a note, but for a place that was named: then it raises InputError.
        """
        from grokquant.reporting.publish import publish

        self._show(report)
        if not kept:
            return
        try:
            _, page = publish(report, self.output, self.place, say_error)
        except InputError as error:
            if self.named:
                raise
            say_error(f"{error}; no report is kept")
            return
        self._say_page(page)

    def _show(self, report: "Report") -> None:
        from grokquant.reporting.rows import notes, terminal_table, verdict
        from grokquant.reporting.suite_tables import suite_tables

        if self.as_json:
            print_json(report.to_json())
            return
        say(*notes(report))
        if self.about_text:
            say(self.about_text)
        print_tables(terminal_table(report), *suite_tables(report))
        say(verdict(report))

    def _say_page(self, page: "Path") -> None:
        if not self.as_json:
            say(f"report: {page}")


@command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown instead of tables.")
@click.option(
    "--output",
    "directory",
    type=PATH,
    metavar="DIR",
    help="Also write compare.html and compare.json to DIR.",
)
@json_option
def compare(runs: tuple[str, ...], as_markdown: bool, directory: str | None, as_json: bool) -> None:
    """Rank evaluated models by quality and size.

    RUNS are directories evaluated by `grokquant eval`, or report.json files, all with the same text
    and reference. A model is on the Pareto front if no other model beats it on both size and
    quality; a bootstrap decides ties.
    """
    from pathlib import Path

    from grokquant.reporting.html.ranking_page import write_ranking
    from grokquant.reporting.ranking import rank_models
    from grokquant.reporting.ranking_tables import markdown, terminal_tables

    ranking = rank_models(runs)
    page = write_ranking(ranking, Path(directory))[1] if directory else None
    if as_json:
        print_json(ranking.as_dict())
    elif as_markdown:
        click.echo(markdown(ranking), nl=False)
    else:
        print_tables(*terminal_tables(ranking))
        if page:
            say(f"page: {page}")
