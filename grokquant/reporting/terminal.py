"""What a person sees: tables on stdout, progress on stderr; bars only on a terminal."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from types import TracebackType

from rich.console import Console, JustifyMethod, OverflowMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.style import Style
from rich.table import Table
from rich.text import Text

from grokquant.engines import verdicts, where_it_runs
from grokquant.escaping import one_line
from grokquant.evaluation.report import Layer
from grokquant.files.json_objects import read_json_object
from grokquant.humanize import duration, size
from grokquant.job.budget import Budget
from grokquant.job.budget.sharing import Sharing
from grokquant.job.fallbacks import dead_experts
from grokquant.job.findings import listed
from grokquant.job.plan import Plan
from grokquant.job.seal import digest_of
from grokquant.job.shards import REPORT_NAME
from grokquant.reporting.signs_of_life import SignsOfLife
from grokquant.types import TensorRef, UnitReport

# Off a terminal: wide enough that no table folds its cells, whatever reads the output.
_PIPE_WIDTH = 1000
# Bits per weight of a layer without quantized matrices.
_BF16_BITS = 16.0
_LEAST_SHARE = 0.005  # of the time, for a step that `plan` prints
_LABEL_WIDTH = 18  # of the longest label that `inspect` prints, right-aligned


def plan_as_dict(plan: Plan, budget: Budget) -> dict:
    """The plan for programs: totals, files, matrices that stay unquantized, a row per unit."""
    return {
        "model": plan.recipe.model.path,
        "output": plan.recipe.output.path,
        "family": plan.checkpoint.family.name,
        "notice": plan.checkpoint.family.notice,
        "notes": [*plan.checkpoint.source.notes, *plan.notes],
        "parameters": plan.checkpoint.parameters,
        "source_bytes": plan.checkpoint.file_bytes,
        "output_bytes": plan.output_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "files": {file.name: file.layout.size for file in plan.files},
        "peak_bytes": budget.peak_bytes,
        "peak_step": budget.peak.name,
        "peak_knob": budget.peak.knob,
        "seconds": budget.seconds,
        "seconds_by_step": budget.times,
        "kept": list(plan.kept),
        "runs_in": verdicts(plan.contents),
        "units": [
            {
                "name": unit.name,
                "method": unit.method,
                "scheme": plan.format.grid_name(unit.scheme),
                "shape": list(unit.shape),
            }
            for unit in plan.units.values()
        ],
    }


class PlainConsole(Console):
    """Prints strings, in tables too, as they are: names hold no markup and control no terminal."""

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        **ignored: object,
    ) -> Text:
        """Called by rich for each string that it prints; what is ignored would read markup."""
        return Text(one_line(text), style, justify=justify, overflow=overflow)


def text_console(stderr: bool = False) -> PlainConsole:
    """A console that, off a terminal, cuts and folds nothing."""
    console = PlainConsole(stderr=stderr, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def print_notices(notices: Iterable[str]) -> None:
    """Lines on stderr, seen even if stdout is redirected."""
    for notice in notices:
        text_console(stderr=True).print(f"grokquant: {notice}")


def print_plan(plan: Plan, console: Console | None = None) -> None:
    print_notices([*plan.checkpoint.notices, *plan.notes])
    console = console or text_console()
    console.print(f"{plan.recipe.model.path} -> {plan.recipe.output.path}")
    console.print(_plan_table(plan))
    console.print(
        f"{plan.checkpoint.parameters:,} weights, {size(plan.checkpoint.file_bytes)} -> "
        f"{size(plan.output_bytes)} in {len(plan.files)} file(s), "
        f"{plan.bits_per_weight:.3f} bits per weight"
    )
    for line in where_it_runs(plan.contents):
        console.print(line)


def print_budget(budget: Budget) -> None:
    console = text_console()
    knob = f"; {budget.peak.knob} lowers it" if budget.peak.knob else ""
    console.print(f"memory: {size(budget.peak_bytes)} at {budget.peak.name}{knob}")
    console.print(f"time: {duration(budget.seconds)} on this machine")
    for step, seconds in sorted(budget.times.items(), key=lambda item: -item[1]):
        share = seconds / budget.seconds
        if share >= _LEAST_SHARE:
            console.print(f"{share:>10.0%}  {step}, {duration(seconds)}")


def sharing_as_dict(sharing: Sharing, budget: Budget) -> dict:
    """What several processes take, beside `plan_as_dict`."""
    return {
        "ranks": sharing.processes,
        "peak_bytes": _peak_of_each(sharing, budget),
        "device_bytes": sharing.device_bytes,
        "moved_bytes": sharing.moved_bytes,
        "seconds": sharing.share * budget.seconds,
    }


def print_sharing(sharing: Sharing, budget: Budget) -> None:
    memory = f"{size(_peak_of_each(sharing, budget))} of memory each"
    if sharing.device_bytes:
        memory += f", {size(sharing.device_bytes)} of it on a GPU where there is one"
    time = f"{duration(sharing.share * budget.seconds)} if each has a machine like this one"
    sent = f"{size(sharing.moved_bytes)} sent between them"
    text_console().print(f"{sharing.processes} ranks: {memory}; {sent}; {time}")


def _peak_of_each(sharing: Sharing, budget: Budget) -> int:
    """With the libraries of a process, as in the budget of one."""
    return budget.peak_bytes - budget.peak.bytes + sharing.peak_bytes


def _plan_table(plan: Plan) -> Table:
    table = Table()
    table.add_column("part")
    table.add_column("grid (method)")
    table.add_column("matrices", justify="right")
    table.add_column("weights", justify="right")
    for (kind, grid), (count, weights) in plan_rows(plan).items():
        table.add_row(kind, grid, str(count), f"{weights:,}")
    return table


def plan_rows(plan: Plan) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind of matrix, grid) -> (matrices, weights)."""
    counts: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    for matrix in plan.checkpoint.matrices():
        unit = plan.units.get(matrix.name)
        ref = plan.checkpoint.source.tensors[matrix.tensor]
        grid = _as_floats(ref)
        if unit:
            grid = f"{plan.format.grid_name(unit.scheme)} ({unit.method})"
        key = (matrix.kind, grid)
        counts[key] += 1
        weights[key] += prod(ref.shape)
    rest = plan.checkpoint.parameters - sum(weights.values())
    rows = {key: (counts[key], weights[key]) for key in counts}
    return rows | {("router, norms, embedding", "not quantized"): (0, rest)}


