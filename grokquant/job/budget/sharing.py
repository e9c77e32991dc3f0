"""What each of several processes holds, sends and does, where they make one result together.

In a layer all wait for the one that has most to do. Its work is counted in multiply-adds:

    outside the experts   forward passes                 divided by the number of processes
                          Hessians, solves               by one, while the others wait
    experts               all of it                      by their owners
                          where they take turns, solves  by one, while the others wait
                          of down
"""

from dataclasses import dataclass, replace
from math import ceil, prod

from grokquant.errors import InputError
from grokquant.job.attention import LAST
from grokquant.job.budget.memory import FLOAT, hidden_unit_bytes, on_device, peak_step
from grokquant.job.budget.timing import passes_outside_experts, weights_outside_experts
from grokquant.job.division import Division
from grokquant.job.experts import is_starved
from grokquant.job.plan import Plan
from grokquant.methods import METHODS
from grokquant.parallel import AT_ONCE, supposed
from grokquant.streaming.blocks import CALIBRATION_DTYPE, TOKENS_IN_PIECE
from grokquant.streaming.gradients import differentiated_tokens
from grokquant.types import Unit


@dataclass(frozen=True)
class Sharing:
    """`processes` that make a result together.

    `peak_bytes` is the memory that one of them takes at most beside its libraries, `device_bytes`
    what is on its GPU of it, if it has one and calibrates; `moved_bytes` is what all send to each
    other; `share` is the part of the time of one process that they take.
    """

    processes: int
    peak_bytes: int
    device_bytes: int
    moved_bytes: int
    share: float


def sharing_of(plan: Plan, processes: int) -> Sharing:
    """Raises InputError for a plan that several processes cannot carry out."""
    if processes < 1:
        raise InputError("expected at least 1", "ranks")
    division = Division(plan, supposed(processes))
    division.check()
    if not plan.needs_calibration:
        written = [0] * processes
        for file in plan.files:
            written[division.writer_of_file(file)] += file.layout.size
        return Sharing(processes, peak_step(plan).bytes, 0, 0, max(written) / sum(written))
    layers = range(plan.checkpoint.num_layers)
    moved = sum(_moved_in_layer(division, layer, processes) for layer in layers)
    for unit in plan.units.values():
        if division.maker_of(unit) != division.writer_of(unit):
            moved += plan.packed_bytes(unit)
    outside = weights_outside_experts(plan)
    works = [_work_in_layer(division, layer, processes, outside[layer]) for layer in layers]
    alone, longest = (sum(column) for column in zip(*works, strict=True))
    peak = _peak(division, processes)
    return Sharing(processes, peak, on_device(plan), round(moved), longest / alone)


