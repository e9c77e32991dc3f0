"""What a budget chooses: matrices that get one grid, and what each grid would take of the budget.

unit         one choice for                     its rule matches
layer        a role in a layer                  layers.3.experts.*
projection   a kind of matrix in a layer        layers.3.experts.*.down
expert       a matrix                           layers.3.experts.5.down
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.formats import FORMATS, Format
from grokquant.job.units import unit_of
from grokquant.recipe import BudgetRecipe
from grokquant.types import BudgetUnit, Matrix, Unit


@dataclass(frozen=True)
class Option:
    """A choice with grid number `grid` of the budget: its matrices as units, and their bytes."""

    grid: int
    units: tuple[Unit, ...]
    bytes: int


@dataclass(frozen=True)
class Choice:
    """Matrices that get one grid. `match` selects them, `kind` selects them in all layers."""

    match: str
    kind: str
    weights: int
    options: tuple[Option, ...]


def choices_of(recipe: BudgetRecipe, checkpoint: Checkpoint) -> list[Choice]:
    """The choices of a budget, in layer order.

    Raises InputError where the budget matches nothing, no grid fits a matrix, or the format cannot
    hold the unit.
    """
    budget = recipe.quantize.budget
    output_format = FORMATS[recipe.output.format]
    unit: BudgetUnit = budget.unit or output_format.budget_units[0]
    if unit not in output_format.budget_units:
        held = " or ".join(output_format.budget_units)
        text = f"format {output_format.name} cannot hold a grid for each {unit}; use {held}"
        raise InputError(f"recipe: quantize.budget.unit: {text}")
    rules = recipe.quantize.rules
    left = [m for m in checkpoint.matrices() if not any(rule.matches(m.name) for rule in rules)]
    matched: dict[tuple[str, str], list[Matrix]] = {}
    for matrix in left:
        if fnmatchcase(matrix.name, budget.match):
            matched.setdefault(_patterns(matrix, unit), []).append(matrix)
    if not matched:
        example = f", such as {left[0].name}" if left else ""
        text = f"{budget.match!r} matches no matrix that the rules leave{example}"
        raise InputError(f"recipe: quantize.budget.match: {text}")
    return [
        _choice(recipe, checkpoint, output_format, match, kind, matrices)
        for (match, kind), matrices in matched.items()
    ]


def options_of(choices: Sequence[Choice]) -> dict[str, dict[int, Unit]]:
    """The units that a matrix may become, by its name and the number of a grid."""
    options: dict[str, dict[int, Unit]] = {}
    for choice in choices:
        for option in choice.options:
            for unit in option.units:
                options.setdefault(unit.name, {})[option.grid] = unit
    return options


def rules_of(recipe: BudgetRecipe, choices: Sequence[Choice], taken: Sequence[int]) -> list[dict]:
    """The rules that give each choice the grid of its option of number `taken`.

    Of each kind the grid that most choices take gets one rule for all layers, which comes last.
    """
    grids = [choice.options[option].grid for choice, option in zip(choices, taken, strict=True)]
    of_kind: dict[str, Counter[int]] = {}
    for choice, grid in zip(choices, grids, strict=True):
        of_kind.setdefault(choice.kind, Counter())[grid] += 1
    usual = {kind: counts.most_common(1)[0][0] for kind, counts in of_kind.items()}
    others = [
        (choice.match, grid)
        for choice, grid in zip(choices, grids, strict=True)
        if grid != usual[choice.kind]
    ]
    return [_rule(recipe, match, grid) for match, grid in (*others, *usual.items())]


def _rule(recipe: BudgetRecipe, match: str, grid: int) -> dict[str, Any]:
    budget = recipe.quantize.budget
    named = budget.grids[grid]
    keys = {"grid": named.lower()} if isinstance(named, str) else named
    return {"match": match, "method": budget.method, **keys}


def _patterns(matrix: Matrix, unit: BudgetUnit) -> tuple[str, str]:
    """What matches the matrices that share a grid with this one, in its layer and in all layers."""
    part = matrix.name.split(".", 2)[2]
    role = part.partition(".")[0]
    if unit == "layer":
        part = f"{role}.*"
    elif unit == "projection" and matrix.expert is not None:
        part = f"{role}.*.{matrix.part}"
    of_kind = f"{role}.*.{matrix.part}" if unit == "expert" and matrix.expert is not None else part
    return f"layers.{matrix.layer}.{part}", f"layers.*.{of_kind}"


def _choice(
    recipe: BudgetRecipe,
    checkpoint: Checkpoint,
    output_format: Format,
    match: str,
    kind: str,
    matrices: Sequence[Matrix],
) -> Choice:
    """Raises InputError where no grid of the budget fits the matrices."""
    refs = [checkpoint.source.tensors[matrix.tensor] for matrix in matrices]
    options = []
    reason: InputError | None = None
    for grid, rule in enumerate(recipe.quantize.budget.rules):
        pairs = zip(matrices, refs, strict=True)
        try:
            units = tuple(unit_of(m, ref, rule, grid, output_format) for m, ref in pairs)
        except InputError as error:
            reason = reason or error
            continue
        options.append(Option(grid, units, sum(map(output_format.packed_bytes, units))))
    if not options:
        raise InputError(f"recipe: quantize.budget.grids: none fits {match}: {reason}")
    weights = sum(prod(ref.shape) for ref in refs)
    return Choice(match, kind, weights, tuple(options))
