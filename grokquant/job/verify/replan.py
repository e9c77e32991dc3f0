"""The plan of a finished result, computed again from what lies in it.

Its recipe and its config say how each matrix should be stored, in which file and with how many
bytes. The source is not needed: the result has the same tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from grokquant.checkpoint import Checkpoint
from grokquant.containers import container_of
from grokquant.errors import InputError
from grokquant.files.regular import open_regular
from grokquant.job.metadata import ORIGIN
from grokquant.job.plan import Plan, plan_of
from grokquant.job.shards import REPORT_NAME
from grokquant.recipe import Recipe
from grokquant.types import Origin


def planned_again(recipe: Recipe, checkpoint: Checkpoint, report: Mapping) -> Plan:
    """The plan that `recipe` makes of a result, with its tensors in the order of their bytes.

    Raises InputError where the recipe cannot have made it.
    """
    plan = plan_of(recipe, _with_origin(checkpoint, report))
    return plan_of(recipe, _in_stored_order(plan))


def _with_origin(checkpoint: Checkpoint, report: Mapping) -> Checkpoint:
    """Names and licence of the source come from the report, and are in headers of GGUF files."""
    noted = report.get(ORIGIN)
    try:
        known = dict(noted) if noted else {}  # without a report, that is the fault to name
        origin = Origin(**known | {"languages": tuple(known.get("languages", ()))})
    except (TypeError, ValueError):
        path = checkpoint.source.path / REPORT_NAME
        raise InputError(f"{path}: {ORIGIN} cannot be read") from None
    return replace(checkpoint, source=replace(checkpoint.source, origin=origin))


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
