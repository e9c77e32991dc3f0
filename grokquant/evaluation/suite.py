"""Suites: texts and tasks to evaluate on, and thresholds for the results, as YAML."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from grokquant.errors import GateError, InputError
from grokquant.evaluation.report import Gate, Report, SuiteResult, TextFigures
from grokquant.files.published import published_path
from grokquant.recipe import (
    EvalSection,
    RowLength,
    Rows,
    Section,
    TextField,
    TextName,
    load_sections,
)

SHIPPED = Path(__file__).parent / "suites"

# Tokens per sequence where a suite does not say: what the protocols' own programs take.
_LENGTHS = {"hf": 2048, "llama.cpp": 512}
# Metrics of lm-eval that `max_accuracy_drop` applies to.
_ACCURACIES = ("acc", "acc_norm", "exact_match")


class TextSection(Section):
    """A text and how it is scored: its first `samples` sequences, which do not overlap.

    `hf` scores all tokens but the first of each sequence of 2048, `llama.cpp` the second half of
    each sequence of 512; `length` changes the size of a sequence. With `packed: false`, each is the
    beginning of one document, as in calibration. With `bos`, the tokenizer's BOS replaces the first
    token of each sequence, which is not scored.
    """

    text: TextName = "python-docs"
    field: TextField = None
    protocol: Literal["hf", "llama.cpp"] = "hf"
    samples: Rows = 64
    length: RowLength | None = None
    packed: bool = True
    bos: bool = False

    @property
    def row_length(self) -> int:
        return self.length or _LENGTHS[self.protocol]

    def first_scored(self, length: int) -> int:
        """Position of the first scored token in a sequence of `length`."""
        return 1 if self.protocol == "hf" else length // 2 + 1


class TaskSection(Section):
    """A task or group of lm-eval by name, or the YAML file of a task: it can run any code, so
    `--task-files` must allow it.

    `items` limits it to the first items; `fewshot` replaces the task's own number of examples.
    """

    name: Annotated[str, Field(min_length=1)]
    items: Annotated[int, Field(ge=1)] | None = None
    fewshot: Annotated[int, Field(ge=0)] | None = None


class Thresholds(Section):
    """Limits for the quantized model, relative to the reference.

    On every text: mean KL divergence in nats, ratio of perplexities, share of tokens with the same
    top token. In every layer: share of tokens with the same first two experts. In every task: loss
    of accuracy, as a fraction.
    """

    max_mean_kld: Annotated[float, Field(ge=0)] | None = None
    max_ppl_ratio: Annotated[float, Field(gt=0)] | None = None
    min_same_top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_router_top2: Annotated[float, Field(ge=0, le=1)] | None = None
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] | None = None


class Suite(Section):
    """Texts, tasks and thresholds. `max_length` limits the tokens per row of a task."""

    texts: Annotated[tuple[TextSection, ...], Field(strict=False, min_length=1)] = (TextSection(),)
    tasks: Annotated[tuple[TaskSection, ...], Field(strict=False)] = ()
    max_length: RowLength = 2048
    thresholds: Thresholds = Thresholds()

    @model_validator(mode="after")
    def _can_be_judged(self) -> "Suite":
        if self.thresholds.max_accuracy_drop is not None and not self.tasks:
            raise PydanticCustomError(
                "rule", "max_accuracy_drop needs tasks", {"key": "thresholds"}
            )
        return self


def load_suite(name: str | Path) -> Suite:
    """A shipped suite by name, or one from a file. Raises InputError with file, line and column, or
    with the known names."""
    shipped = {path.stem: path for path in SHIPPED.glob("*.yaml")}
    path = shipped.get(str(name), Path(name))
    if not path.suffix and not path.exists():
        known = ", ".join(sorted(shipped))
        raise InputError(f"no suite {name!r}, expected a file or one of {known}", "suite")
    return load_sections(path, Suite)


def refuse_task_files(suite: Suite) -> None:
    """Raises InputError where a task is not one of lm-eval or of this package, but a file."""
    for task in suite.tasks:
        if Path(task.name).suffix.lower() in (".yaml", ".yml"):
            raise InputError(
                f"needed for {task.name}: lm-eval runs the code that the file of a task names",
                "task_files",
            )


def suite_of(settings: EvalSection) -> Suite:
    """The text of a recipe's eval section as a suite, without tasks or thresholds."""
    text = TextSection(
        text=settings.text,
        field=settings.field,
        samples=settings.samples,
        length=settings.length,
        packed=settings.packed,
    )
    return Suite(texts=(text,))


def judged(report: Report, name: str, thresholds: Thresholds) -> SuiteResult:
    """The outcome of the thresholds of the suite `name`, each by its worst value."""
    gates = []
    for threshold, limit in thresholds.model_dump(exclude_none=True).items():
        upper = threshold.startswith("max")
        values = list(_VALUES[threshold](report))
        if values:
            value, where = max(values) if upper else min(values)
            met = value <= limit if upper else value >= limit
            gates.append(Gate(threshold=threshold, where=where, value=value, limit=limit, met=met))
    return SuiteResult(name=published_path(name), gates=tuple(gates))


def check_gates(report: Report) -> None:
    """Raises GateError that names every missed threshold, with value and limit."""
    if report.suite is None:
        return
    missed = [_words(gate) for gate in report.suite.gates if not gate.met]
    if missed:
        raise GateError(f"suite {report.suite.name}: {'; '.join(missed)}")


def _words(gate: Gate) -> str:
    name = gate.threshold[4:]  # without max_ or min_
    return f"{name} on {gate.where} is {gate.value:.6g} (limit {gate.limit:g})"


# Values of a threshold and where they were found, one per text, layer or metric.
Values = Iterator[tuple[float, str]]


def _texts(report: Report) -> Iterator[tuple[TextFigures, str]]:
    texts: list[TextFigures] = [report, *report.further_texts]
    for text in texts:
        protocol = text.protocol
        yield text, f"{protocol.text} ({protocol.sequences})"


def _mean_kld(report: Report) -> Values:
    return ((text.kld.mean.value, where) for text, where in _texts(report))


def _ppl_ratio(report: Report) -> Values:
    return ((text.perplexity.ratio.value, where) for text, where in _texts(report))


def _same_top_p(report: Report) -> Values:
    return ((text.same_top_p.value, where) for text, where in _texts(report))


def _router_top2(report: Report) -> Values:
    for layer in report.layers:
        if layer.router_top2_set is not None:
            yield layer.router_top2_set, f"layer {layer.layer}"


def _accuracy_drop(report: Report) -> Values:
    for task in report.tasks.tasks if report.tasks else ():
        for metric in task.metrics:
            if metric.metric in _ACCURACIES:
                drop = metric.reference.value - metric.quantized.value
                yield drop, f"{task.name} ({metric.metric})"


_VALUES = {
    "max_mean_kld": _mean_kld,
    "max_ppl_ratio": _ppl_ratio,
    "min_same_top_p": _same_top_p,
    "min_router_top2": _router_top2,
    "max_accuracy_drop": _accuracy_drop,
}
