"""From a recipe with a budget to one with rules: measures, solves, writes it beside the output.

    OUT.budget/measured.json   errors of matrices, layer by layer; what they were measured with
    OUT.budget/hidden-N        states of the tokens before layer N, while layers are left
    OUT.budget/recipe.yaml     the recipe, for people to read and change
    OUT.budget/written.json    its checksum, by which a changed one is recognized

Measurements depend neither on the number of bits nor on the unit, so that other budgets are solved
at once.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from grokquant.checkpoint import Checkpoint, Opener, open_checkpoint
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.escaping import one_line
from grokquant.families.tokenizer import has_tokenizer, no_tokenizer
from grokquant.files import atomic
from grokquant.formats import FORMATS
from grokquant.job.allocation.choices import Choice, choices_of, options_of, rules_of
from grokquant.job.allocation.measure import Errors, LayerErrors, Probe, costs, divergences
from grokquant.job.allocation.solver import solve
from grokquant.job.fingerprint import PACKAGES, contents_of, difference, rows_digest
from grokquant.job.lock import check_output, locked
from grokquant.job.plan import plan_of
from grokquant.job.shards import commit_tensors
from grokquant.memory import memory_for
from grokquant.recipe import BudgetRecipe, Recipe, parse_recipe, to_yaml
from grokquant.streaming.blocks import BlockwiseModel
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer

_MEASURED = "measured.json"
_WRITTEN = "written.json"
_RECIPE = "recipe.yaml"
# In bfloat16, states that differ a little are rounded differently ever after: that alone costs as
# much as one kind of matrices of one layer in 4 bits.
_DTYPE = torch.float32
# A recipe says why its matrices take less than this share of the budget.
_NEARLY_ALL = 0.995
# Probes together have as many rows as the original, so that they take about as long again.
_PROBED_ROWS = 1.0

Note = Callable[[str], None]


@dataclass(frozen=True)
class Allocation:
    """A budget solved: the recipe, its text, and where that is written.

    `bits_per_weight` is what the matrices of the budget take, `kld` the mean divergence that they
    are expected to cost, in nats, if all errors add up.
    """

    recipe: Recipe
    text: str
    path: Path
    bits_per_weight: float
    kld: float


@dataclass(frozen=True)
class Measured:
    """What rounding costs, as far as it is measured: `layers` of the model are done."""

    layers: int
    errors: dict[str, Errors]
    probes: list[Probe]
    kld: list[float] | None = None


def budget_path(output: Path) -> Path:
    """The directory of a budget's measurements and recipe, beside the output."""
    output = Path(os.path.realpath(output))  # "." has no name
    return output.with_name(output.name + ".budget")


def allocate(
    recipe: BudgetRecipe,
    note: Note,
    device: torch.device = CPU,
    opened: Opener = open_checkpoint,
) -> Allocation:
    """Chooses the grid of each matrix of the budget, and writes the recipe that says so.

    Goes on from an interrupted measurement, and measures nothing twice. Raises InputError for a
    budget that cannot be met, for measurements of something else, and for a recipe in the place of
    its own that was changed by hand.
    """
    checkpoint = opened(recipe.model.path, recipe.model.config)
    output = Path(recipe.output.path)
    check_output(output, checkpoint.source.path)
    choices = choices_of(recipe, checkpoint)
    budget = _bytes_of(recipe, choices)
    smallest = [_smallest(choice) for choice in choices]
    plan_of(_with_rules(recipe, choices, smallest), checkpoint)  # what it refuses, it refuses now
    if not has_tokenizer(checkpoint.source):
        raise no_tokenizer(checkpoint.source)
    place = budget_path(output)
    with locked(place):
        measured = _measure(recipe, checkpoint, choices, place, note, device)
        assert measured.kld is not None
        cost_of = costs(measured.errors, measured.probes, measured.kld)
        expected = [
            [sum(cost_of[unit.name][option.grid] for unit in option.units) for option in c.options]
            for c in choices
        ]
        taken = solve(expected, [[option.bytes for option in c.options] for c in choices], budget)
        kld = sum(row[option] for row, option in zip(expected, taken, strict=True))
        return _written(recipe, choices, taken, kld, place)


