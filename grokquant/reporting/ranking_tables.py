"""A ranking for the terminal and as Markdown: one table of metrics, one of routing by layer."""

from collections.abc import Iterator

from rich.table import Table

from grokquant.escaping import markdown_text
from grokquant.humanize import number, percent, unbroken_size
from grokquant.reporting.ranking import RankedModel, Ranking, Standing
from grokquant.reporting.rows import markdown_row, name_of
from grokquant.reporting.suite_tables import with_error

# Heads of the columns, by whether numbers stand below.
_HEADS = {
    "Model": False,
    "Rank": True,
    "Bits per weight": True,
    "Size": True,
    "Mean KLD, nats": True,
    "PPL(Q)/PPL(base)": True,
    "Same top p": True,
    "Pareto (KLD)": False,
    "Pareto (PPL)": False,
    "Grid (method)": False,
    "Format": False,
}
_ROUTING = "Tokens routed to the same experts as in the reference"


def terminal_tables(ranking: Ranking) -> list[Table]:
    """For a rich console."""
    metrics = Table(caption=_basis(ranking), title_justify="left", caption_justify="left")
    for head, numeric in _HEADS.items():
        metrics.add_column(head, justify="right" if numeric else "left")
    for model in ranking.models:
        metrics.add_row(*_cells(model))
    routing = list(_routing_cells(ranking))
    if not routing:
        return [metrics]
    layers = Table(caption=f"{_ROUTING}, by layer")
    layers.add_column("Layer", justify="right")
    for model in ranking.models:
        layers.add_column(model.name, justify="right")
    for cells in routing:
        layers.add_row(*cells)
    return [metrics, layers]


def markdown(ranking: Ranking) -> str:
    """The same as text for a README or an issue."""
    lines = [
        markdown_row(_HEADS),
        _alignment(list(_HEADS.values())),
        *(markdown_row(_cells(model)) for model in ranking.models),
        "",
        markdown_text(_basis(ranking)),
    ]
    routing = list(_routing_cells(ranking))
    if routing:
        names = [model.name for model in ranking.models]
        heads = markdown_row(["Layer", *names])
        aligned = _alignment([True] * (len(names) + 1))
        lines += ["", f"{_ROUTING}:", "", heads, aligned, *map(markdown_row, routing)]
    return "\n".join([*lines, ""])


def _alignment(numeric: list[bool]) -> str:
    return "|".join(("", *("--:" if right else ":--" for right in numeric), ""))


def _cells(model: RankedModel) -> tuple[str, ...]:
    report = model.report
    return (
        model.name,
        str(model.rank),
        f"{model.bits_per_weight:.3f}",
        unbroken_size(report.quantized.bytes),
        with_error(report.kld.mean),
        with_error(report.perplexity.ratio),
        percent(report.same_top_p.value, 4),
        _standing_words(model.kld),
        _standing_words(model.perplexity),
        model.grid,
        model.format,
    )


def _standing_words(standing: Standing) -> str:
    return f"behind {standing.beaten_by}" if standing.status == "behind" else standing.status


def _routing_cells(ranking: Ranking) -> Iterator[tuple[str, ...]]:
    """A row for each layer with a router: its number, then each model's share of tokens."""
    for layers in zip(*(model.report.layers for model in ranking.models), strict=True):
        shares = [layer.router_set for layer in layers]
        if any(share is not None for share in shares):
            shown = ("–" if share is None else percent(share, 4) for share in shares)
            yield (str(layers[0].layer), *shown)


def _basis(ranking: Ranking) -> str:
    report = ranking.report
    protocol = report.protocol
    bootstrap = report.bootstrap
    return (
        f"{protocol.tokens_scored:,} tokens of {protocol.text}, {protocol.sequences}; "
        f"reference: {name_of(report.reference)}; ± is one standard error, "
        f"from {bootstrap.clusters:,} {bootstrap.unit}s; models that share a rank do not differ "
        f"significantly; noise floor of the KLD: {number(report.noise_floor.mean_kld)}"
    )
