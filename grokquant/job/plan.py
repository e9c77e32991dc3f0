"""Decides everything before any work is done: the grid of each matrix, the size of each file."""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from grokquant.checkpoint import Checkpoint, Opener, open_checkpoint, without_extra_tensors
from grokquant.containers import container_of
from grokquant.containers.container import (
    Container,
    Group,
    OutputLayout,
    PlannedFile,
    PlannedTensor,
    Slot,
)
from grokquant.engines import BY_NAME, Contents, Stored
from grokquant.errors import GateError, InputError
from grokquant.escaping import one_line
from grokquant.families.family import Family
from grokquant.families.naming import HEAD, with_own_head
from grokquant.families.remote_code import RemoteCode
from grokquant.families.tokenizer import has_tokenizer, no_tokenizer
from grokquant.files.atomic import nearest_directory
from grokquant.files.links import refuse_no_place
from grokquant.files.unfinished import work_path
from grokquant.formats import FORMATS, Format
from grokquant.humanize import size
from grokquant.job.smaller_blocks import smaller_blocks
from grokquant.job.units import planned_units
from grokquant.methods import METHODS
from grokquant.methods.method import Needs
from grokquant.recipe import Recipe
from grokquant.streaming.gradients import differentiated_tokens, kept_bytes
from grokquant.types import Matrix, Source, Unit


