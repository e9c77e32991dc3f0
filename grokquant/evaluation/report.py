"""The results of an evaluation as data: `report.json` and back.

Every figure is declared here, once, and measuring returns these classes. Shares and probabilities
are fractions; only tables and pages say percent. The text below a field is its description in the
JSON schema (`Report.model_json_schema()`) and in the documentation.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from grokquant.errors import InputError
from grokquant.escaping import one_line
from grokquant.files.json_objects import read_json_object

SCHEMA: Literal["grokquant.evaluation/2"] = "grokquant.evaluation/2"
JSON_NAME = "report.json"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
# A report may come from anybody, and `compare` computes with these.
TokenCount = Annotated[int, Field(ge=0, le=10**15)]
Sum = Annotated[float, Field(ge=-1e18, le=1e18)]
_MOST_DRAWS = 10**9  # resamples times clusters: some minutes
NotNegative = Annotated[float, Field(ge=0)]
ClusterKind = Literal["document", "sequence", "block"]


def _below(share: str) -> Any:
    """A quantile, under the name that llama.cpp gives it."""
    return Field(alias=share, description=f"{share} of the tokens lie below it.")


class _Part(BaseModel):
    """Base of all parts: frozen, finite, no unknown fields; Python's and JSON's names both work."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Estimate(_Part):
    """A figure and its uncertainty: how far it would be off with other documents.

    From a bootstrap, which draws the documents again with replacement (see `bootstrap`).
    """

    value: float
    """The figure, over all scored tokens."""
    error: NotNegative
    """Its standard error: the standard deviation over the resamples."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    token_error: NotNegative | None = None
    """The standard error as llama.cpp prints it, with tokens taken as independent; too small where
    the tokens of a document are alike."""

    @model_validator(mode="after")
    def _in_order(self) -> "Estimate":
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class ComparedModel(_Part):
    """One of the two models that are compared."""

    path: str
    """Its path as given if that is relative, else its name alone."""
    family: str
    """The model family, such as grok-1 or mixtral."""
    layers: Count
    """Number of decoder layers."""
    experts: Count
    """Routed experts per layer; 1 in a dense model."""
    parameters: Count
    """Number of weights in all tensors."""
    bytes: Count
    """Size of the weight files."""
    bits_per_weight: NotNegative
    """8 * bytes / parameters."""
    schemes: dict[str, Count] = {}
    """Number of matrices by grid, with the method that rounded them if known."""
    format: str | None = None
    """The format that holds them; None where nothing is quantized and in earlier reports."""


def _without_former_words(arithmetic: object) -> object:
    """Earlier reports said this of every model, also where nothing was stored as integers."""
    former = ", integers multiplied out to bf16"
    return arithmetic.removesuffix(former) if isinstance(arithmetic, str) else arithmetic


def _with_present_word(words: object) -> object:
    """Earlier reports call a sequence a window."""
    return words.replace("window", "sequence") if isinstance(words, str) else words


class Protocol(_Part):
    """Which tokens were scored, and how. Results of different protocols cannot be compared."""

    text: str
    """Name of the text."""
    text_sha256: str
    """SHA-256 of its documents and their boundaries."""
    samples: Count
    """Number of sequences, each run on its own."""
    length: Count
    """Tokens per sequence."""
    packed: bool = True
    """Whether sequences are cut from joined documents; else each is the beginning of one."""
    asked_length: Count | None = None
    """Tokens per sequence that were asked for, where the model has fewer positions; else None."""
    tokens_scored: Count
    """Number of tokens behind every figure."""
    scored: str
    """Which tokens of a sequence are scored."""
    bos: bool
    """Whether a sequence begins with a beginning-of-sequence token."""
    arithmetic: Annotated[str, BeforeValidator(_without_former_words)]
    """The dtype in which both models were run."""

    @property
    def sequences(self) -> str:
        """How the text was cut, in words."""
        words = f"{self.samples:,} sequences of {self.length:,} tokens"
        return words if self.packed else f"{words}, each the beginning of a document"

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_report(cls, content: object) -> object:
        """Earlier reports say windows."""
        if not isinstance(content, dict) or "windows" not in content:
            return content
        own = {"samples": content["windows"], "scored": _with_present_word(content.get("scored"))}
        return {key: value for key, value in content.items() if key != "windows"} | own


class Bootstrap(_Part):
    """How errors and intervals were found: by drawing clusters of tokens with replacement."""

    unit: Annotated[ClusterKind, BeforeValidator(_with_present_word)]
    """What is drawn: documents; sequences where the text has too few documents; blocks of 32
    consecutive tokens where there are too few sequences as well. Sequences and blocks are taken as
    independent."""
    clusters: Count
    """Number of clusters."""
    resamples: Annotated[int, Field(ge=2, le=10_000)]
    """Number of resamples."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Random seed."""
    method: str
    """How the interval is taken from the resamples."""


