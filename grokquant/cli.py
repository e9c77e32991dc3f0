"""The command line. stdout carries results, stderr progress; errors are one line.

Commands import what they need when they run: help and usage errors answer without waiting for it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import click

from grokquant import escaping, parallel
from grokquant.errors import GrokquantError, InputError, OutOfMemory, Stopped
from grokquant.escaping import one_line
from grokquant.memory import memory_for
from grokquant.reporting.signs_of_life import SignsOfLife, silence
from grokquant.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from rich.table import Table

    from grokquant.checkpoint import Opener
    from grokquant.evaluation.report import Report
    from grokquant.job.allocation.allocate import Allocation
    from grokquant.recipe import BudgetRecipe, Recipe

_EXIT_CODES = """
Exit codes: 0 success; 1 a quality or verification gate failed; 2 invalid command, recipe or input,
or too little memory; 130 interrupted.
"""

_LONGEST_LINE = 2000  # of an error: names and values in it come from files
_TEAM = "grokquant.team"  # the key of the team of a command in click's contexts


# What a command says when memory runs out, unless what it calls has said it.
_LESS_MEMORY = {
    "eval": "; lower --samples or --length",
    "generate": "; set --max-memory",
}


class _Command(click.Command):
    """A command whose context has its `SignsOfLife`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            has_keys = any(parameter.name == "overrides" for parameter in self.params)
            if has_keys and (keys := _keys_of(error.option_name)):
                ways = " or ".join(f"--set {key}=VALUE" for key in keys)
                text = f"No such option '{error.option_name}'; the recipe has it: {ways}"
                raise click.UsageError(text, ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> object:
        name = self.name or "grokquant"
        if name not in _SHARED:
            parallel.refuse_to_share(f"{name}: does not run")
        doing = f"{name}: {_BEGINNINGS.get(name, 'working')}"
        say = _say_error if parallel.is_first() else _say_nothing
        ctx.obj = SignsOfLife(doing, say, silence())
        with ctx.obj, memory_for(name):
            return super().invoke(ctx)


def _keys_of(option: str) -> list[str]:
    """The keys of a recipe that are called like an option."""
    from grokquant.recipe.reading import places_of

    return places_of(option.removeprefix("--").replace("-", "_"))


# The commands that several processes carry out together.
_SHARED = ("quantize", "eval")
# What a command does first, and it can take long.
_BEGINNINGS = {
    "quantize": "loading torch and reading the model",
    "budget": "loading torch and reading the model",
    "plan": "reading the model and timing small pieces of the run",
    "eval": "reading both models and the text",
    "generate": "loading the model",
}


class _Commands(click.Group):
    """Turns errors and interruptions of any command into one line and an exit code."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except GrokquantError as error:
            code = error.exit_code
            text = str(error)
            if isinstance(error, InputError) and (option := self._option(ctx, error.key)):
                text = f"{option}: {error.text}"
            text = self._with_options(ctx, text)
            if isinstance(error, OutOfMemory):
                text += _LESS_MEMORY.get(ctx.invoked_subcommand or "", "")
        except BrokenPipeError:
            raise  # the reader closed the pipe; click handles that
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            code, text = 2, f"{where}{error.strerror or error}"
        except Stopped as stopped:
            code, text = stopped.exit_code, str(stopped)
        except KeyboardInterrupt:
            code, text = 130, "interrupted; no output was written"
        team = ctx.meta.get(_TEAM) or parallel.Team()
        team.say(_bounded(text), _say_own)
        team.leave()
        ctx.exit(code)

    def _option(self, ctx: click.Context, key: str | None) -> str | None:
        """The option, such as `--samples`, that sets parameter or recipe key `key`."""
        if key is None:
            return None
        named = (key.replace(".", "_"), f"--{key}")
        return next((o.opts[0] for o in self._options(ctx) if {o.name, o.opts[0]} & {*named}), None)

    def _with_options(self, ctx: click.Context, text: str) -> str:
        """`text` as the invoked command says it: `--overwrite` for `overwrite=True`."""
        for option in self._options(ctx):
            if option.is_flag:
                text = text.replace(f"{option.name}=True", option.opts[0])
            elif option.opts[0] == "--output":
                text = text.replace("another output.path", "another --output")
        return text

    def _options(self, ctx: click.Context) -> list[click.Option]:
        command = self.commands.get(ctx.invoked_subcommand or "")
        parameters = command.params if command else []
        return [parameter for parameter in parameters if isinstance(parameter, click.Option)]


def _say_error(line: str) -> None:
    _say(line, err=True)


def _say_own(line: str) -> None:
    _say_error(f"grokquant: {line}")


def _say_nothing(line: str) -> None: ...


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."


def _say(*lines: str, err: bool = False) -> None:
    """Prints each of `lines` as one line, whatever the names in it hold."""
    for line in lines:
        click.echo(one_line(line), err=err)


_SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}


@click.group(cls=_Commands, epilog=_EXIT_CODES, context_settings=_SETTINGS)
@click.version_option(__version__)
def main() -> None:
    """Quantize Grok-1 and similar models without loading them whole, and measure the loss.

    \b
    grokquant quantize toy                         quantize the embedded toy, in a minute
    grokquant eval toy-int4 --reference toy        measure perplexity, KL divergence, routing
    grokquant generate toy-int4 --prompt "The "    generate text with the result
    """
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):  # shells ignore SIGINT in the background
        signal.signal(number, signal.default_int_handler)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers reads it at import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # traces of processes that were lost


class _Path(click.ParamType):
    """A path as typed: shells leave `~` and variables as they are after `=` and in quotes."""

    name = "path"

    def convert(self, value: str, *_: object) -> str:
        from grokquant.files.typed_paths import expanded

        try:
            return expanded(value)
        except ValueError as error:
            raise InputError(str(error)) from None


_PATH = _Path()
_overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe key, e.g. --set model.path=DIR or --set quantize[0].bits=8.",
)
_device = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device: cpu, cuda or cuda:N; auto uses a GPU if there is one.",
)
# The formats of `recipe/schema.py`, repeated here so that --help does not import pydantic.
_FORMATS = ("compressed-tensors", "gptq", "bitsandbytes", "gguf", "bf16")
# The consumers of `engines.py`, repeated for the same reason.
_ENGINES = (
    "llama.cpp",
    "vllm",
    "sglang",
    "transformers-grokquant",
    "transformers",
    "lm-eval",
    "lm-eval-grokquant",
    "gptqmodel",
    "exllamav2",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace an earlier result once the new one is complete."
)


_model = click.argument("model", type=_PATH, metavar="MODEL|RECIPE")
_bits = click.option(
    "--bits",
    type=click.Choice(("2", "3", "4", "5", "6", "8")),
    callback=lambda _context, _option, value: value and int(value),
    help="Bits of the large matrices: 4 or 8, in gptq also 2 and 3, in gguf 2 to 6 and 8.",
)
_grid = click.option("--grid", metavar="GRID", help="Their grid instead, such as q4_k or nf4.")
_format = click.option(
    "--format",
    "output_format",
    type=click.Choice(_FORMATS, case_sensitive=False),
    help="Format of the result  [default: the one that holds the grid]",
)
_shipped = click.option(
    "--recipe",
    "shipped",
    metavar="NAME",
    help="A shipped recipe, see `grokquant recipes`, or a file whose rules are taken.",
)
_effort = click.option(
    "--effort",
    type=click.Choice(("normal", "high")),
    default="normal",
    help="high: experts and dense MLPs by two-sided rounding, in about five times the time.",
)
_output = click.option(
    "--output", type=_PATH, metavar="DIR", help="New directory  [default: MODEL-GRID, here]"
)


@dataclass(frozen=True)
class _Asked:
    """What the options of a command ask for of a recipe; None leaves it open."""

    bits: int | None
    grid: str | None
    output_format: str | None
    shipped: str | None
    output: str | None
    effort: str
    overrides: tuple[str, ...]

    def values(self, model: str, opened: "Opener") -> dict[str, Any]:
        """The keys of the recipe made for `model`. Raises InputError."""
        from grokquant.job.default_recipe import values_for
        from grokquant.recipe import with_overrides

        wanted = (self.shipped, self.bits, self.grid, self.output_format, self.output)
        given = values_for(model, *wanted, self.effort, opened)
        return with_overrides(given, self.overrides)


def _asks(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a recipe, together as its parameter `asked`."""

    @wraps(command)
    def run(**given: Any) -> None:
        asked = _Asked(**{field.name: given.pop(field.name) for field in fields(_Asked)})
        command(asked=asked, **given)

    options = (_bits, _grid, _effort, _format, _shipped, _output, _overrides)
    with_options: Callable[..., None] = run
    for option in reversed(options):  # help shows first what is added last
        with_options = option(with_options)
    return with_options


@main.command()
@_model
@_asks
@click.option("--dry-run", is_flag=True, help="Print the plan and stop, as `grokquant plan` does.")
@_overwrite
@click.option(
    "--repair", is_flag=True, help="Only make the files again that verify rejects in the result."
)
@_device
@_json
def quantize(
    model: str,
    asked: _Asked,
    dry_run: bool,
    overwrite: bool,
    repair: bool,
    device: str,
    as_json: bool,
) -> None:
    """Quantize a model, or resume an interrupted run.

    MODEL is a directory, ORGANIZATION/NAME of a downloaded model of the Hugging Face hub, or `toy`.
    Without options its experts get 4 bits, or all its matrices if it has no experts; the result is
    called after it. The command prints the recipe that this stands for. A file that ends in .yaml
    is a recipe of your own.

    Then it prints the plan, and one line per layer: its error, its bits per weight and the smallest
    number of calibration tokens that any expert got. Ctrl-C stops after the current file; a second
    Ctrl-C stops immediately. Finished files are not redone, nor is a finished result of the same
    recipe; a result of anything else is refused. The result loads like the source, and its report
    has a row for every matrix.
    """
    from grokquant.checkpoint import opener
    from grokquant.devices import device_of
    from grokquant.job import pipeline
    from grokquant.job.default_recipe import is_recipe
    from grokquant.reporting.terminal import RunProgress

    context = click.get_current_context()
    place = device_of(parallel.own_device(device))
    team = parallel.join(place, _say_own)
    context.meta[_TEAM] = team
    opened = opener()
    loaded, shown = _recipe_of(model, asked, opened, None if dry_run else place, team)
    if dry_run:
        team.once(lambda: _show_plan(loaded, opened, as_json, shown=shown))
        return
    if repair:
        parallel.refuse_to_share("quantize --repair: does not run")
    if overwrite and repair:
        raise InputError("keeps nothing that --repair could repair; give one of them", "overwrite")
    with RunProgress(shown, context.obj) as progress:
        if repair:
            made = pipeline.repair(loaded, progress, place, opened)
        else:
            made = pipeline.quantize(loaded, progress, place, overwrite, team, opened)

    def tell() -> None:
        if as_json:
            _print_json(progress.as_dict(made))
            return
        _say(*progress.summary(made))
        if not is_recipe(model):
            _say(f"recipe: {made / 'recipe.yaml'}; the same from it: {_command_of(made, model)}")

    team.once(tell)
    team.leave()


def _command_of(made: "Path", model: str) -> str:
    """The command that makes the result `made` of `model` once more, from its recipe."""
    import shlex

    path = shlex.quote(str(made / "recipe.yaml"))
    source = shlex.quote(f"model.path={model}")
    return f"grokquant quantize {path} --set {source} --output DIR"


@main.command()
@_model
@_asks
@click.option(
    "--for",
    "engine",
    type=click.Choice(_ENGINES, case_sensitive=False),
    help="Fail if this program cannot take the result, and name the rule to change.",
)
@click.option(
    "--ranks",
    "processes",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Also show what each of N processes started by torchrun takes.",
)
@_json
def plan(
    model: str,
    asked: _Asked,
    engine: str | None,
    processes: int | None,
    as_json: bool,
) -> None:
    """Show what quantize would do with the same arguments.

    Prints the grid of each kind of matrix, the exact size of the result, the peak memory, the step
    that needs it, the estimated time, and the programs that can load the result. Sizes come from
    file headers alone; time and memory come from a probe of this machine that takes a few seconds.
    """
    from grokquant.checkpoint import opener

    opened = opener()
    recipe, shown = _recipe_of(model, asked, opened)
    _show_plan(recipe, opened, as_json, engine, shown, processes)


@main.command()
@click.argument("recipe", type=_PATH)
@_overrides
@_device
def budget(recipe: str, overrides: tuple[str, ...], device: str) -> None:
    """Choose grids within a budget of bits and print the recipe.

    RECIPE has `budget` in place of rules; `quantize` does the same with it before it begins. What
    each grid costs each matrix is measured in one pass of the model. The recipe and the
    measurements are kept in OUTPUT.budget, so that another budget needs no other pass; change the
    recipe there as you like, and quantize it.
    """
    from grokquant.checkpoint import opener
    from grokquant.devices import device_of
    from grokquant.recipe import BudgetRecipe, load_any_recipe

    loaded = load_any_recipe(recipe, overrides)
    if not isinstance(loaded, BudgetRecipe):
        raise InputError(f"{recipe}: quantize: has no budget; `grokquant quantize` takes it")
    found = _allocated(loaded, device_of(device), opener())
    click.echo(escaping.lines(found.text), nl=False)


def _allocated(recipe: "BudgetRecipe", device: "torch.device", opened: "Opener") -> "Allocation":
    """A budget solved, and a line about it on stderr."""
    from grokquant.job.allocation.allocate import allocate

    signs = click.get_current_context().obj

    def note(line: str) -> None:
        signs.doing = line
        signs.heard()
        _say(line, err=True)

    found = allocate(recipe, note, device, opened)
    _say(f"budget: {found.bits_per_weight:.4f} bits per weight; recipe: {found.path}", err=True)
    return found


@main.command()
@click.argument("model", type=_PATH, required=False)
@_asks
def recipes(
    model: str | None,
    asked: _Asked,
) -> None:
    """List the shipped recipes, or print one for a MODEL.

    Each fits any model. With MODEL, prints the recipe that quantize uses with the same options, as
    a file to change: grokquant recipes MODEL --bits 4 > mine.yaml
    """
    from grokquant.checkpoint import opener
    from grokquant.job.default_recipe import GOALS
    from grokquant.recipe import parse_recipe, to_yaml

    if model is None:
        width = max(map(len, GOALS))
        _say(*(f"{name:{width}}  {goal.text}" for name, goal in GOALS.items()))
        return
    values = asked.values(model, opener())
    parse_recipe(values)
    click.echo(escaping.lines(to_yaml(values)), nl=False)


def _recipe_of(
    model: str,
    asked: _Asked,
    opened: "Opener",
    device: "torch.device | None" = None,
    team: parallel.Team = parallel.ALONE,
) -> "tuple[Recipe, list[str]]":
    """The recipe in the file `model`, or the one made for the model of this name and the lines that
    show it. A budget is solved on `device`, by the first member of `team`. Raises InputError."""
    from grokquant.job.default_recipe import is_recipe
    from grokquant.recipe import (
        BudgetRecipe,
        load_any_recipe,
        load_recipe,
        parse_recipe,
        to_yaml,
    )

    if is_recipe(model):
        effort = asked.effort if asked.effort != "normal" else None
        given = {"bits": asked.bits, "grid": asked.grid, "recipe": asked.shipped, "effort": effort}
        for key, value in given.items():
            if value is not None:
                text = f"{model} is a recipe, whose rules decide it"
                raise InputError(f"{text}: change them, as with --set quantize[0].bits=8", key)
        loaded = load_any_recipe(model, (*asked.overrides, *_as_overrides(asked)))
        if not isinstance(loaded, BudgetRecipe):
            return loaded, []
        if device is None:
            text = "has a budget, whose grids are to be chosen first: grokquant budget"
            raise InputError(f"{model}: quantize: {text} {model}")

        def solve() -> list[str]:
            found = _allocated(loaded, device, opened)
            return [str(found.path), *found.text.splitlines()]

        path, *lines = team.once(solve)
        return load_recipe(path), [f"recipe for {model}:", *lines]
    values = asked.values(model, opened)
    lines = [f"  {line}" for line in to_yaml(values).splitlines()]
    return parse_recipe(values), [f"recipe for {model}:", *lines]


def _as_overrides(asked: _Asked) -> list[str]:
    """--format and --output as changes to a recipe file."""
    import json

    given = {"output.format": asked.output_format, "output.path": asked.output}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


@main.command()
@click.argument("result", type=_PATH)
@click.option(
    "--format",
    "output_format",
    required=True,
    type=click.Choice(_FORMATS, case_sensitive=False),
    help="Target format.",
)
@click.option("--output", type=_PATH, metavar="DIR", help="New directory  [default: RESULT-FORMAT]")
@_overwrite
@click.option(
    "--tokenizer",
    "output_tokenizer",
    type=click.Choice(("source", "none"), case_sensitive=False),
    default="source",
    show_default=True,
    help="Tokenizer in GGUF files: that of RESULT, or none.",
)
@_json
def convert(
    result: str,
    output_format: str,
    output: str | None,
    overwrite: bool,
    output_tokenizer: str,
    as_json: bool,
) -> None:
    """Repack RESULT into another format.

    RESULT is a quantized checkpoint; its source is not needed. Codes and scales are copied bit for
    bit. If the format cannot hold them, the command fails and nothing is written.
    """
    from grokquant.job import pipeline
    from grokquant.job.convert import conversion_recipe
    from grokquant.reporting.terminal import RunProgress

    place = output or f"{os.path.realpath(result)}-{output_format}"
    recipe = conversion_recipe(result, output_format, place, output_tokenizer)
    with RunProgress(life=click.get_current_context().obj) as progress:
        written = pipeline.quantize(recipe, progress, overwrite=overwrite)
    if as_json:
        _print_json(progress.as_dict(written))
    else:
        _say(*progress.summary(written))


@main.command(name="eval")
@click.argument("output", type=_PATH)
@click.option(
    "--reference",
    type=_PATH,
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
    type=_PATH,
    metavar="NAME",
    help="Suite to run: smoke, fidelity, tasks, grok-1 or a YAML file.",
)
@click.option(
    "--output",
    "directory",
    type=_PATH,
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
    type=_PATH,
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
@_overwrite
@_device
@_json
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
    from grokquant.devices import device_of
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

    context = click.get_current_context()
    run_on = device_of(parallel.own_device(device))
    team = parallel.join(run_on, _say_own)
    context.meta[_TEAM] = team
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
            _say(f"report: {place / HTML_NAME}")
        return found.model_dump(mode="json")

    with LayerProgress(context.obj) as progress:
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
        _say(f"{error}, so no report is kept; --output keeps one", err=True)
        return False
    return True


def _keep_report(
    report: "Report", output: "Path", place: "Path", named: bool, as_json: bool
) -> None:
    """Writes the reports and fills the card; what fails is a note, but for a `named` place."""
    from grokquant.reporting.publish import publish

    def note(line: str) -> None:
        _say(line, err=True)

    try:
        _, page = publish(report, output, place, note)
    except InputError as error:
        if named:
            raise
        note(f"{error}; no report is kept")
        return
    if not as_json:
        _say(f"report: {page}")


def _show_report(report: "Report", about_text: str, as_json: bool) -> None:
    from grokquant.reporting.rows import notes, terminal_table, verdict
    from grokquant.reporting.suite_tables import suite_tables

    if as_json:
        _print_json(report.to_json())
        return
    _say(*notes(report))
    if about_text:
        _say(about_text)
    _print_tables(terminal_table(report), *suite_tables(report))
    _say(verdict(report))


@main.command()
@click.argument("runs", type=_PATH, nargs=-1, required=True)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown instead of tables.")
@click.option(
    "--output",
    "directory",
    type=_PATH,
    metavar="DIR",
    help="Also write compare.html and compare.json to DIR.",
)
@_json
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
        _print_json(ranking.as_dict())
    elif as_markdown:
        click.echo(markdown(ranking), nl=False)
    else:
        _print_tables(*terminal_tables(ranking))
        if page:
            _say(f"page: {page}")


@main.command()
@click.argument("path", type=_PATH)
@_json
def inspect(path: str, as_json: bool) -> None:
    """Show the contents of a checkpoint.

    Prints family, layers, experts, parameters, bytes, bits per weight and every tensor.
    """
    from grokquant.reporting.inspection import describe
    from grokquant.reporting.terminal import print_description

    description = describe(path)
    if as_json:
        _print_json(description)
    else:
        print_description(description)


@main.command()
@click.argument("output", type=_PATH)
@click.option("--digest", metavar="HEX", help="Digest that `quantize` printed when it made OUTPUT.")
@_json
def verify(output: str, digest: str | None, as_json: bool) -> None:
    """Check that an output is whole and unchanged.

    Every file must be there, match its checksum and belong to the output. Recipe, config, index,
    report and the headers of the files must agree, and all values must be finite. Prints every
    fault on a line of its own. Who can write to OUTPUT can make all of this agree; only --digest
    finds that.
    """
    from pathlib import Path

    from grokquant.job.seal import digest_of
    from grokquant.job.shards import SUMS_NAME
    from grokquant.job.verify import Fault, FaultsFound
    from grokquant.job.verify import verify as check

    faults: tuple[Fault, ...] = ()
    matrices = None
    try:
        matrices = check(output, digest)
    except FaultsFound as found:
        faults = found.faults
    if as_json:
        rows = [{"file": fault.file, "text": fault.text} for fault in faults]
        listed = Path(output, SUMS_NAME).is_file()
        found_digest = digest_of(Path(output)) if listed else None
        _print_json(
            {"output": output, "matrices": matrices, "digest": found_digest, "faults": rows}
        )
    else:
        for fault in faults:
            _say(f"grokquant: {fault}", err=True)
    if faults:
        sys.exit(FaultsFound.exit_code)
    if not as_json:
        _say(f"{output}: ok, {matrices} quantized matrices match the report")


@main.command()
@click.argument("path", type=_PATH)
@click.option("--prompt", required=True, help="Text to continue.")
@click.option(
    "--tokens",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of new tokens.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 100),
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Random seed for sampling.",
)
@click.option("--chat", is_flag=True, help="Put the text into the model's chat template.")
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Hold at most this much of the weights, such as 16GB; read the others when needed.",
)
@click.option(
    "--dequantize", is_flag=True, help="Dequantize all weights at once: up to 4x the memory."
)
@_device
def generate(
    path: str,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    max_memory: str | None,
    dequantize: bool,
    device: str,
) -> None:
    """Generate text from a checkpoint.

    PATH is an xAI release, a bf16 Hugging Face directory, a quantized output or `toy`. Weights of
    an output stay packed and are read when they are first used. With --max-memory a model larger
    than the memory of the machine runs too, slowly, and ends with a line on how much was read.
    """
    from grokquant.humanize import size
    from grokquant.runtime.generate import generate_text

    life: SignsOfLife = click.get_current_context().obj

    def write(piece: str) -> None:
        life.say = lambda line: None  # the text is one
        click.echo(escaping.lines(piece) if sys.stdout.isatty() else piece, nl=False)

    packed = False if dequantize else None
    made = generate_text(
        path, prompt, tokens, temperature, seed, device, packed, max_memory, chat, write
    )
    click.echo()
    if max_memory and made.new_tokens:
        read = size(made.bytes_read / made.new_tokens)
        click.echo(f"{made.hit_rate:.0%} of matrices in memory, {read} read per token", err=True)


