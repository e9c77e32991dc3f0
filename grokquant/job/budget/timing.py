"""The time of a run, estimated by running the real code on small pieces of this model here."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grokquant.calibration.hessian import accumulate
from grokquant.calibration.site import Site
from grokquant.errors import InputError
from grokquant.files import atomic
from grokquant.files.direct_io import PlacedFile
from grokquant.job.budget.probe_model import ProbeModel
from grokquant.job.experts import is_starved
from grokquant.job.plan import Plan
from grokquant.job.unit import round_without_data
from grokquant.methods import METHODS
from grokquant.methods.method import Cost, errors_of
from grokquant.recipe import CalibrationSection
from grokquant.streaming.blocks import CALIBRATION_DTYPE, TOKENS_IN_PIECE
from grokquant.streaming.gradients import DTYPE, differentiated_tokens
from grokquant.text import installed
from grokquant.text.document import tokens_of_document
from grokquant.text.documents import bytes_read, calibration_rows, token_rows
from grokquant.text.records import excerpts, is_large
from grokquant.text.tokenizer import load_tokenizer
from grokquant.threads import in_pieces
from grokquant.types import QTensor, TensorRef, Unit

# Of the modules behind a text of every installation one in so many is read.
_TEXT_SHARE = 8
# Rows of the run for each row from those: it takes 8 % of python-docs, 88 % of the others.
_ROWS_FOR_ONE = {"python-docs": 1, "python-code": 7, "package-docs": 7}
_TEXT_BYTES = 1 << 18  # of a longer text
_PIECE = 2048  # rows, columns or tokens of a probe at most
# The source is read in this many places, and this much in each: more than a disk's own cache.
_SAMPLES = 8
_SAMPLE_BYTES = 1 << 26
_WRITTEN_BYTES = 1 << 29
_START_AND_END = 1.0  # seconds of fixed work: tokenizer, metadata files, verification


def expected_seconds(plan: Plan) -> float:
    """From the first tensor to the last file."""
    return sum(expected_times(plan).values())


def expected_times(plan: Plan) -> dict[str, float]:
    """Seconds of each step of a run, beyond what it does beside the others."""
    rate = _write_rate(plan)
    written = plan.output_bytes / rate
    read = plan.checkpoint.stored_bytes / _read_rate(plan.checkpoint.source.weight_files)
    times = {"start and end": _START_AND_END}
    if plan.needs_calibration:
        times["reading"] = read * (3 if plan.needs_gradients else 1)
        times |= _calibrating(plan)
        times["saved states"] = _state_bytes(plan) / rate
        times["writing"] = max(written - sum(times.values()), 0.0)
        return times
    stages = {"reading": read, "rounding": _rounding(plan), "writing": written}
    longest = max(stages, key=lambda name: stages[name])
    # They overlap, but they share the cores.
    threads = torch.get_num_threads()
    times |= {name: s if name == longest else s / threads for name, s in stages.items()}
    return times


def _state_bytes(plan: Plan) -> int:
    """Bytes of the states that are saved after each layer but the last."""
    config = plan.checkpoint.text_config
    size = plan.calibration_tokens * config.hidden_size * CALIBRATION_DTYPE.itemsize
    return (plan.checkpoint.num_layers - 1) * size * (1 + plan.needs_reference)


def _calibrating(plan: Plan) -> dict[str, float]:
    """Seconds of text and layers."""
    tokens, text = _timed_texts(plan)
    times = {"text": text}
    if plan.needs_gradients:
        times["gradients"] = _differentiating(plan)
    return times | _by_pieces(plan, tokens)


def _timed_texts(plan: Plan) -> tuple[int, float]:
    """The number of calibration tokens of the run, and the seconds that making its rows takes."""
    start = perf_counter()
    tokenizer = load_tokenizer(plan.checkpoint)
    seconds = perf_counter() - start
    tokens = 0
    for text, samples in plan.recipe.calibration.samples_of.items():
        asked = plan.recipe.calibration.model_copy(update={"text": text, "samples": samples})
        given, took = _timed_text(plan, tokenizer, asked, text)
        tokens += given
        seconds += took
    return tokens, seconds


def _timed_text(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, asked: CalibrationSection, text: str
) -> tuple[int, float]:
    """The tokens that one text gives, and the seconds that it takes: by a part of a long one."""
    start = perf_counter()
    length = min(asked.length, plan.checkpoint.positions)
    wanted = asked.samples * length
    if is_large(text, _TEXT_BYTES):
        part = list(excerpts(text, asked.field, _TEXT_BYTES, asked.seed))
        share = bytes_read(text, wanted) / _TEXT_BYTES
        tokens = int(share * sum(len(tokens_of_document(tokenizer, each)) for each in part))
        seconds = share * (perf_counter() - start)
    elif text in _ROWS_FOR_ONE and asked.packed:
        # It is the same everywhere, so a part of its modules is enough.
        documents = installed.some_documents(text, _TEXT_SHARE)
        read = perf_counter() - start
        tokens = (
            _ROWS_FOR_ONE[text]
            * token_rows(documents, tokenizer, asked.samples, length, None).numel()
        )
        seconds = perf_counter() - start + (_TEXT_SHARE - 1) * read
    else:
        tokens = calibration_rows(asked, tokenizer, plan.checkpoint).numel()
        seconds = perf_counter() - start
    return min(tokens // length * length, wanted), seconds


def _differentiating(plan: Plan) -> float:
    """Seconds of the forward and the backward pass for gradients.

    Outside the experts a layer runs twice forward, then twice in the backward pass, of which the
    second goes back to its inputs. An expert runs twice and goes back once, the head both once.
    """
    asked = plan.recipe.calibration
    config = plan.checkpoint.text_config
    tokens = differentiated_tokens(asked.samples, asked.length)
    routed = plan.checkpoint.tokens_per_expert(tokens)
    products = 2.0 * tokens * config.hidden_size * config.vocab_size
    for matrix in plan.checkpoint.matrices():
        passed = 5 * tokens if matrix.expert is None else 3 * routed
        products += passed * prod(plan.checkpoint.source.tensors[matrix.tensor].shape)
    size = min(config.hidden_size, _PIECE)
    W, X = (t.to(DTYPE) for t in _random_piece(size, size, min(tokens, _PIECE)))
    return products * _time(lambda: F.linear(X, W)) / (len(X) * size**2)


def _rounding(plan: Plan) -> float:
    """Seconds of rounding without data: a piece of one unit of each kind, scaled to all of them."""
    kinds: dict[tuple, Unit] = {}
    weights: Counter[tuple] = Counter()
    for unit in plan.units.values():
        if _needs_data(unit):
            continue
        stored = plan.checkpoint.source.tensors[unit.tensor].scheme
        kind = (unit.method, unit.scheme, unit.settings, stored)
        kinds.setdefault(kind, unit)
        weights[kind] += prod(unit.shape)
    return sum(_rounding_of(plan, unit) * weights[kind] for kind, unit in kinds.items())


def _rounding_of(plan: Plan, unit: Unit) -> float:
    """Seconds per weight of a unit that needs no data."""
    rows = min(unit.shape[0], _PIECE)
    columns = unit.shape[1]
    stored = _piece(plan.checkpoint.source.tensors[unit.tensor], rows, columns)
    piece = replace(unit, shape=(rows, columns))
    return _time(lambda: round_without_data(piece, stored, plan.format)) / (rows * columns)


def _piece(ref: TensorRef, rows: int, columns: int) -> torch.Tensor | QTensor:
    """Random weights [rows, columns], stored as those of `ref`."""
    generator = torch.Generator().manual_seed(0)
    if ref.scheme is None:
        return torch.randn(rows, columns, generator=generator).to(ref.dtype)
    codes = torch.randint(-127, 128, (columns, rows), generator=generator, dtype=torch.int8)
    groups = max(ref.scheme.groups(columns), 1)  # a group may be wider than the piece
    scales = torch.full((groups, rows), 0.001, dtype=torch.bfloat16)
    return QTensor(codes.T, scales.T, ref.scheme)


@dataclass(frozen=True)
class _Rates:
    """Multiply-adds per second on this machine: in products of the model, in gate and up with what
    follows them, in Hessians, and in float32 products of GPTQ."""

    products: float
    hidden_units: float
    hessians: float
    floats: float


@dataclass(frozen=True)
class _Rounding:
    """Seconds that a method takes for a piece of a matrix: `shared` by the matrices of a site, and
    its `own`. They grow with `cost`, `own` with `weights` too, `shared` with those in Hessians:
    `square`."""

    shared: float
    own: float
    weights: int
    square: int
    cost: Cost


@dataclass(kw_only=True)
class _ProbeSite(Site):
    """A site whose Hessian `H` is computed beforehand, so that rounding is timed without it."""

    H: Tensor

    @classmethod
    def of(cls, X: Tensor) -> "_ProbeSite":
        tokens, features = X.shape
        H = accumulate([X], features).H
        H.diagonal().add_(1.0)  # positive definite, however few the inputs
        return cls(tokens=tokens, features=features, inputs=lambda: iter([X]), H=H)

    def hessian(self, block: int | None, weighted: bool = False) -> list[Tensor]:
        return [self.H.clone()]


def _by_pieces(plan: Plan, tokens: int) -> dict[str, float]:
    """Seconds of forward passes, Hessians and rounding, with tokens spread evenly over experts."""
    routed = plan.checkpoint.tokens_per_expert(tokens)
    model = ProbeModel(plan.checkpoint)
    rates = _rates(plan, model)
    sites: set[tuple] = set()
    pieces: dict[tuple, _Rounding] = {}
    times = {
        "forward outside experts": _outside_experts(plan, model, tokens, rates),
        "forward of experts": 0.0,
        "Hessians": 0.0,
        "factorization": 0.0,
        "rounding": _rounding(plan),
    }
    for matrix in plan.checkpoint.matrices():
        unit = plan.units.get(matrix.name)
        seen = tokens if matrix.expert is None else routed
        rows, columns = plan.checkpoint.source.tensors[matrix.tensor].shape
        if matrix.expert is not None:
            rate = rates.products if matrix.part == "down" else rates.hidden_units
            # With a reference, experts also run as they are stored: in the original, all for the
            # sum that the others should complete, and each for its own part.
            passes = 1 + 3 * plan.needs_reference
            times["forward of experts"] += passes * seen * rows * columns / rate
        if unit is None or not _needs_data(unit):
            continue
        site = (matrix.layer, matrix.expert, matrix.reads)
        stored = plan.checkpoint.source.tensors[matrix.tensor]
        kind = (unit.method, unit.settings, unit.scheme, stored.scheme)
        if kind not in pieces:
            pieces[kind] = _round_piece(unit, stored)
        times["rounding"] += _own(unit, pieces[kind], rates)
        if site not in sites:
            times["factorization"] += _shared(unit, pieces[kind], rates)
            times["Hessians"] += _hessian(plan, unit, seen, tokens, rates)
        sites.add(site)
    return times


def _outside_experts(plan: Plan, model: ProbeModel, tokens: int, rates: _Rates) -> float:
    """Seconds of all that a layer does outside its experts, attention above all, in all layers."""
    checkpoint = plan.checkpoint
    layer = plan.fullest_layer
    weights = weights_outside_experts(plan)[layer]
    passes = checkpoint.num_layers * tokens * passes_outside_experts(plan, layer, weights)
    if not checkpoint.family.streams:
        return passes * sum(weights.values()) / rates.products
    length = min(plan.recipe.calibration.length, checkpoint.positions)
    return passes * model.time_outside_experts(length)


def passes_outside_experts(plan: Plan, layer: int, weights: dict[str, int]) -> float:
    """How many times the tokens pass the `weights` that a layer has outside its experts. Where the
    inputs of a matrix are captured, they pass those before it once more."""
    family = plan.checkpoint.family
    config = plan.checkpoint.config
    has_experts = family.num_experts(config, layer) > 0 or layer in plan.lone_experts
    once = family.ends_with_experts(config, layer) and not plan.needs_reference
    twice = family.streams and has_experts and not once
    passes = (1.0 + twice) * (1 + plan.needs_reference)
    passes += plan.refitted_router(layer) is not None  # its inputs come after everything else
    for units in plan.sites_outside_experts(layer):
        if any(map(_needs_data, units)):
            before = list(weights).index(units[0].name)
            in_original = any(map(plan.aims_alone, units))
            share = sum(list(weights.values())[:before]) / sum(weights.values())
            passes += (1 + in_original) * share
    return passes


def weights_outside_experts(plan: Plan) -> dict[int, dict[str, int]]:
    """By layer, the sizes of the matrices outside its experts, in order, quantized or not."""
    tensors = plan.checkpoint.source.tensors
    sizes: dict[int, dict[str, int]] = defaultdict(dict)
    for matrix in plan.checkpoint.matrices():
        if matrix.expert is None:
            sizes[matrix.layer][matrix.name] = prod(tensors[matrix.tensor].shape)
    return sizes


def _own(unit: Unit, piece: _Rounding, rates: _Rates) -> float:
    """Seconds of rounding a unit, without what its site shares."""
    rows, columns = unit.shape
    cost = METHODS[unit.method].cost(rows, columns, unit.settings)
    scale = rows * columns / piece.weights
    # A wider matrix has longer feedback than the piece.
    return scale * piece.own + max(cost.products - scale * piece.cost.products, 0) / rates.floats


def _shared(unit: Unit, piece: _Rounding, rates: _Rates) -> float:
    """Seconds of the work that a site's matrices share: large products, and what grows with the
    Hessian alone."""
    rows, columns = unit.shape
    method = METHODS[unit.method]
    products = method.cost(rows, columns, unit.settings).shared_products
    square = columns * method.block_columns(columns, unit.settings)
    rest = max(piece.shared - piece.cost.shared_products / rates.floats, 0)
    return products / rates.floats + rest * square / piece.square


def _hessian(plan: Plan, unit: Unit, seen: int, tokens: int, rates: _Rates) -> float:
    """Seconds of the Hessian of a site that sees `seen` of all `tokens`."""
    rows, columns = unit.shape
    block = METHODS[unit.method].block_columns(columns, unit.settings)
    own = seen * columns * block / rates.hessians
    if unit.expert is None or not is_starved(plan.recipe.experts, seen, block):
        return own
    everyone = tokens * columns * block / rates.hessians
    if unit.part == "down":  # its inputs come from gate and up
        return own + everyone + 2 * tokens * rows * columns / rates.hidden_units
    # Those of gate and up are the layer's: their Hessian is made once, for expert 0.
    return own + everyone if unit.expert == 0 else own


def _rates(plan: Plan, model: ProbeModel) -> _Rates:
    """The rates of products, measured on pieces of a matrix, as many as there are threads."""
    unit = next(unit for unit in plan.units.values() if _needs_data(unit))
    rows, columns = (min(size, _PIECE) for size in unit.shape)
    tokens = max(_PIECE, TOKENS_IN_PIECE * torch.get_num_threads())
    W, X = _random_piece(rows, columns, tokens)
    halves = W.float()
    runs_experts = plan.checkpoint.num_experts and plan.checkpoint.family.runs_experts

    def each(work: Callable[[Tensor], Tensor]) -> float:
        return _time(lambda: in_pieces(work, X.split(TOKENS_IN_PIECE)))

    count = tokens * rows * columns
    products = count / each(lambda x: F.linear(x, W))
    return _Rates(
        products=products,
        hidden_units=model.hidden_unit_rate() if runs_experts else products,
        # Several times, so that what is done once, when the last input has come, counts little.
        hessians=4 * tokens * columns**2 / _time(lambda: accumulate([X] * 4, columns)),
        floats=count / each(lambda x: x.float() @ halves.T),
    )


def _round_piece(unit: Unit, stored: TensorRef) -> _Rounding:
    """A piece of a unit, read, rounded by its method on random inputs, and dequantized."""
    rows, columns = (min(size, _PIECE) for size in unit.shape)
    _, X = _random_piece(rows, columns, _PIECE)
    W = _piece(stored, rows, columns)
    method = METHODS[unit.method]
    scheme = unit.scheme

    def once(site: Site) -> float:
        start = perf_counter()
        read = W.dequantize() if isinstance(W, QTensor) else W
        quantized = method.round(read, scheme, unit.settings, site).quantized
        errors_of(read, quantized)
        quantized.dequantize().to(CALIBRATION_DTYPE)
        return perf_counter() - start

    once(_ProbeSite.of(X))  # compiles and warms up
    site = _ProbeSite.of(X)
    first = once(site)
    again = once(site)
    cost = method.cost(rows, columns, unit.settings)
    square = columns * method.block_columns(columns, unit.settings)
    return _Rounding(max(first - again, 0.0), again, rows * columns, square, cost)


def _random_piece(rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    """W [rows, columns] and its inputs X [tokens, columns]."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, columns, generator=generator).to(CALIBRATION_DTYPE)
    W = torch.randn(rows, columns, generator=generator).to(CALIBRATION_DTYPE)
    return W, X


