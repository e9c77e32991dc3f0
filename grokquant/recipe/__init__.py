"""What to make: the recipe of a run, read from YAML or Python values."""

from grokquant.recipe.reading import load_recipe, load_sections, parse_recipe
from grokquant.recipe.schema import (
    TEXT_SUFFIXES,
    CalibrationSection,
    EvalSection,
    ExpertsSection,
    ModelSection,
    OutputSection,
    Recipe,
    RowLength,
    Rows,
    Rule,
    Section,
    TextName,
    check_text,
    is_file,
    is_repository_text,
    parse_size,
)

__all__ = [
    "TEXT_SUFFIXES",
    "CalibrationSection",
    "EvalSection",
    "ExpertsSection",
    "ModelSection",
    "OutputSection",
    "Recipe",
    "RowLength",
    "Rows",
    "Rule",
    "Section",
    "TextName",
    "check_text",
    "is_file",
    "is_repository_text",
    "load_recipe",
    "load_sections",
    "parse_recipe",
    "parse_size",
]
