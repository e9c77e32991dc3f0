"""What a recipe for any model can aim at, and what no recipe can: known before any model is opened.

Nothing here imports transformers, which takes seconds: a slip of the pen is told at once.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from grokquant.errors import InputError
from grokquant.files.unfinished import RECIPE_SUFFIXES
from grokquant.grids import GRIDS, NAMED
from grokquant.sources import PICKLES
from grokquant.sources.located import WEIGHT_SUFFIXES

# How matrices are rounded below 8 bits, if two-sided rounding knows what they should give; others
# are rounded by GPTQ. Normal effort takes up to three times as long as low for about half the
# divergence of experts, high effort twice as long again for another quarter less.
LOW, NORMAL, HIGH = "low", "normal", "high"
EFFORTS: dict[str, dict[str, Any]] = {
    LOW: {"method": "gptq"},
    NORMAL: {"method": "two-sided"},
    HIGH: {"method": "two-sided", "metric": "gradients", "descent": True},
}
# The grid of each number of bits, where a format has no integers of its own.
_GRIDS_OF_BITS = {
    "gguf": {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"},
    "bitsandbytes": {4: "nf4", 8: "llm_int8"},
}
_BITS = (2, 3, 4, 5, 6, 8)
# What people call plain integers, which are asked for by their bits.
INTEGERS = ("integer", *(f"int{bits}" for bits in _BITS))


@dataclass(frozen=True)
class Goal:
    """What a recipe for any model aims at. `bits` is None for a named grid."""

    text: str
    format: str = "compressed-tensors"
    bits: int | None = None
    grid: str = "integer"
    effort: str = NORMAL

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits or GRIDS[self.grid].bits


GOALS = {
    "int4": Goal("Experts in 4 bits, attention in 8: for vLLM and transformers", bits=4),
    "int8": Goal("8 bits, unchanged where the model has them already, else rounded", bits=8),
    "gptq": Goal("All matrices in 4 bits, in the gptq layout", "gptq", bits=4),
    "q2_k": Goal("Experts in 2.6 bits, attention in 8.5: for llama.cpp", "gguf", None, "q2_k"),
    "q3_k": Goal("The same in 3.4 bits", "gguf", None, "q3_k"),
    "iq4_xs": Goal("The same in 4.25 bits", "gguf", None, "iq4_xs"),
    "q4_k": Goal("The same in 4.5 bits", "gguf", None, "q4_k"),
    "q5_k": Goal("The same in 5.5 bits", "gguf", None, "q5_k"),
    "q6_k": Goal("The same in 6.6 bits", "gguf", None, "q6_k"),
    "q8_0": Goal("All matrices in 8.5 bits: for llama.cpp", "gguf", None, "q8_0"),
    "nf4": Goal(
        "All matrices in nf4, rounded to nearest: for bitsandbytes", "bitsandbytes", None, "nf4"
    ),
    "bf16": Goal("Nothing quantized: one checkpoint of floats, as transformers reads it", "bf16"),
}


def is_recipe(path: str | Path) -> bool:
    """Whether `path` is meant as the file of a recipe, not as a model."""
    path = Path(path)
    if path.suffix.lower() in (*RECIPE_SUFFIXES, ".json"):
        return not path.is_dir()
    return path.is_file() and path.suffix not in (*WEIGHT_SUFFIXES, *PICKLES)


def aim_of(
    recipe: str | Path | None,
    bits: int | None,
    grid: str | None,
    format: str | None,
    effort: str = NORMAL,
) -> tuple[str, Goal] | None:
    """The name and the goal of what is asked for; None if `recipe` is a file, which has the rules.

    Raises InputError for what does not go together.
    """
    for key, value in (("bits", bits), ("grid", grid)):
        if recipe is not None and value is not None:
            raise InputError(f"cannot be combined with recipe {recipe}, which decides it", key)
    if effort not in EFFORTS:
        raise InputError(f"expected {_either(EFFORTS)}, not {effort}", "effort")
    if recipe is not None and is_recipe(recipe):
        if effort != NORMAL:
            raise InputError(f"recipe {recipe} has methods of its own: change them", "effort")
        return None
    name, goal = goal_of(None if recipe is None else str(recipe), bits, grid, format)
    return name, replace(goal, effort=effort)


def goal_of(
    recipe: str | None, bits: int | None, grid: str | None, format: str | None
) -> tuple[str, Goal]:
    """What is aimed at, and a name for it. Raises InputError for what no format holds."""
    grid = grid and grid.lower()
    recipe = recipe and recipe.lower()
    if bits not in (None, *_BITS):
        raise InputError(f"expected {_either(_BITS)}, not {bits}", "bits")
    if bits is not None and grid is not None:
        raise InputError(f"cannot be combined with grid {grid}, which has its own", "bits")
    if recipe is not None:
        return _shipped(recipe, format)
    if grid is not None:
        return grid, _of_grid(grid, format)
    if format == "bf16":
        if bits is not None:
            raise InputError("not allowed with format bf16, which is not quantized", "bits")
        return "bf16", GOALS["bf16"]
    if format in _GRIDS_OF_BITS:
        grids = _GRIDS_OF_BITS[format]
        if bits not in (None, *grids):
            raise InputError(f"format {format} has {_either(grids)}, not {bits}", "bits")
        return grids[bits or 4], _of_grid(grids[bits or 4], format)
    if bits in (5, 6):
        raise InputError(f"only format gguf has {bits}, in q{bits}_k", "bits")
    chosen = format or ("compressed-tensors" if bits in (None, 4, 8) else "gptq")
    if chosen == "compressed-tensors" and bits in (2, 3):
        raise InputError(f"only formats gptq and gguf have {bits}", "bits")
    name = f"int{bits or 4}"
    return (f"gptq-{name}" if chosen == "gptq" else name), Goal("", chosen, bits or 4)


def _shipped(recipe: str, format: str | None) -> tuple[str, Goal]:
    if recipe not in GOALS:
        raise InputError(
            f"no recipe {recipe!r}, expected a .yaml file or one of {', '.join(GOALS)}", "recipe"
        )
    goal = GOALS[recipe]
    if format in (None, goal.format):
        return recipe, goal
    held = GRIDS[goal.grid].formats if goal.format != "bf16" else ("bf16",)
    if format not in held:
        raise InputError(f"recipe {recipe} cannot be written as {format}: use another", "format")
    return f"{recipe}-{format}", replace(goal, format=format)


def _of_grid(grid: str, format: str | None) -> Goal:
    if grid in INTEGERS:
        raise InputError(f"{grid} is no grid of its own: give bits instead", "grid")
    if grid not in NAMED:
        near = get_close_matches(grid, NAMED, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"no grid {grid!r}, expected one of {', '.join(NAMED)}{meant}", "grid")
    row = GRIDS[grid]
    own = "gguf" if row.ggml_type is not None else row.formats[0]
    if format not in (None, *row.formats):
        raise InputError(f"grid {grid} is held by {_either(row.formats)}, not {format}", "format")
    return Goal("", format or own, None, grid)


def _either(values: Any) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
