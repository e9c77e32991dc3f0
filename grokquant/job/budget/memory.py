"""The memory of a run, step by step: the bytes that the code holds at once."""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from grokquant.job.hidden_units import kept_tokens
from grokquant.job.plan import Plan
from grokquant.methods import METHODS
from grokquant.streaming.blocks import (
    CALIBRATION_DTYPE,
    INPUTS_AT_ONCE,
    TOKENS_AT_ONCE,
    TOKENS_IN_PIECE,
)
from grokquant.streaming.gradients import differentiated_tokens
from grokquant.types import ROW_BLOCK_BYTES, TensorRef, Unit

FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Step:
    """A step of the run: the bytes it holds, and the recipe key that lowers them."""

    name: str
    bytes: int
    knob: str | None


def peak_step(plan: Plan) -> Step:
    """The step that holds the most."""
    steps = _calibrated(plan) if plan.needs_calibration else _without_data(plan)
    return max([*steps, _copying(plan)], key=lambda step: step.bytes)


def on_device(plan: Plan) -> int:
    """The most that a calibrated run holds on a GPU, where it has one: what lies outside the
    experts of a layer, and a matrix with its Hessian while it is rounded."""
    units = plan.units_of(plan.fullest_layer)
    outside = sum(prod(unit.shape) for unit in units if not plan.in_expert(unit))
    held = outside * CALIBRATION_DTYPE.itemsize
    return max(_calibrated_unit(plan, unit, held).bytes for unit in units)


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process, libraries included: now, or at its peak so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes(device: torch.device) -> int:
    """Free memory of `device`, without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except OSError:
        return total_bytes()


def total_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _copying(plan: Plan) -> Step:
    """Carried-over tensors: one block is read, two wait, one is written."""
    kept = [plan.checkpoint.source.tensors[name] for name in plan.carried_over]
    blocks = [(_block_bytes(ref), ref.name) for ref in kept]
    largest, name = max(blocks, default=(0, ""))
    return Step(f"{name}: carried over", 4 * largest, None)


def _block_bytes(ref: TensorRef) -> int:
    dense = prod(ref.shape) * ref.dtype.itemsize
    return dense if ref.load_rows is None else min(dense, ROW_BLOCK_BYTES)


def _without_data(plan: Plan) -> Iterator[Step]:
    """Two stored matrices, this and the next; two packed ones, this and the one being written."""
    for unit in plan.units.values():
        stored = plan.checkpoint.source.tensors[unit.tensor].stored_bytes
        yield Step(f"{unit.name}: rounding", 2 * stored + 2 * plan.packed_bytes(unit), None)


def _calibrated(plan: Plan) -> Iterator[Step]:
    """The embedding; then each unit of a layer, beside all that calibration holds throughout."""
    config = plan.checkpoint.text_config
    tokens = plan.calibration_tokens
    size = CALIBRATION_DTYPE.itemsize
    states = tokens * config.hidden_size * size
    outside = sum(prod(_shape(plan, name)) * (size + FLOAT) for name in plan.kept_outside_layers)
    yield Step("embedding", outside + 2 * states, "calibration.samples")
    if plan.needs_gradients:
        yield _differentiating(plan)
    for layer in dict.fromkeys([plan.fullest_layer, *plan.lone_experts]):
        yield from _calibrated_layer(plan, layer)


def _calibrated_layer(plan: Plan, layer: int) -> Iterator[Step]:
    """Hidden states, the experts' inputs and the sum of their outputs; the block's attention."""
    config = plan.checkpoint.text_config
    tokens = plan.calibration_tokens
    size = CALIBRATION_DTYPE.itemsize
    states = tokens * config.hidden_size * size
    units = plan.units_of(layer)
    outside_experts = [unit for unit in units if not plan.in_expert(unit)]
    attention = sum(prod(unit.shape) * size for unit in outside_experts)
    always = attention + 2 * states + tokens * config.hidden_size * FLOAT
    if plan.needs_reference:
        # Its states; the experts' inputs and what is missing in their sum; while that is computed,
        # two sums in float32 and the states before the experts, of both models.
        always += 3 * states + tokens * config.hidden_size * FLOAT
        summing = always + 2 * states + 2 * tokens * config.hidden_size * FLOAT
        name = f"layer {layer}: what its experts should give"
        yield Step(name, summing, "calibration.samples")
        aimed = filter(plan.aims_alone, units)
        given = {unit.reads: unit.shape[1] for unit in aimed}
        if given:
            # The inputs of attention's matrices in the original and of one in the quantized model;
            # what its output should be.
            widths = sum(given.values()) + max(given.values())
            attending = always + tokens * (widths * size + config.hidden_size * FLOAT)
            yield Step(
                f"layer {layer}: what its attention should give", attending, "calibration.samples"
            )
        # What one expert should give, and gives as it is stored; metrics of the outputs.
        always += plan.tokens_per_expert(layer) * config.hidden_size * (FLOAT + size)
        always += 4 * config.hidden_size**2 * FLOAT
    for unit in units:
        yield _calibrated_unit(plan, unit, always)


def _differentiating(plan: Plan) -> Step:
    """The backward pass: everything outside the layers, a layer without its experts, one expert,
    states and gradients of some tokens, and what threads differentiate."""
    config = plan.checkpoint.text_config
    asked = plan.recipe.calibration
    length = min(asked.length, plan.checkpoint.positions)
    tokens = differentiated_tokens(asked.samples, length)
    # Inputs, outputs and gradients by them; the same of the experts alone, and what these get.
    states = 9 * tokens * config.hidden_size
    layer = [matrix for matrix in plan.checkpoint.matrices() if matrix.layer == 0]
    held = [matrix for matrix in layer if matrix.expert in (None, 0)]
    weights = sum(prod(_shape(plan, matrix.tensor)) for matrix in held)
    weights += sum(prod(_shape(plan, name)) for name in plan.kept_outside_layers)
    widest = max(size for matrix in held for size in _shape(plan, matrix.tensor))
    # Hidden units several times over in each thread, or logits in one.
    pieces = TOKENS_IN_PIECE * max(6 * torch.get_num_threads() * widest, 4 * config.vocab_size)
    return Step("gradients", (states + weights + pieces) * FLOAT, None)


def _calibrated_unit(plan: Plan, unit: Unit, always: int) -> Step:
    rows, columns = unit.shape
    method = METHODS[unit.method]
    size = CALIBRATION_DTYPE.itemsize
    weights = rows * columns
    # The matrix as stored (int8), the next one, dequantized (bfloat16) and rounded (int8).
    matrix = weights * (1 + 1 + 2 + 1)
    working = method.cost(rows, columns, unit.settings).working_bytes
    hessian = 0
    if method.needs_site:
        hessian = columns * method.block_columns(columns, unit.settings) * FLOAT
    own = matrix + hessian + working
    if plan.in_expert(unit) and unit.part.endswith("down"):
        # gate and up as rounded, and what they make of the tokens. While they do that, the hidden
        # units of some tokens are there several times over: of one part on a GPU, of a piece for
        # each thread of a CPU. Then the Hessian takes those of some tokens at once.
        held = 2 * weights * size + hidden_unit_bytes(plan, unit)
        pieces = max(TOKENS_AT_ONCE, TOKENS_IN_PIECE * torch.get_num_threads())
        making = 6 * pieces * columns * FLOAT
        adding = matrix + hessian + INPUTS_AT_ONCE * columns * size
        own = held + max(making, adding, own)
    has_blocks = hasattr(unit.settings, "hessian_block")
    knob = "hessian_block" if has_blocks and hessian > always else "calibration.samples"
    return Step(f"{unit.name}: {unit.method}", always + own, knob)


def hidden_unit_bytes(plan: Plan, down: Unit) -> int:
    """Of the hidden units that are kept for the down of an expert."""
    return kept_tokens(plan) * down.shape[1] * CALIBRATION_DTYPE.itemsize


def _shape(plan: Plan, name: str) -> tuple[int, ...]:
    return plan.checkpoint.source.tensors[name].shape
