"""The run of `grokquant quantize`: from a recipe to a smaller checkpoint, verified as complete.

Plan; recover the committed files of an interrupted run; then block by block, on the outputs of the
quantized blocks before it: load, quantize, run, write, free. Then verify that every planned unit is
there, and publish.
"""

from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Protocol
from warnings import warn

import numpy as np
import torch
from torch import Tensor

from grokquant.checkpoint import Opener, open_checkpoint
from grokquant.devices import CPU
from grokquant.errors import Elsewhere, InputError, OutOfMemory, Stopped
from grokquant.files.unfinished import work_path
from grokquant.formats import Format
from grokquant.job import metadata
from grokquant.job.budget.memory import peak_step
from grokquant.job.division import Division
from grokquant.job.fallbacks import Fallbacks, Fallen
from grokquant.job.fingerprint import (
    CALIBRATION,
    difference,
    identity_of,
    refuse_changed_source,
    rows_digest,
    stamps_of,
)
from grokquant.job.finished import MADE_FROM, already_made, besides, made_from, refuse_other_result
from grokquant.job.gradients import GradientFiles, make_gradients
from grokquant.job.layer import LayerQuantizer
from grokquant.job.lock import check_output, check_place, work_directory
from grokquant.job.plan import Plan, build_plan, check_disk
from grokquant.job.repair import Damage, adopt, damage_of, take_over
from grokquant.job.seal import seal
from grokquant.job.shards import ShardWriter, is_result
from grokquant.job.signals import StopRequest, stopping
from grokquant.job.unit import round_without_data
from grokquant.job.verify import verify_against_plan
from grokquant.job.workdir import States, WorkDirectory, report_from
from grokquant.memory import memory_for
from grokquant.parallel import ALONE, Team
from grokquant.recipe import Recipe, load_recipe
from grokquant.streaming.blocks import CALIBRATION_DTYPE
from grokquant.streaming.whole import running
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer
from grokquant.types import QTensor, TensorRef, Unit, UnitReport


class Progress(Protocol):
    """Callbacks of a run."""

    def planned(self, plan: Plan) -> None: ...
    def found(self, plan: Plan) -> None: ...
    def repaired(self, plan: Plan, names: list[str]) -> None: ...
    def note(self, line: str) -> None: ...
    def continuing(self, done: int, files: int, damaged: list[str]) -> None: ...
    def calibrating(self, rows: int, length: int) -> None: ...
    def doing(self, what: str) -> None: ...
    def unit_done(self, name: str) -> None: ...
    def layer_done(self, index: int, reports: list[UnitReport], tokens: list[int]) -> None: ...
    def stopping(self) -> None: ...
    def worked(self, busy: dict[str, float]) -> None: ...


class Silence:
    """No-op progress, but for notes: they become warnings. `asked_to_stop` says whether a signal
    came."""

    asked_to_stop = False

    def stopping(self) -> None:
        self.asked_to_stop = True

    def note(self, line: str) -> None:
        warn(line, stacklevel=2)

    def planned(self, plan: Plan) -> None: ...
    def found(self, plan: Plan) -> None: ...
    def repaired(self, plan: Plan, names: list[str]) -> None: ...
    def continuing(self, done: int, files: int, damaged: list[str]) -> None: ...
    def calibrating(self, rows: int, length: int) -> None: ...
    def doing(self, what: str) -> None: ...
    def unit_done(self, name: str) -> None: ...
    def layer_done(self, index: int, reports: list[UnitReport], tokens: list[int]) -> None: ...
    def worked(self, busy: dict[str, float]) -> None: ...


class Mute(Silence):
    """No progress at all, where another process tells of the same run."""

    def note(self, line: str) -> None: ...