def _bytes_of(recipe: BudgetRecipe, choices: Sequence[Choice]) -> int:
    """The budget in bytes. Raises InputError if the smallest grids exceed it."""
    asked = recipe.quantize.budget.bits_per_weight
    weights = sum(choice.weights for choice in choices)
    least = sum(choice.options[_smallest(choice)].bytes for choice in choices)
    if 8 * least > asked * weights:
        text = f"the smallest of the grids take {8 * least / weights:.3f} bits, not {asked:g}"
        raise InputError(f"recipe: quantize.budget.bits_per_weight: {text}")
    return int(asked * weights / 8)


def _smallest(choice: Choice) -> int:
    return min(range(len(choice.options)), key=lambda option: choice.options[option].bytes)


def _with_rules(recipe: BudgetRecipe, choices: Sequence[Choice], taken: Sequence[int]) -> Recipe:
    return parse_recipe(recipe.with_rules(rules_of(recipe, choices, taken)))


# --- measuring


def _measure(
    recipe: BudgetRecipe,
    checkpoint: Checkpoint,
    choices: Sequence[Choice],
    place: Path,
    note: Note,
    device: torch.device,
) -> Measured:
    """All measurements, those that are in `place` already included."""
    rows = calibration_rows(recipe.calibration, load_tokenizer(checkpoint), checkpoint)
    identity = _identity(recipe, checkpoint, rows)
    measured = _recovered(place, identity)
    if measured.kld is not None:
        return measured
    options = options_of(choices)
    layers = checkpoint.num_layers
    model = BlockwiseModel(checkpoint, _DTYPE, device, pieces=True)
    with memory_for("embedding"), torch.no_grad():
        hidden = model.embed(rows)
    kinds = {(unit.layer, unit.kind) for units in options.values() for unit in units.values()}
    probed = max(1, int(_PROBED_ROWS * len(rows) / len(kinds)))
    if measured.layers:
        hidden = load_file(_states(place, measured.layers))["hidden"].clone()
    for index in range(measured.layers, layers):
        note(f"budget: measuring layer {index} of {layers}")
        layer = LayerErrors(model, index, options, recipe.experts.min_tokens)
        with memory_for(f"layer {index}"), torch.no_grad():
            hidden = layer.run(hidden, len(rows), probed)
        measured = Measured(
            index + 1, measured.errors | layer.errors, [*measured.probes, *layer.probes]
        )
        _save(place, identity, measured, hidden)
    with memory_for("head"), torch.no_grad():
        kld = divergences(model, hidden, len(rows), probed)
    measured = Measured(layers, measured.errors, measured.probes, kld)
    _save(place, identity, measured, None)
    return measured


def _identity(recipe: BudgetRecipe, checkpoint: Checkpoint, rows: Tensor) -> dict[str, Any]:
    """What determines the measurements. JSON values only."""
    budget = recipe.quantize.budget.model_dump(mode="json")
    for free in ("bits_per_weight", "unit"):
        del budget[free]
    return {
        "budget": budget,
        "rules": [rule.match for rule in recipe.quantize.rules],
        "format": recipe.output.format,
        "experts": recipe.experts.model_dump(),
        "calibration text": rows_digest(rows),
        **contents_of(checkpoint),
        "version": {package: version(package) for package in PACKAGES},
    }


def _recovered(place: Path, identity: dict) -> Measured:
    """What is measured in `place`. Raises InputError if it is of something else."""
    path = place / _MEASURED
    record = atomic.read_record(path)
    nothing = Measured(0, {}, [])
    if record is None:
        return nothing
    if changed := difference(record["of"], identity):
        raise InputError(
            f"{place}: holds measurements of something else ({changed}); remove that directory to "
            "measure anew, or restore the settings"
        )
    states = _states(place, record["layers"])
    if record["kld"] is None and not atomic.holds(states, record["states"]):
        return nothing
    errors = {name: Errors(*map(_numbered, row)) for name, row in record["errors"].items()}
    probes = [Probe(row["layer"], row["kind"], row["grids"]) for row in record["probes"]]
    return Measured(record["layers"], errors, probes, record["kld"])


