"""What an evaluation found, as data: `report.json` and back.

Shares and probabilities are fractions here; only what people read says percent. The text below a
field is its description in the JSON schema (`Report.model_json_schema()`) and in the documentation.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grokquant.errors import InputError

SCHEMA: Literal["grokquant.evaluation/2"] = "grokquant.evaluation/2"
JSON_NAME = "report.json"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _below(share: str) -> Any:
    """A quantile, under the name that llama.cpp gives it."""
    return Field(alias=share, description=f"{share} of the tokens lie below it.")


class _Part(BaseModel):
    """Frozen, finite, nothing unknown; fields go by Python's names or by those of the JSON."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Estimate(_Part):
    """A figure with what the choice of documents leaves open.

    Documents are drawn again with replacement, each with all its tokens (`bootstrap` says how).
    """

    value: float
    """The figure itself, of all scored tokens."""
    error: NotNegative
    """Its standard error: the standard deviation over the resamples."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    token_error: NotNegative | None = None
    """The standard error that llama.cpp prints, with tokens taken as independent; too small where
    a document's tokens are alike."""

    @model_validator(mode="after")
    def _in_order(self) -> "Estimate":
        if self.low > self.high:
            raise ValueError("the interval ends before it begins")
        return self


class Checkpoint(_Part):
    """One of the two models that were compared."""

    path: str
    """Where it lay, as it was given."""
    family: str
    """The model family, such as grok-1 or mixtral."""
    layers: Count
    """Decoder layers."""
    experts: Count
    """Routed experts of a layer; 1 in a dense model."""
    parameters: Count
    """Weights of all tensors."""
    bytes: Count
    """Size of all tensors as stored, scales included."""
    bits_per_weight: NotNegative
    """8 * bytes / parameters."""
    schemes: dict[str, Count] = {}
    """How many matrices are stored on which grid, with the method that rounded them if known."""


class Protocol(_Part):
    """On which tokens, and how: numbers of different protocols cannot be compared."""

    text: str
    """The text by name."""
    text_sha256: str
    """SHA-256 of its documents and of where each of them ends."""
    windows: Count
    """Windows of text, each run on its own."""
    length: Count
    """Tokens of a window."""
    tokens_scored: Count
    """Tokens that all figures are about."""
    scored: str
    """Which tokens of a window these are."""
    bos: bool
    """Whether a window begins with a beginning-of-sequence token."""
    arithmetic: str
    """The dtype that both models were run in."""


class Bootstrap(_Part):
    """How errors and intervals were found: by drawing clusters of tokens again."""

    unit: Literal["document", "window", "block"]
    """What is drawn. Windows stand in where the text has too few documents to draw from, blocks of
    32 tokens in a row where there are too few windows; they are then taken as independent."""
    clusters: Count
    """How many there are."""
    resamples: Count
    """How often as many are drawn."""
    seed: Count
    """Of the random draws."""
    method: str
    """How the interval is taken from the resamples."""


class Documents(_Part):
    """Sums over the scored tokens of each document (or what stands in for it), in textual order.

    They are all that a bootstrap needs, and let two reports be compared document by document.
    """

    tokens: tuple[Count, ...]
    """Scored tokens."""
    nll: tuple[float, ...]
    """Negative log-likelihoods of the true tokens, quantized model, in nats."""
    nll_reference: tuple[float, ...]
    """The same of the reference."""
    kld: tuple[float, ...]
    """KL divergences of the tokens, in nats."""
    same_top: tuple[Count, ...]
    """Tokens that both models rank first alike."""

    @model_validator(mode="after")
    def _same_length(self) -> "Documents":
        if len({len(getattr(self, name)) for name in type(self).model_fields}) > 1:
            raise ValueError("the columns have different lengths")
        return self