def quantize(
    recipe: Recipe,
    progress: Progress | None = None,
    device: torch.device = CPU,
    overwrite: bool = False,
    team: Team = ALONE,
    opened: Opener = open_checkpoint,
) -> Path:
    """Quantizes as `recipe` says and returns the output directory.

    Arithmetic happens on `device`, and is divided among the members of `team`, who all make this
    call and see the same files. The same call resumes an interrupted run, and leaves its own
    finished result as it is. A result of something else is replaced only with `overwrite`, once the
    new one is complete. Raises InputError for unusable input, GateError if a gate fails and Stopped
    after a signal; in each of these cases nothing new appears under the output's name.
    """
    progress = team.only_first(progress or Silence(), Mute())
    plan = build_plan(recipe, opened)
    output = Path(recipe.output.path)
    check_output(output, plan.checkpoint.source.path)
    division = Division(plan, team)
    division.check()
    make_rows = lru_cache(partial(_calibration_rows, plan))
    stamps = stamps_of(plan)
    identity = identity_of(plan)
    differs = partial(difference, words="{0} is {2}, not {1}")
    team.agree(identity, differs)

    def is_made() -> bool:
        return not overwrite and already_made(output, plan, identity, make_rows)

    if team.once(lambda: not work_path(output).exists() and is_made()):
        progress.found(plan)
        return output  # nothing was written, not even a lock
    check_disk(plan)
    progress.planned(plan)
    with memory_for("calibration.text"):
        rows = make_rows()
    identity |= {CALIBRATION: rows_digest(rows)}
    team.agree(identity, differs)
    with (
        stopping(progress.stopping) as stop,
        work_directory(output, identity, team) as work,
    ):
        # By a run that was killed before it had removed this directory.
        if team.once(lambda: work.published):
            return output
        if team.once(is_made):
            if work.started:
                progress.note(f"{work.path}: holds an interrupted run that was to replace {output}")
            progress.found(plan)
            return output
        _announce(output, progress)
        provenance = metadata.Provenance(recipe, made_from(plan, identity))
        with _resumable(plan, work, stop), memory_for("quantize"):
            _fill(division, work, rows, provenance, progress, stop, device)
            team.once(partial(refuse_changed_source, plan, stamps))
            stop.busy = lambda: True  # nothing is left to stop
            team.once(partial(work.publish, overwrite))
    return output


def repair(
    recipe: Recipe,
    progress: Progress | None = None,
    device: torch.device = CPU,
    opened: Opener = open_checkpoint,
) -> Path:
    """Makes the files of a finished result again that `verify` rejects; returns the directory.

    `recipe` must be the one that made it, but for paths and what changes no weight. All other files
    stay as they are, and the result stays until the new files are whole; the same call continues
    an interrupted repair. Raises InputError if there is no result or one of something else, and
    GateError if the files could not be made as they were, or other faults remain.
    """
    progress = progress or Silence()
    plan = build_plan(recipe, opened)
    output = Path(recipe.output.path)
    check_place(output, plan.checkpoint.source.path)
    damage = damage_of(output)
    if not damage.faults:
        progress.repaired(plan, [])
        return output
    make_rows = lru_cache(partial(_calibration_rows, plan))
    stamps = stamps_of(plan)
    identity = identity_of(plan)
    if damage.report:
        refuse_other_result(output, damage.report, plan, identity, make_rows)
    progress.planned(plan)
    rows = make_rows()
    identity |= {CALIBRATION: rows_digest(rows)}
    provenance = _provenance_of(
        output, damage, metadata.Provenance(recipe, made_from(plan, identity))
    )
    with stopping(progress.stopping) as stop, work_directory(output, identity) as work:
        adopt(work, plan, output, damage)
        with _resumable(plan, work, stop):
            _fill(Division(plan, ALONE), work, rows, provenance, progress, stop, device)
            refuse_changed_source(plan, stamps)
            stop.busy = lambda: True
            names = take_over(work, output, damage)
    progress.repaired(plan, names)
    return output


def _provenance_of(output: Path, damage: Damage, now: metadata.Provenance) -> metadata.Provenance:
    """What the result says of how it was made, where that is intact: paths may differ now."""
    path = output / metadata.RECIPE_NAME
    is_intact = path.is_file() and path.name not in damage.rejected
    recipe = load_recipe(path) if is_intact else now.recipe
    return metadata.Provenance(recipe, damage.report.get(MADE_FROM, now.made_from))


