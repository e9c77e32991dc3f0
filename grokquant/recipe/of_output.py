"""The evaluation settings in the recipe beside an output."""

import re
from pathlib import Path

from pydantic import ValidationError

from grokquant.errors import InputError
from grokquant.recipe import BUILT_IN_TEXTS, EvalSection, is_file, load_recipe, recipe_text

# Texts that the recipe in a result may name: that of Python itself, and a data set of the hub. Any
# other name could be that of a private file.
_KNOWN_TEXTS = (*BUILT_IN_TEXTS, "Salesforce/wikitext")
# A recipe of llm-compressor has stages. It may hold Python objects, so it is not read as YAML.
_STAGE = re.compile(r"^\w+_stage\s*:", re.MULTILINE)


def settings_of(
    output: str | Path,
    text: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    field: str | None = None,
    packed: bool | None = None,
) -> EvalSection:
    """The eval section of the recipe that made `output`, or the defaults, with the given changes.

    Raises InputError where that recipe or a given value cannot be used.
    """
    recipe = _recipe_of(output)
    settings = load_recipe(recipe).eval if recipe else EvalSection()
    given = {"text": text, "samples": samples, "length": length, "packed": packed}
    changes: dict[str, object] = {k: value for k, value in given.items() if value is not None}
    if text is not None or field is not None:
        changes["field"] = field  # the recipe's is that of its own text
    try:
        return EvalSection(**(settings.model_dump() | changes))
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        raise InputError(problem["msg"].removeprefix("Value error, "), key) from None


def check_text_is_known(output: str | Path, settings: EvalSection) -> None:
    """Raises InputError if the recipe of `output` names a file or data set of its own: it may come
    from anybody, and published recipes have no paths."""
    if settings.text.partition(":")[0] in _KNOWN_TEXTS:
        return
    missing = is_file(settings.text) and not Path(settings.text).exists()
    what = "is not here; give its path" if missing else "is read only if you name it yourself"
    raise InputError(f"{_recipe_of(output)} names {settings.text}, which {what}", "text")


def origin_of_text(output: str | Path, text: str | None) -> str:
    """Where the text of an evaluation comes from, if `text` is what was given."""
    if text is not None:
        return "as given"
    recipe = _recipe_of(output)
    return f"named by {recipe}" if recipe else "the default"


def _recipe_of(output: str | Path) -> Path | None:
    """The recipe that made `output`, if it has one. llm-compressor calls its own the same."""
    path = Path(output) / "recipe.yaml"
    is_ours = path.is_file() and not _STAGE.search(recipe_text(path))
    return path if is_ours else None
