"""The rows that every form of the report shares, in llama.cpp's words, and the two plain tables.

`rows` carries for each number its place in `report.json`, its unit, which way is better and what
it means; the terminal, the model card and the page only set them differently.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor, log10

from rich.markup import escape
from rich.table import Table

from grokquant import humanize
from grokquant.evaluation.report import ComparedModel, Estimate, Report

LOWER, HIGHER = "↓ lower", "↑ higher"
NEAR_ONE, NEAR_ZERO = "→ near 1", "→ near 0"

# Keeps a number and its unit on one line.
NBSP = "\u00a0"
_UNITS = {
    "document": ("document", "documents"),
    "window": ("window", "windows"),
    "block": ("block of 32 tokens", "blocks of 32 tokens"),
}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Row:
    """One metric. `path` is the JSON pointer of its value, `unit` "", "nats" or "%"; a value in
    percent is still a fraction here. `better` may be empty: a number that is nobody's goal.
    `noise` is what the metric reads for no change at all."""

    block: str
    name: str
    path: str
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
        error = self.estimate.error * self._scale if self.estimate else 0
        return number(error, error) if self.estimate else ""

    @property
    def shown_interval(self) -> str:
        """Both ends of the 95 % interval, without the unit; empty where there is none."""
        ends = (self.estimate.low, self.estimate.high) if self.estimate else ()
        return " to ".join(map(self.bare, ends))

    @property
    def shown_noise(self) -> str:
        return "" if self.noise is None else number(self.noise * self._scale)

    def bare(self, value: float) -> str:
        """A value of this metric, as exact as its error allows, without the unit."""
        error = self.estimate.error if self.estimate else 0
        return number(value * self._scale, error * self._scale)

    @property
    def _scale(self) -> int:
        return 100 if self.unit == "%" else 1


def rows(report: Report) -> list[Row]:
    """The metrics a reader looks at first; `quantile_rows` has the rest."""
    return [
        *_perplexity_rows(report),
        *_kld_rows(report),
        *_token_rows(report),
        *_router_rows(report),
    ]


def noise_rows(report: Report) -> list[Row]:
    """What three of the metrics read where nothing differs."""
    noise, block = report.noise_floor, "Noise floor"
    floors = (
        ("PPL ratio, no change", "perplexity_ratio", noise.perplexity_ratio, ""),
        ("Mean KLD, no change", "mean_kld", noise.mean_kld, "nats"),
        ("Same top p, no change", "same_top_p", noise.same_top_p, "%"),
    )
    words = f"Measured on {noise.how}. Smaller differences mean nothing."
    return [
        Row(block, name, f"/noise_floor/{key}", value, unit, "", words * (i == 0))
        for i, (name, key, value, unit) in enumerate(floors)
    ]


def _perplexity_rows(report: Report) -> Iterator[Row]:
    ppl = report.perplexity

    noise = {"ratio": report.noise_floor.perplexity_ratio}

    def row(name: str, key: str, estimate: Estimate, better: str, words: str) -> Row:
        path, value = f"/perplexity/{key}/value", estimate.value
        return Row("Perplexity", name, path, value, "", better, words, estimate, noise.get(key))

    yield row(
        "Mean PPL(Q)", "quantized", ppl.quantized, LOWER,
        "Of the quantized model: between how many equally likely tokens it hesitates on average.",
    )  # fmt: skip
    yield row("Mean PPL(base)", "reference", ppl.reference, "", "The same of the reference.")
    yield row(
        "Mean PPL(Q)/PPL(base)", "ratio", ppl.ratio, NEAR_ONE,
        "Quantized over reference on the same tokens; 1.01 is one percent worse.",
    )  # fmt: skip
    yield row(
        "Mean ln(PPL(Q)/PPL(base))", "ln_ratio", ppl.ln_ratio, NEAR_ZERO,
        "Nats lost per token: the logarithm of the ratio.",
    )  # fmt: skip
    yield row(
        "Mean PPL(Q)-PPL(base)", "difference", ppl.difference, NEAR_ZERO,
        "The difference of the two perplexities.",
    )  # fmt: skip
    yield Row(
        "Perplexity", "Cor(ln(PPL(Q)), ln(PPL(base)))", "/perplexity/correlation",
        ppl.correlation, "", NEAR_ONE,
        "Whether both models find the same tokens hard.",
    )  # fmt: skip


def _kld_rows(report: Report) -> Iterator[Row]:
    kld = report.kld

    def row(name: str, key: str, value: float, words: str) -> Row:
        return Row("KL divergence", name, f"/kld/{key}", value, "nats", LOWER, words)

    yield Row(
        "KL divergence", "Mean KLD", "/kld/mean/value", kld.mean.value, "nats", LOWER,
        "How far the predicted distribution moves, averaged over tokens; 0 is identical.", kld.mean,
        report.noise_floor.mean_kld,
    )  # fmt: skip
    yield row("Median KLD", "median", kld.median, "Half of the tokens move less than this.")
    yield row("99.0% KLD", "99.0%", kld.q99_0, "One token in a hundred moves more than this.")
    yield row("99.9% KLD", "99.9%", kld.q99_9, "One token in a thousand moves more than this.")
    yield row("Maximum KLD", "maximum", kld.maximum, "The single worst token.")


def _token_rows(report: Report) -> Iterator[Row]:
    delta, top = report.delta_p, report.same_top_p

    def row(name: str, path: str, estimate: Estimate, better: str, words: str) -> Row:
        return Row("Tokens", name, path, estimate.value, "%", better, words, estimate)

    yield Row(
        "Tokens", "Same top p", "/same_top_p/value", top.value, "%", HIGHER,
        "How often both models rank the same token first: greedy decoding goes on unchanged.",
        top, report.noise_floor.same_top_p,
    )  # fmt: skip
    yield row(
        "Mean Δp", "/delta_p/mean/value", delta.mean, NEAR_ZERO,
        "Average change in the probability of the true token, in percentage points.",
    )  # fmt: skip
    yield row(
        "RMS Δp", "/delta_p/rms/value", delta.rms, LOWER,
        "Typical size of that change, up or down, in percentage points.",
    )  # fmt: skip


def _router_rows(report: Report) -> Iterator[Row]:
    """The layers in which the routers agree least; none in a dense model."""
    found = [(layer.router_set, i) for i, layer in enumerate(report.layers) if layer.routed]
    agreements = [(share, i) for share, i in found if share is not None]
    if not agreements:
        return
    share, least = min(agreements)
    mean = sum(share for share, _ in agreements) / len(agreements)
    block = "Routers"
    yield Row(
        block, "Same experts, mean", "", mean, "%", HIGHER,
        "How often a layer sends a token to exactly the experts that the reference chose, "
        "averaged over layers.",
    )  # fmt: skip
    yield Row(
        block, "Same experts, least", f"/layers/{least}/router_set", share, "%", HIGHER,
        f"The same in the layer where it is rarest: layer {report.layers[least].layer}.",
    )  # fmt: skip


_QUANTILES = (
    "maximum", "99.9%", "99.0%", "95.0%", "90.0%", "75.0%", "median",
    "25.0%", "10.0%", "5.0%", "1.0%", "0.1%", "minimum",
)  # fmt: skip


def quantile_rows(report: Report) -> list[tuple[str, float | None, float]]:
    """(name, KLD in nats or None where not taken, Δp as a fraction), largest first."""
    kld, delta = (part.model_dump(by_alias=True) for part in (report.kld, report.delta_p))
    return [(name, kld.get(name), delta[name]) for name in _QUANTILES]


def terminal_table(report: Report) -> Table:
    """The metrics for a rich console."""
    title = f"{name_of(report.quantized)} against {name_of(report.reference)}"
    table = Table(title=escape(title), caption=escape(_basis(report)), title_justify="left")
    table.add_column("Metric")
    table.add_column("Value", justify="right", no_wrap=True)
    table.add_column("±", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right")
    table.add_column("No change", justify="right", no_wrap=True)
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
    table.add_row("Size", size(report.quantized.bytes), "", "", "", LOWER[:1])
    return table


def markdown_table(report: Report) -> str:
    """The metrics for a model card, with the protocol below."""
    model = report.quantized
    lines = ["| Metric | Value | ± | 95 % interval | No change | Better |"]
    lines.append("|:--|--:|--:|--:|--:|:--|")
    lines += [
        f"| {markdown_cell(row.name)} | {row.shown} | {row.shown_error} | {row.shown_interval} "
        f"| {row.shown_noise} | {row.better} |"
        for row in rows(report)
    ]
    lines += [
        f"| Bits per weight | {model.bits_per_weight:.2f} | | | | {LOWER} |",
        f"| Size | {size(model.bytes)} | | | | {LOWER} |",
    ]
    return "\n".join([*lines, "", markdown_cell(f"{_basis(report)}."), ""])


def verdict(report: Report) -> str:
    """Two sentences in plain words: what was lost, what was gained."""
    kld, top, model = report.kld.mean.value, report.same_top_p.value, report.quantized
    return (
        f"{_perplexity_words(report.perplexity.ratio)}, the average token’s distribution moves by "
        f"{rough(kld)}{NBSP}nats, and {top * 100:.1f}{NBSP}% of top tokens stay the same. "
        f"{model.bits_per_weight:.2f} bits per weight: {size(model.bytes)} instead of "
        f"{size(bf16_bytes(model))} as bf16."
    )


def _perplexity_words(ratio: Estimate) -> str:
    if ratio.value == 1:
        return "Perplexity is the same"
    verb, sign = ("rises", 1) if ratio.value > 1 else ("falls", -1)
    value, low, high = (
        number(sign * (x - 1) * 100, ratio.error * 100) for x in (ratio.value, *_ends(ratio, sign))
    )
    doubt = ", so it may as well be none" if ratio.low <= 1 <= ratio.high else ""
    interval = f"95{NBSP}% interval {low} to {high}{NBSP}%{doubt}"
    return f"Perplexity {verb} by {value}{NBSP}% ({interval})"


def _ends(ratio: Estimate, sign: int) -> tuple[float, float]:
    return (ratio.low, ratio.high) if sign > 0 else (ratio.high, ratio.low)


def errors_words(report: Report) -> str:
    """Where errors and intervals come from, in a sentence."""
    drawn = report.bootstrap
    unit = _UNITS[drawn.unit][drawn.clusters != 1]
    return (
        f"± is one standard error; it and the 95{NBSP}% interval come from drawing the "
        f"{drawn.clusters:,} {unit} again {drawn.resamples:,} times."
    )


def _basis(report: Report) -> str:
    protocol, drawn = report.protocol, report.bootstrap
    return (
        f"{protocol.tokens_scored:,} tokens of {protocol.text}, "
        f"{protocol.windows:,} windows of {protocol.length:,}; reference: "
        f"{name_of(report.reference)} multiplied out; {protocol.arithmetic}; ± is a standard error "
        f"and intervals are of 95 %, both over {drawn.clusters:,} {drawn.unit}s drawn again; No "
        f"change: {report.noise_floor.how}"
    )


def name_of(checkpoint: ComparedModel) -> str:
    """The last part of the path that names something."""
    parts = [part for part in checkpoint.path.replace("\\", "/").split("/") if part]
    return parts[-1] if parts else checkpoint.path


def bf16_bytes(checkpoint: ComparedModel) -> int:
    return 2 * checkpoint.parameters


def number(value: float, error: float = 0.0) -> str:
    """A value to the second digit of its error, or to four digits where it has none."""
    value = value + 0.0  # no negative zero
    magnitude = error if error > 0 else abs(value)
    if magnitude == 0:
        return "0"
    digits = (1 if error > 0 else 3) - floor(log10(magnitude))
    if digits > 7:
        return _scientific(value)
    text = f"{value:.{max(digits, 0)}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(_SUPERSCRIPT)
    return f"{mantissa.replace('-', '−')}{NBSP}×{NBSP}10{power}"


def with_unit(text: str, unit: str) -> str:
    return f"{text}{NBSP}{unit}" if unit else text


def percent(share: float, digits: int = 2) -> str:
    """A fraction in percent with so many significant digits: 0.41 %, 12.5 %."""
    shown = share * 100
    if shown == 0:
        return f"0{NBSP}%"
    decimals = max(digits - 1 - floor(log10(abs(shown))), 0)
    text = f"{shown:.{decimals}f}" if decimals < 6 else _scientific(shown)
    return f"{text}{NBSP}%".replace("-", "−")


def rough(value: float) -> str:
    """Two significant digits, for sentences."""
    return number(value, abs(value))


def short(value: float) -> str:
    """For ticks: 0.001, 1, but 10⁻⁶ for a far power of ten."""
    if value and abs(value) < 1e-3:
        text = _scientific(value)
        return text.removeprefix(f"1.0{NBSP}×{NBSP}")
    return f"{value:.3g}"


def count(things: int) -> str:
    """7.7 million, 314 billion."""
    for word, factor in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if things >= factor:
            return f"{humanize.three_digits(things / factor)}{NBSP}{word}"
    return str(things)


def size(stored: int) -> str:
    """Bytes in decimal units, on one line: 4.10 MB, 158 GB."""
    return humanize.size(stored).replace(" ", NBSP)


def markdown_cell(text: str) -> str:
    """Text that neither ends a cell nor begins a tag."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