class Documents(_Part):
    """Sums over the scored tokens of each cluster (see `bootstrap`), in the order of the text.

    A bootstrap needs nothing else, so two reports can be compared document by document.
    """

    tokens: Annotated[tuple[TokenCount, ...], Field(min_length=1)]
    """Number of scored tokens."""
    nll: tuple[Sum, ...]
    """Negative log-likelihood of the true tokens under the quantized model, in nats."""
    nll_reference: tuple[Sum, ...]
    """The same under the reference."""
    kld: tuple[Sum, ...]
    """KL divergence, in nats."""
    same_top: tuple[Count, ...]
    """Number of tokens for which both models rank the same token first."""

    @model_validator(mode="after")
    def _same_length(self) -> "Documents":
        if len({len(getattr(self, name)) for name in type(self).model_fields}) > 1:
            raise ValueError("the columns have different lengths")
        if not all(self.tokens):
            raise ValueError("a cluster without tokens")
        return self


class Perplexity(_Part):
    """exp of the mean negative log-likelihood; both models on the same tokens."""

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
    """Pearson correlation over tokens of both models' negative log-likelihoods."""


class Spread(_Part):
    """The distribution of a figure over tokens.

    Names are llama.cpp's; `99.0%` is the value below which 99 % of the tokens lie.
    """

    mean: Estimate
    """Mean over tokens."""
    maximum: float
    """The largest value."""
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
    """The smallest value."""

    @classmethod
    def quantiles(cls) -> dict[str, float]:
        """Names of the quantiles, such as 99.9%, and their shares of tokens."""
        names = (field.alias for field in cls.model_fields.values())
        return {name: float(name[:-1]) / 100 for name in names if name}


class Divergence(Spread):
    """KL(reference || quantized) of the next-token distributions, over tokens, in nats.

    Computed in float64 over the whole vocabulary. Names are llama.cpp's; `99.0%` is the value below
    which 99 % of the tokens lie.
    """


class DeltaP(Spread):
    """Probability of the true token, quantized minus reference, as a fraction, over tokens."""

    rms: Estimate
    """Root mean square over tokens."""
    q75_0: float = _below("75.0%")
    q25_0: float = _below("25.0%")


class NoiseFloor(_Part):
    """The figures where nothing differs: the reference against itself."""

    mean_kld: float
    """Mean KL divergence, in nats."""
    perplexity_ratio: NotNegative
    """Ratio of the perplexities of both runs."""
    same_top_p: Share
    """Share of tokens for which both runs rank the same token first."""
    how: str
    """What was repeated, and what was different the second time."""
    note: str | None = None
    """What to do about a floor that is too high for what was measured; None if it is not."""


class RouterAgreement(_Part):
    """Shares of tokens for which two routers choose the same experts; None in a dense layer."""

    router_top1: Share | None = None
    """Share of tokens with the same first expert (the one with the largest gate)."""
    router_top2_set: Share | None = None
    """Share of tokens with the same first two experts, in any order."""
    router_set: Share | None = None
    """Share of tokens with the same set of experts."""


class Forced(RouterAgreement):
    """One layer on the reference's own hidden states (teacher-forced): the error of this layer
    alone.

    Routers are not quantized, so a different choice of experts here comes from the attention of
    this layer.
    """

    tokens: Count
    """Number of tokens measured, those of the first sequences."""
    block_error: NotNegative
    """||h_q - h|| / ||h|| of the layer's output h [tokens, hidden]."""
    attention_error: NotNegative
    """The same of the output of the attention's last matrix."""
    experts_error: NotNegative | None = None
    """The same of the combined output of the routed experts, given the reference's inputs, routes
    and gates."""
    damage: tuple[Share, ...] = ()
    """Share of the damage by expert: D_e / sum D, where D_e = sum ||g (y_q - y)||^2 over the
    tokens routed to expert e with gate g. Sums to 1, or is 0 throughout if there is no damage."""

    @model_validator(mode="after")
    def _whole(self) -> "Forced":
        if any(self.damage) and abs(sum(self.damage) - 1) > 1e-6:
            raise ValueError("the shares of the damage do not add up to 1")
        return self


