"""What an evaluation found, as data: `report.json` and back.

Shares and probabilities are fractions here; only what people read says percent.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grokquant.errors import InputError

SCHEMA: Literal["grokquant.evaluation/1"] = "grokquant.evaluation/1"
JSON_NAME = "report.json"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Frozen, finite, nothing unknown; fields go by Python's names or by those of the JSON."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )


class Estimate(_Part):
    """A mean with its standard error (tokens taken as independent)."""

    value: float
    error: Annotated[float, Field(ge=0)]


class Checkpoint(_Part):
    """What was compared. `bytes` as stored; `schemes` counts matrices by grid and method."""

    path: str
    family: str
    layers: Count
    experts: Count
    parameters: Count
    bytes: Count
    bits_per_weight: Annotated[float, Field(ge=0)]
    schemes: dict[str, Count] = {}


class Protocol(_Part):
    """On which tokens, and how: numbers of different protocols cannot be compared."""

    text: str
    text_sha256: str
    windows: Count
    length: Count
    tokens_scored: Count
    scored: str
    bos: bool
    arithmetic: str


class Perplexity(_Part):
    """exp of the mean negative log-likelihood; `correlation` is that of the logarithms."""

    reference: Estimate
    quantized: Estimate
    ratio: Estimate
    ln_ratio: Estimate
    difference: Estimate
    correlation: float


class Divergence(_Part):
    """KL(reference || quantized) of the next-token distributions over tokens, in nats."""

    mean: Estimate
    maximum: float
    q99_9: float = Field(alias="99.9%")
    q99_0: float = Field(alias="99.0%")
    q95_0: float = Field(alias="95.0%")
    q90_0: float = Field(alias="90.0%")
    median: float
    q10_0: float = Field(alias="10.0%")
    q5_0: float = Field(alias="5.0%")
    q1_0: float = Field(alias="1.0%")
    q0_1: float = Field(alias="0.1%")
    minimum: float


class DeltaP(_Part):
    """Probability of the true token, quantized minus reference, as a fraction, over tokens."""

    mean: Estimate
    rms: Estimate
    maximum: float
    q99_9: float = Field(alias="99.9%")
    q99_0: float = Field(alias="99.0%")
    q95_0: float = Field(alias="95.0%")
    q90_0: float = Field(alias="90.0%")
    q75_0: float = Field(alias="75.0%")
    median: float
    q25_0: float = Field(alias="25.0%")
    q10_0: float = Field(alias="10.0%")
    q5_0: float = Field(alias="5.0%")
    q1_0: float = Field(alias="1.0%")
    q0_1: float = Field(alias="0.1%")
    minimum: float


class NoiseFloor(_Part):
    """The mean KLD that the evaluation measures where nothing differs."""

    mean_kld: float
    how: str


class Layer(_Part):
    """One layer against the reference's. A dense layer has no router and no experts."""

    layer: Count
    relative_error: Annotated[float, Field(ge=0)]
    router_top1: Share | None = None
    router_top2_set: Share | None = None
    tokens_per_expert: tuple[Count, ...] = ()
    reference_tokens_per_expert: tuple[Count, ...] = ()

    @model_validator(mode="after")
    def _same_experts(self) -> "Layer":
        if len(self.tokens_per_expert) != len(self.reference_tokens_per_expert):
            raise ValueError("the two models have different numbers of experts")
        return self

    @property
    def routed(self) -> bool:
        """Whether there is a choice of experts to speak of."""
        return len(self.tokens_per_expert) > 1


class UnitRow(_Part):
    """A row of the quantization report: one matrix."""

    name: str
    method: str
    scheme: str
    bits_per_weight: Annotated[float, Field(ge=0)]
    relative_error: Annotated[float, Field(ge=0)]
    output_error: Annotated[float, Field(ge=0)] | None = None
    tokens: Count | None = None
    fallback: str | None = None


class TaskValue(_Part):
    """A metric with its standard error over items, where it is made of one figure an item."""

    value: float
    error: Annotated[float, Field(ge=0)] | None = None


class TaskMetric(_Part):
    """A metric of lm-eval for both models, from the same items."""

    metric: str
    filter: str
    higher_is_better: bool | None
    items: Count
    quantized: TaskValue
    reference: TaskValue


class Task(_Part):
    """A task of lm-eval. `sha256` is that of its documents, prompts and targets."""

    name: str
    version: str
    fewshot: Count
    items: Count
    sha256: str
    metrics: tuple[TaskMetric, ...]


class Tasks(_Part):
    """Tasks of the lm-eval harness, and what their numbers depend on.

    Rows take `max_length` tokens at most; `prefix_token` stands before texts without a context.
    """

    lm_eval: str
    max_length: Count
    prefix_token: Count
    tasks: tuple[Task, ...]


class FurtherText(_Part):
    """Figures of another text than the first one of a suite."""

    protocol: Protocol
    perplexity: Perplexity
    kld: Divergence
    delta_p: DeltaP
    same_top_p: Estimate


class Gate(_Part):
    """A threshold of a suite and what was found: `value` of `where` against `limit`."""

    threshold: str
    where: str
    value: float
    limit: float
    met: bool


class Suite(_Part):
    """The suite that was run, by its name, and how its thresholds fared."""

    name: str
    gates: tuple[Gate, ...] = ()


class Report(_Part):
    """Everything that an evaluation found. Holds no time: equal runs give equal bytes."""

    schema_name: Literal["grokquant.evaluation/1"] = Field(default=SCHEMA, alias="schema")
    grokquant: str
    quantized: Checkpoint
    reference: Checkpoint
    protocol: Protocol
    perplexity: Perplexity
    kld: Divergence
    delta_p: DeltaP
    same_top_p: Estimate
    noise_floor: NoiseFloor
    layers: tuple[Layer, ...] = ()
    units: tuple[UnitRow, ...] = ()
    further_texts: tuple[FurtherText, ...] = ()
    tasks: Tasks | None = None
    suite: Suite | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`, in the order of the fields.

        Without what only suites have where there was none.
        """
        content = self.model_dump(mode="json", by_alias=True)
        extra = ("further_texts", "tasks", "suite")
        return {key: value for key, value in content.items() if value or key not in extra}


def read_report(path: Path) -> Report:
    """Loads `report.json` (or the directory that holds it). Raises InputError."""
    path = path / JSON_NAME if path.is_dir() else path
    try:
        return parse_report(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from error


def parse_report(content: object, origin: str) -> Report:
    """A report from parsed JSON. Raises InputError that names `origin` and the first bad key."""
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "report"
        raise InputError(f"{origin}: {key}: {first['msg']}") from error