@contextmanager
def _resumable(plan: Plan, work: WorkDirectory, stop: StopRequest) -> Iterator[None]:
    """Adds to what ends a run early how far it is, or what would need less memory."""
    try:
        yield
    except Stopped:
        raise Stopped(_where_it_stands(plan, work)) from None
    except Elsewhere:
        if stop.requested:  # the signal came to all, and some have stopped before
            raise Stopped(_where_it_stands(plan, work)) from None
        raise
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}; {_with_less_memory(plan, work)}") from None


def _announce(output: Path, progress: Progress) -> None:
    """Says what will go with the result that this run replaces."""
    if is_result(output) and (names := besides(output)):
        progress.note(f"{output}: {', '.join(names)} in it will be deleted with the old result")


def _fill(
    division: Division,
    work: WorkDirectory,
    rows: Tensor | None,
    provenance: metadata.Provenance,
    progress: Progress,
    stop: StopRequest,
    device: torch.device,
) -> None:
    """Writes the whole output into the work directory."""
    plan = division.plan
    team = division.team
    stop.busy = lambda: False
    stop.check()
    for line in team.once(partial(metadata.write_beside, work.files, plan)):
        progress.note(line)
    work.recover(plan, team)
    if work.sums or work.damaged:
        progress.continuing(len(work.sums), len(plan.files), work.damaged)
    with ShardWriter(work.files, plan, work.commit) as writer:
        fallbacks = Fallbacks(plan, *((0, 0) if rows is None else rows.shape))
        known = dict(work.reports)
        run = Run(division, work, writer, progress, stop, device, fallbacks, known)
        run.recovered = frozenset(known)
        stop.busy = lambda: bool(writer.incomplete)
        if _open_layers(plan, work):
            _quantize_blocks(run, rows)
        writer.drain()
        if run.busy:
            progress.worked(run.busy | {"writing": writer.seconds})
    run.share()
    shape = () if rows is None else tuple(rows.shape)
    team.once(partial(_complete, plan, work, shape, provenance))


def _complete(
    plan: Plan, work: WorkDirectory, shape: tuple[int, ...], provenance: metadata.Provenance
) -> None:
    """Adds to the weights all that describes them, once they are verified."""
    reports = [work.reports[name] for name in plan.units]
    record = metadata.Record(reports, work.tokens_per_expert, shape, provenance.made_from)
    stated = replace(plan, recipe=provenance.recipe)
    metadata.write(work.files, stated, record)
    verify_against_plan(work.files, plan)
    seal(work.files, metadata.quantization_report(stated, record), work.sums)


