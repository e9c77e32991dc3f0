"""eval measures a result, compare ranks several."""

from functools import partial
from typing import TYPE_CHECKING

import click

from grokquant.cli.group import command, join_team
from grokquant.cli.options import PATH, device_option, json_option, overwrite_option
from grokquant.cli.printing import print_json, print_tables, say
from grokquant.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from grokquant.evaluation.report import Report


@command(
    name="eval",
    doing="reading both models and the text",
    shared=True,
    less_memory="; lower --samples or --length",
)
@click.argument("output", type=PATH)
@click.option(
    "--reference",
    type=PATH,
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
    from pathlib import Path

    from grokquant.checkpoint import open_checkpoint
    from grokquant.evaluation.finished import finished_evaluation, identity_of
    from grokquant.evaluation.models import dtype_of_products
    from grokquant.evaluation.report import Report
    from grokquant.evaluation.run import cache_at, run_suite, suite_for
    from grokquant.evaluation.suite import check_gates
    from grokquant.job.fingerprint import difference
    from grokquant.job.verify.papers import evaluation_faults
    from grokquant.recipe.of_output import origin_of_text
    from grokquant.reporting.html.page import HTML_NAME
    from grokquant.reporting.publish import place_of_reports
    from grokquant.reporting.terminal import LayerProgress, print_notices

    run_on, team = join_team(device)
    models = open_checkpoint(output), open_checkpoint(reference)
    place = Path(directory) if directory else place_of_reports(Path(output), Path(reference))

    def begin() -> bool:
        for model in models:
            print_notices(model.source.notes)
        return _can_be_written(place, named=directory is not None)

    kept = team.once(begin)
    chosen = suite_for(output, suite, text, samples, length, task_files, field)
    about_text = ""
    if suite is None:
        about_text = f"text: {chosen.texts[0].text}, {origin_of_text(output, text)}"
    products = dtype_of_products(models[1], dtype, run_on)
    identity = identity_of(*models, chosen, not quick, products)
    team.agree(identity, partial(difference, words="{0} is {2}, not {1}"))

    def finished() -> dict | None:
        found = None if overwrite else finished_evaluation(place, identity)
        if found is None:
            return None
        if directory is None and (fault := next(evaluation_faults(Path(output)), None)):
            raise InputError(f"{fault}; overwrite=True evaluates again")
        progress.note(f"{place}: already evaluated, with the same models, texts and versions")
        _show_report(found, about_text, as_json)
        if not as_json:
            say(f"report: {place / HTML_NAME}")
        return found.model_dump(mode="json")

    with LayerProgress(click.get_current_context().obj) as progress:
        states = cache_at(cache, cache_size, progress.note)
        if found := team.once(finished):
            team.leave()
            check_gates(Report.model_validate(found))
            return
        report = run_suite(
            output,
            reference,
            chosen,
            suite or "",
            team.only_first(progress.layer_done, None),
            run_on,
            forced=not quick,
            cache=states,
            any_reference=any_reference,
            team=team,
            dtype=dtype,
        ).report
    report = report.model_copy(update={"made_from": identity})

    def tell() -> None:
        _show_report(report, about_text, as_json)
        if kept:
            _keep_report(report, Path(output), place, directory is not None, as_json)

    team.once(tell)
    team.leave()
    check_gates(report)


def _can_be_written(place: "Path", named: bool) -> bool:
    """Whether reports can be written to `place`. Raises InputError if not and the user `named` it:
    a result that can only be read is evaluated all the same."""
    from grokquant.job.shards import check_writable

    try:
        check_writable(place)
    except InputError as error:
        if named:
            raise
        say(f"{error}, so no report is kept; --output keeps one", err=True)
        return False
    return True


def _keep_report(
    report: "Report", output: "Path", place: "Path", named: bool, as_json: bool
) -> None:
    """Writes the reports and fills the card; what fails is a note, but for a `named` place."""
    from grokquant.reporting.publish import publish

    def note(line: str) -> None:
        say(line, err=True)

    try:
        _, page = publish(report, output, place, note)
    except InputError as error:
        if named:
            raise
        note(f"{error}; no report is kept")
        return
    if not as_json:
        say(f"report: {page}")


def _show_report(report: "Report", about_text: str, as_json: bool) -> None:
    from grokquant.reporting.rows import notes, terminal_table, verdict
    from grokquant.reporting.suite_tables import suite_tables

    if as_json:
        print_json(report.to_json())
        return
    say(*notes(report))
    if about_text:
        say(about_text)
    print_tables(terminal_table(report), *suite_tables(report))
    say(verdict(report))


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