def _as_floats(ref: TensorRef) -> str:
    """How a matrix is stored that is not quantized."""
    dtype = str(ref.dtype).removeprefix("torch.")
    return f"{dtype} ({'dequantized' if ref.scheme else 'unquantized'})"


class _LayerBar:
    """A line per layer and, on a terminal, a bar below the lines. `life` is told of each line."""

    def __init__(self, life: SignsOfLife | None = None) -> None:
        self.console = text_console(stderr=True)
        self.life = life
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.start = time.monotonic()
        self.task: TaskID | None = None
        self.total = 0
        self.ends: list[float] = []  # of the layers

    def note(self, line: str) -> None:
        self.console.print(line)
        if self.life:
            self.life.heard()

    def doing(self, what: str) -> None:
        """What the bar or a sign of life says is being done."""
        if self.life:
            self.life.doing = what
        if self.task is not None:
            self.bar.update(self.task, description=what)

    def begin(self, description: str, total: int) -> None:
        self.bar.start()
        if self.life and self.console.is_terminal:
            self.life.say = lambda line: None  # the bar moves instead
        self.task = self.bar.add_task(description, total=total, left="")
        self.total = total
        self.start = time.monotonic()
        self.begin_layers()

    def begin_layers(self) -> None:
        """From now on, time is spent on layers."""
        self.ends = [time.monotonic()]

    def advance(self, line: str, layer: int) -> None:
        """`line` tells of the layer number `layer`, which is done."""
        self.ends.append(time.monotonic())
        left = f"{duration(seconds_left(self.ends, self.total - 1 - layer))} left"
        self.note(f"{line}, {left}")
        if self.task is not None:
            self.bar.update(self.task, completed=layer + 1, left=left)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()