class Layer(RouterAgreement):
    """One layer of both models, each on its own path, so errors of earlier layers are included. A
    dense layer has no router and no experts."""

    layer: Count
    """Layer number, from 0."""
    relative_error: NotNegative
    """||h_q - h|| / ||h|| of the layer's output h [tokens, hidden]."""
    tokens_per_expert: tuple[Count, ...] = ()
    """Number of tokens that the quantized model's router sends to each expert."""
    reference_tokens_per_expert: tuple[Count, ...] = ()
    """The same of the reference."""
    load_shift: Share | None = None
    """Smallest share of the routed tokens that would have to change their expert to restore the
    reference's loads: sum |load - reference load| / (2 * routed tokens)."""
    forced: Forced | None = None
    """The layer alone; None if not measured."""

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
    """A group of scored tokens."""

    tokens: Count
    """Number of tokens."""
    mean_kld: float | None = None
    """Mean KL divergence in nats; None if the group is empty."""
    share_of_kld: float | None = None
    """Share of the KL divergence summed over all tokens; None if that sum is 0."""


class FirstChange(TokenGroup):
    """Tokens whose routing changes in this layer and in no earlier one."""

    layer: Count
    """Layer number, from 0."""


class Routing(_Part):
    """KL divergence of tokens with and without a change of routing, on the quantized model's own
    path.

    The routing of a token has changed where its set of experts differs from the reference's.
    """

    unchanged: TokenGroup
    """Tokens with the same experts in every layer."""
    changed: TokenGroup
    """Tokens with other experts in some layer."""
    first_change: tuple[FirstChange, ...] = ()
    """`changed` by the first layer with other experts, one row per layer with experts."""


class UnitRow(_Part):
    """A row of the quantization report: one matrix."""

    name: str
    """Name of the matrix, as in recipes."""
    layer: Count | None = None
    """Its layer, from 0; None in reports of earlier versions."""
    expert: Count | None = None
    """The expert that it belongs to, from 0; None outside the experts."""
    method: str
    """The method that rounded it."""
    scheme: str
    """Its grid."""
    bits_per_weight: NotNegative
    """Stored bits per weight."""
    relative_error: NotNegative
    """||W_q - W|| / ||W||."""
    output_error: NotNegative | None = None
    """Relative error of its outputs on the calibration tokens; None without calibration."""
    held_out_error: NotNegative | None = None
    """The same on calibration tokens that its rounding has not seen; None if there are none."""
    tokens: Count | None = None
    """Number of calibration tokens that reached it."""
    fallback: str | None = None
    """Why it was not rounded as planned; None if it was."""


class PairedAccuracy(_Part):
    """Accuracy of both models on the same items, and the answers that flipped."""

    items: Count
    """Number of items."""
    reference: Share
    """Accuracy of the reference."""
    quantized: Share
    """Accuracy of the quantized model."""
    difference: Estimate
    """quantized - reference, with items resampled in pairs."""
    lost: Count
    """Items that only the reference gets right."""
    gained: Count
    """Items that only the quantized model gets right."""
    p_value: Share
    """McNemar's exact test, two-sided: the probability of flips at least as one-sided as these if
    both directions were equally likely."""


class TaskValue(_Part):
    """A metric of one model."""

    value: float
    """As computed by lm-eval."""
    error: NotNegative | None = None
    """Its standard error over items; None if the metric is not a mean of one number per item."""


class TaskMetric(_Part):
    """One of lm-eval's metrics for both models, on the same items."""

    metric: str
    """Its name, such as acc."""
    filter: str
    """The filter that answers passed through."""
    higher_is_better: bool | None
    """As declared by lm-eval; None if it declares nothing."""
    items: Count
    """Number of items."""
    quantized: TaskValue
    """Of the quantized model."""
    reference: TaskValue
    """Of the reference."""
    paired: PairedAccuracy | None = None
    """Item against item; None if items are not right or wrong."""


class Task(_Part):
    """A task of lm-eval."""

    name: str
    """Its name in lm-eval."""
    version: str
    """Its version, as declared by the task."""
    fewshot: Count
    """Number of examples before each question."""
    items: Count
    """Number of questions."""
    sha256: str
    """SHA-256 of its documents, prompts and targets."""
    metrics: tuple[TaskMetric, ...]
    """Its metrics."""


class Tasks(_Part):
    """Tasks of the lm-eval harness, and the settings that their results depend on."""

    lm_eval: str
    """Version of the harness."""
    max_length: Count
    """Maximum number of tokens per row."""
    prefix_token: Count
    """The token placed before texts without a context."""
    tasks: tuple[Task, ...]
    """The tasks, in the order of the suite."""