@dataclass(frozen=True, repr=False)
class Plan:
    """A recipe applied to a checkpoint.

    `units` are the matrices to quantize, by name; `kept` names the quantizable matrices that are
    not quantized; `parts` are the tensors that the run computes or carries over, by name, and
    `output_layout` says where they go. `notes` are lines for the user.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    units: dict[str, Unit]
    kept: tuple[str, ...]
    parts: dict[str, PlannedTensor]
    output_layout: OutputLayout
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        places = one_line(f"{self.recipe.model.path} -> {self.recipe.output.path}")
        return f"<Plan {places}: {len(self.units)} matrices, {self.bits_per_weight:.3f} bits>"

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.output.format]

    @property
    def remote_code(self) -> RemoteCode | None:
        """The Python file that the output carries, if any."""
        return self.checkpoint.family.remote_code if self.recipe.output.remote_code else None

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The output's files, in the order in which they are written."""
        return self.output_layout.files

    @property
    def slots(self) -> dict[str, Slot]:
        return self.output_layout.slots

    @property
    def output_bytes(self) -> int:
        """Bytes of all weight files, to the byte: the size that every report gives."""
        return sum(file.layout.size for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.bytes for file in self.files for tensor in file.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the weight files, as `Checkpoint.bits_per_weight` of the finished output."""
        return 8 * self.output_bytes / self.checkpoint.parameters

    @cached_property
    def contents(self) -> Contents:
        """What programs that load the output will find."""
        tensors = self.checkpoint.source.tensors
        return Contents(
            self.recipe.output.format,
            self.checkpoint.family.name,
            tuple(
                Stored(matrix, tensors[matrix.tensor].shape, unit.scheme if unit else None)
                for matrix in self.checkpoint.matrices()
                for unit in [self.units.get(matrix.name)]
            ),
            own_head=HEAD in tensors,
            remote_code=self.remote_code is not None,
            names=self.recipe.output.names,
            names_experts=self.checkpoint.family.names_experts,
            joins=self.checkpoint.family.joins,
        )

    @cached_property
    def needs(self) -> set[Needs]:
        """The data that the methods of the units need."""
        return {METHODS[unit.method].needs for unit in self.units.values()}

    @property
    def needs_calibration(self) -> bool:
        return bool(self.needs - {Needs.NOTHING})

    @property
    def needs_reference(self) -> bool:
        return Needs.REFERENCE in self.needs

    @cached_property
    def needs_gradients(self) -> bool:
        """Whether the original runs backward first."""
        aimed = filter(self.has_aim, self.units.values())
        return any(METHODS[unit.method].needs_gradients(unit.settings) for unit in aimed)

    @cached_property
    def lone_experts(self) -> dict[int, frozenset[str]]:
        """The tensors of the dense MLPs that are rounded as the only expert of their layer, by
        layer: towards what they give in the original."""
        checkpoint = self.checkpoint
        asked: dict[int, set[str]] = defaultdict(set)
        for unit in self.units.values():
            if unit.expert is None and _aims(unit):
                asked[unit.layer].add(unit.tensor)
        names = {i: checkpoint.family.lone_expert(checkpoint.config, i).values() for i in asked}
        return {i: frozenset(names[i]) for i in asked if not asked[i].isdisjoint(names[i])}

    def in_expert(self, unit: Unit) -> bool:
        """Whether a matrix is rounded when its expert runs."""
        return unit.expert is not None or unit.tensor in self.lone_experts.get(unit.layer, ())

    def has_aim(self, unit: Unit) -> bool:
        """Whether a matrix can be rounded towards what it gives in the original, or towards what
        the output of its layer lacks."""
        return self.adds_to_sum(unit) or self.aims_alone(unit)

    def adds_to_sum(self, unit: Unit) -> bool:
        """Whether its expert can be rounded towards what the sum of the experts lacks."""
        whole = unit.expert is None or self.checkpoint.family.mixture_norm is not None
        return whole and self.in_expert(unit)

    def takes_turns(self, layer: int) -> bool:
        """Whether the experts of a layer are rounded towards what their sum is in the original, so
        that each needs what those before it give."""
        return any(map(_aims, filter(self.adds_to_sum, self.units_of(layer))))

    def aims_alone(self, unit: Unit) -> bool:
        """Whether a matrix of attention or of a shared expert is rounded so."""
        if unit.expert is not None or not _aims(unit):
            return False
        checkpoint = self.checkpoint
        return checkpoint.family.takes_aim(checkpoint.config, unit.layer, unit.part)

    def differentiated(self, layer: int) -> dict[str, list[Unit]]:
        """The matrices of a layer by whose outputs the original runs backward, by what they read,
        in the order of the computation."""
        sites: dict[str, list[Unit]] = defaultdict(list)
        for unit in filter(self.aims_alone, self.units_of(layer)):
            if METHODS[unit.method].needs_gradients(unit.settings):
                sites[unit.reads].append(unit)
        return sites

    def refitted_attention(self, layer: int) -> list[str]:
        """Checkpoint tensors of a layer that read the states before its attention and are fitted to
        the quantized model. Those of the first layer read what they read in the original."""
        if layer == 0 or not self._refits(layer):
            return []
        tensors = self.checkpoint.source.tensors
        return [
            matrix.tensor
            for matrix in self._kept_matrices[layer]
            if matrix.reads == "attention.q" and tensors[matrix.tensor].scheme is None
        ]

    def refitted_router(self, layer: int) -> str | None:
        """The checkpoint tensor of a layer's router if it is fitted to the quantized model."""
        names = self.checkpoint.family.router(self.checkpoint.config, layer)
        return names[0] if names and self._refits(layer) else None

    def refitted_in(self, layer: int) -> list[str]:
        """Both."""
        router = self.refitted_router(layer)
        return self.refitted_attention(layer) + ([router] if router else [])

    @cached_property
    def refitted(self) -> list[str]:
        """The tensors of all layers that are not quantized, but fitted to the quantized model."""
        layers = range(self.checkpoint.num_layers)
        return [name for layer in layers for name in self.refitted_in(layer)]

    def _refits(self, layer: int) -> bool:
        aimed = filter(self.adds_to_sum, self.units_of(layer))
        return any(METHODS[unit.method].refits(unit.settings) for unit in aimed)

    @cached_property
    def _kept_matrices(self) -> dict[int, list[Matrix]]:
        """The matrices of each layer that are not quantized."""
        kept: dict[int, list[Matrix]] = defaultdict(list)
        for matrix in self.checkpoint.matrices():
            if matrix.name not in self.units:
                kept[matrix.layer].append(matrix)
        return kept

    @property
    def gradient_bytes(self) -> int:
        """What the backward pass keeps on the disk."""
        if not self.needs_gradients:
            return 0
        config = self.checkpoint.config
        asked = self.recipe.calibration
        tokens = differentiated_tokens(asked.samples, asked.length)
        sites = self.differentiated(self.fullest_layer).values()
        rows = [[unit.shape[0] for unit in site] for site in sites]
        return self.checkpoint.num_layers * kept_bytes(tokens, config.hidden_size, rows)

    def units_of(self, layer: int) -> list[Unit]:
        """The units of a layer in the order of the computation."""
        return self._units_by_layer.get(layer, [])

    @cached_property
    def fullest_layer(self) -> int:
        """The first of the layers with most to do: others may be copied, or dense."""

        def to_do(layer: int) -> tuple[int, int]:
            units = self.units_of(layer)
            return sum(METHODS[unit.method].needs_site for unit in units), len(units)

        return max(range(self.checkpoint.num_layers), key=to_do)

    @property
    def calibration_tokens(self) -> int:
        """The number of tokens that a run asks for."""
        asked = self.recipe.calibration
        return asked.samples * min(asked.length, self.checkpoint.positions)

    def tokens_per_expert(self, layer: int) -> int:
        """How many of them reach an expert of a layer on average; all reach a lone one."""
        tokens = self.calibration_tokens
        return tokens if layer in self.lone_experts else self.checkpoint.tokens_per_expert(tokens)

    def sites_outside_experts(self, layer: int) -> list[list[Unit]]:
        """Units of a layer outside its experts, grouped by the input that they read."""
        sites: dict[str, list[Unit]] = {}
        for unit in self.units_of(layer):
            if not self.in_expert(unit):
                sites.setdefault(unit.reads, []).append(unit)
        return list(sites.values())

    @cached_property
    def _units_by_layer(self) -> dict[int, list[Unit]]:
        units: dict[int, list[Unit]] = {}
        for unit in self.units.values():
            units.setdefault(unit.layer, []).append(unit)
        return units

    @cached_property
    def unit_of_tensor(self) -> dict[str, Unit]:
        return {unit.tensor: unit for unit in self.units.values()}

    @cached_property
    def unit_of_part(self) -> dict[str, Unit]:
        """The unit of each packed tensor."""
        units = self.unit_of_tensor
        return {part: unit for tensor, unit in units.items() for part in self.parts_of(tensor)}

    def packed_bytes(self, unit: Unit) -> int:
        return self.format.packed_bytes(unit)

    def parts_of(self, tensor: str) -> list[str]:
        """The names of the parts that store a tensor of the checkpoint."""
        unit = self.unit_of_tensor.get(tensor)
        if unit is None:
            return [tensor]
        return list(self.format.packed_layout(tensor, unit.shape, unit.scheme))

    @property
    def carried_over(self) -> list[str]:
        """Checkpoint tensors that the output holds unchanged."""
        return [name for names in self._kept_by_layer.values() for name in names]

    @property
    def kept_outside_layers(self) -> list[str]:
        """Checkpoint tensors outside the layers: embedding, final norm, head."""
        return self._kept_by_layer[None]

    def kept_in_layer(self, index: int) -> list[str]:
        """Checkpoint tensors of a layer that are carried over unchanged."""
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
        return {part: file_of[place.tensor] for part, place in self.slots.items()}


def build_plan(recipe: Recipe, opened: Opener = open_checkpoint) -> Plan:
    """The rules of `recipe` applied to its checkpoint, which is `opened` (headers only).

    Raises InputError naming the rule or unit if a rule matches nothing or a grid does not fit a
    matrix. `check_disk` checks the free space.
    """
    refuse_no_place(Path(recipe.output.path))
    return plan_of(recipe, opened(recipe.model.path, recipe.model.config))


def plan_of(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """The rules of `recipe` applied to `checkpoint`, wherever that lies. Raises InputError."""
    if recipe.output.extra_tensors == "leave_out":
        checkpoint = without_extra_tensors(checkpoint)
    if recipe.output.lm_head:
        source = with_own_head(checkpoint.source)
        checkpoint = replace(checkpoint, source=source)
    output_format = FORMATS[recipe.output.format]
    prepared = container_of(recipe.output.format).prepared(checkpoint.source)
    checkpoint = replace(checkpoint, source=prepared)
    units = planned_units(recipe, checkpoint, output_format)
    _check_experts_run(checkpoint, units)
    kept = tuple(matrix.name for matrix in checkpoint.matrices() if matrix.name not in units)
    if not units and not output_format.holds_dense:
        raise InputError("recipe: quantize: no rule rounds a matrix, there is nothing to quantize")
    planned = {unit.tensor: unit for unit in units.values()}
    groups = _part_groups(checkpoint, planned, output_format)
    schemes = {tensor: unit.scheme for tensor, unit in planned.items()}
    container = container_of(recipe.output.format)
    without = _check_tokenizer(recipe, checkpoint.source, container)
    notes = (*without, *smaller_blocks(units.values()))
    laid_out = checkpoint.source
    if recipe.output.tokenizer == "none":
        laid_out = replace(laid_out, tokenizer_files=())
    parts = {part.name: part for _, group in groups for part in group}
    names = _stored_names(recipe, checkpoint.family, parts)
    stored = [(layer, [replace(p, name=names[p.name]) for p in group]) for layer, group in groups]
    output_layout = container.lay_out(laid_out, stored, schemes, recipe.output.shard)
    slots = {part: output_layout.slots[name] for part, name in names.items()}
    output_layout = replace(output_layout, slots=slots)
    plan = Plan(recipe, checkpoint, units, kept, parts, output_layout, notes)
    plan = replace(plan, notes=(*notes, *_rounded_as_gptq(plan)))
    if plan.needs_calibration and not has_tokenizer(checkpoint.source):
        raise no_tokenizer(checkpoint.source)
    if recipe.output.remote_code:
        _check_remote_code(plan)
    return plan


def _aims(unit: Unit) -> bool:
    """Whether its method rounds towards what the original model gives."""
    return METHODS[unit.method].needs is Needs.REFERENCE


def _rounded_as_gptq(plan: Plan) -> Iterator[str]:
    """A line about matrices outside the experts whose method should aim and cannot."""
    parts: dict[str, list[str]] = defaultdict(list)
    for unit in plan.units.values():
        if unit.expert is None and _aims(unit) and not plan.has_aim(unit):
            parts[unit.method].append(unit.part)
    for method, names in parts.items():
        listed = ", ".join(dict.fromkeys(names))
        yield f"{method} rounds {listed} as gptq does: it does not know what they should give"


def _check_experts_run(checkpoint: Checkpoint, units: dict[str, Unit]) -> None:
    """Raises InputError for a method that would have to see the inputs of single experts, where
    the model's code computes all experts at once."""
    for unit in units.values():
        if METHODS[unit.method].needs_site and not checkpoint.family.sees_inputs(unit):
            name = checkpoint.family.name
            raise InputError(
                f"recipe: quantize[{unit.rule}].method: {unit.method} needs the inputs of "
                f"{unit.name}, but experts of {name} do not run one by one; use rtn"
            )


def _stored_names(recipe: Recipe, family: Family, parts: Iterable[str]) -> dict[str, str]:
    """The names of parts in the files. Raises InputError where `names` has no effect."""
    if recipe.output.names == "published":
        return {part: part for part in parts}
    if recipe.output.format != "gptq":
        raise InputError("gptqmodel is allowed with format gptq only", "output.names")
    if not family.gptqmodel_names:
        text = f"GPTQModel has no other names for {family.name} than the published ones"
        raise InputError(text, "output.names")
    return {part: family.gptqmodel_name(part) for part in parts}


def _check_remote_code(plan: Plan) -> None:
    """Raises InputError where a file of classes is not needed, or would not be enough."""
    family = plan.checkpoint.family
    if family.remote_code is None:
        its_own = family.model_class.__module__.startswith("transformers.")
        text = f"transformers has {family.name} itself" if its_own else f"not for {family.name}"
        raise InputError(text, "output.remote_code")
    if limit := BY_NAME["transformers"].limit(plan.contents):
        text = f"transformers alone does not take {limit.reason}"
        raise InputError(text, "output.remote_code")


def _check_tokenizer(recipe: Recipe, source: Source, container: Container) -> tuple[str, ...]:
    """Lines about a tokenizer that the output will not have.

    Raises InputError if its weight files need one that is missing, or `tokenizer` has no effect.
    """
    asked = recipe.output.tokenizer
    if asked == "none" and not container.holds_tokenizer:
        raise InputError("none is allowed with format gguf only", "output.tokenizer")
    if has_tokenizer(source):
        return ()
    if asked == "source" and container.holds_tokenizer:
        text = f"{source.path} has none; `none` writes files without one, or copy one there"
        raise InputError(text, "output.tokenizer")
    return (f"{source.path}: has no tokenizer, so the output has none either",)


def _part_groups(
    checkpoint: Checkpoint, planned: dict[str, Unit], output_format: Format
) -> list[Group]:
    """(layer, parts) of each group that must not be split, in the order of the run."""
    order = {tensor: number for number, tensor in enumerate(planned)}
    groups = []
    for layer, names in _groups(checkpoint):
        names.sort(key=lambda name: order.get(name, -1))
        parts = [
            part for name in names for part in _stored_as(checkpoint, name, planned, output_format)
        ]
        groups.append((layer, parts))
    return groups


def _groups(checkpoint: Checkpoint) -> Iterator[tuple[int | None, list[str]]]:
    """(layer, checkpoint names) of each group that must not be split: an expert, or the rest."""
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
    checkpoint: Checkpoint, name: str, planned: dict[str, Unit], output_format: Format
) -> Iterator[PlannedTensor]:
    """The tensors that store the checkpoint's tensor `name` in the output."""
    unit = planned.get(name)
    ref = checkpoint.source.tensors[name]
    layout = {name: (ref.dtype, ref.shape)}
    if unit:
        layout = output_format.packed_layout(name, unit.shape, unit.scheme)
    for stored, (dtype, shape) in layout.items():
        yield PlannedTensor(stored, dtype, shape)


def tensors_by_layer(checkpoint: Checkpoint) -> dict[int | None, list[str]]:
    """Checkpoint names by layer, in the order of writing; None stands for outside the layers."""
    layers = range(checkpoint.num_layers)
    by_layer: dict[int | None, list[str]] = {layer: [] for layer in [None, *layers]}
    for name in checkpoint.source.tensors:
        layer = checkpoint.family.layer_of(name)
        by_layer[layer if layer in layers else None].append(name)
    return by_layer


def check_engine(plan: Plan, name: str) -> None:
    """Raises GateError if the consumer called `name` cannot take the output of `plan`."""
    consumer = BY_NAME[name]
    limit = consumer.limit(plan.contents)
    if limit is None:
        return
    place = ""
    if limit.about == "rules":
        matrix = limit.at_fault(plan.contents)[0].matrix.name
        index = plan.recipe.rule_index(matrix)
        rule = "no rule" if index is None else f"quantize[{index}]"
        place = f" ({matrix}, of {rule})"
    does = "gives wrong results for" if limit.wrong else "does not take"
    raise GateError(f"{consumer.title} {does} {limit.reason}{place}: {limit.way_out}")


def check_disk(plan: Plan) -> None:
    """Raises InputError if the output's disk has too little space for the rest of the output."""
    output = Path(plan.recipe.output.path)
    free = shutil.disk_usage(nearest_directory(output)).free
    of_interrupted_run = (work_path(output) / "files" / file.name for file in plan.files)
    written = sum(path.stat().st_size for path in of_interrupted_run if path.is_file())
    needed = plan.output_bytes - written + plan.gradient_bytes
    if needed > free:
        raise InputError(
            f"{output}: needs {size(needed)}, but only {size(free)} are free on its disk"
        )