class Perplexity(_Part):
    """exp of the mean negative log-likelihood, token by token on the same text."""

    reference: Estimate
    """Of the reference."""
    quantized: Estimate
    """Of the quantized model."""
    ratio: Estimate
    """quantized / reference."""
    ln_ratio: Estimate
    """ln(quantized / reference): nats lost per token."""
    difference: Estimate
    """quantized - reference."""
    correlation: float
    """Pearson's, of the negative log-likelihoods of both models over tokens."""


class Divergence(_Part):
    """KL(reference || quantized) of the next-token distributions over tokens, in nats.

    From full distributions in float64, none of them cut short. Names are llama.cpp's; `99.0%` is
    the value below which 99 % of the tokens lie.
    """

    mean: Estimate
    """The mean over tokens."""
    maximum: float
    """The largest."""
    q99_9: float = _below("99.9%")
    q99_0: float = _below("99.0%")
    q95_0: float = _below("95.0%")
    q90_0: float = _below("90.0%")
    median: float
    """Half of the tokens lie below it."""
    q10_0: float = _below("10.0%")
    q5_0: float = _below("5.0%")
    q1_0: float = _below("1.0%")
    q0_1: float = _below("0.1%")
    minimum: float
    """The smallest."""


class DeltaP(_Part):
    """Probability of the true token, quantized minus reference, as a fraction, over tokens."""

    mean: Estimate
    """The mean over tokens."""
    rms: Estimate
    """The root mean square over tokens."""
    maximum: float
    """The largest."""
    q99_9: float = _below("99.9%")
    q99_0: float = _below("99.0%")
    q95_0: float = _below("95.0%")
    q90_0: float = _below("90.0%")
    q75_0: float = _below("75.0%")
    median: float
    """Half of the tokens lie below it."""
    q25_0: float = _below("25.0%")
    q10_0: float = _below("10.0%")
    q5_0: float = _below("5.0%")
    q1_0: float = _below("1.0%")
    q0_1: float = _below("0.1%")
    minimum: float
    """The smallest."""


class NoiseFloor(_Part):
    """What the evaluation measures where nothing differs: the reference against itself."""

    mean_kld: float
    """Mean KLD, in nats."""
    perplexity_ratio: NotNegative
    """Perplexity over perplexity."""
    same_top_p: Share
    """Share of tokens whose top token is the same."""
    how: str
    """What was repeated, and what was different the second time."""


class Forced(_Part):
    """One layer on the reference's own hidden states (teacher-forced): its error and no other's.

    As routers are not quantized, what the router chooses differently here is the doing of the
    attention of this layer.
    """

    tokens: Count
    """Tokens of the windows that this was measured on, the first ones."""
    block_error: NotNegative
    """||h_q - h|| / ||h|| of the hidden states h [tokens, hidden] that leave the layer."""
    attention_error: NotNegative
    """The same of the output of the attention's last matrix."""
    experts_error: NotNegative | None = None
    """The same of the mixed outputs of the routed experts, which get the reference's inputs, routes
    and gates."""
    router_top1: Share | None = None
    """Share of tokens whose first expert is the same."""
    router_top2_set: Share | None = None
    """Share of tokens whose first two experts are the same, in any order."""
    router_set: Share | None = None
    """Share of tokens all of whose experts are the same, in any order."""
    damage: tuple[Share, ...] = ()
    """Each expert's share of the damage: D_e / sum D, where D_e = sum ||g (y_q - y)||^2 over the
    tokens routed to expert e with gate g. Sums to 1, or is 0 throughout without any damage."""

    @model_validator(mode="after")
    def _whole(self) -> "Forced":
        if any(self.damage) and abs(sum(self.damage) - 1) > 1e-6:
            raise ValueError("the shares of the damage do not add up to 1")
        return self