class TextFigures(_Part):
    """Figures of both models on one text."""

    protocol: Protocol
    """Which tokens were scored, and how."""
    bootstrap: Bootstrap
    """How errors and intervals were found."""
    perplexity: Perplexity
    """How well both models predict the text."""
    kld: Divergence
    """How far apart the predicted distributions are."""
    delta_p: DeltaP
    """How the probability of the true token changes."""
    same_top_p: Estimate
    """Share of tokens for which both models rank the same token first."""
    documents: Documents
    """Sums by document."""

    @model_validator(mode="after")
    def _can_be_resampled(self) -> "TextFigures":
        if self.bootstrap.resamples * len(self.documents.tokens) > _MOST_DRAWS:
            raise ValueError(f"more than {_MOST_DRAWS} draws in the bootstrap")
        return self


class Gate(_Part):
    """A threshold of a suite, and the value held against it."""

    threshold: str
    """Its key in the suite."""
    where: str
    """The text, layer or task with the worst value."""
    value: float
    """The worst value."""
    limit: float
    """The limit set by the suite."""
    met: bool
    """Whether the value is within the limit."""


class SuiteResult(_Part):
    """The suite that was run, and the outcome of its thresholds."""

    name: str
    """The suite's name or file, as given."""
    gates: tuple[Gate, ...] = ()
    """Its thresholds."""


class NextToken(_Part):
    """A token of the text, and what each model ranks first in its place after the same text."""

    text: str
    """The true token."""
    reference: str
    """The token that the reference ranks first."""
    reference_p: Share
    """Its probability there."""
    quantized: str
    """The token that the quantized model ranks first."""
    quantized_p: Share
    """Its probability there."""


class Generated(_Part):
    """What both models write after the text before a passage, always the likeliest token: a token
    that differs changes all that come after it."""

    reference: tuple[str, ...]
    """The tokens of the reference, in order."""
    quantized: tuple[str, ...]
    """The tokens of the quantized model, in order."""
    same: Count
    """How many of the first tokens are the same in both."""

    @model_validator(mode="after")
    def _within(self) -> "Generated":
        if self.same > min(len(self.reference), len(self.quantized)):
            raise ValueError("more tokens are the same than there are")
        return self


class Passage(_Part):
    """The end of the first sequence. Both models read the true text before each of its `tokens`, so
    these are not generated text: a token that differs does not change those after it."""

    before: str
    """The text before it."""
    tokens: tuple[NextToken, ...]
    """Its tokens, in order."""
    generated: Generated | None = None
    """What both models write in its place; None if they were too large, and in earlier reports."""
    not_generated: str | None = None
    """Why they have written nothing; None if they have, and in earlier reports."""


class ReportHeader(_Part):
    """The two models, and the program that compared them."""

    schema_name: Literal["grokquant.evaluation/2"] = Field(default=SCHEMA, alias="schema")
    """Version of this schema."""
    reference_note: str | None = None
    """Why the reference is, or may be, another model than the source; absent if it is the source or
    one like it."""
    grokquant: str
    """Version of the program."""
    quantized: ComparedModel
    """The quantized model."""
    reference: ComparedModel
    """The model that it is compared with."""


class Report(TextFigures, ReportHeader):
    """The whole report, with the figures of the first text. It holds no time, so equal runs give
    equal bytes."""

    noise_floor: NoiseFloor
    """The figures where nothing differs."""
    routing: Routing | None = None
    """How changes of routing relate to the KL divergence; None for a dense model."""
    layers: tuple[Layer, ...] = ()
    """All layers, in order."""
    units: tuple[UnitRow, ...] = ()
    """All matrices of the quantization report; empty for a checkpoint of another tool."""
    further_texts: tuple[TextFigures, ...] = ()
    """The texts of a suite after the first."""
    tasks: Tasks | None = None
    """The tasks of a suite, if any."""
    suite: SuiteResult | None = None
    """The outcome of a suite; None if none was run."""
    passage: Passage | None = None
    """What both models would say next, along a passage of the first text."""
    made_from: dict[str, Any] | None = None
    """What determines these figures, so that they need not be computed again: checksums of models
    and texts, the suite, versions. `grokquant eval` fills it in."""

    def __repr__(self) -> str:
        models = one_line(f"{self.quantized.path} against {self.reference.path}")
        return f"<Report {models}: mean KLD {self.kld.mean.value:.4g}>"

    __str__ = __repr__

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`, in the order of the fields.

        Keys that only a suite, a command or another reference fills are left out where empty.
        """
        content = self.model_dump(mode="json", by_alias=True)
        extra = ("reference_note", "further_texts", "tasks", "suite", "passage", "made_from")
        return {key: value for key, value in content.items() if value or key not in extra}


def read_report(path: Path) -> Report:
    """Reads a report from `report.json` or the directory that holds it. Raises InputError."""
    path = path / JSON_NAME if path.is_dir() else path
    return parse_report(read_json_object(path), str(path))


def parse_report(content: object, origin: str) -> Report:
    """A report from parsed JSON. Raises InputError naming `origin` and the first bad key."""
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
