"""quantize, and what people do before it: recipes, budget and plan."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from grokquant import escaping, parallel
from grokquant.cli.asked import Asked, allocated, asks, model_argument, recipe_of
from grokquant.cli.group import command, join_team
from grokquant.cli.options import (
    ENGINES,
    PATH,
    device_option,
    json_option,
    overrides_option,
    overwrite_option,
)
from grokquant.cli.printing import print_json, say
from grokquant.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from grokquant.checkpoint import Opener
    from grokquant.recipe import Recipe

_READING = "loading torch and reading the model"


@command(doing=_READING, shared=True)
@model_argument
@asks
@click.option("--dry-run", is_flag=True, help="Print the plan and stop, as `grokquant plan` does.")
@overwrite_option
@click.option(
    "--repair", is_flag=True, help="Only make the files again that verify rejects in the result."
)
@device_option
@json_option
def quantize(
    model: str,
    asked: Asked,
    dry_run: bool,
    overwrite: bool,
    repair: bool,
    device: str,
    as_json: bool,
) -> None:
    """Quantize a model, or resume an interrupted run.

    MODEL is a directory, a .gguf or .safetensors file, ORGANIZATION/NAME of a downloaded model of
    the Hugging Face hub, or `toy`.
    Without options its experts get 4 bits, or all its matrices if it has no experts; the result is
    called after it. The command prints the recipe that this stands for. A file that ends in .yaml
    is a recipe of your own.

    Then it prints the plan, and one line per layer: its error, its bits per weight and the smallest
    number of calibration tokens that any expert got. Ctrl-C stops after the current file; a second
    Ctrl-C stops immediately. Finished files are not redone, nor is a finished result of the same
    recipe; a result of anything else is refused. The result loads like the source, and its report
    has a row for every matrix.
    """
    place, team = join_team(device)
    loaded, shown, opened = recipe_of(model, asked, None if dry_run else place, team)

    from grokquant.job import pipeline
    from grokquant.job.goals import is_recipe
    from grokquant.reporting.terminal import RunProgress

    if dry_run:
        team.once(lambda: show_plan(loaded, opened, as_json, shown=shown))
        return
    if repair:
        parallel.refuse_to_share("quantize --repair: does not run")
    if overwrite and repair:
        raise InputError("keeps nothing that --repair could repair; give one of them", "overwrite")
    with RunProgress(shown, click.get_current_context().obj) as progress:
        if repair:
            made = pipeline.repair(loaded, progress, place, opened)
        else:
            made = pipeline.quantize(loaded, progress, place, overwrite, team, opened)

    def tell() -> None:
        if as_json:
            print_json(progress.as_dict(made))
            return
        say(*progress.summary(made))
        if not is_recipe(model):
            say(f"recipe: {made / 'recipe.yaml'}; the same from it: {_command_of(made, model)}")

    team.once(tell)
    team.leave()


def _command_of(made: "Path", model: str) -> str:
    """The command that makes the result `made` of `model` once more, from its recipe."""
    import shlex

    path = shlex.quote(str(made / "recipe.yaml"))
    source = shlex.quote(f"model.path={model}")
    return f"grokquant quantize {path} --set {source} --output DIR"


@command(doing="reading the model and timing small pieces of the run")
@model_argument
@asks
@click.option(
    "--for",
    "engine",
    type=click.Choice(ENGINES, case_sensitive=False),
    help="Fail if this program cannot take the result, and name the rule to change.",
)
@click.option(
    "--ranks",
    "processes",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Also show what each of N processes started by torchrun takes.",
)
@json_option
def plan(
    model: str,
    asked: Asked,
    engine: str | None,
    processes: int | None,
    as_json: bool,
) -> None:
    """Show what quantize would do with the same arguments.

    Prints the grid of each kind of matrix, the exact size of the result, the peak memory, the step
    that needs it, the estimated time, and the programs that can load the result. Sizes come from
    file headers alone; time and memory come from a probe of this machine that takes a few seconds.
    """
    recipe, shown, opened = recipe_of(model, asked)
    show_plan(recipe, opened, as_json, engine, shown, processes)


def show_plan(
    recipe: "Recipe",
    opened: "Opener",
    as_json: bool,
    engine: str | None = None,
    shown: Sequence[str] = (),
    processes: int | None = None,
) -> None:
    """Prints the plan, and before it, on stderr, the lines that show a recipe."""
    from pathlib import Path

    from grokquant.files.atomic import check_writable
    from grokquant.job.budget import budget_of
    from grokquant.job.budget.sharing import sharing_of
    from grokquant.job.plan import build_plan, check_disk, check_engine
    from grokquant.reporting import terminal

    plan = build_plan(recipe, opened)
    check_writable(Path(recipe.output.path))
    sharing = sharing_of(plan, processes) if processes else None
    budget = budget_of(plan)
    say(*shown, err=True)
    if as_json:
        shares = {"shared": terminal.sharing_as_dict(sharing, budget)} if sharing else {}
        print_json(terminal.plan_as_dict(plan, budget) | shares)
    else:
        terminal.print_plan(plan)
        terminal.print_budget(budget)
        if sharing:
            terminal.print_sharing(sharing, budget)
    if engine:
        check_engine(plan, engine)
    check_disk(plan)  # last: the plan is shown even if this disk is too small


@command(doing=_READING)
@click.argument("recipe", type=PATH)
@overrides_option
@device_option
def budget(recipe: str, overrides: tuple[str, ...], device: str) -> None:
    """Choose grids within a budget of bits and print the recipe.

    RECIPE has `budget` in place of rules; `quantize` does the same with it before it begins. What
    each grid costs each matrix is measured in one pass of the model. The recipe and the
    measurements are kept in OUTPUT.budget, so that another budget needs no other pass; change the
    recipe there as you like, and quantize it.
    """
    from grokquant.devices import device_of
    from grokquant.recipe import BudgetRecipe, load_any_recipe

    loaded = load_any_recipe(recipe, overrides)
    if not isinstance(loaded, BudgetRecipe):
        raise InputError(f"{recipe}: quantize: has no budget; `grokquant quantize` takes it")

    from grokquant.checkpoint import opener

    found = allocated(loaded, device_of(device), opener())
    click.echo(escaping.lines(found.text), nl=False)


@command()
@click.argument("model", type=PATH, required=False)
@asks
def recipes(
    model: str | None,
    asked: Asked,
) -> None:
    """List the shipped recipes, or print one for a MODEL.

    Each fits any model. With MODEL, prints the recipe that quantize uses with the same options, as
    a file to change: grokquant recipes MODEL --bits 4 > mine.yaml
    """
    from grokquant.job.goals import GOALS

    if model is None:
        width = max(map(len, GOALS))
        say(*(f"{name:{width}}  {goal.text}" for name, goal in GOALS.items()))
        return

    from grokquant.checkpoint import opener
    from grokquant.recipe import parse_recipe, to_yaml

    values = asked.values(model, opener())
    parse_recipe(values)
    click.echo(escaping.lines(to_yaml(values)), nl=False)
