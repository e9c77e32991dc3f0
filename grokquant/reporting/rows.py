"""The metrics of a report as rows: the one source of terminal, model card and page.

A row knows its value with the JSON pointer of it, its unit, which way is better and what it means.
Names are llama.cpp's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from grokquant.escaping import markdown_text
from grokquant.evaluation.report import ComparedModel, Estimate, Report
from grokquant.humanize import NBSP, number, rough, unbroken_size, with_unit
from grokquant.reporting.json_pointer import Datum, value_at

LOWER = "↓ lower"
HIGHER = "↑ higher"
NEAR_ONE = "→ near 1"
NEAR_ZERO = "→ near 0"

# Percentiles of tokens, largest first, as `report.json` calls them.
QUANTILES = (
    "maximum", "99.9%", "99.0%", "95.0%", "90.0%", "75.0%", "median",
    "25.0%", "10.0%", "5.0%", "1.0%", "0.1%", "minimum",
)  # fmt: skip
# llama.cpp prints no quartiles of the KLD.
KLD_QUANTILES = tuple(name for name in QUANTILES if name not in ("75.0%", "25.0%"))

# What `schemes` of a report calls matrices that are stored as floats.
_FLOATS = {"bfloat16", "float16", "float32", "float64"}
_UNITS = {
    "document": ("document", "documents"),
    "sequence": ("sequence", "sequences"),
    "block": ("block of 32 tokens", "blocks of 32 tokens"),
}


@dataclass(frozen=True)
class Row:
    """One metric. `pointer` is the JSON pointer of `value`, or empty if the value is computed.

    `unit` is "", "nats" or "%"; a value in percent is still a fraction here. `better` is empty if
    no direction is better. `noise` is the noise floor: what the metric reads for no change at all.
    """

    block: str
    name: str
    pointer: str
    value: float
    unit: str
    better: str
    words: str
    estimate: Estimate | None = None
    noise: float | None = None

    @property
    def shown(self) -> str:
        return with_unit(self.bare(self.value), self.unit)

    @property
    def shown_error(self) -> str:
        """The standard error to two digits, without the unit; empty where there is none."""
        if self.estimate is None:
            return ""
        error = self.estimate.error * self.scale
        return number(error, error)

    @property
    def shown_interval(self) -> str:
        """Both ends of the 95 % interval, without the unit; empty where there is none."""
        if self.estimate is None:
            return ""
        return f"{self.bare(self.estimate.low)} to {self.bare(self.estimate.high)}"

    @property
    def shown_noise(self) -> str:
        return "" if self.noise is None else number(self.noise * self.scale)

    @property
    def scale(self) -> int:
        """What turns a value into the number shown."""
        return 100 if self.unit == "%" else 1

    def part(self, name: str) -> Datum:
        """A part of the estimate: "error", "low", "high" or "token_error"."""
        return Datum(getattr(self.estimate, name), self.pointer.removesuffix("value") + name)

    def bare(self, value: float) -> str:
        """A value of this metric, as exact as its error allows, without the unit."""
        error = self.estimate.error if self.estimate else 0.0
        return number(value * self.scale, error * self.scale)


@dataclass(frozen=True)
class _Metric:
    """A row before its report is known: `pointer` leads to an estimate or to a number."""

    block: str
    name: str
    pointer: str
    unit: str
    better: str
    words: str
    noise: str = ""  # pointer of its noise floor

    def row(self, report: Report) -> Row:
        found = value_at(report, self.pointer)
        estimate = found if isinstance(found, Estimate) else None
        return Row(
            block=self.block,
            name=self.name,
            pointer=f"{self.pointer}/value" if estimate else self.pointer,
            value=estimate.value if estimate else found,
            unit=self.unit,
            better=self.better,
            words=self.words,
            estimate=estimate,
            noise=value_at(report, self.noise) if self.noise else None,
        )


_METRICS = (
    _Metric(
        "Perplexity", "Mean PPL(Q)", "/perplexity/quantized", "", LOWER,
        "Quantized model: effective number of equally likely next tokens.",
    ),
    _Metric(
        "Perplexity", "Mean PPL(base)", "/perplexity/reference", "", "",
        "Reference model, on the same tokens.",
    ),
    _Metric(
        "Perplexity", "Mean PPL(Q)/PPL(base)", "/perplexity/ratio", "", NEAR_ONE,
        "Quantized over reference, on the same tokens; 1.01 is one percent worse.",
        "/noise_floor/perplexity_ratio",
    ),
    _Metric(
        "Perplexity", "Mean ln(PPL(Q)/PPL(base))", "/perplexity/ln_ratio", "", NEAR_ZERO,
        "Logarithm of the ratio: nats lost per token.",
    ),
    _Metric(
        "Perplexity", "Mean PPL(Q)-PPL(base)", "/perplexity/difference", "", NEAR_ZERO,
        "Difference of the two perplexities.",
    ),
    _Metric(
        "Perplexity", "Cor(ln(PPL(Q)), ln(PPL(base)))", "/perplexity/correlation", "", NEAR_ONE,
        "Whether both models find the same tokens hard.",
    ),
    _Metric(
        "KL divergence", "Mean KLD", "/kld/mean", "nats", LOWER,
        "How far the predicted distribution moves, averaged over tokens; 0 means identical.",
        "/noise_floor/mean_kld",
    ),
    _Metric(
        "KL divergence", "Median KLD", "/kld/median", "nats", LOWER,
        "Half of the tokens are below this.",
    ),
    _Metric(
        "KL divergence", "99.0% KLD", "/kld/99.0%", "nats", LOWER,
        "One token in a hundred is above this.",
    ),
    _Metric(
        "KL divergence", "99.9% KLD", "/kld/99.9%", "nats", LOWER,
        "One token in a thousand is above this.",
    ),
    _Metric(
        "KL divergence", "Maximum KLD", "/kld/maximum", "nats", LOWER,
        "The single worst token.",
    ),
    _Metric(
        "Tokens", "Same top p", "/same_top_p", "%", HIGHER,
        "Top-1 agreement: how often both models rank the same token first.",
        "/noise_floor/same_top_p",
    ),
    _Metric(
        "Tokens", "Mean Δp", "/delta_p/mean", "%", NEAR_ZERO,
        "Average change in the probability of the true token, in percentage points.",
    ),
    _Metric(
        "Tokens", "RMS Δp", "/delta_p/rms", "%", LOWER,
        "Typical size of that change, up or down, in percentage points.",
    ),
)  # fmt: skip


def rows(report: Report) -> list[Row]:
    """The metrics a reader looks at first; those that an older report lacks are left out."""
    measured = (metric for metric in _METRICS if value_at(report, metric.pointer) is not None)
    return [*(metric.row(report) for metric in measured), *_router_rows(report)]


def noise_rows(report: Report) -> list[Row]:
    """What three of the metrics read for no change at all."""
    block = "Noise floor"
    words = f"Measured with {report.noise_floor.how}. Smaller differences are not meaningful."
    floors = (
        _Metric(block, "PPL ratio, noise floor", "/noise_floor/perplexity_ratio", "", "", words),
        _Metric(block, "Mean KLD, noise floor", "/noise_floor/mean_kld", "nats", "", ""),
        _Metric(block, "Same top p, noise floor", "/noise_floor/same_top_p", "%", "", ""),
    )
    return [floor.row(report) for floor in floors]


def _router_rows(report: Report) -> Iterator[Row]:
    """Agreement of the routers: mean and worst layer; nothing for a dense model."""
    agreements = [
        (layer.router_set, i)
        for i, layer in enumerate(report.layers)
        if layer.routed and layer.router_set is not None
    ]
    if not agreements:
        return
    _, worst = min(agreements)
    yield Row(
        block="Routers",
        name="Same experts, mean",
        pointer="",
        value=sum(share for share, _ in agreements) / len(agreements),
        unit="%",
        better=HIGHER,
        words="How often a layer routes a token to exactly the same experts as the reference, "
        "averaged over layers.",
    )
    yield _Metric(
        "Routers", "Same experts, worst layer", f"/layers/{worst}/router_set", "%", HIGHER,
        f"The same for the layer that agrees least: layer {report.layers[worst].layer}.",
    ).row(report)  # fmt: skip


def notes(report: Report) -> list[str]:
    """What a reader must know before any figure: it comes first, wherever the report is shown."""
    first = [note for note in (report.reference_note, report.noise_floor.note) if note]
    protocols = (text.protocol for text in (report, *report.further_texts))
    cut = (
        f"Sequences of {protocol.text} have {protocol.length:,} tokens and not the "
        f"{protocol.asked_length:,} asked for: the model has no more positions."
        for protocol in protocols
        if protocol.asked_length
    )
    return [*first, *dict.fromkeys(cut)]


def terminal_table(report: Report) -> Table:
    """The metrics for a rich console."""
    title = f"{name_of(report.quantized)} against {name_of(report.reference)}"
    table = Table(title=title, caption=_basis(report), title_justify="left")
    table.add_column("Metric")
    table.add_column("Value", justify="right", no_wrap=True)
    table.add_column("±", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right")
    table.add_column(Text("Noise\nfloor"), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)  # which way is better, an arrow
    block = ""
    for row in rows(report):
        if block and row.block != block:
            table.add_section()
        shown = (row.shown, row.shown_error, row.shown_interval, row.shown_noise)
        table.add_row(row.name, *shown, row.better[:1])
        block = row.block
    table.add_section()
    bits = f"{report.quantized.bits_per_weight:.2f}"
    table.add_row("Bits per weight", bits, "", "", "", LOWER[:1])
    table.add_row("Size", unbroken_size(report.quantized.bytes), "", "", "", LOWER[:1])
    return table


def markdown_table(report: Report) -> str:
    """The metrics for a model card, with the protocol below."""
    model = report.quantized
    metrics = [
        (row.name, row.shown, row.shown_error, row.shown_interval, row.shown_noise, row.better)
        for row in rows(report)
    ]
    lines = [
        *(line for note in notes(report) for line in (markdown_text(note), "")),
        "| Metric | Value | ± | 95 % interval | Noise floor | Better |",
        "|:--|--:|--:|--:|--:|:--|",
        *map(markdown_row, metrics),
        markdown_row(("Bits per weight", f"{model.bits_per_weight:.2f}", "", "", "", LOWER)),
        markdown_row(("Size", unbroken_size(model.bytes), "", "", "", LOWER)),
        "",
        markdown_text(f"{_basis(report)}."),
        "",
    ]
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Two sentences: what was lost, what was gained."""
    model = report.quantized
    return (
        f"{_perplexity_words(report.perplexity.ratio)}, the mean KL divergence is "
        f"{rough(report.kld.mean.value)}{NBSP}nats, and both models agree on the top token "
        f"{report.same_top_p.value * 100:.1f}{NBSP}% of the time. "
        f"{model.bits_per_weight:.2f} bits per weight: {unbroken_size(model.bytes)} instead of "
        f"{unbroken_size(bf16_bytes(model))} in bf16."
    )


