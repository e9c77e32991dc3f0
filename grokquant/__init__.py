"""Quantizes Grok-1 and its kind, streamed block by block, and proves what it cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from grokquant.families import grok_model as _grok_model
from grokquant.runtime.load import load
from grokquant.tokenizer import register as _register_tokenizer

if TYPE_CHECKING:
    from grokquant.evaluation.report import EvaluationReport
    from grokquant.plan import Plan
    from grokquant.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["evaluate", "load", "plan", "quantize"]

_grok_model.register()
_register_tokenizer()

RecipeLike = "Recipe | str | Path | Mapping"


def plan(recipe: "Recipe | str | Path | Mapping") -> "Plan":
    """What `quantize` would do, from file headers alone. Raises InputError."""
    from grokquant.plan import build_plan

    return build_plan(_as_recipe(recipe))


def quantize(recipe: "Recipe | str | Path | Mapping") -> Path:
    """Quantizes as a recipe (file, mapping or object) says; returns the output directory."""
    from grokquant import pipeline

    return pipeline.quantize(_as_recipe(recipe))


def evaluate(
    quantized: str | Path,
    reference: str | Path,
    text: str = "python-docs",
    windows: int = 64,
    length: int = 256,
) -> "EvaluationReport":
    """Compares a quantized output with its reference on the same tokens, both streamed."""
    from grokquant.evaluation import evaluate as run

    return run(quantized, reference, text, windows, length)


def _as_recipe(recipe: "Recipe | str | Path | Mapping") -> "Recipe":
    from grokquant.recipe import Recipe, load_recipe, parse_recipe

    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)
