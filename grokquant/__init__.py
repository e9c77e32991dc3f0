"""Quantizes Grok-1 and similar models, streamed block by block, and measures the loss.

The import is cheap, since the command line begins with it: torch, transformers, even pathlib are
imported by the first call that needs them. transformers still recognizes our outputs, see
`runtime/registry.py`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from grokquant.runtime.registry import register as _register
from grokquant.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from grokquant.checkpoint import Opener
    from grokquant.evaluation.report import Report
    from grokquant.parallel import Team
    from grokquant.recipe import BudgetRecipe, Recipe
    from grokquant.reporting.shown import (
        ModelSummary,
        ShownPlan,
        ShownQuantization,
        ShownRanking,
        ShownReport,
    )
    from grokquant.runtime.load import load

__all__ = [
    "__version__",
    "compare",
    "evaluate",
    "evaluation_report",
    "inspect",
    "load",
    "plan",
    "quantization_report",
    "quantize",
    "recipe_for",
]

_register()


if not TYPE_CHECKING:  # type checkers see the import above, and misspelt attributes

    def __getattr__(name: str) -> object:
        """`load`, whose signature needs torch, when it is asked for (PEP 562)."""
        if name == "load":
            from grokquant.runtime.load import load

            return load
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def recipe_for(
    model: "str | Path",
    recipe: "str | Path | None" = None,
    bits: int | None = None,
    grid: str | None = None,
    format: str | None = None,
    output: "str | Path | None" = None,
    effort: str = "normal",
) -> "Recipe":
    """The best known recipe for `model`, which `quantize` and `plan` take.

    `model` is a directory, ORGANIZATION/NAME of a model in the local cache of the hub, or `toy`.
    `bits` (2 to 6 or 8) or `grid` (such as `q4_k`) say what the large matrices become, or `recipe`
    names a shipped recipe or a file with rules; without any of them, experts get 4 bits. `effort`
    `low` is GPTQ; `normal` rounds experts and dense MLPs by two-sided rounding, for up to three
    times the time and about half the divergence, but for large models in little memory and on
    GPUs; `high` takes twice that time for another quarter less. `format` and `output` are the keys
    of the recipe's `output`. Raises InputError.
    """
    from grokquant.job.default_recipe import values_for
    from grokquant.recipe import parse_recipe

    return parse_recipe(values_for(model, recipe, bits, grid, format, output, effort))


def plan(recipe: "Recipe | str | Path | Mapping") -> "ShownPlan":
    """What `quantize` would do, from file headers alone. Raises InputError."""
    from grokquant.checkpoint import opener
    from grokquant.job.plan import build_plan
    from grokquant.reporting.shown import ShownPlan

    opened = opener()
    return ShownPlan.of(build_plan(_as_recipe(recipe, opened), opened))


def quantize(
    recipe: "Recipe | BudgetRecipe | str | Path | Mapping",
    device: str = "auto",
    overwrite: bool = False,
    repair: bool = False,
) -> "Path":
    """Quantizes as described by a recipe (file, mapping or object); returns the output directory.

    Of a recipe with a budget, the grids are chosen first, as `grokquant budget` does.
    A model, such as its directory, stands for `recipe_for(model)`.
    The same call resumes an interrupted run, and returns at once if its result is finished. A
    result of something else raises InputError, unless `overwrite`: then it is replaced once the new
    one is complete. `repair` only makes the files of a finished result again that `verify` rejects.
    A notebook shows a progress bar; elsewhere nothing is printed. Processes that torchrun has
    started make the result together.

    In the main thread Ctrl-C and SIGTERM let the current file finish, then raise
    `errors.Stopped`, a KeyboardInterrupt; a second one does so at once. Afterwards signals have the
    handlers that they had before.
    """
    from warnings import warn

    from grokquant import parallel
    from grokquant.checkpoint import opener
    from grokquant.devices import device_of
    from grokquant.errors import Stopped
    from grokquant.job import pipeline
    from grokquant.reporting.notebook_progress import run_progress

    progress = run_progress()
    place = device_of(parallel.own_device(device))
    if repair:
        parallel.refuse_to_share("quantize(repair=True): does not run")
    team = parallel.join(place, warn)
    opened = opener()
    made = _solved(_as_any_recipe(recipe, opened), place, team, opened)
    if repair:
        output = pipeline.repair(made, progress, place, opened)
    else:
        output = pipeline.quantize(made, progress, place, overwrite, team, opened)
    team.leave()
    if progress.asked_to_stop:  # when nothing was left to stop
        raise Stopped(f"{output}: is finished; a signal came while it was published")
    return output


def evaluate(
    quantized: "str | Path",
    reference: "str | Path",
    text: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    device: str = "auto",
    suite: str | None = None,
    quick: bool = False,
    cache: "str | Path | None" = None,
    cache_size: str = "20GB",
    any_reference: bool = False,
    task_files: bool = False,
    field: str | None = None,
    dtype: str = "auto",
    packed: bool | None = None,
) -> "ShownReport":
    """Compares a quantized output with its reference on the same tokens, both streamed.

    `text`, `samples`, `length` and `packed` default to the eval section of the recipe that made
    `quantized`, but a file or data set of its own must be given as `text`. `field` is that of its
    records which holds the text.
    A `suite`, a shipped one or a file, defines its own texts, tasks and thresholds; the report says
    which thresholds are met. `quick` skips the per-layer isolation measurements and the generated
    text. `cache` is a directory of at most `cache_size` that caches the reference's results for
    later evaluations. A reference that `quantized` was not made from is refused, or with
    `any_reference` named in the report. A suite may name files of tasks, which can run any code,
    only with `task_files`. `dtype` is that of the products of experts: float32, bfloat16, or auto,
    which is bfloat16 where that is faster for a large model. Processes that torchrun has started
    evaluate together, and each gets the report. Raises InputError.
    """
    from warnings import warn

    from grokquant import parallel
    from grokquant.devices import device_of
    from grokquant.evaluation.models import opened_models
    from grokquant.evaluation.run import cache_at, run_suite, suite_for
    from grokquant.reporting.notebook_progress import evaluation_progress
    from grokquant.reporting.shown import ShownReport

    place = device_of(parallel.own_device(device))
    team = parallel.join(place, warn)
    models = opened_models(quantized, reference, place, dtype, any_reference)
    evaluation = run_suite(
        models,
        suite_for(quantized, suite, text, samples, length, task_files, field, packed),
        suite or "",
        evaluation_progress(),
        place,
        forced=not quick,
        cache=cache_at(cache, cache_size, warn),
        team=team,
    )
    team.leave()
    return ShownReport.of(evaluation.report)


def inspect(path: "str | Path") -> "ModelSummary":
    """What a checkpoint holds, from file headers alone: a dictionary. Raises InputError."""
    from grokquant.reporting.shown import ModelSummary

    return ModelSummary.of(path)


def quantization_report(output: "str | Path") -> "ShownQuantization":
    """The report of the run that made `output`, with a row per matrix. Raises InputError."""
    from grokquant.reporting.shown import ShownQuantization

    return ShownQuantization.at(output)


def evaluation_report(output: "str | Path") -> "ShownReport":
    """The report that `grokquant eval` left in `output`. Raises InputError."""
    from grokquant.reporting.shown import evaluation_at

    return evaluation_at(output)


def compare(runs: "Sequence[str | Path | Report]") -> "ShownRanking":
    """Ranks evaluated models by quality and size: reports, or results that `grokquant eval` has
    evaluated, all with the same text and reference. Raises InputError."""
    from grokquant.reporting.shown import ShownRanking

    return ShownRanking.of(runs)


def _as_recipe(recipe: "Recipe | str | Path | Mapping", opened: "Opener") -> "Recipe":
    from grokquant.errors import InputError
    from grokquant.recipe import BudgetRecipe

    given = _as_any_recipe(recipe, opened)
    if isinstance(given, BudgetRecipe):
        raise InputError("recipe: quantize: has a budget, whose grids `quantize` chooses first")
    return given


def _as_any_recipe(
    recipe: "Recipe | BudgetRecipe | str | Path | Mapping", opened: "Opener"
) -> "Recipe | BudgetRecipe":
    from grokquant.job.default_recipe import values_for
    from grokquant.job.goals import is_recipe
    from grokquant.recipe import BudgetRecipe, Recipe, load_any_recipe, parse_any_recipe

    if isinstance(recipe, (Recipe, BudgetRecipe)):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_any_recipe(recipe)
    if is_recipe(recipe):
        return load_any_recipe(recipe)
    return parse_any_recipe(values_for(recipe, opened=opened))


def _solved(
    recipe: "Recipe | BudgetRecipe", device: "torch.device", team: "Team", opened: "Opener"
) -> "Recipe":
    """The recipe, its budget solved if it has one: by the first member of `team`, and for all."""
    from grokquant.recipe import BudgetRecipe, load_recipe

    if not isinstance(recipe, BudgetRecipe):
        return recipe
    from grokquant.job.allocation.allocate import allocate

    def solve() -> str:
        return str(allocate(recipe, lambda line: None, device, opened).path)

    return load_recipe(team.once(solve))