class Layer(_Part):
    """One layer against the reference's, each model on its own path, so with the errors of all
    layers before. A dense layer has no router and no experts."""

    layer: Count
    """Its number, from 0."""
    relative_error: NotNegative
    """||h_q - h|| / ||h|| of the hidden states h [tokens, hidden] that leave it."""
    router_top1: Share | None = None
    """Share of tokens whose first expert (that of the largest gate) is the same."""
    router_top2_set: Share | None = None
    """Share of tokens whose first two experts are the same, in any order."""
    router_set: Share | None = None
    """Share of tokens all of whose experts are the same, in any order."""
    tokens_per_expert: tuple[Count, ...] = ()
    """Tokens that the quantized model's router sends to each expert."""
    reference_tokens_per_expert: tuple[Count, ...] = ()
    """The same of the reference."""
    load_shift: Share | None = None
    """The least share of the routed tokens that would have to go to another expert to give the
    reference's loads: half of the sum of the absolute differences, over all."""
    forced: Forced | None = None
    """The layer alone; None where this was not measured."""

    @model_validator(mode="after")
    def _same_experts(self) -> "Layer":
        counts = {len(self.tokens_per_expert), len(self.reference_tokens_per_expert)}
        if self.forced and self.forced.damage:
            counts.add(len(self.forced.damage))
        if len(counts) > 1:
            raise ValueError("the two models have different numbers of experts")
        return self

    @property
    def routed(self) -> bool:
        """Whether there is a choice of experts to speak of."""
        return len(self.tokens_per_expert) > 1


class TokenGroup(_Part):
    """The scored tokens that have something in common."""

    tokens: Count
    """How many they are."""
    mean_kld: float | None = None
    """Their mean KLD in nats; None where there are none."""
    share_of_kld: float | None = None
    """Their part of the sum of the KLD of all tokens; None where that is 0."""


class FirstChange(TokenGroup):
    """The tokens whose experts differ in this layer and in none before."""

    layer: Count
    """The layer's number, from 0."""


class Routing(_Part):
    """The KLD of tokens by what the quantized model's routers did with them, on its own path.

    A token's routing has changed where the set of its experts differs from the reference's.
    """

    unchanged: TokenGroup
    """Tokens that go to the same experts in every layer."""
    changed: TokenGroup
    """Tokens that go to another expert in some layer."""
    first_change: tuple[FirstChange, ...] = ()
    """`changed` by the first layer in which they do; one row for each layer with experts."""


class UnitRow(_Part):
    """A row of the quantization report: one matrix."""

    name: str
    """As recipes call it."""
    method: str
    """What rounded it."""
    scheme: str
    """The grid it lies on."""
    bits_per_weight: NotNegative
    """Stored bits over weights."""
    relative_error: NotNegative
    """||W_q - W|| / ||W||."""
    output_error: NotNegative | None = None
    """The same of its outputs on the calibration tokens; None where there were none."""
    tokens: Count | None = None
    """Calibration tokens that reached it."""
    fallback: str | None = None
    """Why it was not rounded as planned; None where it was."""


class PairedAccuracy(_Part):
    """Two models on the same items, each of which is answered rightly or not."""

    items: Count
    """How many there are."""
    reference: Share
    """Share that the reference gets right."""
    quantized: Share
    """Share that the quantized model gets right."""
    difference: Estimate
    """quantized - reference, items drawn again in pairs."""
    lost: Count
    """Items that only the reference gets right."""
    gained: Count
    """Items that only the quantized model gets right."""
    p_value: Share
    """McNemar's exact test, two-sided: how likely flips at least as one-sided as these are, were
    both directions equally likely."""


class TaskValue(_Part):
    """A metric of one model."""

    value: float
    """What lm-eval gives."""
    error: NotNegative | None = None
    """Its standard error over items; None where it is not made of one figure an item."""


class TaskMetric(_Part):
    """A metric of lm-eval for both models, from the same items."""

    metric: str
    """Its name, such as acc."""
    filter: str
    """The filter that answers went through."""
    higher_is_better: bool | None
    """As lm-eval says; None where it does not."""
    items: Count
    """How many it is taken from."""
    quantized: TaskValue
    """Of the quantized model."""
    reference: TaskValue
    """Of the reference."""
    paired: PairedAccuracy | None = None
    """Item against item; None where items are not right or wrong."""