def _show_plan(
    recipe: "Recipe",
    opened: "Opener",
    as_json: bool,
    engine: str | None = None,
    shown: Sequence[str] = (),
    processes: int | None = None,
) -> None:
    """Prints the plan, and before it, on stderr, the lines that show a recipe."""
    from pathlib import Path

    from grokquant.job.budget import budget_of
    from grokquant.job.budget.sharing import sharing_of
    from grokquant.job.plan import build_plan, check_disk, check_engine
    from grokquant.job.shards import check_writable
    from grokquant.reporting import terminal

    plan = build_plan(recipe, opened)
    check_writable(Path(recipe.output.path))
    sharing = sharing_of(plan, processes) if processes else None
    budget = budget_of(plan)
    _say(*shown, err=True)
    if as_json:
        shares = {"shared": terminal.sharing_as_dict(sharing, budget)} if sharing else {}
        _print_json(terminal.plan_as_dict(plan, budget) | shares)
    else:
        terminal.print_plan(plan)
        terminal.print_budget(budget)
        if sharing:
            terminal.print_sharing(sharing, budget)
    if engine:
        check_engine(plan, engine)
    check_disk(plan)  # last: the plan is shown even if this disk is too small


def _print_tables(*tables: "Table") -> None:
    from grokquant.reporting.terminal import text_console

    console = text_console()
    for table in tables:
        console.print(table)


def _print_json(value: object) -> None:
    import json

    click.echo(escaping.json_text(json.dumps(value, indent=2, ensure_ascii=False)))
