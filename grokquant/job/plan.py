"""Decides everything before anything is spent: which matrix gets which grid, and its size."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import gcd, prod
from pathlib import Path
from types import ModuleType

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.containers import container_of
from grokquant.containers.container import Arrangement, Group, Place, PlannedFile, PlannedTensor
from grokquant.errors import InputError
from grokquant.files.atomic import nearest_directory
from grokquant.formats import FORMATS
from grokquant.grids import GRIDS, Scheme
from grokquant.humanize import size
from grokquant.methods.copy import can_copy
from grokquant.recipe import Recipe, Rule
from grokquant.types import TensorRef, Unit


@dataclass(frozen=True)
class Plan:
    """A recipe applied to a checkpoint.

    `units` are the matrices to quantize by unit name; `kept` names the quantizable matrices that
    stay as they are; `parts` is what the run computes or carries over, by name, and `arrangement`
    where it goes.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    units: dict[str, Unit]
    kept: tuple[str, ...]
    parts: dict[str, PlannedTensor]
    arrangement: Arrangement

    @property
    def packing(self) -> ModuleType:
        return FORMATS[self.recipe.output.format]

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The output's files, in the order in which they are written."""
        return self.arrangement.files

    @property
    def places(self) -> dict[str, Place]:
        return self.arrangement.places

    @property
    def output_bytes(self) -> int:
        """Bytes of all weight files, to the byte."""
        return sum(file.layout.size for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.bytes for file in self.files for tensor in file.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.checkpoint.parameters

    @property
    def needs_calibration(self) -> bool:
        return any(unit.method == "gptq" for unit in self.units.values())

    def rule_of(self, unit: str) -> Rule:
        return next(rule for rule in self.recipe.quantize if rule.matches(unit))

    def units_of(self, layer: int, experts: bool = True) -> list[Unit]:
        """The units of a layer in the order of the computation; without its experts if so asked."""
        units = [u for u in self.units.values() if u.name.startswith(f"layers.{layer}.")]
        return [u for u in units if experts or ".experts." not in u.name]

    @cached_property
    def unit_of_tensor(self) -> dict[str, Unit]:
        return {unit.tensor: unit for unit in self.units.values()}

    def packed_bytes(self, unit: Unit) -> int:
        layout = self.packing.packed_layout(unit.tensor, unit.shape, unit.scheme).values()
        return sum(prod(shape) * dtype.itemsize for dtype, shape in layout)

    @property
    def carried_over(self) -> list[str]:
        """Checkpoint tensors that are in the output as they are."""
        return [name for names in self._kept_by_layer.values() for name in names]

    @property
    def kept_outside_layers(self) -> list[str]:
        """Checkpoint tensors outside the layers: embedding, final norm, head."""
        return self._kept_by_layer[None]

    def kept_in_layer(self, index: int) -> list[str]:
        """Checkpoint tensors of a layer that are carried over as they are."""
        return self._kept_by_layer[index]

    @cached_property
    def _kept_by_layer(self) -> dict[int | None, list[str]]:
        return {
            layer: [name for name in names if name not in self.unit_of_tensor]
            for layer, names in tensors_by_layer(self.checkpoint).items()
        }

    @cached_property
    def file_of(self) -> dict[str, PlannedFile]:
        """The file of each part."""
        file_of = {tensor.name: file for file in self.files for tensor in file.tensors}
        return {part: file_of[place.tensor] for part, place in self.places.items()}


def build_plan(recipe: Recipe) -> Plan:
    """Opens the checkpoint of `recipe` (headers only) and applies its rules.

    Raises InputError naming the rule or unit where a rule matches nothing or a grid does not fit a
    matrix. Whether the output has room is left to `check_disk`.
    """
    checkpoint = open_checkpoint(recipe.model.path, recipe.model.config)
    names = [name for name, _ in checkpoint.units()]
    _check_rules_match(recipe, names)
    packing = FORMATS[recipe.output.format]
    units, kept = {}, []
    for name, ref in checkpoint.units():
        rule = recipe.rule_for(name)
        if rule is None or rule.method == "keep":
            kept.append(name)
        else:
            units[name] = _plan_unit(name, ref, rule, packing)
    if not units and not packing.HOLDS_DENSE:
        raise InputError("recipe: quantize: every matrix is kept, there is nothing to do")
    planned = {unit.tensor: unit for unit in units.values()}
    groups = _part_groups(checkpoint, planned, packing)
    schemes = {tensor: unit.scheme for tensor, unit in planned.items()}
    container = container_of(recipe.output.format)
    arrangement = container.arrange(checkpoint.source, groups, schemes, recipe.output.shard)
    parts = {part.name: part for _, group in groups for part in group}
    return Plan(recipe, checkpoint, units, tuple(kept), parts, arrangement)


def _check_rules_match(recipe: Recipe, names: list[str]) -> None:
    """Raises InputError for a rule that no matrix takes: it would be left out in silence."""
    taken = {id(recipe.rule_for(name)) for name in names}
    for index, rule in enumerate(recipe.quantize):
        key = f"recipe: quantize[{index}].match: {rule.match!r}"
        if not any(rule.matches(name) for name in names):
            raise InputError(
                f"{key} matches no matrix of {recipe.model.path} "
                f"(they are called like {names[0]} or {names[-1]})"
            )
        if id(rule) not in taken:
            raise InputError(f"{key} decides nothing, rules before it take all that it matches")


def _plan_unit(name: str, ref: TensorRef, rule: Rule, packing: ModuleType) -> Unit:
    rows, columns = ref.shape
    scheme = _copied(name, ref, rule, packing) if rule.method == "copy" else _chosen(rule, packing)
    if scheme.group_size == columns and rule.grid == "integer" and scheme.is_integer:
        scheme = replace(scheme, group_size=None)
    if columns % (scheme.group_size or 1):
        raise InputError(
            f"{name}: {columns} input features are not divisible by group {scheme.group_size}"
        )
    if rule.method == "copy" and not (ref.scheme and can_copy(ref.scheme, scheme, columns)):
        raise InputError(f"{name}: copy to {scheme} is not lossless, the source has {ref.scheme}")
    if reason := packing.refusal(scheme, (rows, columns)):
        raise InputError(f"{name}: {packing.NAME} cannot hold it: {reason}")
    return Unit(name, ref.name, (rows, columns), rule.method, scheme)


def _chosen(rule: Rule, packing: ModuleType) -> Scheme:
    """The grid that a rule asks for."""
    group = rule.group if isinstance(rule.group, int) else None
    if rule.grid != "integer":
        named = GRIDS[rule.grid].scheme
        return replace(named, group_size=group) if rule.group else named
    scale_dtype = rule.scale_dtype or packing.SCALE_DTYPE
    return Scheme(rule.bits or 8, group, rule.symmetric, scale_dtype)


def _copied(name: str, ref: TensorRef, rule: Rule, packing: ModuleType) -> Scheme:
    """The stored grid in groups as large as rule, source and format allow; scales are repeated,
    and keep their dtype where the format has it."""
    columns = ref.shape[1]
    if ref.scheme is None:
        raise InputError(f"{name}: method copy needs a source that stores integers")
    if not ref.scheme.is_integer:
        return ref.scheme
    stored, group = ref.scheme.group_size or columns, rule.group
    most = gcd(stored, group) if isinstance(group, int) else stored
    groups = [most, *(smaller for smaller in (128, 64, 32) if most % smaller == 0)]
    groups = [columns] if group == "channel" else groups
    dtypes = (
        [rule.scale_dtype] if rule.scale_dtype else [ref.scheme.scale_dtype, packing.SCALE_DTYPE]
    )
    schemes = [
        replace(ref.scheme, group_size=None if size == columns else size, scale_dtype=dtype)
        for size in groups
        for dtype in dtypes
    ]
    return next((s for s in schemes if not packing.refusal(s, ref.shape)), schemes[0])


def _part_groups(
    checkpoint: Checkpoint, planned: dict[str, Unit], packing: ModuleType
) -> list[Group]:
    """(layer, parts) of what must not be split, in the order in which they will come."""
    order = {tensor: number for number, tensor in enumerate(planned)}
    groups = []
    for layer, names in _groups(checkpoint):
        names.sort(key=lambda name: order.get(name, -1))
        parts = [part for name in names for part in _stored_as(checkpoint, name, planned, packing)]
        groups.append((layer, parts))
    return groups


def _groups(checkpoint: Checkpoint) -> Iterator[tuple[int | None, list[str]]]:
    """(layer, checkpoint names) of what must not be split: an expert, the rest of a layer."""
    family = checkpoint.family
    for layer, names in tensors_by_layer(checkpoint).items():
        if layer is None:
            yield from ((None, [name]) for name in names)
            continue
        numbers = range(family.num_experts(checkpoint.config, layer))
        experts = [
            [*family.expert_tensors(layer, n).values(), *family.expert_biases(layer, n).values()]
            for n in numbers
        ]
        in_experts = set(chain.from_iterable(experts))
        yield layer, [name for name in names if name not in in_experts]
        yield from ((layer, expert) for expert in experts)


def _stored_as(
    checkpoint: Checkpoint, name: str, planned: dict[str, Unit], packing: ModuleType
) -> Iterator[PlannedTensor]:
    """What the output holds of the checkpoint's tensor `name`."""
    unit, ref = planned.get(name), checkpoint.source.tensors[name]
    layout = {name: (ref.dtype, ref.shape)}
    if unit:
        layout = packing.packed_layout(name, unit.shape, unit.scheme)
    for stored, (dtype, shape) in layout.items():
        yield PlannedTensor(stored, dtype, shape)


def tensors_by_layer(checkpoint: Checkpoint) -> dict[int | None, list[str]]:
    """Checkpoint names layer by layer, in the order in which they are written; None is outside."""
    layers = range(checkpoint.config.num_hidden_layers)
    owners = {checkpoint.family.layer_prefix.format(layer=layer): layer for layer in layers}
    depth = checkpoint.family.layer_prefix.count(".")
    by_layer: dict[int | None, list[str]] = {layer: [] for layer in [None, *layers]}
    for name in checkpoint.source.tensors:
        prefix = ".".join(name.split(".")[:depth]) + "."
        by_layer[owners.get(prefix)].append(name)
    return by_layer


def work_path(output: Path) -> Path:
    """The directory in which a run works until `output` is whole."""
    output = output.resolve()  # "." has no name; a link leads to the disk that is meant
    return output.with_name(output.name + ".partial")


def check_disk(plan: Plan) -> None:
    """Raises InputError where the output's disk has too little room for what is still to come."""
    output = Path(plan.recipe.output.path)
    free = shutil.disk_usage(nearest_directory(output)).free
    of_interrupted_run = (work_path(output) / "files" / file.name for file in plan.files)
    written = sum(path.stat().st_size for path in of_interrupted_run if path.is_file())
    if plan.output_bytes - written > free:
        raise InputError(
            f"{output}: needs {size(plan.output_bytes - written)}, "
            f"{size(free)} are free on that disk"
        )
