"""The time of a run: that of the real code on small pieces of this model, on this machine."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration.hessian import accumulate
from grokquant.files import atomic
from grokquant.files.direct_io import PlacedFile
from grokquant.formats import FORMATS
from grokquant.job.layer import LayerQuantizer, is_starved
from grokquant.job.plan import Plan
from grokquant.job.unit import round_without_data
from grokquant.methods.gptq import factorize, round_gptq
from grokquant.streaming.blocks import CALIBRATION_DTYPE, BlockwiseModel
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer
from grokquant.types import QTensor, TensorRef, Unit

_PIECE = 2048  # rows, columns or tokens of a probe at most
_SAMPLES, _SAMPLE_BYTES = 8, 1 << 26  # places where the source is read
_WRITTEN_BYTES = 1 << 29
_SMALL_LAYER = 1e12  # weights times tokens
_START_AND_END = 1.0  # seconds for what does not grow: tokenizer, papers, proof


def expected_seconds(plan: Plan) -> float:
    """From the first tensor to the last file."""
    written = plan.output_bytes / _write_rate(plan)
    read = plan.checkpoint.stored_bytes / _read_rate(plan.checkpoint.source.weight_files)
    if plan.needs_calibration:
        return _START_AND_END + max(read + _calibrating(plan), written)
    stages = (read, written, _rounding(plan))
    # They overlap, but they share the cores.
    return _START_AND_END + max(stages) + (sum(stages) - max(stages)) / torch.get_num_threads()


def _calibrating(plan: Plan) -> float:
    """Seconds of text and layers: by a real layer where that is short, else from pieces of one."""
    start = perf_counter()
    tokenizer = load_tokenizer(plan.checkpoint)
    rows = calibration_rows(plan.recipe.calibration, tokenizer, plan.checkpoint)
    text = perf_counter() - start
    layers = plan.checkpoint.config.num_hidden_layers
    if is_small(plan):
        return text + layers * _one_layer(plan, rows)
    return text + _by_pieces(plan, rows.numel())


def is_small(plan: Plan) -> bool:
    """Whether a whole layer is done with its calibration in seconds."""
    settings = plan.recipe.calibration
    weights = sum(prod(unit.shape) for unit in plan.units_of(0))
    return settings.samples * settings.length * weights < _SMALL_LAYER


def _one_layer(plan: Plan, rows: Tensor) -> float:
    """Seconds of the first layer, done as in the run and thrown away."""
    start = perf_counter()
    model = BlockwiseModel(plan.checkpoint, CALIBRATION_DTYPE)
    hidden = model.embed(rows)
    LayerQuantizer(plan, model, 0, lambda *_: None, lambda _: None).run(hidden)
    return perf_counter() - start


def _rounding(plan: Plan) -> float:
    """Seconds of rounding without data: a piece of one unit of each kind, scaled to all of them."""
    kinds: dict[tuple, Unit] = {}
    weights: Counter[tuple] = Counter()
    for unit in plan.units.values():
        stored = plan.checkpoint.source.tensors[unit.tensor].scheme
        kind = (unit.method, unit.scheme, plan.rule_of(unit.name).scale, stored)
        kinds.setdefault(kind, unit)
        weights[kind] += prod(unit.shape)
    return sum(_rounding_of(plan, unit) * weights[kind] for kind, unit in kinds.items())


def _rounding_of(plan: Plan, unit: Unit) -> float:
    """Seconds per weight of a unit that needs no data."""
    rows, columns = min(unit.shape[0], _PIECE), unit.shape[1]
    stored = _piece(plan.checkpoint.source.tensors[unit.tensor], rows, columns)
    packing, rule = FORMATS[plan.recipe.output.format], plan.rule_of(unit.name)
    return _time(lambda: round_without_data(unit, rule, stored, packing)) / (rows * columns)


def _piece(ref: TensorRef, rows: int, columns: int) -> torch.Tensor | QTensor:
    """Random weights [rows, columns], stored as those of `ref`."""
    generator = torch.Generator().manual_seed(0)
    if ref.scheme is None:
        return torch.randn(rows, columns, generator=generator).to(ref.dtype)
    codes = torch.randint(-127, 128, (columns, rows), generator=generator, dtype=torch.int8)
    scales = torch.full((ref.scheme.groups(columns), rows), 0.001, dtype=torch.bfloat16)
    return QTensor(codes.T, scales.T, ref.scheme)


@dataclass(frozen=True)
class _Rates:
    """What this machine does in a second: multiply-adds of the model's products, of Hessians and of
    their factorisation; weights of rounding where a matrix has `columns` columns."""

    products: float
    hessians: float
    factors: float
    weights: float
    columns: int


def _by_pieces(plan: Plan, tokens: int) -> float:
    """Seconds of forward passes, Hessians and rounding, with tokens spread evenly over experts."""
    config = plan.checkpoint.config
    experts = max(plan.checkpoint.num_experts, 1)
    routed = tokens * (getattr(config, "num_experts_per_tok", None) or 1) // experts
    rates = _probe(plan, min(routed, _PIECE))
    seconds = 0.0
    for name, ref in plan.checkpoint.units():
        unit, weights = plan.units.get(name), prod(ref.shape)
        expert = ".experts." in name
        gptq = unit is not None and unit.method == "gptq"
        # Attention runs twice and once more for each Hessian; gate and up also for that of down.
        passes = 1 if name.endswith(".down") else 2 + (gptq and not expert)
        seconds += passes * weights * (routed if expert else tokens) / rates.products
        if unit and gptq:
            seconds += _gptq(plan, unit, routed if expert else tokens, tokens, rates)
        elif unit:
            seconds += weights / rates.weights
    return seconds


def _gptq(plan: Plan, unit: Unit, seen: int, tokens: int, rates: _Rates) -> float:
    """Seconds of one matrix that sees `seen` of all `tokens`. gate and up share a Hessian."""
    rows, columns = unit.shape
    block = min(plan.rule_of(unit.name).hessian_block or columns, columns)
    rounding = rows * columns / rates.weights
    rounding += rows * columns * max(block - rates.columns, 0) / 2 / rates.hessians
    if unit.name.endswith(".up"):
        return rounding
    own = seen * columns * block / rates.hessians + columns * block**2 / 6 / rates.factors
    if not is_starved(plan.recipe.experts, seen, block):
        return own + rounding
    everyone = tokens * columns * block / rates.hessians
    if unit.name.endswith(".down"):
        everyone += 2 * tokens * rows * columns / rates.products
    elif not unit.name.endswith("experts.0.gate"):
        everyone = 0.0  # made once for all experts
    return own + everyone + rounding


def _probe(plan: Plan, tokens: int) -> _Rates:
    """The functions that a run calls, on `tokens` inputs of a piece of a matrix."""
    unit = next(unit for unit in plan.units.values() if unit.method == "gptq")
    rule, rows, columns = plan.rule_of(unit.name), *(min(n, _PIECE) for n in unit.shape)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, columns, generator=generator).to(CALIBRATION_DTYPE)
    W = torch.randn(rows, columns, generator=generator).to(CALIBRATION_DTYPE)
    H = accumulate([X], columns).H
    H.diagonal().add_(1.0)
    feedback = factorize(H, rule.damping, rule.act_order)
    return _Rates(
        products=tokens * rows * columns / _time(lambda: F.linear(X, W)),
        hessians=tokens * columns**2 / _time(lambda: accumulate([X], columns)),
        factors=columns**3 / 6 / _time(lambda: factorize(H, rule.damping, rule.act_order)),
        weights=rows * columns / _time(lambda: round_gptq(W, feedback, unit.scheme, rule.scale)),
        columns=columns,
    )


def _read_rate(files: tuple[Path, ...]) -> float:
    """Bytes per second of reading at places all over the source."""
    largest = sorted(files, key=lambda path: path.stat().st_size)[-_SAMPLES:]
    read, start = 0, perf_counter()
    for number, path in enumerate(largest):
        with path.open("rb", buffering=0) as file:
            file.seek(path.stat().st_size * number // (2 * len(largest)))
            read += len(file.read(_SAMPLE_BYTES))
    return read / (perf_counter() - start)


def _write_rate(plan: Plan) -> float:
    """Bytes per second of writing, hashing and syncing where the output will be."""
    place = atomic.nearest_directory(Path(plan.recipe.output.path).absolute().parent)
    data = memoryview(os.urandom(_SAMPLE_BYTES))
    size = min(_WRITTEN_BYTES, plan.output_bytes) // len(data) + 1
    with atomic.temporary(place / "grokquant-probe") as probe:
        start = perf_counter()
        stored = PlacedFile(probe)
        for number in range(size):
            stored.write(number * len(data), data)
        stored.close()
        atomic.sync(probe)
        return size * len(data) / (perf_counter() - start)


def _time(action: Callable[[], object]) -> float:
    """Seconds of the second call; the first one compiles and warms up."""
    action()
    start = perf_counter()
    action()
    return perf_counter() - start
