"""Values of stored tensors: finite where they are floats or hold scales, and as the format demands.

Tensors are read as they are stored, not unpacked: any bits are codes, and scales show as floats.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.job.plan import Plan
from grokquant.job.verify.fault import Fault
from grokquant.job.verify.replan import stored_names
from grokquant.types import Source


def value_faults(stored: Source, path: Path, plan: Plan | None) -> Iterator[Fault]:
    """Faults of the tensors in the file `path`; `stored` are those of all files of a result."""
    try:
        listed = stored_names(stored.kind, [path])
    except InputError:
        return  # named where headers are compared
    names = [name for name in listed if name in stored.tensors]
    constants = _constants(plan, names) if plan else {}
    for name in names:
        ref = stored.tensors[name]
        try:
            for _ in ref.row_blocks():
                pass  # sources refuse floats and scales that are not finite
            if name in constants and not torch.equal(ref.read(), constants[name]):
                yield Fault(f"{path}: {name} has not the values that its format demands", path.name)
        except InputError as error:
            yield Fault(str(error), path.name)


def _constants(plan: Plan, names: Sequence[str]) -> dict[str, Tensor]:
    """The packed tensors among `names`, and of their units, that depend on no weight."""
    listed = set(names)
    parts = (part for part in plan.unit_of_part if plan.slots[part].tensor in listed)
    units = {plan.unit_of_part[part].name: plan.unit_of_part[part] for part in parts}
    constants: dict[str, Tensor] = {}
    for unit in units.values():
        values = plan.format.constants(unit.tensor, unit.shape, unit.scheme)
        constants |= {plan.slots[part].tensor: value for part, value in values.items()}
    return constants
