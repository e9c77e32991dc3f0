"""Charts of a quantization report: errors and calibration tokens by layer and expert."""

from grokquant.humanize import NBSP, percent, tick_percent
from grokquant.reporting.html.charts import BLUES, bar_chart, heat_map
from grokquant.reporting.html.markup import figure
from grokquant.reporting.html.svg import Mark
from grokquant.reporting.quantization import QuantizationReport, mean_error


def error_by_layer(report: QuantizationReport) -> str:
    """The mean error of the matrices of each layer: of their outputs, else of their weights."""
    layers = report.by_layer()
    calibrated = any(row.output_error is not None for row in report.units)
    field = "output_error" if calibrated else "relative_error"
    errors = [mean_error(rows, field) for rows in layers.values()]
    marks = [None if error is None else Mark(error) for error in errors]
    if not any(marks):
        return ""
    what = "outputs on the calibration tokens" if calibrated else "weights"
    title = "Output error of each layer" if calibrated else "Weight error of each layer"
    return figure(
        title,
        f"Relative error of the {what}, averaged over the layer’s matrices. Lower is better.",
        bar_chart(title, marks, percent, tick_percent, "layer", list(layers)),
    )


def calibration_load(report: QuantizationReport) -> str:
    """The calibration tokens of each expert; nothing without calibration or experts."""
    counts = report.tokens_per_expert
    if not any(len(layer) > 1 for layer in counts):
        return ""
    columns = [[_load(tokens, sum(layer)) for tokens in layer] for layer in counts]
    fewest = min(tokens for layer in counts for tokens in layer)
    return figure(
        "Calibration tokens of each expert",
        "Share of a layer’s routed calibration tokens that go to each expert. Fewest: "
        f"{fewest:,} tokens.",
        heat_map("Share of calibration tokens by layer and expert", columns, _share, BLUES),
    )


def _load(tokens: int, total: int) -> Mark:
    return Mark(tokens / max(total, 1), note=f", {tokens:,} tokens")


def _share(share: float) -> str:
    return f"{share * 100:.1f}{NBSP}%"
