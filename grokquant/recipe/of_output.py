"""The evaluation settings in the recipe beside an output."""

from pathlib import Path

from pydantic import ValidationError

from grokquant.errors import InputError
from grokquant.recipe import EvalSection, is_file, load_recipe


def settings_of(
    output: str | Path,
    text: str | None = None,
    samples: int | None = None,
    length: int | None = None,
) -> EvalSection:
    """The eval section of the recipe that made `output`, or the defaults, with the given changes.

    Raises InputError where that recipe or a given value cannot be used.
    """
    recipe = Path(output) / "recipe.yaml"
    settings = load_recipe(recipe).eval if recipe.is_file() else EvalSection()
    given = {"text": text, "samples": samples, "length": length}
    changes = {key: value for key, value in given.items() if value is not None}
    try:
        return EvalSection(**(settings.model_dump() | changes))
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        raise InputError(problem["msg"].removeprefix("Value error, "), key) from None


def check_text_is_here(output: str | Path, settings: EvalSection) -> None:
    """Raises InputError if the recipe of `output` names a text file that is not here: published
    recipes have no absolute paths."""
    if is_file(settings.text) and not Path(settings.text).exists():
        recipe = Path(output) / "recipe.yaml"
        raise InputError(
            f"{recipe} names {settings.text}, which is not here; give its path", "text"
        )
