"""Who makes which matrix and who writes which file, where several processes make one result.

All members know it before the run begins:

    expert       made by the member with the least to do in its layer, by the cost of Hessians and
                 solves; nobody else ever holds those Hessians
    file         written by the maker of its first expert, else by the member with the fewest bytes
    other units  those that read the same input are made by the writer of the first one
"""

from math import prod

import torch

from grokquant.containers.container import PlannedFile
from grokquant.errors import InputError
from grokquant.job.plan import Plan
from grokquant.methods import METHODS
from grokquant.parallel import Team
from grokquant.types import QTensor, Unit


class Division:
    """The division of a plan among the members of `team`."""

    def __init__(self, plan: Plan, team: Team) -> None:
        self.plan = plan
        self.team = team
        self._owners: dict[int, list[int]] = {}  # of the experts of each layer
        self._maker: dict[str, int] = {}
        if plan.needs_calibration:
            for layer in range(plan.checkpoint.num_layers):
                self._assign_experts(layer)
        self._writer = self._writers()
        for unit in plan.units.values():
            self._maker.setdefault(unit.name, self.writer_of(unit))
        if plan.needs_calibration:
            self._join_sites()

    def check(self) -> None:
        """Raises InputError for a plan that cannot be divided."""
        for unit in self.plan.units.values():
            if METHODS[unit.method].sees_layer and self.team.is_divided:
                raise InputError(
                    f"recipe: quantize[{unit.rule}].method: {unit.method} rounds with a view of "
                    "the whole layer, so it does not run under torchrun; run it as one process"
                )

    def owners(self, layer: int) -> list[int]:
        """The makers of the experts of a layer."""
        return self._owners[layer]

    def maker_of(self, unit: Unit) -> int:
        return self._maker[unit.name]

    def writer_of(self, unit: Unit) -> int:
        """The writer of a unit's file."""
        return self.writer_of_file(self._file_of(unit))

    def writer_of_file(self, file: PlannedFile) -> int:
        return self._writer[file.name]

    def is_made_here(self, unit: Unit) -> bool:
        return self.team.is_here(self.maker_of(unit))

    def is_written_here(self, file: PlannedFile) -> bool:
        return self.team.is_here(self.writer_of_file(file))

    def shared(self, unit: Unit, made: QTensor | None, device: torch.device) -> QTensor:
        """A unit that its maker has rounded, on all members; it travels as it is packed."""
        output_format = self.plan.format
        return self.team.shared(
            made,
            lambda quantized: output_format.pack(unit.tensor, quantized),
            lambda parts: output_format.unpack(unit.tensor, parts, unit.scheme).to(device),
            output_format.packed_layout(unit.tensor, unit.shape, unit.scheme),
            self.maker_of(unit),
        )

    def handed_over(
        self, unit: Unit, parts: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """The packed `parts` that the maker of a unit has, on the writer of its file."""
        layout = self.plan.format.packed_layout(unit.tensor, unit.shape, unit.scheme)
        return self.team.hand_over(parts, layout, self.maker_of(unit), self.writer_of(unit))

    def _file_of(self, unit: Unit) -> PlannedFile:
        """The file of a unit, whose parts are never apart."""
        return self.plan.file_of[self.plan.parts_of(unit.tensor)[0]]

    def costs_of_experts(self, layer: int) -> list[float]:
        """Multiply-adds for each expert of a layer: its Hessians, its solves and its outputs."""
        checkpoint = self.plan.checkpoint
        is_lone = layer in self.plan.lone_experts
        experts = 1 if is_lone else checkpoint.family.num_experts(checkpoint.config, layer)
        costs = [0.0] * experts
        tokens = self.plan.tokens_per_expert(layer)
        sites: set[tuple[int, str]] = set()
        for unit in self.plan.units_of(layer):
            if not self.plan.in_expert(unit):
                continue
            expert = unit.expert or 0
            site = (expert, unit.reads)
            costs[expert] += self.cost(unit, tokens, shared=site not in sites)
            sites.add(site)
        return costs

    def _assign_experts(self, layer: int) -> None:
        self._owners[layer] = self.team.assign(self.costs_of_experts(layer))
        for unit in self.plan.units_of(layer):
            if self.plan.in_expert(unit):
                self._maker[unit.name] = self._owners[layer][unit.expert or 0]

    def cost(self, unit: Unit, tokens: int, shared: bool) -> float:
        """Multiply-adds for a matrix that `tokens` reach; `shared`: and for the Hessian of its site
        and what is made of it."""
        method = METHODS[unit.method]
        cost = method.cost(*unit.shape, unit.settings)
        products = tokens * prod(unit.shape) + cost.products
        if shared and method.needs_site:
            columns = unit.shape[1]
            block = method.block_columns(columns, unit.settings)
            products += tokens * columns * block + cost.shared_products
        return products

    def _writers(self) -> dict[str, int]:
        """The writer of each file, by its name."""
        writers: dict[str, int] = {}
        for unit in self.plan.units.values():
            if unit.name in self._maker:
                writers.setdefault(self._file_of(unit).name, self._maker[unit.name])
        others = [file for file in self.plan.files if file.name not in writers]
        chosen = self.team.assign([file.layout.size for file in others])
        return writers | {file.name: m for file, m in zip(others, chosen, strict=True)}

    def _join_sites(self) -> None:
        """Has all units of a layer that read the same input, outside experts, made by one member:
        it alone needs their Hessian."""
        for layer in range(self.plan.checkpoint.num_layers):
            for units in self.plan.sites_outside_experts(layer):
                self._maker |= dict.fromkeys((u.name for u in units), self.writer_of(units[0]))
