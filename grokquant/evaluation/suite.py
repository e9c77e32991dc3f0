"""Suites: what to evaluate and what must come of it, as YAML."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from grokquant.errors import GateError, InputError
from grokquant.evaluation import report as parts
from grokquant.recipe import DataName, EvalSection, RowLength, Rows, Section, load_sections

SHIPPED = Path(__file__).parent / "suites"

_LENGTHS = {"hf": 2048, "llama.cpp": 512}
_ACCURACIES = ("acc", "acc_norm", "exact_match")


class TextSection(Section):
    """A text and how it is scored: the first `windows` windows, which do not overlap.

    `hf` scores every token but the first of windows of 2048, `llama.cpp` the second half of windows
    of 512; `length` makes windows longer or shorter. With `bos` the first token of each window, one
    that is not scored, gives way to the tokenizer's BOS.
    """

    data: DataName = "python-docs"
    protocol: Literal["hf", "llama.cpp"] = "hf"
    windows: Rows = 64
    length: RowLength | None = None
    bos: bool = False

    @property
    def row_length(self) -> int:
        return self.length or _LENGTHS[self.protocol]

    def first_scored(self, length: int) -> int:
        """The place of the first scored token in a window of `length`."""
        return 1 if self.protocol == "hf" else length // 2 + 1


class TaskSection(Section):
    """A task or group of lm-eval by its name, or a YAML file of one; such files can run Python.

    The first `items` of it, all by default, with `fewshot` examples, by default the task's own.
    """

    name: Annotated[str, Field(min_length=1)]
    items: Annotated[int, Field(ge=1)] | None = None
    fewshot: Annotated[int, Field(ge=0)] | None = None


class Thresholds(Section):
    """What the quantized model must reach, relative to the reference.

    Divergence in nats, ratio of perplexities and share of tokens with the same top choice, on every
    text; share of tokens that the router of every layer sends to the same experts; how much of an
    accuracy may be lost in any task, as a fraction.
    """

    max_mean_kld: Annotated[float, Field(ge=0)] | None = None
    max_ppl_ratio: Annotated[float, Field(gt=0)] | None = None
    min_same_top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_router_top2: Annotated[float, Field(ge=0, le=1)] | None = None
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] | None = None


class Suite(Section):
    """Texts, tasks and thresholds. A row of a task takes `max_length` tokens at most."""

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
    """A shipped suite by name, or one from a file. Raises InputError with file, line and column."""
    shipped = {path.stem: path for path in SHIPPED.glob("*.yaml")}
    path = shipped.get(str(name), Path(name))
    if not path.suffix and not path.exists():
        known = ", ".join(sorted(shipped))
        raise InputError(f"--suite: no suite {name!r}, expected a file or one of {known}")
    return load_sections(path, Suite)


def suite_of(settings: EvalSection) -> Suite:
    """The suite that the eval section of a recipe stands for: its text, nothing else."""
    text = TextSection(data=settings.data, windows=settings.samples, length=settings.length)
    return Suite(texts=(text,))


def judged(report: parts.Report, name: str, thresholds: Thresholds) -> parts.Suite:
    """How the thresholds of the suite `name` fared."""
    gates = []
    for threshold, limit in thresholds.model_dump(exclude_none=True).items():
        highest = threshold.startswith("max")
        worst = max if highest else min
        found = list(_FOUND[threshold](report))
        if found:
            value, where = worst(found)
            met = value <= limit if highest else value >= limit
            gates.append(
                parts.Gate(threshold=threshold, where=where, value=value, limit=limit, met=met)
            )
    return parts.Suite(name=name, gates=tuple(gates))


def check_gates(report: parts.Report) -> None:
    """Raises GateError that names every threshold that was missed, with value and limit."""
    suite = report.suite
    missed = [_words(gate) for gate in suite.gates if not gate.met] if suite else []
    if suite and missed:
        raise GateError(f"suite {suite.name}: {'; '.join(missed)}")


def _words(gate: parts.Gate) -> str:
    most = "most" if gate.threshold.startswith("max") else "least"
    name = gate.threshold[4:]
    return f"{name} of {gate.where} is {gate.value:.6g}, at {most} {gate.limit:g} is asked for"


Found = Iterator[tuple[float, str]]


def _texts(report: parts.Report) -> Iterator[tuple[parts.Report | parts.FurtherText, str]]:
    texts: list[parts.Report | parts.FurtherText] = [report, *report.further_texts]
    for text in texts:
        protocol = text.protocol
        yield text, f"{protocol.text} ({protocol.windows} windows of {protocol.length})"


def _mean_kld(report: parts.Report) -> Found:
    return ((text.kld.mean.value, where) for text, where in _texts(report))


def _ppl_ratio(report: parts.Report) -> Found:
    return ((text.perplexity.ratio.value, where) for text, where in _texts(report))


def _same_top_p(report: parts.Report) -> Found:
    return ((text.same_top_p.value, where) for text, where in _texts(report))


def _router_top2(report: parts.Report) -> Found:
    for layer in report.layers:
        if layer.router_top2_set is not None:
            yield layer.router_top2_set, f"layer {layer.layer}"


def _accuracy_drop(report: parts.Report) -> Found:
    for task in report.tasks.tasks if report.tasks else ():
        for metric in task.metrics:
            if metric.metric in _ACCURACIES:
                drop = metric.reference.value - metric.quantized.value
                yield drop, f"{task.name} ({metric.metric})"


_FOUND = {
    "max_mean_kld": _mean_kld,
    "max_ppl_ratio": _ppl_ratio,
    "min_same_top_p": _same_top_p,
    "min_router_top2": _router_top2,
    "max_accuracy_drop": _accuracy_drop,
}