def _needs_data(unit: Unit) -> bool:
    return METHODS[unit.method].needs_site


def _read_rate(files: tuple[Path, ...]) -> float:
    """Bytes per second of reading at offsets spread over the source."""
    largest = sorted(files, key=lambda path: path.stat().st_size)[-_SAMPLES:]
    read = 0
    start = perf_counter()
    for number, path in enumerate(largest):
        with path.open("rb", buffering=0) as file:
            file.seek(path.stat().st_size * number // (2 * len(largest)))
            read += len(file.read(_SAMPLE_BYTES))
    return read / (perf_counter() - start)


def _write_rate(plan: Plan) -> float:
    """Bytes per second of writing, hashing and syncing where the output will be."""
    place = atomic.nearest_directory(Path(plan.recipe.output.path).absolute().parent)
    data = memoryview(os.urandom(min(_SAMPLE_BYTES, plan.output_bytes)))
    size = min(_WRITTEN_BYTES, plan.output_bytes) // len(data) + 1
    try:
        with atomic.temporary(place / "grokquant-probe") as probe:
            start = perf_counter()
            stored = PlacedFile(probe)
            for number in range(size):
                stored.write(number * len(data), data)
            stored.close()
            atomic.sync(probe)
            return size * len(data) / (perf_counter() - start)
    except OSError as error:
        output = plan.recipe.output.path
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None


def _time(action: Callable[[], object]) -> float:
    """Seconds of the second call; the first one compiles and warms up."""
    action()
    start = perf_counter()
    action()
    return perf_counter() - start