def _numbered(row: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are texts."""
    return {int(grid): value for grid, value in row.items()}


def _save(place: Path, identity: dict, measured: Measured, hidden: Tensor | None) -> None:
    path = _states(place, measured.layers)
    checksum = None if hidden is None else commit_tensors(path, {"hidden": hidden})
    record = {
        "of": identity,
        "layers": measured.layers,
        "errors": {name: [e.outputs, e.weights] for name, e in measured.errors.items()},
        "probes": [asdict(probe) for probe in measured.probes],
        "kld": measured.kld,
        "states": checksum,
    }
    atomic.write_record(place / _MEASURED, _as_json(record))
    for old in place.glob("hidden-*"):
        if hidden is None or old != path:
            old.unlink(missing_ok=True)


def _as_json(record: dict) -> dict:
    """The record as it is read back, so that its checksum is the same."""
    errors = {
        name: [{str(grid): value for grid, value in row.items()} for row in rows]
        for name, rows in record["errors"].items()
    }
    return record | {"errors": errors}


def _states(place: Path, layer: int) -> Path:
    return place / f"hidden-{layer}"


# --- the recipe


def _written(
    recipe: BudgetRecipe,
    choices: Sequence[Choice],
    taken: Sequence[int],
    kld: float,
    place: Path,
) -> Allocation:
    """Writes the recipe. Raises InputError where one is that was changed by hand."""
    values = recipe.with_rules(rules_of(recipe, choices, taken))
    resolved = parse_recipe(values)
    used = sum(choice.options[option].bytes for choice, option in zip(choices, taken, strict=True))
    bits = 8 * used / sum(choice.weights for choice in choices)
    head = _headed(recipe, choices, taken, bits, kld)
    text = f"{head}\n{to_yaml(values)}"
    path = place / _RECIPE
    before = atomic.read_record(place / _WRITTEN) or {}
    if path.exists() and not atomic.holds(path, before.get("sha256", "")):
        raise InputError(
            f"{path}: was changed by hand; quantize that file itself, or move it away for a new one"
        )
    atomic.write_record(place / _WRITTEN, {"sha256": sha256(text.encode()).hexdigest()})
    atomic.write_text(path, text)
    return Allocation(resolved, text, path, bits, kld)


def _headed(
    recipe: BudgetRecipe, choices: Sequence[Choice], taken: Sequence[int], bits: float, kld: float
) -> str:
    """Comments at the top of the recipe: what was asked for, and what it became."""
    budget = recipe.quantize.budget
    name = FORMATS[recipe.output.format].grid_name
    matrices: Counter[str] = Counter()
    for choice, option in zip(choices, taken, strict=True):
        for unit in choice.options[option].units:
            matrices[name(unit.scheme)] += 1
    shares = ", ".join(f"{count} in {grid}" for grid, count in matrices.most_common())
    lines = [
        f"{bits:.4f} of {budget.bits_per_weight:g} bits per weight in {budget.match}",
        f"matrices: {shares}",
        f"expected divergence: {kld:.2g} nats a token",
    ]
    if bits < _NEARLY_ALL * budget.bits_per_weight:
        lines.insert(1, f"not all is used: {_why_left(choices, taken, _bytes_of(recipe, choices))}")
    return "\n".join(f"# {one_line(line)}" for line in lines)


def _why_left(choices: Sequence[Choice], taken: Sequence[int], budget: int) -> str:
    """Why the best choice takes clearly less than the budget in bytes."""
    pairs = list(zip(choices, taken, strict=True))
    left = budget - sum(choice.options[option].bytes for choice, option in pairs)
    steps = [
        larger.bytes - choice.options[option].bytes
        for choice, option in pairs
        for larger in choice.options
        if larger.bytes > choice.options[option].bytes
    ]
    if not steps:
        return "all matrices have the largest grid"
    if min(steps) <= left:
        return "larger grids that would fit are expected to cost more"
    bits = 8 * min(steps) / sum(choice.weights for choice in choices)
    return f"the next larger grid of one unit takes {bits:.2g} bits more; a smaller unit fills it"