def _peak(division: Division, processes: int) -> int:
    """What one process would hold with these rows, and what comes here from others: rows for its
    experts, with their outputs, or all inputs of a matrix outside them."""
    plan = division.plan
    asked = plan.recipe.calibration
    piece = max(1, TOKENS_IN_PIECE // asked.length)
    rows = min(asked.samples, ceil(asked.samples / piece / processes) * piece)
    own = asked.model_copy(update={"samples": rows})
    with_own = replace(plan, recipe=plan.recipe.model_copy(update={"calibration": own}))
    alone = peak_step(with_own)
    if processes == 1:
        return alone.bytes
    layer = plan.fullest_layer
    owners = division.owners(layer)
    most = max((owners.count(owner) for owner in owners), default=0)
    routed = plan.tokens_per_expert(layer)
    # Of each owned expert, inputs and outputs; of own rows, a copy to send.
    rows_here = 2 * most * routed + len(owners) * routed // processes
    size = CALIBRATION_DTYPE.itemsize
    if plan.takes_turns(layer):  # inputs of both models; of one expert, what is asked and answered
        rows_here += routed * (FLOAT + size) // size
    rows_here += plan.calibration_tokens * _blends(division, layer)
    for_experts = rows_here * plan.checkpoint.text_config.hidden_size * size
    sites = [units for units in plan.sites_outside_experts(layer) if _needs_inputs(units)]
    widest = max((units[0].shape[1] for units in sites), default=0)
    come = max(for_experts, plan.calibration_tokens * widest * size)
    # An owner keeps hidden units of the tokens of all.
    downs = [unit for unit in plan.units_of(layer) if unit.expert == 0 and unit.part == "down"]
    come += sum(hidden_unit_bytes(plan, u) - hidden_unit_bytes(with_own, u) for u in downs)
    return alone.bytes + come + 2 * min(AT_ONCE, come)  # and buffers of the exchange


def _moved_in_layer(division: Division, layer: int, processes: int) -> float:
    """Inputs of experts and their outputs, and those of all tokens where too few reach an expert;
    outside the experts, inputs for the maker, and for all others the matrices that it has rounded.
    Each row is sent by the process that has it."""
    plan = division.plan
    elsewhere = (1 - 1 / processes) * CALIBRATION_DTYPE.itemsize
    moved = 0.0
    owners = division.owners(layer)
    rows = _passages(plan, layer) * len(owners) * plan.tokens_per_expert(layer)
    rows += plan.calibration_tokens * len(set(owners)) * _blends(division, layer)
    moved += rows * plan.checkpoint.text_config.hidden_size * elsewhere
    for units in plan.sites_outside_experts(layer):
        if _needs_inputs(units):
            moved += plan.calibration_tokens * _width_of_site(plan, units) * elsewhere
        moved += sum(map(plan.packed_bytes, units)) * (processes - 1)
    moved += _moved_for_gradients(division, layer, processes)
    return moved + _moved_to_fit(plan, layer, processes, elsewhere)


def _width_of_site(plan: Plan, units: list[Unit]) -> int:
    """What the maker of matrices outside experts gets of each token, in numbers of two bytes: their
    inputs, and where they have an aim, those of the original or the outputs, and a weight."""
    columns = units[0].shape[1]
    if not any(map(plan.aims_alone, units)):
        return columns
    in_float32 = FLOAT // CALIBRATION_DTYPE.itemsize
    is_last = units[0].part == LAST
    goal = plan.checkpoint.text_config.hidden_size * in_float32 if is_last else columns
    return columns + goal + in_float32


def _passages(plan: Plan, layer: int) -> int:
    """How often something as large as its input goes to the owner of an expert, or comes back, for
    each token that is routed to it."""
    there_and_back = 2
    if plan.takes_turns(layer):
        # Twice by the stored experts. Then inputs of both models, outputs of the stored expert,
        # what they should be, in float32, and the outputs.
        return 2 * there_and_back + 2 + 1 + 2 + 1
    return there_and_back * (2 if plan.needs_reference else 1)


def _moved_for_gradients(division: Division, layer: int, processes: int) -> float:
    """In float32: inputs of experts and outputs, both and their gradients, and what one process
    makes metrics of."""
    plan = division.plan
    if not plan.needs_gradients:
        return 0
    asked = plan.recipe.calibration
    tokens = differentiated_tokens(asked.samples, asked.length)
    experts = len(division.owners(layer))
    routed = experts * plan.checkpoint.tokens_per_expert(tokens)
    there_and_back = 2
    rows = (1 + 2) * there_and_back * routed + tokens * bool(experts)
    sites = plan.differentiated(layer).values()
    outs = sum(unit.shape[0] for site in sites for unit in site)
    numbers = rows * plan.checkpoint.text_config.hidden_size + tokens * outs
    return numbers * (1 - 1 / processes) * FLOAT


def _moved_to_fit(plan: Plan, layer: int, processes: int, elsewhere: float) -> float:
    """Inputs, in both models, of what is fitted to them, and for all others what is fitted."""
    router = plan.refitted_router(layer)
    sites = [plan.refitted_attention(layer), [router] if router else []]
    shapes = [[plan.checkpoint.source.tensors[name].shape for name in names] for names in sites]
    inputs = sum(2 * plan.calibration_tokens * site[0][1] for site in shapes if site)
    dtype = CALIBRATION_DTYPE.itemsize
    fitted = sum(prod(shape) for site in shapes for shape in site) * dtype
    return inputs * elsewhere + fitted * (processes - 1)


def _work_in_layer(
    division: Division, layer: int, processes: int, outside: dict[str, int]
) -> tuple[float, float]:
    """Multiply-adds of one process alone, and of the one that the others wait for; `outside` are
    the weights outside the experts."""
    plan = division.plan
    owned = [0.0] * processes
    costs = division.costs_of_experts(layer)
    turns = _turns(division, layer)
    for owner, cost, turn in zip(division.owners(layer), costs, turns, strict=True):
        owned[owner] += cost - turn
    passes = passes_outside_experts(plan, layer, outside)
    passed = passes * plan.calibration_tokens * sum(outside.values())
    solved = sum(
        division.cost(unit, plan.calibration_tokens, shared=unit is units[0])
        for units in plan.sites_outside_experts(layer)
        for unit in units
        if METHODS[unit.method].needs_site
    )
    solved += sum(turns)
    return passed + solved + sum(owned), passed / processes + solved + max(owned)


def _turns(division: Division, layer: int) -> list[float]:
    """Multiply-adds for each expert of a layer during which all others wait: solves of its down."""
    plan = division.plan
    turns = [0.0] * len(division.owners(layer))
    if not plan.takes_turns(layer):
        return turns
    for unit in plan.units_of(layer):
        if plan.in_expert(unit) and unit.part.endswith("down"):
            cost = METHODS[unit.method].cost(*unit.shape, unit.settings)
            turns[unit.expert or 0] += cost.shared_products + cost.products
    return turns


def _blends(division: Division, layer: int) -> bool:
    """Whether experts get so few tokens that their Hessians are blended with that of all."""
    plan = division.plan
    limits = plan.recipe.experts
    tokens = plan.checkpoint.tokens_per_expert(plan.calibration_tokens)
    solved = (
        unit
        for unit in plan.units_of(layer)
        if unit.expert is not None and METHODS[unit.method].needs_site
    )
    spans = (METHODS[u.method].block_columns(u.shape[1], u.settings) for u in solved)
    return tokens >= limits.min_tokens and any(is_starved(limits, tokens, n) for n in spans)


def _needs_inputs(units: list[Unit]) -> bool:
    return any(METHODS[unit.method].needs_site for unit in units)