def seconds_left(times: Sequence[float], layers: int) -> float:
    """Seconds that `layers` more take, after those that ended at `times`, the first of which is the
    beginning. The first layer also loads and compiles; it counts only where it is alone."""
    known = times[1:] if len(times) > 2 else times
    return layers * (known[-1] - known[0]) / (len(known) - 1)


class RunProgress(_LayerBar):
    """Prints the lines `shown` and the plan, then a line per block."""

    def __init__(self, shown: Sequence[str] = (), life: SignsOfLife | None = None) -> None:
        super().__init__(life)
        self.shown = shown

    def __enter__(self) -> "RunProgress":
        return self

    def planned(self, plan: Plan) -> None:
        self._reset(plan, was_there=False)
        for line in self.shown:
            self.note(line)
        print_plan(plan, self.console)
        self.begin("quantizing", plan.checkpoint.num_layers)
        if plan.needs_calibration:
            self.doing("quantizing: reading the calibration text")

    def found(self, plan: Plan) -> None:
        self._reset(plan, was_there=True)

    def repaired(self, plan: Plan, names: list[str]) -> None:
        self._reset(plan, was_there=not names, mended=names)

    def _reset(self, plan: Plan, was_there: bool, mended: list[str] | None = None) -> None:
        self.plan = plan
        self.place = Path(plan.recipe.output.path).absolute()  # ".", too, becomes another directory
        self.was_there = was_there
        self.mended = mended
        self.fallbacks = 0
        self.done: dict[int, int] = {}  # layer -> finished matrices
        self.busy: dict[str, float] = {}

    def continuing(self, done: int, files: int, damaged: list[str]) -> None:
        for name in damaged:
            self.note(f"{name}: changed since it was written; rebuilding it")
        self.note(f"resuming: {done} of {files} files are done")

    def worked(self, busy: dict[str, float]) -> None:
        self.busy = busy

    def stopping(self) -> None:
        self.note("stopping after the current file; interrupt again to stop immediately")

    def calibrating(self, rows: int, length: int) -> None:
        asked = self.plan.recipe.calibration
        line = f"calibration: {rows} sequences of {length} tokens"
        if (rows, length) != (asked.samples, asked.length):
            line += f", fewer than the {asked.samples} x {asked.length} in the recipe"
        self.note(line)
        self.begin_layers()

    def unit_done(self, name: str) -> None:
        unit = self.plan.units[name]
        self.done[unit.layer] = self.done.get(unit.layer, 0) + 1
        units = len(self.plan.units_of(unit.layer))
        layers = self.plan.checkpoint.num_layers
        part = f"{min(self.done[unit.layer], units)} of {units} matrices"
        self.doing(f"quantizing layer {unit.layer} of {layers}, {part}")

    def layer_done(self, index: int, reports: list[UnitReport], tokens: list[int]) -> None:
        self.fallbacks += sum(report.fallback is not None for report in reports)
        line = f"layer {index}: {error_words(reports)}, {_bits_of(reports, self.plan):.3f} bits"
        if tokens:
            line += f", fewest tokens for an expert: {min(tokens)}"
        self.advance(line, index)
        more = index + 1 < self.total
        self.doing(f"quantizing layer {index + 1}" if more else "writing and verifying")

    def as_dict(self, output: Path) -> dict:
        """The result for programs. `busy_seconds` overlap; `finished_before` says that nothing was
        computed, `repaired` names the files that a repair made again."""
        return {
            "output": str(output),
            "digest": digest_of(self.place),
            "finished_before": self.was_there,
            "repaired": self.mended,
            "output_bytes": self.plan.output_bytes,
            "bits_per_weight": self.plan.bits_per_weight,
            "seconds": time.monotonic() - self.start,
            "busy_seconds": self.busy,
            "fallbacks": self.fallbacks,
            "findings": _findings_of(self.place),
        }

    def summary(self, output: Path) -> list[str]:
        """The lines that end a run."""
        plan = self.plan
        if self.mended is not None:
            return [_repaired(output, self.mended)]
        if self.was_there:
            return [
                f"{output}: already finished, from the same recipe, source and versions; all "
                f"{len(plan.files)} weight files have their sizes, nothing was computed"
            ]
        seconds = time.monotonic() - self.start
        lines = [
            f"{output}: {size(plan.checkpoint.file_bytes)} -> {size(plan.output_bytes)}, "
            f"{plan.bits_per_weight:.3f} bits per weight, {duration(seconds)}",
            f"report: {output / REPORT_NAME}",
            f"digest: {digest_of(self.place)}",
        ]
        if self.busy:
            shares = (f"{work} {busy / seconds:.0%}" for work, busy in self.busy.items())
            lines.append(f"overlapping work: {', '.join(shares)}")
        if self.fallbacks:
            lines.append(f"{self.fallbacks} matrices fell back to rtn; the report says why")
        lines += listed(_dead_in(self.place))
        lines += listed(_findings_of(self.place))
        return lines