@dataclass
class Run:
    """The state of a run. Every finished unit passes through `emit`.

    `reports` are those of all units that are known here, `recovered` the units that an earlier run
    has committed, `outbox` the parts of units that wait for the writer of their file, and `untold`
    the layers that are done as far as it depends on this process. `busy` are the seconds spent
    reading and computing where both overlap with writing.
    """

    division: Division
    work: WorkDirectory
    writer: ShardWriter
    progress: Progress
    stop: StopRequest
    device: torch.device
    fallbacks: Fallbacks
    reports: dict[str, UnitReport]
    recovered: frozenset[str] = frozenset()
    outbox: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    untold: list[int] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def plan(self) -> Plan:
        return self.division.plan

    @property
    def format(self) -> Format:
        return self.plan.format

    def emit(self, parts: dict[str, Tensor], report: UnitReport) -> None:
        """Sends the packed parts of a unit to their file, or keeps them for its writer."""
        self.reports[report.name] = report
        self.count_fallback(report)
        self.fallbacks.check()
        if self.division.is_written_here(self.plan.file_of[next(iter(parts))]):
            self.writer.write(parts, report)
        else:
            self.outbox[report.name] = parts
        self.progress.unit_done(report.name)
        self.stop.check()

    def emit_matrix(self, unit: Unit, quantized: QTensor, report: UnitReport) -> None:
        self.emit(self.format.pack(unit.tensor, quantized), report)

    def committed(self, unit: Unit) -> QTensor | None:
        """The unit as an earlier run has committed it."""
        if unit.name not in self.recovered:
            return None
        names = self.format.packed_layout(unit.tensor, unit.shape, unit.scheme)
        parts = self.work.read(self.plan, list(names))
        return self.format.unpack(unit.tensor, parts, unit.scheme).to(self.device)

    def write_kept(self, tensors: list[str], revised: Mapping[str, Tensor]) -> None:
        """Carries tensors over: router, norms, embedding, matrices that are kept.

        They are unchanged except for those that a method has `revised`. Sources raise InputError
        for non-finite values.
        """
        for name in tensors:
            file = self.plan.file_of[name]
            if self.work.committed(file) or not self.division.is_written_here(file):
                continue
            if name in revised:
                dtype = self.plan.parts[name].dtype
                self.writer.write_rows(name, 0, revised[name].to(dtype).cpu())
                continue
            for first, rows in self.plan.checkpoint.source.tensors[name].row_blocks():
                self.writer.write_rows(name, first, rows)

    def count_fallback(self, report: UnitReport) -> None:
        if report.fallback:
            self.fallbacks.add(Fallen(report.name, report.tokens, report.fallback))

    def read_ahead(self, units: list[Unit]) -> Generator[Tensor | QTensor, None, None]:
        """The stored matrix of each unit; the next one is read while one is rounded.

        Two buffers take turns.
        """
        refs = [self.plan.checkpoint.source.tensors[unit.tensor] for unit in units]
        largest = max((ref.stored_bytes for ref in refs), default=0)
        buffers = [torch.from_numpy(np.empty(largest, np.uint8)) for _ in range(2)]
        with ThreadPoolExecutor(1, "reader") as reader:
            reading: deque[Future] = deque()
            for ref, buffer in zip(refs, cycle(buffers), strict=False):
                reading.append(reader.submit(self._read, ref, buffer))
                if len(reading) == 2:
                    yield reading.popleft().result()
            yield from (read.result() for read in reading)

    def _read(self, ref: TensorRef, buffer: Tensor) -> Tensor | QTensor:
        start = perf_counter()
        stored = ref.load_into(buffer) if ref.load_into else ref.load()
        self.busy["reading"] += perf_counter() - start
        return stored

    def round(self, unit: Unit, stored: Tensor | QTensor) -> None:
        """Rounds and packs a unit that needs no data."""
        start = perf_counter()
        with memory_for(f"{unit.name}: {unit.method}"):
            parts, report = round_without_data(unit, stored.to(self.device), self.format)
        self.busy["computing"] += perf_counter() - start
        self.emit(parts, report)

    def layer_done(self, index: int, tokens: list[int]) -> None:
        names = [unit.name for unit in self.plan.units_of(index)]
        if not self.reports.keys() >= set(names):
            self.untold.append(index)
            return
        self.progress.layer_done(index, [self.reports[name] for name in names], tokens)

    def deliver(self, index: int) -> None:
        """Tells all members of the units of a layer, and hands their parts to the writers."""
        units = [unit for unit in self.plan.units_of(index) if unit.name not in self.recovered]
        own = {u.name: asdict(self.reports[u.name]) for u in units if u.name in self.reports}
        for name, row in self.division.team.merge(own).items():
            self.reports[name] = report_from(row)
            self.count_fallback(self.reports[name])
        self.fallbacks.check()
        for unit in units:
            parts = self.division.handed_over(unit, self.outbox.pop(unit.name, None))
            if parts:
                self.writer.write(parts, self.reports[unit.name])

    def share(self) -> None:
        """Tells all members what each has made."""
        self.work.share(self.division.team)
        self.reports = dict(self.work.reports)
        for index in self.untold:
            self.layer_done(index, [])


