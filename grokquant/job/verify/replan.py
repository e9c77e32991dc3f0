"""The plan of a finished result, computed again from what lies in it.

Its recipe and its config say how each matrix should be stored, in which file and with how many
bytes. The source is not needed: the result has the same tensors.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from grokquant.checkpoint import Checkpoint
from grokquant.containers import container_of
from grokquant.files.regular import open_regular
from grokquant.job.plan import Plan, plan_of
from grokquant.recipe import Recipe


def planned_again(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """The plan that `recipe` makes of a result, with its tensors in the order of their bytes.

    Raises InputError where the recipe cannot have made it.
    """
    plan = plan_of(recipe, checkpoint)
    return plan_of(recipe, _in_stored_order(plan))


def _in_stored_order(plan: Plan) -> Checkpoint:
    """A run writes tensors in the order of its source, which only the files of a result know."""
    source = plan.checkpoint.source
    stored = stored_names(plan.recipe.output.format, source.weight_files)
    place = {name: number for number, name in enumerate(stored)}
    order = {
        name: place.get(plan.slots[plan.parts_of(name)[0]].tensor, len(place))
        for name in source.tensors
    }
    names = sorted(source.tensors, key=order.__getitem__)
    tensors = {name: source.tensors[name] for name in names}
    return replace(plan.checkpoint, source=replace(source, tensors=tensors))


def stored_names(output_format: str, files: Iterable[Path]) -> list[str]:
    """What the headers of files name, in the order of the files and of the bytes in them."""
    container = container_of(output_format)
    names: list[str] = []
    for path in files:
        with open_regular(path) as file:
            names += container.listed(file, str(path))
    return names