def _findings_of(output: Path) -> list[str]:
    """What the report of a finished run says of unusual losses."""
    return read_json_object(output / REPORT_NAME)["findings"]


def _dead_in(output: Path) -> list[str]:
    """A line for each expert that no token of a finished run reached."""
    names = dead_experts(read_json_object(output / REPORT_NAME)["units"])
    return [f"{name}: no calibration token reached it, it was rounded to nearest" for name in names]


def _repaired(output: Path, names: list[str]) -> str:
    if not names:
        return f"{output}: verify finds no fault, nothing was computed"
    return f"{output}: repaired {', '.join(names)}; all other files are as they were"


class LayerProgress(_LayerBar):
    """A line per evaluated layer."""

    def __enter__(self) -> "LayerProgress":
        return self

    def layer_done(self, figures: Layer, total: int) -> None:
        if self.task is None:
            # Text and headers were read before, in a time that counts for the first layer.
            begun = self.start
            self.begin("evaluating", total)
            self.ends = [begun]
        line = f"layer {figures.layer}: error {figures.relative_error:.4f}"
        if figures.router_set is not None:
            line += f", same experts for {figures.router_set:.1%} of tokens"
        self.advance(line, figures.layer)
        more = figures.layer + 1 < total
        self.doing(f"evaluating layer {figures.layer + 1}" if more else "evaluating the outputs")


def error_words(reports: list[UnitReport]) -> str:
    """The mean error of a layer's matrices: of their outputs, else of their weights."""
    output_errors = [r.output_error for r in reports if r.output_error is not None]
    if output_errors:
        return f"output error {sum(output_errors) / len(output_errors):.4f}"
    errors = [r.relative_error for r in reports]
    return f"weight error {sum(errors) / max(len(errors), 1):.4f}"


def _bits_of(reports: list[UnitReport], plan: Plan) -> float:
    """Mean bits per weight of a layer's matrices."""
    weights = [prod(plan.units[r.name].shape) for r in reports]
    if not weights:
        return _BF16_BITS
    bits = sum(r.bits_per_weight * n for r, n in zip(reports, weights, strict=True))
    return bits / sum(weights)


def print_description(description: dict) -> None:
    """`grokquant inspect` for people: a row per tensor, then the totals, where a screen ends."""
    print_notices(filter(None, [description["notice"], *description["notes"]]))
    facts = [
        (key.replace("_", " "), str(description[key]))
        for key in ("path", "layout", "family", "layers", "experts", "experts_per_token")
        if description[key] is not None
    ]
    facts.append(("parameters", f"{description['parameters']:,}"))
    facts.append(("size", size(description["bytes"])))
    facts.append(("bits per weight", f"{description['bits_per_weight']:.3f}"))
    for grid, count in description["matrices"].items():
        facts.append(("matrices", f"{count} x {grid}"))
    console = text_console()
    table = Table("tensor", "shape", "stored as", "bytes")
    for tensor in description["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        table.add_row(tensor["name"], shape, tensor["stored_as"], f"{tensor['bytes']:,}")
    console.print(table)
    for label, fact in facts:
        console.print(f"{label:>{_LABEL_WIDTH}}  {fact}")
    for line in description["where_it_runs"]:
        console.print(line)