def _quantize_blocks(run: Run, rows: Tensor | None) -> None:
    for report in run.reports.values():
        run.count_fallback(report)
    run.fallbacks.check()
    run.write_kept(run.plan.kept_outside_layers, {})
    run.writer.drain()
    open_layers = _open_layers(run.plan, run.work)
    if rows is None:
        _without_data(run)
    elif open_layers:
        _with_calibration(run, rows, min(open_layers), max(open_layers))


def _with_calibration(run: Run, rows: Tensor, first_open: int, last_open: int) -> None:
    run.progress.calibrating(*rows.shape)
    plan = run.plan
    work = run.work
    team = run.division.team
    gradients = GradientFiles(work, run.progress.doing) if plan.needs_gradients else None
    if gradients:
        with memory_for("gradients"):
            make_gradients(run.division, gradients, rows)
    model = running(plan.checkpoint, CALIBRATION_DTYPE, run.device, pieces=True)
    layers = plan.checkpoint.num_layers
    own = team.rows(len(rows), model.rows_at_once(rows.shape[1]))
    with memory_for("embedding"):
        hidden = model.embed(rows[own])  # (rows, time, hidden)
    states = States(hidden, hidden if plan.needs_reference else None)
    model.free_embedding()
    first = 0
    if found := work.load_states(first_open, own):
        first, states = found
    for index in range(first, last_open + 1):
        metrics = gradients.metrics(index) if gradients else None
        layer = LayerQuantizer(
            plan, model, index, run.emit_matrix, run.committed, run.division, metrics
        )
        kept = plan.kept_in_layer(index)
        changes = layer.revises or plan.refitted_in(index)
        if not changes:  # first, so that the file they share with experts is soon complete
            run.write_kept(kept, {})
        with memory_for(f"layer {index}"):
            states = layer.run(states)
        if not torch.isfinite(states.hidden).all():
            raise InputError(f"layer {index}: its outputs on the calibration text are not finite")
        if changes:
            run.write_kept(kept, layer.revised)
        work.tokens_per_expert[index : index + 1] = [layer.tokens_per_expert]
        run.deliver(index)
        run.layer_done(index, layer.tokens_per_expert)
        run.writer.drain()
        saved = states if index + 1 < layers else None
        work.save_states(index + 1, saved, own.start, team)


def _without_data(run: Run) -> None:
    """Reading, computing and writing overlap, so that the disk is the bottleneck."""
    units = run.plan.units.values()
    own = [unit for unit in units if run.division.is_made_here(unit)]
    left = [unit for unit in own if unit.name not in run.work.reports]
    waiting = deque(left)
    with closing(run.read_ahead(left)) as stored:
        for index in range(run.plan.checkpoint.num_layers):
            run.write_kept(run.plan.kept_in_layer(index), {})
            while waiting and waiting[0].layer == index:
                run.round(waiting.popleft(), next(stored))
            run.layer_done(index, [])


def _calibration_rows(plan: Plan) -> Tensor | None:
    if not plan.needs_calibration:
        return None
    tokenizer = load_tokenizer(plan.checkpoint)
    return calibration_rows(plan.recipe.calibration, tokenizer, plan.checkpoint)


def _open_layers(plan: Plan, work: WorkDirectory) -> set[int]:
    """The unfinished layers. Tensors outside the layers count as 0."""
    layers = plan.checkpoint.num_layers
    left = {file.layer or 0 for file in plan.files if not work.committed(file)}
    if plan.needs_calibration:
        left |= set(range(len(work.tokens_per_expert), layers))
    return left


def _where_it_stands(plan: Plan, work: WorkDirectory) -> str:
    if not work.sums:
        return "interrupted; no output was written"
    done = f"{len(work.sums)} of {len(plan.files)} files are done"
    return f"stopped, {done}; run the same command to resume"


def _with_less_memory(plan: Plan, work: WorkDirectory) -> str:
    done = f"{len(work.sums)} of {len(plan.files)} files are done"
    ways = "with more memory"
    if plan.needs_calibration:
        ways += " or fewer threads (OMP_NUM_THREADS)"
    if knob := peak_step(plan).knob:
        ways += f", or lower {knob} and begin anew"
    return f"{done}; run the same command {ways}"
