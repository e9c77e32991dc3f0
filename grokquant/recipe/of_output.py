"""What the recipe beside an output says about evaluating it."""

from pathlib import Path

from pydantic import ValidationError

from grokquant.errors import InputError
from grokquant.recipe import EvalSection, load_recipe


def settings_of(
    output: str | Path,
    data: str | None = None,
    samples: int | None = None,
    length: int | None = None,
) -> EvalSection:
    """The eval section of the recipe that made `output`, or the defaults, with what is given.

    Raises InputError where that recipe or the name of the text cannot be used.
    """
    recipe = Path(output) / "recipe.yaml"
    settings = load_recipe(recipe).eval if recipe.is_file() else EvalSection()
    given = {"data": data, "samples": samples, "length": length}
    changes = {key: value for key, value in given.items() if value is not None}
    try:
        return EvalSection(**(settings.model_dump() | changes))
    except ValidationError as error:
        (key, *_), text = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise InputError(f"eval.{key}: {text.removeprefix('Value error, ')}") from None
