"""The recipe that a command is asked for: by the name of a model and options, or by a file."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from grokquant.cli.options import FORMAT, MODEL, PATH, overrides_option
from grokquant.cli.printing import say
from grokquant.errors import InputError
from grokquant.parallel import ALONE, Team

if TYPE_CHECKING:
    import torch

    from grokquant.checkpoint import Opener
    from grokquant.job.allocation.allocate import Allocation
    from grokquant.recipe import BudgetRecipe, Recipe

model_argument = click.argument("model", type=MODEL, metavar="MODEL|RECIPE")
_bits = click.option(
    "--bits",
    type=click.Choice(("2", "3", "4", "5", "6", "8")),
    callback=lambda _context, _option, value: value and int(value),
    help="Bits of the large matrices: 4 or 8, in gptq also 2 and 3, in gguf 2 to 6 and 8.",
)
_grid = click.option("--grid", metavar="GRID", help="Their grid instead, such as q4_k or nf4.")
_effort = click.option(
    "--effort",
    type=click.Choice(("low", "normal", "high")),
    default="normal",
    show_default=True,
    help="low: GPTQ. normal: two-sided rounding, in up to three times the time for about half the "
    "divergence, but GPTQ on GPUs and for large models in little memory. high: twice that time, a "
    "quarter less.",
)
_format = click.option(
    "--format",
    "output_format",
    type=FORMAT,
    help="Format of the result  [default: the one that holds the grid]",
)
_shipped = click.option(
    "--recipe",
    "shipped",
    metavar="NAME",
    help="A shipped recipe, see `grokquant recipes`, or a file whose rules are taken.",
)
_output = click.option(
    "--output", type=PATH, metavar="DIR", help="New directory  [default: MODEL-GRID, here]"
)


@dataclass(frozen=True)
class Asked:
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


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a recipe, together as its parameter `asked`."""

    @wraps(command)
    def run(**given: Any) -> None:
        asked = Asked(**{field.name: given.pop(field.name) for field in fields(Asked)})
        command(asked=asked, **given)

    options = (_bits, _grid, _effort, _format, _shipped, _output, overrides_option)
    with_options: Callable[..., None] = run
    for option in reversed(options):  # help shows first what is added last
        with_options = option(with_options)
    return with_options


def recipe_of(
    model: str,
    asked: Asked,
    device: "torch.device | None" = None,
    team: Team = ALONE,
) -> "tuple[Recipe, list[str], Opener]":
    """The recipe in the file `model`, or the one made for the model of this name, the lines that
    show it, and what opened the model. A budget is solved on `device`, by the first member of
    `team`. Raises InputError: for what is wrong without a model, before transformers is loaded."""
    from grokquant.job.goals import aim_of, is_recipe

    if is_recipe(model):
        loaded = _in_file(model, asked, can_solve=device is not None)
    else:
        aim_of(asked.shipped, asked.bits, asked.grid, asked.output_format, asked.effort)
        loaded = None

    from grokquant.checkpoint import opener
    from grokquant.recipe import BudgetRecipe, load_recipe, parse_recipe, to_yaml

    opened = opener()
    if loaded is None:
        values = asked.values(model, opened)
        lines = [f"  {line}" for line in to_yaml(values).splitlines()]
        return parse_recipe(values), [f"recipe for {model}:", *lines], opened
    if not isinstance(loaded, BudgetRecipe):
        return loaded, [], opened

    def solve() -> list[str]:
        assert device is not None
        found = allocated(loaded, device, opened)
        return [str(found.path), *found.text.splitlines()]

    path, *lines = team.once(solve)
    return load_recipe(path), [f"recipe for {model}:", *lines], opened


def _in_file(model: str, asked: Asked, can_solve: bool) -> "Recipe | BudgetRecipe":
    """The recipe in the file `model`, with the overrides. Raises InputError."""
    from grokquant.recipe import BudgetRecipe, load_any_recipe

    effort = asked.effort if asked.effort != "normal" else None
    given = {"bits": asked.bits, "grid": asked.grid, "recipe": asked.shipped, "effort": effort}
    for key, value in given.items():
        if value is not None:
            text = f"{model} is a recipe, whose rules decide it"
            raise InputError(f"{text}: change them, as with --set quantize[0].bits=8", key)
    loaded = load_any_recipe(model, (*asked.overrides, *_as_overrides(asked)))
    if isinstance(loaded, BudgetRecipe) and not can_solve:
        text = "has a budget, whose grids are to be chosen first: grokquant budget"
        raise InputError(f"{model}: quantize: {text} {model}")
    return loaded


def _as_overrides(asked: Asked) -> list[str]:
    """--format and --output as changes to a recipe file."""
    import json

    given = {"output.format": asked.output_format, "output.path": asked.output}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


def allocated(recipe: "BudgetRecipe", device: "torch.device", opened: "Opener") -> "Allocation":
    """A budget solved, and a line about it on stderr."""
    from grokquant.job.allocation.allocate import allocate

    signs = click.get_current_context().obj

    def note(line: str) -> None:
        signs.doing = line
        signs.heard()
        say(line, err=True)

    found = allocate(recipe, note, device, opened)
    say(f"budget: {found.bits_per_weight:.4f} bits per weight; recipe: {found.path}", err=True)
    return found