class Task(_Part):
    """A task of lm-eval."""

    name: str
    """As lm-eval calls it."""
    version: str
    """Of the task, as it says itself."""
    fewshot: Count
    """Examples before each question."""
    items: Count
    """Questions asked."""
    sha256: str
    """Of its documents, prompts and targets."""
    metrics: tuple[TaskMetric, ...]
    """What came of them."""


class Tasks(_Part):
    """Tasks of the lm-eval harness, and what their numbers depend on."""

    lm_eval: str
    """The version of the harness."""
    max_length: Count
    """Tokens that a row takes at most."""
    prefix_token: Count
    """The token before texts that have no context."""
    tasks: tuple[Task, ...]
    """The tasks, in the order of the suite."""


class FurtherText(_Part):
    """Figures of another text than the first one of a suite."""

    protocol: Protocol
    """What was measured on."""
    bootstrap: Bootstrap
    """Where errors and intervals come from."""
    perplexity: Perplexity
    """How well both predict the text."""
    kld: Divergence
    """How far the predicted distributions are apart."""
    delta_p: DeltaP
    """How the probability of the true token changes."""
    same_top_p: Estimate
    """Share of tokens for which both models rank the same token first."""
    documents: Documents
    """Sums by document."""


class Gate(_Part):
    """A threshold of a suite and what was found."""

    threshold: str
    """Its key in the suite."""
    where: str
    """The text, layer or task that is furthest from it, or nearest to missing it."""
    value: float
    """What was found there."""
    limit: float
    """What was asked for."""
    met: bool
    """Whether the value is within the limit."""


class Suite(_Part):
    """The suite that was run."""

    name: str
    """As it was asked for."""
    gates: tuple[Gate, ...] = ()
    """How its thresholds fared."""


class Report(_Part):
    """Everything that an evaluation found. Holds no time: equal runs give equal bytes."""

    schema_name: Literal["grokquant.evaluation/2"] = Field(default=SCHEMA, alias="schema")
    """The version of this schema."""
    grokquant: str
    """The version of the program."""
    quantized: Checkpoint
    """The model that is judged."""
    reference: Checkpoint
    """The model that it is compared with."""
    protocol: Protocol
    """What was measured on."""
    bootstrap: Bootstrap
    """Where errors and intervals come from."""
    perplexity: Perplexity
    """How well both predict the text."""
    kld: Divergence
    """How far the predicted distributions are apart."""
    delta_p: DeltaP
    """How the probability of the true token changes."""
    same_top_p: Estimate
    """Share of tokens for which both models rank the same token first."""
    noise_floor: NoiseFloor
    """What these figures read for no difference at all."""
    routing: Routing | None = None
    """What changes of routing have to do with the KLD; None for a dense model."""
    layers: tuple[Layer, ...] = ()
    """Every layer, in order."""
    units: tuple[UnitRow, ...] = ()
    """Every matrix of the quantization report; none for a checkpoint that others made."""
    documents: Documents
    """Sums by document."""
    further_texts: tuple[FurtherText, ...] = ()
    """The texts of a suite after the first."""
    tasks: Tasks | None = None
    """The tasks of a suite; None without any."""
    suite: Suite | None = None
    """How the thresholds of a suite fared; None where none was run."""

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
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from error


def parse_report(content: object, origin: str) -> Report:
    """A report from parsed JSON. Raises InputError that names `origin` and the first bad key."""
    version = content.get("schema") if isinstance(content, dict) else None
    if isinstance(version, str) and version != SCHEMA:
        raise InputError(
            f"{origin}: schema: is {version[:60]!r}, this program reads {SCHEMA}: evaluate again"
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "report"
        raise InputError(f"{origin}: {key}: {first['msg']}") from error