def _perplexity_words(ratio: Estimate) -> str:
    if ratio.value == 1:
        return "Perplexity is unchanged"
    verb = "rises" if ratio.value > 1 else "falls"
    ends = (ratio.low, ratio.high) if ratio.value > 1 else (ratio.high, ratio.low)
    value, low, high = (_change(end, ratio) for end in (ratio.value, *ends))
    doubt = ": not distinguishable from zero" if ratio.low <= 1 <= ratio.high else ""
    interval = f"95{NBSP}% confidence interval {low} to {high}{NBSP}%{doubt}"
    return f"Perplexity {verb} by {value}{NBSP}% ({interval})"


def _change(end: float, ratio: Estimate) -> str:
    """How far `end` is from 1 in percent, in the direction of the ratio itself."""
    change = (end - 1) * 100
    return number(change if ratio.value > 1 else -change, ratio.error * 100)


def errors_words(report: Report) -> str:
    """Where errors and intervals come from, in two sentences."""
    bootstrap = report.bootstrap
    singular, plural = _UNITS[bootstrap.unit]
    unit = singular if bootstrap.clusters == 1 else plural
    return (
        f"± is one standard error. Standard errors and 95{NBSP}% confidence intervals come from a "
        f"paired bootstrap over {bootstrap.clusters:,} {unit} "
        f"({bootstrap.resamples:,} resamples)."
    )


def _basis(report: Report) -> str:
    protocol = report.protocol
    bootstrap = report.bootstrap
    dequantized = ", dequantized" if stored_quantized(report.reference) else ""
    return (
        f"{protocol.tokens_scored:,} tokens of {protocol.text}, {protocol.sequences}; reference: "
        f"{name_of(report.reference)}{dequantized}; {protocol.arithmetic}; ± is one standard "
        f"error; errors and 95 % intervals from a paired bootstrap over {bootstrap.clusters:,} "
        f"{bootstrap.unit}s; noise floor: {report.noise_floor.how}"
    )


def name_of(checkpoint: ComparedModel) -> str:
    """The last part of the path that names something."""
    parts = [part for part in checkpoint.path.replace("\\", "/").split("/") if part]
    return parts[-1] if parts else checkpoint.path


def bf16_bytes(checkpoint: ComparedModel) -> int:
    return 2 * checkpoint.parameters


def stored_quantized(checkpoint: ComparedModel) -> bool:
    return not _FLOATS.issuperset(checkpoint.schemes)


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"
